import errno
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from functools import partial
from pathlib import Path

import pytest

from clip_pgs.common import CONFIGS
from clip_pgs.evaluation import evaluate, load_suite
from clip_pgs.evaluation.datasets import (
    CAPTION_PAIR_SPLITS,
    HUB_ROOT,
    EvalSet,
    check_presence,
    locate,
)
from clip_pgs.evaluation.suites import read_list, suites


def names(suite, datasets):
    return [eval_set.name for eval_set in load_suite(suite, datasets=datasets)]


def test_paper_lists_hold_the_sets_of_its_five_evaluations():
    classification = names("zeroshot-classification", "paper")
    assert len(classification) == len(set(classification)) == 17
    assert {"food101", "vtab/cifar10", "fgvc_aircraft", "vtab/pcam"} <= set(classification)
    assert names("zeroshot-retrieval", "paper") == ["mscoco_captions", "flickr8k", "flickr30k"]
    assert names("linear-probe", "paper") == ["vtab/cifar10", "vtab/cifar100", "imagenet1k"]
    variants = ["imagenetv2", "imagenet-a", "imagenet-r", "imagenet-o", "imagenet_sketch"]
    assert names("robustness", "paper") == ["imagenet1k", *variants]
    splits = {f"sugar_crepe/{split}" for split in CAPTION_PAIR_SPLITS}
    assert set(names("compositionality", "paper")) == splits
    assert len(load_suite("all", datasets="paper")) == 17 + 3 + 3 + 6 + 7


def test_demo_lists_of_all_suites_are_the_default():
    found = {(s.suite, s.name): s.location for s in load_suite()}
    assert list(dict.fromkeys(suite for suite, _ in found)) == [suite.name for suite in suites()]
    for suite in ("zeroshot-classification", "linear-probe", "robustness"):
        assert found[suite, "shape"] == "data/demo/eval/shape"
    assert found["zeroshot-retrieval", "retrieval"] == "data/demo/eval/retrieval"
    assert found["compositionality", "sugar_crepe/swap_att"] == "data/demo/eval/sugar_crepe"


@pytest.mark.parametrize("datasets", ["demo", "paper"])
def test_first_set_of_robustness_is_the_one_the_others_vary(datasets):
    plain = [s.name for s in load_suite("robustness", datasets=datasets) if s.is_reference]
    assert plain == ["shape" if datasets == "demo" else "imagenet1k"]


def test_own_list_goes_to_the_suites_by_declared_type(dataset_list, data_root):
    options = {"datasets": str(dataset_list), "data_root": str(data_root)}
    found = {s.name: s.task for s in load_suite("all", **options)}
    assert found == {"six": "zeroshot_classification", "pairs": "zeroshot_retrieval"}
    assert [s.name for s in load_suite("zeroshot-retrieval", **options)] == ["pairs"]


