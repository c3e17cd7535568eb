import io
import json
import os
import shutil
import tarfile

import pytest

from clip_pgs.data.shards import expand_shards
from clip_pgs.data.tar import index_shards
from clip_pgs.training.checks import check_options
from clip_pgs.training.data_checks import held_out_digests, training_files
from clip_pgs.training.options import parse_options
from clip_pgs.training.run_folder import save_indexes, save_options
from clip_pgs.training.validation import metrics_table
from support.runs import flags, run, write_csv
from support.runs import write_shards as write_samples


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that checks a run on shards which resumes, given the pattern of now."""
    monkeypatch.chdir(tmp_path)
    samples(tmp_path / "train", num_shards=3)
    first = parse_options(resumed("train/*.tar")[:-2])
    (tmp_path / "logs" / "demo").mkdir(parents=True)
    save_options(first, tmp_path / "logs" / "demo", files=training_files(first))
    return lambda pattern="train/*.tar": check_options(parse_options(resumed(pattern)))


def samples(folder, **options):
    write_samples(folder, samples_per_shard=2, **options)
    (folder / "sizes.json").unlink()


def resumed(data):
    argv = ["--model", "ViT-B-16", "--warmup", "2", "--name", "demo", "--batch-size", "2"]
    return [*argv, "--train-data", str(data), "--resume", "latest"]


def remove(folder):
    (folder / "00001.tar").unlink()


def add(folder):
    shutil.copy(folder / "00001.tar", folder / "00001b.tar")


def grow(folder):
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes() + bytes(512))


def miscount(folder):
    (folder / "sizes.json").write_text('{"00001.tar": 1}')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, "00001.tar: 10240 bytes, 2 samples is gone"),
        (add, "00001b.tar: 10240 bytes, 2 samples is new"),
        (grow, "00001.tar: 10752 bytes, 2 samples is new"),
        (miscount, "00001.tar: 10240 bytes, 1 samples is new"),
    ],
)
def test_other_shards_below_a_pattern_are_refused_by_name(trained, tmp_path, change, words):
    trained()
    change(tmp_path / "train")
    with pytest.raises(ValueError, match="--accept-changes") as refused:
        trained()
    assert words in str(refused.value)


@pytest.mark.parametrize("has_sizes", [False, True])
def test_a_shard_of_other_pairs_but_the_same_size_is_refused_by_name(
    trained, tmp_path, has_sizes, monkeypatch
):
    shards = sorted((tmp_path / "train").glob("*.tar"))
    if has_sizes:
        sizes = {shard.name: 2 for shard in shards}
        (tmp_path / "train" / "sizes.json").write_text(json.dumps(sizes))
    # As in a new process, which has indexed nothing before its stream does.
    monkeypatch.setattr("clip_pgs.data.tar._counted", {})
    options = parse_options(resumed("train/*.tar")[:-2])
    folder = tmp_path / "logs" / "demo"
    save_options(options, folder, files=training_files(options))
    index_shards(expand_shards("train/*.tar"))
    save_indexes(options, folder)
    trained()

    content = shards[1].read_bytes()
    for other in (other_names(content), longer_caption(content)):
        assert len(other) == len(content)
        shards[1].write_bytes(other)
        with pytest.raises(ValueError, match="--accept-changes") as refused:
            trained()
        assert "train_data 00001.tar: list of members " in str(refused.value)
        assert "00000.tar" not in str(refused.value)
    shards[1].write_bytes(content)
    trained()
    saved = json.loads((folder / "options.json").read_text())
    # A run of before has no digests and goes on.
    del saved["train_indexes"]
    (folder / "options.json").write_text(json.dumps(saved))
    shards[1].write_bytes(other)
    trained()


def rewritten(content, change):
    """Return an archive with each member changed."""
    file = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=file, mode="w") as new,
    ):
        for member in old:
            data = change(member, old.extractfile(member).read())
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return file.getvalue()


def other_names(content):
    def change(member, data):
        member.name = f"x{member.name[1:]}"
        return data

    return rewritten(content, change)


def longer_caption(content):
    return rewritten(content, lambda m, data: data + b"s" * m.name.endswith(".txt"))


@pytest.mark.parametrize("pattern", ["train/{00000..00002}.tar", "{}/train/*.tar", "moved/*.tar"])
def test_the_same_shards_are_accepted_wherever_they_lie(trained, tmp_path, pattern):
    shutil.copytree(tmp_path / "train", tmp_path / "moved")
    trained(pattern.replace("{}", str(tmp_path)))


def test_the_same_shards_in_another_order_are_refused(trained):
    with pytest.raises(ValueError, match="another order"):
        trained("train/00001.tar::train/00000.tar::train/00002.tar")


@pytest.fixture
def trained_table(tmp_path, monkeypatch):
    """The table of a run that began in the working folder."""
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "pairs")
    first = parse_options(resumed(table)[:-2])
    (tmp_path / "logs" / "demo").mkdir(parents=True)
    save_options(first, tmp_path / "logs" / "demo", files=training_files(first))
    return table


def test_a_table_with_another_row_is_refused(trained_table, tmp_path):
    check_options(parse_options(resumed("pairs/pairs.csv")))
    rows = trained_table.read_text()
    trained_table.write_text(f"{rows}{tmp_path}/pairs/0.png\tred\n")
    with pytest.raises(ValueError, match=r"16 samples is gone, .* 17 samples is new"):
        check_options(parse_options(resumed(trained_table)))


def test_a_table_in_another_order_is_refused(trained_table):
    head, *rows = trained_table.read_text().splitlines(keepends=True)
    trained_table.write_text("".join([head, *reversed(rows)]))
    with pytest.raises(ValueError, match=r"\(train_data pairs.csv: \w+ is gone, .* is new\)"):
        check_options(parse_options(resumed(trained_table)))


def test_a_run_of_before_that_kept_the_pattern_alone_goes_on(trained, tmp_path):
    path = tmp_path / "logs" / "demo" / "options.json"
    saved = json.loads(path.read_text())
    del saved["train_files"]
    path.write_text(json.dumps(saved))
    trained()
    with pytest.raises(ValueError, match="train_data 'train"):
        trained("train/{00000..00001}.tar")


def halve(table):
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:5]))
    return table


def reword(table):
    text = table.read_text()
    table.write_text(text.replace("red", "tan"))
    assert text != table.read_text()
    return table


def replace_by_shards(table):
    return write_samples(table.parent / "other", num_shards=1, samples_per_shard=8)


def keep(table):
    return table


@pytest.mark.parametrize("change", [halve, reword, replace_by_shards, keep])
def test_a_run_that_goes_on_tells_other_validation_data(tmp_path, caplog, change):
    caplog.set_level("INFO")
    table = write_csv(tmp_path / "val", num_samples=8)
    options = {"train_data": write_csv(tmp_path / "train"), "resume": "latest"}
    run(tmp_path, val_data=table, epochs=1, **options)
    assert "other data" not in caplog.text
    caplog.clear()
    folder = run(tmp_path, val_data=change(table), epochs=2, **options)
    sentences = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = [sentence for sentence in sentences if "val_data" in sentence]
    assert len(told) == (change is not keep)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, second = [line["data"]["val_data"] for line in lines if line["kind"] == "val"]
    assert (first == second) == (change is keep)


@pytest.mark.parametrize("change", [other_names, longer_caption])
def test_validation_shards_of_the_same_names_and_sizes_tell_other_members(tmp_path, change):
    pattern = write_samples(tmp_path, num_shards=1, samples_per_shard=2)
    (shard,) = expand_shards(pattern)
    digests = []
    content = (tmp_path / "00000.tar").read_bytes()
    for data in (content, change(content), content):
        (tmp_path / "00000.tar").write_bytes(data)
        index_shards([shard])
        options = parse_options(flags(tmp_path, val_data=pattern))
        digests.append(held_out_digests(options)["val_data"])
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("name", ["imagenet_val", "imagenet_v2"])
def test_a_folder_of_imagenet_tells_other_images_and_not_where_it_lies(tmp_path, name):
    def digest(folder):
        return held_out_digests(parse_options(flags(tmp_path, **{name: folder})))[name]

    (tmp_path / "a" / "n01").mkdir(parents=True)
    (tmp_path / "a" / "n01" / "0.png").write_bytes(b"image")
    before = digest(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert digest(tmp_path / "b") == before
    (tmp_path / "b" / "n01" / "1.png").write_bytes(b"image")
    assert digest(tmp_path / "b") != before


R1, TOP1, AVERAGE = "image_to_text_R@1", "imagenet-zeroshot-val-top1", "zeroshot/average/acc1"
SETS = {"zeroshot/one": "a", "zeroshot/two": "b"}


@pytest.mark.parametrize(
    ("name", "earlier", "now", "is_compared"),
    [
        (R1, {"data": {"val_data": "a"}}, {"data": {"val_data": "a"}}, True),
        (R1, {"data": {"val_data": "a"}}, {"data": {"val_data": "b"}}, False),
        # Of an earlier version.
        (R1, {"num_samples": 40}, {"num_samples": 40, "data": {"val_data": "b"}}, True),
        (R1, {"num_samples": 40}, {"num_samples": 19, "data": {"val_data": "b"}}, False),
        (R1, {"data": {"imagenet_val": "a"}}, {"data": {"imagenet_val": "b"}}, True),
        (TOP1, {"data": {"imagenet_val": "a"}}, {"data": {"imagenet_val": "b"}}, False),
        (TOP1, {"num_samples": 40}, {"num_samples": 19}, True),
        (AVERAGE, {"data": SETS}, {"data": SETS}, True),
        (AVERAGE, {"data": SETS}, {"data": {**SETS, "zeroshot/two": "c"}}, False),
        (AVERAGE, {"data": SETS}, {"data": {"zeroshot/one": "a"}}, False),
        (AVERAGE, {"data": SETS}, {"data": {**SETS, "probe/two": "c"}}, True),
        (AVERAGE.replace("/", "@pgs/", 1), {"data": SETS}, {"data": {"zeroshot/one": "c"}}, False),
        ("zeroshot/one/acc1", {"data": SETS}, {"data": {**SETS, "zeroshot/two": "c"}}, True),
        ("zeroshot/two/acc1", {"data": SETS}, {"data": {**SETS, "zeroshot/two": "c"}}, False),
    ],
)
def test_the_best_so_far_is_of_the_same_data(name, earlier, now, is_compared):
    text = metrics_table([{"epoch": 2, name: 0.5, **earlier}, {"epoch": 3, name: 0.25, **now}])
    assert ("0.5000 after epoch 2" in text) == is_compared
    assert text.count("*") == (not is_compared)


def test_the_table_has_the_averages_of_each_suite_or_its_sets():
    averages = [
        "robust/id_average/acc1",
        "robust/ood_average/acc1",
        "robust/average_of_2_of_3/acc1",
    ]
    sets = ["robust/imagenet-a/acc1", "own/average-joe/acc1", "own/two/acc1", "own/average/x/acc1"]
    names = [*averages, *sets, "image_to_text_R@1"]
    text = metrics_table([{"epoch": 1, **dict.fromkeys(names, 0.5)}])
    shown = [name for name in names if f"\n{name} " in text]
    assert shown == [*averages, "own/average/x/acc1", "image_to_text_R@1"]
    text = metrics_table([{"epoch": 1, **dict.fromkeys([*averages, *sets[:3]], 0.5)}])
    assert [name for name in sets if f"\n{name} " in text] == sets[1:3]
