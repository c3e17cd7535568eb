import http.server
import threading
from functools import partial

import pytest

from clip_pgs.evaluation import evaluate, load_suite
from clip_pgs.evaluation.datasets import HUB_ROOT, locate


def test_paper_lists_hold_its_twenty_sets():
    names = [s.name for s in load_suite("zeroshot-classification", datasets="paper")]
    assert len(names) == len(set(names)) == 17
    assert {"food101", "vtab/cifar10", "fgvc_aircraft", "vtab/pcam"} <= set(names)
    retrieval = [s.name for s in load_suite("zeroshot-retrieval", datasets="paper")]
    assert retrieval == ["mscoco_captions", "flickr8k", "flickr30k"]
    assert len(load_suite("all", datasets="paper")) == 20


def test_demo_lists_are_the_default():
    found = {s.name: (s.suite, s.location) for s in load_suite()}
    assert found == {
        "shape": ("zeroshot-classification", "data/demo/eval/shape"),
        "color": ("zeroshot-classification", "data/demo/eval/color"),
        "retrieval": ("zeroshot-retrieval", "data/demo/eval/retrieval"),
    }


def test_own_list_goes_to_the_suites_by_declared_type(dataset_list, data_root):
    options = {"datasets": str(dataset_list), "data_root": str(data_root)}
    found = {s.name: s.task for s in load_suite("all", **options)}
    assert found == {"six": "zeroshot_classification", "pairs": "zeroshot_retrieval"}
    assert [s.name for s in load_suite("zeroshot-retrieval", **options)] == ["pairs"]


@pytest.mark.parametrize("folder", ["vtab/cifar10", "vtab-cifar10", "wds_vtab-cifar10"])
def test_name_is_found_under_each_of_its_folder_names(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    found = locate("wds/vtab/cifar10", str(tmp_path))
    assert found == ("vtab/cifar10", str(tmp_path / folder))


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
        ("# nothing\n\n", {}, "names no data set"),
        ("six", {"name": "zeroshot-retrieval"}, "names no data set of the suite"),
        ("six\nwds/six", {}, "two data sets named six"),
    ],
)
def test_bad_request_is_told_in_a_sentence(tmp_path, data_root, text, options, sentence):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_suite(**{"datasets": str(path), "data_root": str(data_root), **options})


def test_sets_are_read_over_http(color_model, dataset_list, data_root, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(QuietHandler, directory=str(data_root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/{{dataset_cleaned}}"
        eval_sets = load_suite(datasets=str(dataset_list), data_root=root)
        results = evaluate(color_model, eval_sets, workers=0)
        server.shutdown()
    assert [result.status for result in results] == ["done", "done"]
    assert results[0].metrics["acc1"] == 0.75


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
