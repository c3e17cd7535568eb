"""What is read of a set, and what becomes of files that are not as they should be."""

import gzip
import io
import json
import pickle
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from PIL import Image

from clip_pgs.evaluation import evaluate, load_suite
from clip_pgs.evaluation.datasets import (
    DamagedDataError,
    count_shards,
    read_class_names,
    read_templates,
)
from clip_pgs.evaluation.samples import Reading, open_samples
from clip_pgs.evaluation.suites import get_suite, read_list
from support.eval_sets import add_member, color_png, write_dataset, write_pairs

SUITES = {"classification": "zeroshot-classification", "retrieval": "zeroshot-retrieval"}


def score(loaded, folder, *, suite="zeroshot-classification", workers=0, output=None):
    name = f"{folder.name}/add_att" if suite == "compositionality" else folder.name
    eval_set = get_suite(suite).eval_set(name, str(folder))
    return evaluate(loaded, [eval_set], workers=workers, output=output)[0]


def make_set(folder, *, kind="classification", extra=(), replaced=(), num_samples=4):
    """Write a set of four samples whose members are added to or replaced, by name."""
    target = [str, lambda n: f"it is {n}"][kind == "retrieval"]
    suffix = {"classification": "cls", "retrieval": "txt", "multilabel": "npy"}[kind]
    write_dataset(folder, [], kind=kind, num_classes=4)
    members = {}
    for number in range(num_samples):
        members[f"{number}.png"] = color_png(number)
        members[f"{number}.{suffix}"] = target(number).encode()
    members |= dict(replaced)
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for name, content in members.items():
            if content is not None:
                add_member(tar, name, content)
            for other, evil in extra if name == "0.png" else ():
                add_member(tar, other, evil)
    return folder


class Harmful:
    def __reduce__(self):
        return Path.write_text, (Path("pwned"), "code was run")


def saved(save, content):
    stream = io.BytesIO()
    save(stream, content)
    return stream.getvalue()


def saved_image(size):
    return saved(lambda stream, size: Image.new("RGB", size).save(stream, "PNG"), size)


def save_array(stream, content):
    np.save(stream, np.array([content], dtype=object), allow_pickle=True)


LINE = saved_image((30_000, 1))
PICKLED = {
    **{f"0.{suffix}": pickle.dumps(Harmful()) for suffix in ("pyd", "pkl", "pickle", "PYD")},
    "0.pth": saved(lambda stream, content: torch.save(content, stream), Harmful()),
    "0.npy": saved(save_array, Harmful()),
    "0.npz": saved(lambda stream, content: np.savez(stream, a=[content]), Harmful()),
    "0.yaml": b"!!python/object/apply:os.system ['touch pwned']",
    "0.json": b"{",
    "0.cbor": b"\xff",
    "0.left.pyd": pickle.dumps(Harmful()),
    "readme.pyd": pickle.dumps(Harmful()),
}


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
@pytest.mark.parametrize("place", ["folder", "in another process"])
def test_a_file_that_is_no_picture_label_or_caption_is_passed_over(
    color_model, tmp_path, monkeypatch, kind, place
):
    monkeypatch.chdir(tmp_path)
    folder = make_set(tmp_path / "evil", kind=kind, extra=PICKLED.items())
    clean = make_set(tmp_path / "clean", kind=kind)
    workers = 0 if place == "folder" else 1
    result = score(color_model, folder, suite=SUITES[kind], workers=workers)
    assert (result.status, result.error) == ("done", None)
    assert result.metrics == score(color_model, clean, suite=SUITES[kind]).metrics
    assert not Path("pwned").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize("kind", [*SUITES, "compositionality"])
def test_no_picture_is_lost_where_shared_memory_is_full(color_model, tmp_path, monkeypatch, kind):
    suite, folder = SUITES.get(kind, kind), tmp_path / "set"
    if suite == kind:
        write_pairs(folder, {"add_att": [(color, color, 5) for color in range(4)]})
    else:
        make_set(folder, kind=kind)
    expected = score(color_model, folder, suite=suite)

    def is_full(storage):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", is_full)
    result = score(color_model, folder, suite=suite, workers=1)
    assert (result.status, result.error) == ("done", None)
    assert (result.samples, result.metrics) == (expected.samples, expected.metrics)


