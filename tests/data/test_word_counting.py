from __future__ import annotations

import json

import pytest

from clip_pgs.data.__main__ import main
from clip_pgs.data.words import count_shard


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
    assert "caption is not UTF-8: 1, no caption: 1, unreadable shard: 1)" in told
    assert f"--text-masking-option frequencies={shards}/words.json\n" in told


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
        ("0.tar", ["--workers", "0"], "--workers must be >= 1, got 0"),
        ("0.tar", ["-o", "{folder}"], "is a folder; name a file"),
        ("empty.tar", [], "there is no caption to count: 1 left out (no caption: 1)"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    shards, make_tar, capsys, shards_given, options, message
):
    make_tar(shards / "empty.tar", [("a.jpg", b"x")])
    options = [option.replace("{folder}", str(shards)) for option in options]
    out = shards / "words.json"
    assert main(["words", str(shards / shards_given), "-o", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
