from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from clip_pgs.data.text_masking import FrequencyMasking
from clip_pgs.data.words import WordFrequencies, write_word_frequencies

COUNTS = {"a": 6400, "dog": 900, "runs": 400, "seldom": 100}
NUM_WORDS = 10_000
CAPTION = "A dog runs, seldom alone"
THRESHOLD = 0.01


@pytest.fixture
def make_masking(tmp_path):
    write_word_frequencies(WordFrequencies(COUNTS, NUM_WORDS, 1000, 5), tmp_path / "words.json")

    def make(**options):
        return FrequencyMasking(
            **{"frequencies": tmp_path / "words.json", "threshold": THRESHOLD, **options}
        )

    return make


def shortened(masking, caption, *, seed):
    random.seed(seed)
    return masking(caption)


@pytest.mark.parametrize("word", ["A", "dog", "runs"])
def test_word_is_dropped_as_often_as_the_rule_says(make_masking, word):
    masking = make_masking()
    num_draws = 3000
    random.seed(0)
    dropped = sum(word not in masking(CAPTION).replace(",", "").split() for _ in range(num_draws))
    probability = 1 - math.sqrt(THRESHOLD / (COUNTS[word.lower()] / NUM_WORDS))
    deviation = math.sqrt(num_draws * probability * (1 - probability))
    assert abs(dropped - num_draws * probability) < 4 * deviation


def test_words_are_dropped_independently(make_masking):
    random.seed(0)
    masking = make_masking()
    rests = Counter(masking("dog runs seldom") for _ in range(3000))
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
        ({"frequencies": "nowhere.json"}, "'nowhere.json' do not exist"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\], got 1.5"),
        ({"threshold": float("nan")}, r"threshold must be in \(0, 1\], got nan"),
        ({"threshold": "low"}, "threshold must be a number, got 'low'"),
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