def test_labels_of_several_classes_are_arrays_and_are_not_unpickled(
    color_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = torch.eye(4).numpy().astype(np.int64)
    arrays = {f"{n}.npy": saved(np.save, row) for n, row in enumerate(rows)}
    good = make_set(tmp_path / "good", kind="multilabel", replaced=arrays.items())
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        text = "".join(f"number {n}\n" for n in range(4)) if name == "classnames.txt" else "a {c}"
        (good / name).write_text(text)
    assert score(color_model, good).metrics == {"mean_average_precision": 1.0}
    odd = {
        "pickled": saved(save_array, Harmful()),
        "of another length": saved(np.save, rows[0, :3]),
        "of other values": saved(np.save, rows[0] * 7),
        "huge": saved(np.save, rows[0]).replace(b"(4,)", b"(4000000000000,)"),
    }
    for content in odd.values():
        with tarfile.open(good / "test/0.tar", "w") as tar:
            add_member(tar, "0.png", color_png(0))
            add_member(tar, "0.npy", content)
        result = score(color_model, good)
        assert result.status == "failed"
        assert result.error.startswith("sample '0' of test/0.tar has no usable .npy")
    assert not Path("pwned").exists()


def test_a_location_is_no_shell_command(color_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "http://127.0.0.1:9/'; touch pwned; '"
    eval_set = get_suite("zeroshot-classification").eval_set("six", url)
    assert evaluate(color_model, [eval_set], workers=0)[0].status == "missing"
    assert not Path("pwned").exists()


def eps(**_):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "eps")
    return stream.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("2.png", b"\x89PNG no picture", ["'2' of test/0.tar", "decoded"]),
        ("2.png", color_png(2)[:60], ["'2' of test/0.tar", "decoded"]),
        ("2.png", LINE, ["'2' of test/0.tar", "30000 x 1"]),
        ("2.png", eps(), ["'2' of test/0.tar", "no JPEG, PNG"]),
        ("2.png", None, ["sample '2' of test/0.tar", "no picture"]),
        ("3.jpg", color_png(3), ["sample '3' of test/0.tar", "a .png and a .jpg"]),
        ("2.cls", None, ["sample '2' of test/0.tar", "no .cls"]),
        ("2.cls", b"4", ["sample '2' of test/0.tar", "4 classes of classnames.txt", "got 4"]),
        ("2.cls", b"-1", ["sample '2' of test/0.tar", "b'-1'"]),
        ("2.cls", b"9" * 5000, ["sample '2' of test/0.tar", "b'999"]),
        ("2.cls", b"two", ["sample '2' of test/0.tar", "b'two'"]),
        ("2.cls", b"", ["sample '2' of test/0.tar", "b''"]),
    ],
)
def test_a_sample_that_is_not_as_it_should_be_is_named_with_its_shard(
    color_model, tmp_path, workers, name, content, parts
):
    folder = make_set(tmp_path / "set", replaced={name: content}.items())
    result = score(color_model, folder, workers=workers)
    assert result.status == "failed"
    assert all(part in result.error for part in parts), result.error
    assert "\n" not in result.error


def test_a_picture_that_resizing_makes_too_large_is_named(color_model, tmp_path):
    large = replace(color_model, transform=open_clip.image_transform(4096, is_train=False))
    line = saved_image((600, 6))
    folder = make_set(tmp_path / "set", replaced=[("0.png", line)])
    result = score(large, folder)
    assert result.status == "failed"
    assert all(part in result.error for part in ("'0' of test/0.tar", "600 x 6"))


@pytest.mark.parametrize(
    ("captions", "rule"),
    [
        (b"", "has no usable .txt: there is no caption"),
        (b" \n\n", "has no usable .txt: there is no caption"),
        (b"\xff\xfe", "has no usable .txt"),
        (b"a\n" * 201, "a picture has at most 200 captions, a line each, got 201"),
        (b"a" * (2**16 + 1), "must have a .txt file of at most 65536 bytes, got 65537"),
    ],
)
def test_a_picture_without_a_caption_or_with_too_many_is_named(
    color_model, tmp_path, captions, rule
):
    folder = make_set(tmp_path / "set", kind="retrieval", replaced=[("1.txt", captions)])
    result = score(color_model, folder, suite="zeroshot-retrieval")
    assert result.status == "failed"
    assert "sample '1' of test/0.tar" in result.error
    assert rule in result.error


