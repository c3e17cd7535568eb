from __future__ import annotations

import json
import os

import pytest

from clip_pgs.data.__main__ import main
from clip_pgs.data.samples import MAX_CHARACTERS, RawSample
from clip_pgs.data.words import (
    WordFrequencies,
    count_captions,
    count_shard,
    find_words,
    keep_words,
    read_word_frequencies,
    write_word_frequencies,
)


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
    assert [word[0].lower() for word in find_words(caption)] == words


def test_words_are_counted_as_far_as_training_reads_a_caption():
    sample = RawSample("0.tar", "a", None, (b"a " * 5000, b"\0" * 5000))
    words = count_captions([sample]).words
    assert words == {"a": MAX_CHARACTERS // 2, "\0" * MAX_CHARACTERS: 1}


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
        ("{", "are not as"),
        ("\xff", "are not as"),
        ("[1]", "are not as"),
        ('{"dog": 0.5}', "are not as .* 'version'"),
        ({"version": 2}, "version 2, and this package reads 1"),
        ({"num_words": -1}, "'num_words' must be a whole number >= 1, got -1"),
        ({"num_captions": 0}, "'num_captions' must be a whole number >= 1, got 0"),
        ({"counts": [1]}, "are not as"),
        ({"counts": {"a": 0.5}}, "'a' must be a whole number >= 1, got 0.5"),
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
    with pytest.raises(ValueError, match=r"does not exist; `clip-pgs data words SHARDS"):
        read_word_frequencies(tmp_path / "words.json")


@pytest.fixture
def shards(tmp_path, make_tar):
    """Two shards: seven good captions, four samples without one, and a damaged end."""
    make_tar(
        tmp_path / "0.tar",
        [
            ("a.jpg", b"never decoded"),
            ("a.txt", b"A dog, a Dog."),
            ("b.txt", b"the dog's bowl"),
            ("c.jpg", b"no caption"),
            ("d.txt", b" \n"),
            ("e.txt", b"\xff\xfe"),
            ("f.txt", b"A cat."),
        ],
    )
    make_tar(tmp_path / "1.tar", [(f"{n}.txt", b"a cat") for n in range(4)] + [("9.txt", b"")])
    damaged = (tmp_path / "1.tar").read_bytes()
    # Five members of two blocks and one of one block, and no end.
    (tmp_path / "1.tar").write_bytes(damaged[: 9 * 512] + b"x" * 600)
    return tmp_path


def count(folder, *arguments, out="words.json"):
    assert main(["words", f"{folder}/{{0..1}}.tar", "-o", str(folder / out), *arguments]) == 0
    return json.loads((folder / out).read_text())


def test_words_of_shards_are_counted_exactly(shards, capsys):
    assert count(shards, "--min-count", "2") == {
        "version": 1,
        "num_captions": 7,
        # Three captions of the first shard, then those of the second together.
        "num_words": 6 + 3 + 3 + 8,
        "min_count": 2,
        "counts": {"a": 7, "cat": 5, ".": 2, "dog": 2},
    }
    told = capsys.readouterr().out
    assert "counted 20 words in 7 captions, 5 left out (empty caption: 2, " in told
    assert "caption is not UTF-8: 1, no caption: 1, unreadable shard: 1; the first is " in told
    assert f"the first is {shards}/0.tar: c: no caption (no .txt member but .jpg; " in told
    assert f"--text-masking-option frequencies={shards}/words.json\n" in told


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("a", "counted 1 word in 1 caption, none left out; 1 different word with a count of 1 or "),
        ("a b", "counted 2 words in 1 caption, none left out; 2 different words with"),
    ],
)
def test_one_word_is_no_plural(make_tar, tmp_path, capsys, caption, told):
    make_tar(tmp_path / "0.tar", [("0.txt", caption.encode())])
    argv = [f"{tmp_path}/0.tar", "-o", str(tmp_path / "words.json"), "--min-count", "1"]
    assert main(["words", *argv]) == 0
    assert told in capsys.readouterr().out


def test_file_is_the_same_for_any_number_of_processes(shards):
    count(shards, "--workers", "1", "--min-count", "1", out="one.json")
    count(shards, "--workers", "2", "--min-count", "1", out="two.json")
    assert (shards / "one.json").read_bytes() == (shards / "two.json").read_bytes()


def test_words_stand_by_count_and_then_by_the_alphabet(shards):
    words = count(shards, "--min-count", "1")["counts"]
    assert list(words) == ["a", "cat", ".", "dog", ",", "bowl", "dog's", "the"]


def test_rare_words_are_left_out_by_default(shards):
    assert count(shards)["counts"] == {"a": 7, "cat": 5}


def test_captions_are_counted_without_their_images(shards):
    assert count_shard(str(shards / "0.tar")).num_captions == 3


@pytest.mark.parametrize(
    ("name", "separator", "options"),
    [("a.csv", ",", []), ("a.tsv", "\t", []), ("a.csv", ";", ["--separator", ";"])],
)
def test_words_of_a_table_are_counted(tmp_path, name, separator, options):
    rows = ["text", "a dog", "", "a cat"]
    (tmp_path / name).write_text("\n".join(f"x{separator}{row}" for row in rows))
    options = [*options, "--caption-key", "text", "--min-count", "1"]
    assert main(["words", str(tmp_path / name), "-o", str(tmp_path / "out.json"), *options]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["num_captions"] == 2
    assert written["counts"] == {"a": 2, "cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("shards_given", "options", "message"),
    [
        ("none.tar", [], "matches no file"),
        ("0.tar", ["--min-count", "0"], "--min-count must be >= 1, got 0"),
        ("0.tar", ["--min-count", "4"], "lower --min-count to at most 3, the count of the most"),
        ("0.tar", ["--workers", "0"], "--workers must be >= 1, got 0"),
        ("0.tar", ["-o", "{folder}"], "it is a folder"),
        ("empty.tar", [], "there is no caption to count: 1 left out (no caption: 1; the first is"),
        ("text.txt", [], "text.txt: unreadable shard (it begins with b'filepath,title"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    shards, make_tar, capsys, shards_given, options, message
):
    make_tar(shards / "empty.tar", [("a.jpg", b"x")])
    (shards / "text.txt").write_text("filepath,title\na.jpg,one\n")
    options = [option.replace("{folder}", str(shards)) for option in options]
    out = shards / "words.json"
    assert main(["words", str(shards / shards_given), "-o", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["table.csv", "0.tar", "sub/../1.tar"])
def test_what_is_counted_is_not_replaced_by_the_counts(shards, capsys, name):
    (shards / "sub").mkdir()
    (shards / "table.csv").write_text("title\na dog\n")
    path = shards / name
    before = path.read_bytes()
    given = path if name.endswith(".csv") else shards / "{0,1}.tar"
    assert main(["words", str(given), "-o", str(path), "--min-count", "1"]) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_bytes() == before
