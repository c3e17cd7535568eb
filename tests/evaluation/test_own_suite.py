"""A suite of another package is asked for by its place, and needs nothing in this one."""

import json
import sys

import pytest

from clip_pgs.evaluation import evaluate, format_table, load_suite
from clip_pgs.evaluation.suites import SUITES, register_suite

MODULE = """
from clip_pgs.evaluation import Scores, register_suite


@register_suite(
    "brightness",
    title="Brightness",
    summary="how bright the images are",
    task="brightness",
    types=("classification", "retrieval"),
    metrics={"light": "light"},
    main_metrics=("light",),
    unit="percent",
)
def score(encoder, eval_set):
    images_ND = encoder.images(eval_set).images
    return Scores({"light": float(images_ND.mean() * 0 + 0.25)}, len(images_ND))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_suites.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_suites:score"
    sys.modules.pop("their_suites")
    SUITES._entries.pop("brightness")


def test_suite_outside_the_package_is_scored_and_shown(
    module, color_model, dataset_list, data_root, tmp_path
):
    eval_sets = load_suite(module, datasets=str(dataset_list), data_root=str(data_root))
    assert [(s.suite, s.name) for s in eval_sets] == [
        ("brightness", "six"),
        ("brightness", "pairs"),
    ]
    results = evaluate(color_model, eval_sets, workers=0, output=tmp_path / "out")
    assert [result.metrics for result in results] == [{"light": 0.25}] * 2
    content = json.loads((tmp_path / "out/brightness_six.json").read_text())
    assert (content["task"], content["samples"]) == ("brightness", 12)
    header, *rows = format_table(results).splitlines()
    assert header.split() == ["brightness", "light", "samples"]
    assert rows[0].split() == ["six", "25.0", "12"]


def test_suite_that_declares_too_little_is_refused():
    with pytest.raises(TypeError, match="main_metrics"):
        register_suite("half", title="Half", summary="", task="", types=(), metrics={}, unit="")


@pytest.mark.parametrize("name", ["no_such_module:score", "json:loads", "their_suites:nothing"])
def test_suite_that_is_not_there_is_told_in_a_sentence(name, dataset_list, data_root):
    with pytest.raises(ValueError, match=name.replace(":", ".")):
        load_suite(name, datasets=str(dataset_list), data_root=str(data_root))