ODD_NAMES = [
    ("classification", ["Screenshot 2024-01-01 at 10.00.00.jpg"], "'Screenshot 2024-01-01 at 10'"),
    ("classification", ["Foto 12.5.24.jpg", "Foto 12.5.24.cls"], "'Foto 12'"),
    ("classification", ["in/a.1.png"], "'in/a'"),
    ("classification", ["4.1.cls"], "'4'"),
    ("retrieval", ["4.1.txt"], "'4'"),
    ("multilabel", ["4.png", "4.1.npy"], "'4'"),
    # Two pairs of one name up to the first dot.
    ("retrieval", ["4.png", "4.txt", "4.b.png", "4.b.txt"], "'4'"),
]


@pytest.mark.parametrize(("kind", "names", "sample"), ODD_NAMES)
def test_a_picture_or_label_whose_name_has_another_dot_is_not_left_out_in_silence(
    color_model, tmp_path, kind, names, sample
):
    added = [(name, b"1") for name in names]
    folder = make_set(tmp_path / "set", kind=kind, replaced=added, num_samples=0)
    for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / file).write_text("a {c}\n" if "templates" in file else "0\n1\n2\n3\n")
    result = score(color_model, folder, suite=SUITES.get(kind, SUITES["classification"]))
    assert result.status == "failed"
    assert f"sample {sample} of test/0.tar has files with more dots" in result.error
    assert names[-1] in result.error


def test_a_file_with_more_dots_beside_a_whole_sample_is_passed_over(color_model, tmp_path):
    names = ["._0.jpg", "0.1.txt", "0.1.json", "README", "read.me.md", "0.jpg.bak", "__a__/0.1.jpg"]
    names += ["0.seg.png", "0.mask.jpg", "0.1.cls"]
    folder = make_set(tmp_path / "set", extra=[(name, b"?") for name in names])
    result = score(color_model, folder)
    assert (result.status, result.samples) == ("done", 4)


def test_a_caption_pair_whose_picture_is_damaged_is_named(color_model, tmp_path):
    folder = tmp_path / "sugar_crepe"
    write_pairs(folder, {"add_att": [(0, 0, 1), (1, 1, 2), (2, 2, 3)]})
    (folder / "val2017/1.png").write_bytes(eps())
    for workers in (0, 1):
        result = score(color_model, folder, suite="compositionality", workers=workers)
        assert result.status == "failed"
        assert str(folder / "val2017/1.png") in result.error


@pytest.mark.parametrize("name", ["../1.png", "/etc/passwd", "a\0b"])
def test_a_caption_pair_names_no_picture_elsewhere(color_model, tmp_path, name):
    folder = tmp_path / "sugar_crepe"
    write_pairs(folder, {"add_att": [(0, 0, 1)]})
    item = {"filename": name, "caption": "it is 0", "negative_caption": "it is 1"}
    (folder / "add_att.json").write_text(json.dumps([item]))
    result = score(color_model, folder, suite="compositionality")
    assert result.status == "failed"
    assert repr(name) in result.error


def damage(shard, how):
    content = shard.read_bytes()
    if how == "cut in a picture":
        shard.write_bytes(content[:700])
    elif how == "cut between samples":
        with tarfile.open(shard) as tar:
            shard.write_bytes(content[: tar.getmembers()[4].offset])
    elif how == "a header":
        with tarfile.open(shard) as tar:
            place = tar.getmembers()[4].offset
        shard.write_bytes(content[: place + 100] + b"garbage" + content[place + 107 :])
    elif how == "of lengths":
        with tarfile.open(shard, "w") as tar:
            member = tarfile.TarInfo("0.png")
            member.size = 10**15
            tar.addfile(member)
            tar.fileobj.write(bytes(1024))
    elif how == "gzip":
        shard.write_bytes(gzip.compress(content)[:-40])
    else:
        shard.write_bytes(b"<html>no tar</html>" * 100)