@pytest.mark.parametrize("name", ["configs/eval/{}", "{}", "goods_retrieval"])
def test_a_list_of_the_package_is_found_from_any_folder(tmp_path, data_root, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    options = {"datasets": name.format("goods_retrieval.txt"), "data_root": str(data_root)}
    (found,) = load_suite("all", **options)
    assert found.name == "products_small_retrieval"
    # A file of one's own goes first.
    Path("goods_retrieval.txt").write_text("pairs")
    options["datasets"] = "goods_retrieval.txt"
    assert [each.name for each in load_suite("all", **options)] == ["pairs"]


LISTS = sorted((CONFIGS / "eval").glob("*.txt"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_a_list_of_the_package_names_its_suite_where_no_set_says_its_type(tmp_path, path):
    (suite,) = [s.name for s in suites() if s.name.split("-")[-1] in path.stem]
    sets = load_suite(suite, datasets=path.stem, data_root=str(tmp_path))
    assert len(sets) == len(read_list(path))


def test_lines_of_an_own_list_marked_for_a_suite_go_there_alone(tmp_path, data_root):
    path = tmp_path / "list.txt"
    path.write_text("linear-probe: six\nrobustness: six\nsugar_crepe/add_att\n")
    options = {"datasets": str(path), "data_root": str(data_root)}
    found = [(s.suite, s.name, s.task) for s in load_suite("all", **options)]
    assert found == [
        ("linear-probe", "six", "linear_probe"),
        ("robustness", "six", "zeroshot_classification"),
        ("compositionality", "sugar_crepe/add_att", "image_caption_selection"),
    ]


def test_a_comment_begins_a_line_or_follows_white_space(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# all\n  # of them\na#1/set\t#x\nb # c #d\n#e\nlinear-probe: f#2# #\n")
    found = [(line.suite, line.name) for line in read_list(path)]
    assert found == [(None, "a#1/set"), (None, "b"), ("linear-probe", "f#2#")]


@pytest.mark.parametrize("suite", ["linear-probe", "robustness", "zeroshot-classification"])
def test_own_list_belongs_to_the_one_suite_asked_for(dataset_list, data_root, suite):
    found = load_suite(suite, datasets=str(dataset_list), data_root=str(data_root))
    assert [(s.suite, s.name) for s in found] == [(suite, "six")]


def test_caption_pairs_are_found_in_their_folder_and_in_the_root_itself(data_root):
    folder = str(data_root / "sugar_crepe")
    name = "sugar_crepe/add_att"
    assert locate(name, str(data_root)) == (name, folder)
    assert locate(name, folder) == (name, folder)
    assert locate(f"{folder}/add_att", ".") == (name, folder)
    assert locate(name, "/sets/{dataset_cleaned}") == (name, "/sets/sugar_crepe")


@pytest.mark.parametrize("name", ["hard_crepe", "a/sugar_crepe"])
def test_caption_pairs_that_are_not_there_are_no_other_set_s(data_root, dataset_list, name):
    dataset_list.write_text(f"{name}/add_att\n")
    for root in (data_root, data_root / "sugar_crepe"):
        (found,) = load_suite(datasets=str(dataset_list), data_root=str(root))
        assert found.location == str(root / name)
        assert check_presence(found).state == "missing"


@pytest.mark.parametrize("folder", ["vtab/cifar10", "vtab-cifar10", "wds_vtab-cifar10"])
def test_name_is_found_under_each_of_its_folder_names(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    found = locate("wds/vtab/cifar10", str(tmp_path))
    assert found == ("vtab/cifar10", str(tmp_path / folder))


def test_the_home_folder_is_found_below_any_root(data_root, monkeypatch):
    monkeypatch.setenv("HOME", str(data_root))
    assert locate("~/six", "elsewhere") == ("six", str(data_root / "six"))


def test_a_path_that_no_disk_has_is_that_of_a_missing_set(color_model):
    name, location = locate("n" * 300 + "/six", ".")
    eval_set = EvalSet(name, location, "zeroshot-classification", "zeroshot_classification")
    (result,) = evaluate(color_model, [eval_set], workers=0)
    assert (result.status, result.error) == ("missing", f"no folder {location}")
    assert check_presence(eval_set).state == "missing"


def test_absolute_path_needs_no_root(data_root):
    assert locate(str(data_root / "six"), ".") == ("six", str(data_root / "six"))


def test_template_is_filled_as_clip_benchmark_does():
    name, location = locate("wds/vtab/cifar10", "/sets/wds_{dataset_cleaned}")
    assert (name, location) == ("vtab/cifar10", "/sets/wds_vtab-cifar10")
    assert locate("wds/vtab/cifar10", "/sets/{dataset}")[1] == "/sets/vtab/cifar10"
    assert locate("wds/cars", "hub")[1] == HUB_ROOT.replace("{dataset_cleaned}", "cars")


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("six", {"name": "zero-shot"}, "unknown suite 'zero-shot'"),
        ("six", {"data_root": "nowhere"}, "data root nowhere is not a folder"),
        ("six", {"datasets": "nolist"}, "unknown data set list 'nolist'"),
        ("six", {"datasets": "my/list.txt"}, "list 'my/list.txt': there is no such file"),
        ("# nothing\n\n", {}, "names no data set"),
        ("six", {"name": "zeroshot-retrieval"}, "names no data set of the suite"),
        ("six\nwds/six", {}, "two data sets named six"),
        ("six\na\0b", {}, r"line 2 of .*list.txt must name a data set .* got .a\\x00b"),
        ("six\n" + "n" * 10_000, {}, "line 2 of .*list.txt must name a data set in at most 4096"),
        ("six\n" + "n" * 300, {}, "must name data sets by 1 to 150 letters"),
        ("/" + "n/" * 2000 + "\u00e9" * 80, {}, "must name data sets by 1 to 150 letters"),
        ("six\n*", {}, "must name data sets by 1 to 150 letters, .* got '\\*'"),
        ("nosuite: six", {}, "line 1 of .*list.txt must name a suite before its colon, one of"),
        ("linear_probe: six", {}, "linear-probe, .*, got 'linear_probe'"),
        ("a/b\na-b", {}, "two data sets named a/b or a-b"),
        ("robustness: pairs", {}, "marks pairs for robustness, which cannot evaluate retrieval"),
    ],
)
def test_bad_request_is_told_in_a_sentence(tmp_path, data_root, text, options, sentence):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_suite(**{"datasets": str(path), "data_root": str(data_root), **options})


@pytest.mark.parametrize("reason", ["is gone", "declares nonsense", "may not be read"])
def test_a_marked_set_whose_type_is_not_known_takes_no_other_away(
    color_model, tmp_path, data_root, monkeypatch, reason
):
    root = shutil.copytree(data_root, tmp_path / "sets")
    declared = root / "pairs/dataset_type.txt"
    if reason == "is gone":
        shutil.rmtree(root / "pairs")
    elif reason == "declares nonsense":
        declared.write_text("nonsense")
    else:
        forbid(monkeypatch, declared)
    path = tmp_path / "list.txt"
    path.write_text("zeroshot-retrieval: pairs\nzeroshot-classification: six\n")
    eval_sets = load_suite(datasets=str(path), data_root=str(root))
    classified, retrieved = evaluate(color_model, eval_sets, workers=0)
    assert classified.status == "done"
    assert (retrieved.suite, retrieved.dataset) == ("zeroshot-retrieval", "pairs")
    assert retrieved.status == ("missing" if reason == "is gone" else "failed")
    assert str(root / "pairs") in retrieved.error


def forbid(monkeypatch, path):
    """Let a file be opened by nobody, as its owner's mode says to all but root."""
    opened = Path.open

    def refusing(self, *args, **options):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refusing)


def test_sets_are_read_over_http(color_model, dataset_list, served):
    eval_sets = load_suite(datasets=str(dataset_list), data_root=served.root)
    results = evaluate(color_model, eval_sets, workers=0)
    assert [result.status for result in results] == ["done", "done"]
    assert results[0].metrics["acc1"] == 0.75


@pytest.fixture
def score(color_model, dataset_list, served, tmp_path, caplog):
    """Return what scores both sets of the server and returns how many were done before."""

    def score_both():
        caplog.clear()
        eval_sets = load_suite(datasets=str(dataset_list), data_root=served.root)
        with caplog.at_level("INFO"):
            evaluate(color_model, eval_sets, workers=0, output=tmp_path / "out")
        return caplog.text.count("done before")

    return score_both


def kept(tmp_path, name):
    """Return what the result file of the first set holds under a name."""
    return json.loads((tmp_path / "out/zeroshot_classification_six.json").read_text())[name]


def test_a_set_that_changed_on_its_server_is_scored_again(score, served, tmp_path):
    assert (score(), kept(tmp_path, "samples")) == (0, 12)
    assert (score(), kept(tmp_path, "samples")) == (2, 12)
    shard = served.folder / "six/test/0.tar"
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shard, "w") as tar:
        for member, content in members[:-2]:
            tar.addfile(member, io.BytesIO(content))
    # A server tells whole seconds, and the tar's padding makes both of one size.
    os.utime(shard, (0, 0))
    assert score() == 1
    assert kept(tmp_path, "samples") < 12


@pytest.mark.parametrize(
    ("file_name", "workers"),
    # Workers read shards alone.
    [("classnames.txt", 0), ("dataset_type.txt", 0), ("test/0.tar", 0), ("test/0.tar", 1)],
)
@pytest.mark.parametrize("fault", ["cut", "coded", 429, 500])
def test_an_answer_that_cannot_be_read_takes_one_set_alone(
    color_model, dataset_list, served, fault, file_name, workers
):
    served.faults[f"/six/{file_name}"] = fault
    names = {"six": "zeroshot-classification", "pairs": "zeroshot-retrieval"}
    dataset_list.write_text("".join(f"{suite}: {name}\n" for name, suite in names.items()))
    eval_sets = load_suite(datasets=str(dataset_list), data_root=served.root)
    classified, retrieved = evaluate(color_model, eval_sets, workers=workers)
    assert retrieved.status == "done"
    assert classified.status == "missing"
    assert f"six/{file_name} cannot be read: " in classified.error
    assert not {"damaged", "Traceback"} & set(classified.error.replace("(", " ").split())
    if file_name == "classnames.txt":
        presence = check_presence(eval_sets[0])
        assert (presence.state, presence.reason) == ("missing", classified.error)


def test_a_number_outlives_a_server_that_fails_and_one_that_tells_nothing_redoes_it(
    score, served, tmp_path
):
    assert (score(), kept(tmp_path, "status")) == (0, "done")
    os.utime(served.folder / "six/test/1.tar", (1, 1))
    for fault in ("cut", 404, 503):
        served.faults["/six/test/1.tar"] = fault
        assert (score(), kept(tmp_path, "status")) == (1, "done")
    served.faults.clear()
    assert (score(), kept(tmp_path, "status")) == (1, "done")
    assert (score(), kept(tmp_path, "status")) == (2, "done")
    served.head_fault = 405
    assert (score(), kept(tmp_path, "status")) == (0, "done")


@pytest.mark.parametrize("fault", [429, 503])
def test_a_server_without_time_for_a_question_takes_no_number_away(score, served, tmp_path, fault):
    assert (score(), kept(tmp_path, "status")) == (0, "done")
    served.head_fault = fault
    score()
    assert kept(tmp_path, "status") == "done"
    served.head_fault = None
    assert score() == 2
    # It fails when the set is read, after it was found and compared.
    os.utime(served.folder / "pairs/test/0.tar", (1, 1))
    faults = served.faults["/pairs/dataset_type.txt"] = [None, None, fault]
    assert score() == 1
    assert faults == []
    assert json.loads((tmp_path / "out/zeroshot_retrieval_pairs.json").read_text())["samples"] > 0


def test_a_set_is_not_scored_as_one_of_a_type_that_was_guessed(dataset_list, served):
    served.faults["/pairs/dataset_type.txt"] = 503
    with pytest.raises(
        ValueError, match=r"type of pairs is unknown, .* like 'zeroshot-retrieval: "
    ):
        load_suite(datasets=str(dataset_list), data_root=served.root)
    dataset_list.write_text("zeroshot-retrieval: pairs\n")
    (pairs,) = load_suite(datasets=str(dataset_list), data_root=served.root)
    assert pairs.suite == "zeroshot-retrieval"


def test_a_password_in_the_address_is_refused_and_not_repeated(dataset_list):
    root = "http://me:s3cret@127.0.0.1/{dataset}"
    with pytest.raises(ValueError, match="no user name or password") as error:
        load_suite(datasets=str(dataset_list), data_root=root)
    assert "s3cret" not in str(error.value)


class Served(http.server.ThreadingHTTPServer):
    """A server of a folder, and `faults`: how it answers what is asked for at a path.

    A list of them is taken one by one; `head_fault` is how it answers who asks what there is.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.folder, self.faults, self.head_fault = folder, {}, None
        self.root = f"http://127.0.0.1:{self.server_port}/{{dataset_cleaned}}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_HEAD(self):
        if self.server.head_fault is None:
            super().do_HEAD()
        else:
            self.send_error(self.server.head_fault)

    def do_GET(self):
        fault = self.server.faults.get(self.path)
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        if fault is None:
            super().do_GET()
        elif isinstance(fault, int):
            self.send_error(fault)
        else:
            self.send_response(200)
            if fault == "coded":
                self.send_header("Content-Encoding", "gzip")
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, data_root, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = shutil.copytree(data_root, tmp_path / "served")
    with Served(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_damaged_picture_fails_the_splits_that_show_it_alone(
    color_model, tmp_path, data_root, dataset_list
):
    root = shutil.copytree(data_root, tmp_path / "sets")
    (root / "sugar_crepe/val2017/5.png").write_bytes(b"junk")
    dataset_list.write_text("sugar_crepe/add_att\nsugar_crepe/swap_obj\n")
    eval_sets = load_suite("compositionality", datasets=str(dataset_list), data_root=str(root))
    results = {result.dataset: result for result in evaluate(color_model, eval_sets, workers=0)}
    assert results["sugar_crepe/add_att"].metrics == {"acc": 0.75}
    assert results["sugar_crepe/swap_obj"].status == "failed"
    assert "5.png cannot be decoded" in results["sugar_crepe/swap_obj"].error
