"""Captions that are shortened on their way through a training stream."""

from __future__ import annotations

import pytest
import torch
from open_clip import SimpleTokenizer

from clip_pgs.data.build import build_train_stream, build_val_stream
from clip_pgs.data.words import WordFrequencies, write_word_frequencies
from support.streams import AUGMENT, read_from, same, with_options

SENTENCE = "a small brown dog and a white cat run over the wet grass of an old park"


@pytest.fixture
def sentence_args(tmp_path, make_image, make_args):
    """A table of twelve pairs with long captions."""
    rows = ["filepath\ttitle"]
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(make_image(number))
        rows.append(f"{tmp_path}/{number}.jpg\t{number} {SENTENCE}")
    table = tmp_path / "pairs.tsv"
    table.write_text("\n".join(rows))
    return make_args(train_data=str(table), val_data=str(table), batch_size=4)


def open_sentences(args):
    return build_train_stream(
        args, transform=AUGMENT, tokenize=SimpleTokenizer(), rank=0, world_size=1
    )


@pytest.mark.parametrize("name", ["block", "random", "shuffle", "frequency"])
def test_masked_texts_depend_on_the_sample_and_not_on_the_workers(sentence_args, name, tmp_path):
    sentence_args.text_masking, sentence_args.text_tokens = name, 7
    if name == "frequency":
        words = tmp_path / "words.json"
        write_word_frequencies(WordFrequencies({"a": 3, "dog": 3}, 9, 3, 1), words)
        sentence_args.text_masking_options = {"frequencies": str(words), "threshold": 0.01}
    alone, shared = (
        read_from(open_sentences(with_options(sentence_args, workers=workers)))
        for workers in (0, 2)
    )
    assert same(alone, shared)
    assert [texts.shape for _, texts in alone] == [(4, 7)] * 3


def test_masking_the_text_leaves_the_images_as_they_are(sentence_args):
    plain = read_from(open_sentences(sentence_args))
    sentence_args.text_masking, sentence_args.text_tokens = "random", 7
    masked = read_from(open_sentences(sentence_args))
    for (images, texts), (same_images, few) in zip(plain, masked, strict=True):
        assert torch.equal(images, same_images)
        assert (texts.shape, few.shape) == ((4, 77), (4, 7))


def test_text_is_masked_in_another_way_each_epoch(sentence_args):
    sentence_args.text_masking, sentence_args.text_tokens = "random", 7
    stream = open_sentences(sentence_args)
    first, second = (
        {tuple(text) for _, texts in read_from(stream, epoch) for text in texts.tolist()}
        for epoch in (0, 1)
    )
    assert len(first | second) > 20


def test_validation_sees_whole_texts(sentence_args):
    sentence_args.text_masking, sentence_args.text_tokens = "random", 7
    stream = build_val_stream(sentence_args, transform=AUGMENT, tokenize=SimpleTokenizer())
    texts = torch.cat([texts for _, texts in stream])
    expected = SimpleTokenizer()([f"{number} {SENTENCE}" for number in range(12)])
    assert torch.equal(texts, expected)


def test_text_masking_that_is_not_possible_is_refused(sentence_args):
    sentence_args.text_masking = "random"
    with pytest.raises(ValueError, match="--text-masking random needs a budget"):
        open_sentences(sentence_args)
