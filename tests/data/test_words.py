from __future__ import annotations

import pytest

from clip_pgs.data.words import find_words, keep_words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, running...", ["a", "dog", ",", "running", "..."]),
        (
            "don't  touch\tthe dog's\u2019 bowl",
            ["don't", "touch", "the", "dog's", "\u2019", "bowl"],
        ),
        ("2 of 1,000", ["2", "of", "1", ",", "000"]),
        ("It\u2019s a caf\u00e9 \u732b", ["it\u2019s", "a", "caf\u00e9", "\u732b"]),
        ("cafe\u0301 well-known", ["cafe\u0301", "well", "-", "known"]),
        ("'quoted'", ["'", "quoted", "'"]),
        (" \n ", []),
    ],
)
def test_words_are_runs_of_letters_and_digits_or_of_other_characters(caption, words):
    assert [word.text for word in find_words(caption)] == words


@pytest.mark.parametrize(
    ("kept", "rest"),
    [
        ([0, 1, 2, 3, 4, 5], "A Dog, well-kept"),
        ([1, 3], "Dog well"),
        ([1, 2], "Dog,"),
        ([3, 5], "well kept"),
        ([4, 5], "-kept"),
        ([], ""),
    ],
)
def test_kept_words_keep_their_case_and_touch_where_they_did(kept, rest):
    caption = "A  Dog, well-kept"
    assert keep_words(caption, find_words(caption), kept) == rest