@pytest.mark.parametrize(
    "how",
    ["cut in a picture", "cut between samples", "a header", "of lengths", "gzip", "no tar"],
)
def test_a_shard_that_is_damaged_or_cut_short_is_not_scored_in_part(color_model, tmp_path, how):
    folder = make_set(tmp_path / "set")
    damage(folder / "test/0.tar", how)
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "test/0.tar" in result.error


def test_shards_may_be_compressed(color_model, tmp_path):
    folder = make_set(tmp_path / "set")
    shard = folder / "test/0.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert score(color_model, folder).metrics["acc1"] == 1.0


def test_a_set_without_samples_says_what_it_lacks(color_model, tmp_path):
    folder = make_set(tmp_path / "set", num_samples=0, replaced=[("0.tif", b""), ("0.json", b"")])
    result = score(color_model, folder)
    assert result.status == "failed"
    assert (
        "no sample with a picture (webp, png, jpg, jpeg) and a .cls file beside it" in result.error
    )
    assert "name ends at its first dot" in result.error


@pytest.mark.parametrize(
    ("count", "files", "kind", "part"),
    [
        ("1", ["0", "1", "2"], DamagedDataError, "1.tar"),
        ("2", ["0", "1", "00002"], DamagedDataError, "00002.tar"),
        ("2", ["0", "1", "copy"], DamagedDataError, "copy.tar"),
        ("2", ["0", "._0", "._1"], FileNotFoundError, "lacks test/1.tar (1 of 2 shards)"),
        ("3", ["0", "2"], FileNotFoundError, "lacks test/1.tar (1 of 3 shards)"),
        ("999999999", ["0", "1"], FileNotFoundError, "lacks test/2.tar (999999997 of 999999999"),
        ("9" * 5000, ["0"], DamagedDataError, "99999"),
        ("0", ["0"], DamagedDataError, "'0'"),
        ("-1", ["0"], DamagedDataError, "'-1'"),
        ("\N{SUPERSCRIPT TWO}", ["0"], DamagedDataError, "nshards.txt"),
    ],
)
def test_number_of_shards_is_that_of_the_folder(tmp_path, count, files, kind, part):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text(count, encoding="utf-8")
    for name in files:
        (tmp_path / f"test/{name}.tar").touch()
    with pytest.raises(kind) as caught:
        count_shards(str(tmp_path))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "template",
    ["a {c!r:>1000000000}", "{c.__class__}", "a {}", "a {class}", "a {0}", "a photo", "{c} {", ""],
)
def test_a_template_takes_the_name_of_a_class_and_nothing_else(color_model, tmp_path, template):
    folder = make_set(tmp_path / "set")
    (folder / "zeroshot_classification_templates.txt").write_text(f"a {{c}}\n{template}\nthe {{c}}")
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "line 2 of" in result.error
    assert "{c}" in result.error


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("classnames.txt", "".join(f"{n}\n" for n in range(100_001)), 100_000),
        ("zeroshot_classification_templates.txt", "{c}\n" * 1001, 1000),
    ],
)
def test_more_classes_or_templates_than_any_set_has_are_refused(
    color_model, tmp_path, file, text, limit
):
    folder = make_set(tmp_path / "set")
    (folder / file).write_text(text)
    result = score(color_model, folder)
    assert result.status == "failed"
    assert f"{file} must have at most {limit} lines, got {limit + 1}" in result.error


@pytest.mark.parametrize("text", ["number 0\n\nnumber 1", "\n0\n1\n2\n3", "", "\xff"])
def test_class_names_that_are_none_are_refused(color_model, tmp_path, text):
    folder = make_set(tmp_path / "set")
    (folder / "classnames.txt").write_text(text, encoding="latin-1")
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "classnames.txt" in result.error


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1e"])
def test_a_class_name_of_two_lines_does_not_move_the_labels_of_the_others(
    color_model, tmp_path, mark
):
    folder = make_set(tmp_path / "set")
    path = folder / "classnames.txt"
    text = path.read_text()
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert score(color_model, folder).status == "done"
    path.write_text(text.replace(" 1", f"{mark}1"), encoding="utf-8")
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "line 2 of" in result.error
    assert "classnames.txt" in result.error


