from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from clip_pgs.data.__main__ import main
from clip_pgs.data.shards import count_samples, expand_shards, stated_sizes, upsampling_weights


@pytest.fixture
def folder(tmp_path):
    for name in ("00.tar", "01.tar", "02.tar", "other.tar"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_braces_and_joined_sources_expand_in_order(folder):
    shards = expand_shards(f"{folder}/other.tar::{folder}/{{00..02}}.tar")
    assert shards == [f"{folder}/{name}.tar" for name in ("other", "00", "01", "02")]


def test_star_expands_sorted(folder):
    assert expand_shards(f"{folder}/0*.tar") == [f"{folder}/0{i}.tar" for i in range(3)]


def test_file_url_is_a_local_file(folder):
    assert expand_shards(f"file:{folder}/00.tar") == [f"{folder}/00.tar"]


@pytest.mark.parametrize("pattern", ["*.tar", "file:pipe:touch pwned;.tar", "pi?e:*"])
def test_no_name_of_a_file_is_a_command(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch pwned;.tar").write_bytes(b"")
    assert expand_shards(pattern) == ["./pipe:touch pwned;.tar"]
    assert main(["check", pattern]) == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("pipe:cat {0..1}.tar", ["pipe:cat 0.tar", "pipe:cat 1.tar"]),
        ("s3://bucket/{0..1}.tar", ["s3://bucket/0.tar", "s3://bucket/1.tar"]),
        ("https://host/a.tar?key=1*", ["https://host/a.tar?key=1*"]),
    ],
)
def test_commands_and_urls_are_not_looked_up(pattern, expected):
    assert expand_shards(pattern) == expected


def test_missing_file_is_named_with_its_pattern(folder):
    pattern = f"{folder}/{{00..04}}.tar"
    with pytest.raises(ValueError, match=r"03\.tar', which does not exist \(2 of 5") as error:
        expand_shards(pattern)
    assert pattern in str(error.value)


@pytest.mark.parametrize("pattern", ["{8..9}.tar", "9*.tar", "nothing.tar"])
def test_pattern_without_a_file_says_so(folder, pattern):
    with pytest.raises(ValueError, match="matches no file") as error:
        expand_shards(f"{folder}/{pattern}")
    assert pattern in str(error.value)


def test_name_that_no_file_system_takes_matches_nothing():
    with pytest.raises(ValueError, match="matches no file"):
        expand_shards("x" * 5000)
    assert main(["check", "x" * 5000]) == 2


def test_brackets_and_escaped_braces_are_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d [1]", "d 1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").touch()
    (tmp_path / "{x.tar").touch()
    assert expand_shards("d [1]/*.tar") == ["d [1]/0.tar"]
    assert expand_shards(r"\{x.tar") == ["{x.tar"]
    with pytest.raises(ValueError, match=r"unbalanced ones; one of a name is \\{ or \\}"):
        expand_shards("{x.tar")


@pytest.mark.parametrize("name", ["shards", "d {1}", "e:f"])
def test_folder_is_refused_with_a_pattern_that_names_its_shards(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with pytest.raises(ValueError, match=r"is a folder; name the shards"):
        expand_shards(re.sub(r"([{}])", r"\\\1", name))
    for number in range(2):
        Path(name, f"{number}.tar").touch()
    with pytest.raises(ValueError, match=r"is a folder; for the shards in it write") as error:
        expand_shards(re.sub(r"([{}])", r"\\\1", name))
    pattern = ast.literal_eval(str(error.value).rpartition(" write ")[2])
    assert [Path(shard).name for shard in expand_shards(pattern)] == ["0.tar", "1.tar"]


@pytest.mark.parametrize("pattern", ["", "a.tar::", "a{0.tar"])
def test_malformed_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        expand_shards(pattern)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999999}.tar",
        "{0.." + "9" * 5000 + "}.tar",
        "{a,b}" * 21,
        "{" * 3000,
        "{0..999}{0..999}.tar",
    ],
)
def test_a_pattern_of_countless_names_is_refused_at_once(pattern):
    with pytest.raises(ValueError, match="names more than 262144 files, or has more than 20 brac"):
        expand_shards(pattern)


def test_sizes_are_summed_over_the_chosen_shards_and_folders(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (folder / "sizes.json").write_text('{"00.tar": 3, "01.tar": 4, "02.tar": 50}')
    (other / "__len__").write_text("1000\n")
    shards = [f"{folder}/00.tar", f"{folder}/01.tar", f"{other}/x.tar", f"{other}/y.tar"]
    assert count_samples(shards) == 1007


def test_count_is_unknown_where_a_folder_or_url_states_none(folder):
    assert count_samples([f"{folder}/00.tar"]) is None
    assert count_samples(["https://host/0.tar"]) is None
    (folder / "sizes.json").write_text('{"00.tar": 3}')
    assert count_samples([f"{folder}/00.tar", f"{folder}/01.tar"]) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sizes.json", "{"),
        ("sizes.json", "[3]"),
        ("sizes.json", '{"00.tar": -1}'),
        ("sizes.json", '{"00.tar": 1.5}'),
        ("sizes.json", '{"00.tar": 1000000000000000000}'),
        ("sizes.json", '{"00.tar": "1e9"}'),
        ("sizes.json", '{"00.tar": NaN}'),
        ("sizes.json", '{"00.tar": true}'),
        ("sizes.json", '{"00.tar": 1' + "0" * 5000 + "}"),
        ("sizes.json", "[" * 100_000),
        ("__len__", "9" * 30),
        ("__len__", "9" * 5000),
        ("__len__", "__import__('os').getpid()"),
        ("__len__", "-4"),
    ],
)
def test_malformed_count_is_refused_by_name(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        count_samples([f"{folder}/00.tar"])


def test_each_shard_weighs_what_its_source_does(folder):
    pattern = f"{folder}/{{00..02}}.tar::{folder}/other.tar"
    assert upsampling_weights(pattern, "1::2.5") == [1.0, 1.0, 1.0, 2.5]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ("1", "for each of the 2 data sources"),
        ("1::x", "a finite number >= 0 for each"),
        ("1::-1", "a finite number >= 0 for each"),
        ("1::nan", "a finite number >= 0 for each"),
        ("0::0", "a finite number >= 0 for each"),
    ],
)
def test_unfit_upsampling_factors_are_refused(folder, factors, message):
    with pytest.raises(ValueError, match=message):
        upsampling_weights(f"{folder}/00.tar::{folder}/01.tar", factors)


def test_more_samples_than_a_shard_can_hold_are_refused_by_name(folder):
    (folder / "sizes.json").write_text('{"00.tar": 2000000}')
    with pytest.raises(ValueError, match=r"00\.tar has 2000000 samples, more than its 0 bytes"):
        stated_sizes([f"{folder}/00.tar"])
