from __future__ import annotations

import math
import pickle
import random
import sys
from collections import Counter

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from clip_pgs.data.text_masking import TEXT_MASKINGS, FrequencyMasking, create_text_masking
from clip_pgs.data.words import WordFrequencies, write_word_frequencies

CLIP = open_clip.SimpleTokenizer()
START, END = CLIP.sot_token_id, CLIP.eot_token_id
CAPTIONS = [
    "a small brown dog and a white cat run over the wet grass of an old park in the evening",
    "a red bicycle",
]
OPENCLIP_NAMES = {"block": "simple", "random": "random", "shuffle": "shuffle"}


@pytest.fixture
def frequencies(tmp_path):
    path = tmp_path / "words.json"
    write_word_frequencies(WordFrequencies({"a": 500, "the": 300}, 1000, 100, 5), path)
    return path


@pytest.fixture
def hugging_face(tmp_path):
    """A tokenizer of words from 4 on, with start 1, end 2, padding 0 and unknown 3."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    special = {"[PAD]": 0, "[START]": 1, "[END]": 2, "[UNK]": 3}
    vocabulary = {**special, **{word: 4 + index for index, word in enumerate(words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return HFTokenizer(str(tmp_path / "tokenizer"), context_length=24)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def create(name, tmp_frequencies=None, *, tokenizer=CLIP, **options):
    if name == "frequency":
        options = {"frequencies": tmp_frequencies, "threshold": 0.1, **options}
    return create_text_masking(name, tokenizer=tokenizer, **options)


def test_none_is_the_tokenizer_itself():
    assert create_text_masking("none", tokenizer=CLIP) is CLIP


@pytest.mark.parametrize("name", ["none", "truncate"])
def test_truncation_is_openclips_own_cut(name):
    tokens = create_text_masking(name, tokenizer=CLIP, num_tokens=8)(CAPTIONS)
    assert torch.equal(tokens, open_clip.tokenize(CAPTIONS, context_length=8))
    whole = CLIP(CAPTIONS)
    assert tokens[0].tolist() == [*whole[0, :7].tolist(), END]


@pytest.mark.parametrize("name", sorted(OPENCLIP_NAMES))
def test_reduction_is_openclips_own_with_the_same_generators(name):
    expected = open_clip.SimpleTokenizer(reduction_mask=OPENCLIP_NAMES[name])
    masked = create_text_masking(name, tokenizer=CLIP, num_tokens=9)
    for seed in range(5):
        seed_all(seed)
        tokens = masked(CAPTIONS)
        seed_all(seed)
        assert torch.equal(tokens, expected(CAPTIONS, context_length=9))


def test_block_random_and_shuffle_keep_what_they_promise():
    caption = CLIP.encode(CAPTIONS[0])
    seed_all(0)
    block, ordered, shuffled = (
        create_text_masking(name, tokenizer=CLIP, num_tokens=8)(CAPTIONS[:1])[0, 1:-1].tolist()
        for name in ("block", "random", "shuffle")
    )
    assert block in [caption[start : start + 6] for start in range(len(caption) - 5)]
    positions = iter(caption)
    assert all(token in positions for token in ordered)
    assert set(shuffled) <= set(caption)
    assert shuffled != sorted(shuffled, key=caption.index)


@pytest.mark.parametrize("name", sorted(set(TEXT_MASKINGS.names()) - {"syntax"}))
@pytest.mark.parametrize("num_tokens", [3, 8, 77])
def test_budget_is_kept_with_start_and_end(name, num_tokens, frequencies):
    tokens = create(name, frequencies, num_tokens=num_tokens)(CAPTIONS)
    assert tokens.shape == (2, num_tokens)
    assert tokens.dtype == torch.int64
    for row in tokens.tolist():
        end = row.index(END)
        assert row[0] == START
        assert end > 0
        assert set(row[end + 1 :]) <= {0}
    if num_tokens == 3:
        assert (tokens[:, 2] == END).all()


@pytest.mark.parametrize("name", ["truncate", "frequency"])
def test_budget_is_kept_with_a_hugging_face_tokenizer(name, hugging_face, frequencies):
    options = {"tokenizer": hugging_face, "num_tokens": 6}
    tokens = create(name, frequencies, **options)(CAPTIONS)
    assert tokens.shape == (2, 6)
    for row in tokens.tolist():
        assert row[0] == 1
        assert set(row[row.index(2) + 1 :]) <= {0}
    assert 2 in tokens[0, 1:].tolist()


def test_frequent_words_go_and_the_rest_comes_before_the_cut(frequencies):
    masked = create("frequency", frequencies, num_tokens=8, threshold=1e-9)
    content = "small brown dog and white cat run over wet grass of an old park in evening"
    seed_all(0)
    assert torch.equal(masked(CAPTIONS[:1]), CLIP([content], context_length=8))
    unlimited = create("frequency", frequencies, threshold=1e-9)
    assert torch.equal(unlimited(CAPTIONS[:1]), CLIP([content]))


def test_filled_budget_holds_as_many_words_as_it_can(frequencies):
    masked = create("frequency", frequencies, num_tokens=8, fill=True)
    tokens = masked([CAPTIONS[0], "the a the a the a the a the"])
    assert (tokens[:, 7] == END).all()


@pytest.mark.parametrize("name", sorted(set(TEXT_MASKINGS.names()) - {"syntax"}))
def test_copy_in_another_process_draws_the_same(name, frequencies):
    masked = create(name, frequencies, num_tokens=8)
    seed_all(3)
    tokens = masked(CAPTIONS)
    seed_all(3)
    assert torch.equal(pickle.loads(pickle.dumps(masked))(CAPTIONS), tokens)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("words", {}, "unknown text masking 'words'; choose from block, frequency, none, "),
        ("block", {}, "--text-masking block needs a budget; give it with --text-tokens"),
        ("syntax", {}, "--text-masking syntax needs a budget; give it with --text-tokens"),
        ("truncate", {"num_tokens": 2}, "--text-tokens must be >= 3 .* got 2"),
        ("none", {"num_tokens": 78}, "at most the model's context length, 77, got 78"),
        (
            "random",
            {"num_tokens": 8, "threshold": 1},
            "no option 'threshold'; it takes none at all",
        ),
        ("frequency", {"t": 1}, "no option 't'; it takes frequencies, threshold, fill"),
        ("frequency", {"num_tokens": 8}, "needs the option frequencies=FILE"),
    ],
)
def test_bad_masking_is_refused_in_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_text_masking(name, tokenizer=CLIP, **options)


def test_reduction_with_another_tokenizer_is_refused(hugging_face):
    with pytest.raises(ValueError, match="and this model has HFTokenizer; use truncate or freq"):
        create_text_masking("random", tokenizer=hugging_face, num_tokens=6)


def test_truncation_without_a_budget_is_told(caplog):
    assert create_text_masking("truncate", tokenizer=CLIP) is CLIP
    assert "has no effect without --text-tokens" in caplog.text


def test_syntax_without_nltk_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match=r"needs nltk .* not installed; `pip install nltk`"):
        create_text_masking("syntax", tokenizer=CLIP, num_tokens=8)


NLTK = """
TAGS = {"dog": "NN", "cat": "NN", "wet": "JJ", "run": "VBP"}