def test_a_byte_order_mark_is_no_part_of_the_first_name_or_caption(color_model, tmp_path):
    plain = make_set(tmp_path / "plain")
    marked = make_set(tmp_path / "marked")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        path = marked / name
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_class_names(str(marked)) == read_class_names(str(plain))
    assert read_templates(str(marked)) == read_templates(str(plain))
    assert score(color_model, marked).metrics == score(color_model, plain).metrics
    path = tmp_path / "list.txt"
    path.write_text("marked\nplain\n", encoding="utf-8-sig")
    assert [line.name for line in read_list(path)] == ["marked", "plain"]


def test_a_shard_whose_member_states_a_petabyte_is_damaged_and_read_at_once(color_model, tmp_path):
    folder = make_set(tmp_path / "set")
    path = folder / "test/0.tar"
    header = tarfile.TarInfo("zz.bin")
    header.size = 2**50
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512 * -(-tar.getmembers()[-1].size // 512)
    path.write_bytes(path.read_bytes()[:end] + header.tobuf(tarfile.GNU_FORMAT))
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "test/0.tar cannot be read" in result.error


def test_a_set_of_shards_that_were_appended_is_not_scored_by_half(color_model, tmp_path):
    folder = make_set(tmp_path / "set")
    path = folder / "test/0.tar"
    path.write_bytes(path.read_bytes() * 2)
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "other data follow the end of the archive" in result.error


def test_names_are_put_where_the_slot_is_whatever_they_hold(tmp_path):
    (tmp_path / "classnames.txt").write_text("{c}\n {0!r} \n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c} of {c}\n")
    assert read_class_names(str(tmp_path)) == ["{c}", "{0!r}"]
    assert read_templates(str(tmp_path)) == ["a {c} of {c}"]


def test_classes_that_cannot_be_told_apart_or_never_occur_are_told(color_model, tmp_path, caplog):
    folder = make_set(tmp_path / "set")
    # As few as among ImageNet's, where two missiles and two sunglasses are of 1,000.
    names = [*(f"{index} of number {index % 12}" for index in range(20)), "3  OF number 3"]
    (folder / "classnames.txt").write_text("\n".join(names))
    assert score(color_model, folder).status == "done"
    assert "share a name: 3 of number 3" in caplog.text
    assert "has no picture of 17 of its 21 classes, the first is number 4" in caplog.text


def test_a_class_without_pictures_between_others_is_told(color_model, tmp_path, caplog):
    folder = tmp_path / "set"
    write_dataset(folder, [(0, 0), (2, 2)], kind="classification", num_classes=12)
    assert score(color_model, folder).status == "done"
    assert "has no picture of 10 of its 12 classes, the first is number 1" in caplog.text


@pytest.mark.parametrize("dtype", [np.int64, np.float32, bool])
@pytest.mark.parametrize("absent", [[], [1], [0, 3]])
def test_classes_that_no_picture_shows_are_told_with_what_they_do_to_map(
    color_model, tmp_path, caplog, absent, dtype
):
    rows = np.eye(4, dtype=dtype)
    rows[:, absent] = 0
    arrays = {f"{number}.npy": saved(np.save, row) for number, row in enumerate(rows)}
    folder = make_set(tmp_path / "set", kind="multilabel", replaced=arrays.items())
    (folder / "classnames.txt").write_text("".join(f"number {n}\n" for n in range(4)))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}")
    share = 1 - len(absent) / 4
    assert score(color_model, folder).metrics == {"mean_average_precision": share}
    told = [text for text in caplog.messages if "has no picture of" in text]
    assert len(told) == bool(absent)
    first = f"{len(absent)} of its 4 classes, the first is number {min(absent, default=0)};"
    assert all(first in text and "0 in mAP" in text for text in told)


