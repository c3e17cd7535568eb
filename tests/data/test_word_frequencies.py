from __future__ import annotations

import json
import os

import pytest

from clip_pgs.data.words import (
    WordFrequencies,
    read_word_frequencies,
    write_word_frequencies,
)

FREQUENCIES = WordFrequencies({"a": 64, "dog": 16, "caf\u00e9": 4}, 100, 25, 3)


def test_rule_of_clipf_worked_by_hand():
    # t = 0.04: 1 - sqrt(0.04 / 0.64) = 3/4, 1 - sqrt(0.04 / 0.16) = 1/2, and 0.04 is the limit.
    assert FREQUENCIES.drop_probabilities(0.04) == pytest.approx({"a": 0.75, "dog": 0.5})


def test_mean_number_of_kept_words_worked_by_hand():
    # Of 100 words 64 * 3/4 + 16 * 1/2 = 56 are dropped; 44 are left to 25 captions.
    assert FREQUENCIES.mean_kept(0.04) == pytest.approx(44 / 25)


def test_frequencies_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "words.json"
    write_word_frequencies(FREQUENCIES, path)
    assert read_word_frequencies(path) == FREQUENCIES
    assert list(read_word_frequencies(path).counts) == ["a", "dog", "caf\u00e9"]


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "words.json"
    write_word_frequencies(FREQUENCIES, path)
    written = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_word_frequencies(WordFrequencies({}, 1, 1, 1), path)
    assert path.read_bytes() == written
    assert os.listdir(tmp_path) == ["words.json"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "cannot be read"),
        ("\xff", "cannot be read"),
        ("[1]", "did not write them"),
        ('{"dog": 0.5}', "did not write them"),
        ({"version": 2}, "have version 2, this package reads 1"),
        ({"num_words": -1}, "num_words must be a whole number >= 1, got -1"),
        ({"num_captions": 0}, "num_captions must be a whole number >= 1, got 0"),
        ({"counts": [1]}, "counts must map words to counts, got list"),
        ({"counts": {"a": 0.5}}, "the count of 'a' must be a whole number >= 1, got 0.5"),
        ({"counts": {"a": 101}}, "add up to more than num_words, 100"),
    ],
)
def test_file_of_another_kind_is_refused_in_one_sentence(tmp_path, content, fault):
    path = tmp_path / "words.json"
    write_word_frequencies(FREQUENCIES, path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=fault) as error:
        read_word_frequencies(path)
    assert f"word frequencies {str(path)!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"do not exist; `python -m clip_pgs\.data words SHARDS"):
        read_word_frequencies(tmp_path / "words.json")