class tokenize:
    word_tokenize = staticmethod(lambda text: text.split())


def pos_tag(words):
    return [(word, TAGS.get(word, "DT")) for word in words]


def download(name):
    raise RuntimeError("a loading process must not download")
"""


@pytest.fixture
def install_nltk(tmp_path, monkeypatch):
    """Put a stand-in for nltk, which the tests do not need to have, in its place."""

    def install(source):
        (tmp_path / "nltk.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "nltk", raising=False)

    yield install
    sys.modules.pop("nltk", None)


def test_syntax_without_its_data_is_one_sentence(install_nltk):
    install_nltk(NLTK.replace("return [", "raise LookupError('Resource not found.')\n    return ["))
    with pytest.raises(
        ValueError, match=r"two data sets of nltk, which are not installed; .*`python"
    ):
        create_text_masking("syntax", tokenizer=CLIP, num_tokens=8)


def test_syntax_keeps_nouns_then_adjectives_then_verbs(install_nltk):
    install_nltk(NLTK)
    words = {3: "dog", 4: "dog cat", 5: "dog cat wet", 6: "dog cat run wet"}
    for num_tokens, expected in words.items():
        masked = create_text_masking("syntax", tokenizer=CLIP, num_tokens=num_tokens)
        tokens = masked(["a dog and the cat run over wet grass"])
        assert torch.equal(tokens, CLIP([expected], context_length=num_tokens))


COUNTS = {"a": 6400, "dog": 900, "runs": 400, "seldom": 100}
NUM_WORDS = 10_000
CAPTION = "A dog runs, seldom alone"
THRESHOLD = 0.01


@pytest.fixture
def make_masking(tmp_path):
    write_word_frequencies(WordFrequencies(COUNTS, NUM_WORDS, 1000, 5), tmp_path / "words.json")

    def make(**options):
        return FrequencyMasking(
            CLIP, **{"frequencies": tmp_path / "words.json", "threshold": THRESHOLD, **options}
        )

    return make


def shortened(masking, caption, *, seed):
    random.seed(seed)
    return masking.shorten(caption)


@pytest.mark.parametrize("word", ["A", "dog", "runs"])
def test_word_is_dropped_as_often_as_the_rule_says(make_masking, word):
    masking = make_masking()
    num_draws = 3000
    random.seed(0)
    dropped = sum(
        word not in masking.shorten(CAPTION).replace(",", "").split() for _ in range(num_draws)
    )
    probability = 1 - math.sqrt(THRESHOLD / (COUNTS[word.lower()] / NUM_WORDS))
    deviation = math.sqrt(num_draws * probability * (1 - probability))
    assert abs(dropped - num_draws * probability) < 4 * deviation


def test_words_are_dropped_independently(make_masking):
    random.seed(0)
    masking = make_masking()
    rests = Counter(masking.shorten("dog runs seldom") for _ in range(3000))
    # Dropped with probability 2/3 and 1/2.
    expected = {
        "seldom": 1 / 3,
        "dog seldom": 1 / 6,
        "runs seldom": 1 / 3,
        "dog runs seldom": 1 / 6,
    }
    assert set(rests) == set(expected)
    for rest, probability in expected.items():
        assert abs(rests[rest] / 3000 - probability) < 0.04


def test_unknown_and_rare_words_stay_in_order(make_masking):
    masking = make_masking()
    for seed in range(50):
        rest = shortened(masking, "Zebra a dog a seldom quagga", seed=seed)
        assert [word for word in rest.split() if word not in ("a", "dog")] == [
            "Zebra",
            "seldom",
            "quagga",
        ]


def test_at_least_one_word_is_kept(make_masking):
    masking = make_masking(threshold=1e-9)
    rests = {shortened(masking, "a dog a dog", seed=seed) for seed in range(50)}
    assert rests == {"a", "dog"}


def test_caption_of_which_nothing_is_dropped_is_left_alone(make_masking):
    caption = "  Zebra,\tquagga  and\nseldom okapi "
    assert shortened(make_masking(), caption, seed=0) == caption


def test_same_seed_gives_the_same_words(make_masking):
    masking = make_masking()
    rests = [shortened(masking, CAPTION * 3, seed=seed) for seed in range(20)]
    assert rests == [shortened(make_masking(), CAPTION * 3, seed=seed) for seed in range(20)]
    assert len(set(rests)) > 10


def test_filling_keeps_as_many_words_as_the_budget_holds(make_masking):
    masking = make_masking(fill=True, num_tokens=5)
    lengths = {len(shortened(masking, "a dog a dog a dog runs", seed=s).split()) for s in range(50)}
    assert lengths == {3}
    assert shortened(masking, "a dog", seed=0) == "a dog"


def test_filling_keeps_first_what_the_rule_keeps(make_masking):
    caption = "zebra dog runs a dog runs a quagga"
    plain, filled = make_masking(), make_masking(fill=True, num_tokens=8)
    for seed in range(50):
        survivors = Counter(shortened(plain, caption, seed=seed).split())
        kept = Counter(shortened(filled, caption, seed=seed).split())
        assert survivors <= kept or kept <= survivors


def test_filling_prefers_words_as_the_released_code_ranks_them(make_masking):
    masking = make_masking(fill=True, num_tokens=6)
    words = ["a", "dog", "runs", "seldom", "a", "dog", "runs", "a"]
    for seed in range(30):
        random.seed(seed)
        # https://github.com/MingliangLiang3/CLIPF: the highest of a uniform draw less P(word).
        scores = [
            random.random() - (1 - math.sqrt(THRESHOLD * NUM_WORDS / COUNTS[w])) for w in words
        ]
        best = sorted(sorted(range(len(words)), key=lambda i: -scores[i])[:4])
        expected = " ".join(words[index] for index in best)
        assert shortened(masking, " ".join(words), seed=seed) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequencies": None}, "needs the option frequencies=FILE"),
        ({"frequencies": 3}, "needs the option frequencies=FILE"),
        ({"frequencies": "nowhere.json"}, "'nowhere.json' does not exist"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\], got 1.5"),
        ({"threshold": float("nan")}, r"threshold must be in \(0, 1\], got nan"),
        ({"threshold": "low"}, "threshold must be in .*, got 'low'"),
        ({"fill": 1}, "fill must be true or false, got 1"),
        ({"fill": True}, "give one with --text-tokens"),
    ],
)
def test_bad_option_is_refused_in_one_sentence(make_masking, options, message):
    with pytest.raises(ValueError, match=message):
        make_masking(**options)


def test_threshold_that_leaves_hardly_a_word_is_told(make_masking, tmp_path, caplog):
    path = tmp_path / "common.json"
    # A caption is eight times the word "a", which t = 1e-4 keeps once in a hundred times.
    write_word_frequencies(WordFrequencies({"a": 1 << 20}, 1 << 20, 1 << 17, 5), path)
    options = {"frequencies": path, "threshold": 1e-4}
    make_masking()
    make_masking(**options, fill=True, num_tokens=8)
    assert not caplog.records
    make_masking(**options)
    assert "threshold 0.0001, frequency masking keeps 0.08 words of a caption" in caplog.text