def test_a_class_that_came_after_its_features_is_told(color_model, tmp_path):
    arrays = {f"{number}.npy": saved(np.save, row) for number, row in enumerate(np.eye(4))}
    folder = make_set(tmp_path / "set", kind="multilabel", replaced=arrays.items())
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}")
    for names, status in ((4, "done"), (5, "failed")):
        (folder / "classnames.txt").write_text("".join(f"number {n}\n" for n in range(names)))
        result = score(color_model, folder, output=tmp_path / "out")
        assert result.status == status
    assert "classnames.txt must name a class for each of the 4 numbers" in result.error
    assert "got 5 names" in result.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("suite", ["zeroshot-classification", "compositionality"])
def test_pictures_that_a_transform_leaves_in_their_sizes_are_told_in_a_sentence(
    color_model, tmp_path, suite, workers
):
    if suite == "compositionality":
        write_pairs(tmp_path / "set", {"add_att": [(0, 0, 1), (1, 1, 2)]})
        (tmp_path / "set/val2017/0.png").write_bytes(saved_image((8, 16)))
    else:
        replaced = [("0.png", saved_image((8, 16)))]
        make_set(tmp_path / "set", replaced=replaced)
    result = score(color_model, tmp_path / "set", suite=suite, workers=workers)
    assert result.status == "failed"
    assert result.error.startswith("samples of a batch differ: stack expects each tensor to be")


@pytest.mark.parametrize(
    ("samples", "kind", "num_classes", "words"),
    [
        ([(0, 0), (1, 0)], "classification", 1, "classnames.txt must name two classes"),
        ([(0, ["it is 0"])], "retrieval", 0, "must have two pictures or more"),
    ],
)
def test_a_set_that_each_model_solves_has_no_score(
    color_model, tmp_path, samples, kind, num_classes, words
):
    folder = tmp_path / "set"
    write_dataset(folder, samples, kind=kind, num_classes=num_classes)
    result = score(color_model, folder, suite=f"zeroshot-{kind}")
    assert result.status == "failed"
    assert words in result.error


@pytest.mark.parametrize("num_repeated", [1, 6])
def test_captions_that_are_repeated_are_told(color_model, tmp_path, caplog, num_repeated):
    captions = [f"it is {number if number >= num_repeated else 0}" for number in range(12)]
    folder = tmp_path / "set"
    write_dataset(folder, [(n, [c]) for n, c in enumerate(captions)], kind="retrieval")
    assert score(color_model, folder, suite="zeroshot-retrieval").status == "done"
    is_told = "captions of set are repeated" in caplog.text
    assert is_told == (num_repeated > 1)
    assert "'it is 0'" in caplog.text or not is_told


@pytest.mark.parametrize(
    ("captions", "sentence"),
    [
        (["it is {}", "It  is {}"], "captions of set are repeated for one picture, and each of"),
        (["it is {}", "it is 0"], "captions of set are repeated, and one counts for its own"),
        (["it is {}", "it shows {}"], ""),
    ],
)
def test_captions_that_one_picture_repeats_are_not_taken_for_those_of_others(
    color_model, tmp_path, caplog, captions, sentence
):
    folder = tmp_path / "set"
    samples = [(n, [caption.format(n) for caption in captions]) for n in range(12)]
    write_dataset(folder, samples, kind="retrieval")
    assert score(color_model, folder, suite="zeroshot-retrieval").status == "done"
    told = [message for message in caplog.messages if "captions of" in message]
    assert len(told) == bool(sentence)
    assert all(message.startswith(sentence) and "'it is 0'" in message for message in told)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("num_repeated", "sentence"),
    [(1, ""), (6, "12 samples show 7 different pictures; "), (12, "show 1 different picture; ")],
)
def test_pictures_that_are_repeated_are_told_in_each_call(
    color_model, tmp_path, caplog, num_repeated, sentence, workers
):
    folder = tmp_path / "set"
    samples = [(n if n >= num_repeated else 0, [f"it is {n}"]) for n in range(12)]
    write_dataset(folder, samples, kind="retrieval", num_shards=2)
    eval_sets = [get_suite("zeroshot-retrieval").eval_set("set", str(folder))]
    # The second finds the features that the first has kept.
    for _ in range(2):
        caplog.clear()
        evaluate(color_model, eval_sets, workers=workers, output=tmp_path / "out", force=True)
        is_told = "pictures of set are repeated" in caplog.text
        assert is_told == (num_repeated > 1)
        assert sentence in caplog.text


def test_blank_captions_are_told_and_change_no_score(color_model, tmp_path, caplog):
    captions = [[f"it is {number}", f"number {number}"] for number in range(6)]
    write_dataset(tmp_path / "set", list(enumerate(captions)), kind="retrieval")
    expected = score(color_model, tmp_path / "set", suite="zeroshot-retrieval").metrics
    assert "blank" not in caplog.text
    captions[1].insert(1, " ")
    captions[4].insert(0, "")
    write_dataset(tmp_path / "blanks", list(enumerate(captions)), kind="retrieval")
    result = score(color_model, tmp_path / "blanks", suite="zeroshot-retrieval")
    assert result.metrics == expected
    assert "blanks leaves out 2 blank captions" in caplog.text


@pytest.mark.parametrize("names", [["a"] * 12, ["cat", "Cat"], [*"abcdefghijklmnopqrs", "a"] * 2])
def test_classes_of_which_many_share_a_name_are_no_set(color_model, tmp_path, names):
    folder = make_set(tmp_path / "set")
    (folder / "classnames.txt").write_text("\n".join(names))
    with pytest.raises(DamagedDataError, match=r"classnames\.txt must give .* got '(a|cat)'"):
        read_class_names(str(folder))
    assert score(color_model, folder).status == "failed"


def test_a_type_of_data_that_is_none_is_refused(color_model, tmp_path):
    folder = make_set(tmp_path / "set")
    (folder / "dataset_type.txt").write_text("segmentation")
    result = score(color_model, folder)
    assert result.status == "failed"
    assert "'segmentation'" in result.error


@pytest.mark.parametrize(("workers", "num_shards"), [(0, 3), (2, 3)])
def test_samples_come_as_from_clip_benchmark(tmp_path, color_model, workers, num_shards):
    samples = [(n % 12, n % 12) for n in range(23)]
    write_dataset(
        tmp_path / "set", samples, kind="classification", num_shards=num_shards, num_classes=12
    )
    theirs = build_dataset(
        "wds/set",
        root=str(tmp_path / "set"),
        transform=color_model.transform,
        split="test",
        task="zeroshot_classification",
    )
    expected = torch.utils.data.DataLoader(theirs.batched(3), batch_size=None, num_workers=workers)
    reading = Reading(color_model.transform, batch_size=3, workers=workers)
    ours = open_samples(str(tmp_path / "set"), "test", reading, num_shards=num_shards, title="set")
    for (pictures, labels, _), (their_pictures, their_labels) in zip(ours, expected, strict=True):
        assert torch.equal(pictures, their_pictures)
        assert torch.equal(labels, torch.as_tensor(their_labels))


def test_gray_of_16_bits_is_the_picture_that_8_bits_are(tmp_path, color_model):
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16)
    shown = []
    for name, pixels in (("8", gray.astype(np.uint8)), ("16", gray * 257)):
        picture = saved(lambda stream, image: image.save(stream, "PNG"), Image.fromarray(pixels))
        folder = make_set(tmp_path / name, replaced={"0.png": picture})
        reading = Reading(color_model.transform)
        ((pictures, *_),) = open_samples(str(folder), "test", reading, num_shards=1, title="set")
        shown.append(pictures)
    assert torch.equal(*shown)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal_shows_how_many_are_left(
    color_model, data_root, dataset_list, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    eval_sets = load_suite(datasets=str(dataset_list), data_root=str(data_root))
    evaluate(color_model, eval_sets[:1], workers=0)
    assert "six" in terminal.getvalue()
    assert "/12 " in terminal.getvalue()


def test_a_damaged_shard_has_no_bar_that_hides_its_reason(color_model, damaged_folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert "test/0.tar" in score(color_model, damaged_folder).error


def test_a_set_in_a_folder_of_any_name_is_read(color_model, tmp_path):
    folder = make_set(tmp_path / "plain")
    odd = shutil.move(folder, tmp_path / "it's {0..9} odd")
    assert score(color_model, Path(odd)).metrics["acc1"] == 1.0
