"""A suite of another package is asked for by its place, and needs nothing in this one."""

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from clip_pgs.evaluation import evaluate, format_table, load_suite
from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.suites import SUITES, register_suite

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
MODULE = re.search(r"```python\n# their_suites.py\n(.*?)```", PAGE, re.DOTALL)[1]
LAST_LINE = MODULE.strip().splitlines()[-1].strip()


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_suites.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_suites:score"
    sys.modules.pop("their_suites")
    SUITES._entries.pop("spread")


def test_suite_outside_the_package_is_scored_and_shown(
    module, color_model, dataset_list, data_root, tmp_path
):
    eval_sets = load_suite(module, datasets=str(dataset_list), data_root=str(data_root))
    assert [(s.suite, s.name) for s in eval_sets] == [
        ("spread", "six"),
        ("spread", "pairs"),
    ]
    results = evaluate(color_model, eval_sets, workers=0, output=tmp_path / "out")
    content = json.loads((tmp_path / "out/spread_six.json").read_text())
    assert (content["task"], content["samples"]) == ("spread", 12)
    header, *rows = format_table(results).splitlines()
    assert header.split() == ["spread", "spread", "samples"]
    kept = map(load_file, (tmp_path / "out/features").glob("*.safetensors"))
    images = next(each["images"] for each in kept if "labels" in each)
    apart = 1 - cosine_similarity(images[:, None], images[None], dim=2).mean()
    assert results[0].metrics == {"spread": pytest.approx(float(apart), abs=1e-5)}
    assert rows[0].split() == ["six", f"{100 * apart:.1f}", "12"]


@pytest.fixture
def evaluate_with(module, color_model, dataset_list, data_root, tmp_path):
    """Return the result of a set by the suite with another last line."""

    def run(line):
        changed = MODULE.replace(LAST_LINE, line)
        assert changed != MODULE
        (tmp_path / "their_suites.py").write_text(changed)
        eval_sets = load_suite(module, datasets=str(dataset_list), data_root=str(data_root))
        return evaluate(color_model, eval_sets[:1], workers=0, output=tmp_path / "out")[0]

    return run


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('return Scores({"spread": float("nan")}, 12)', "metric spread must be in [0, 1]"),
        ('return Scores({"spread": 1000}, 12)', "metric spread must be in [0, 1]"),
        ('return Scores({"spread": 0.5}, -1)', "samples must be a number that is not negative"),
        ('return Scores({"spread": 0.5}, 10**50)', "samples must be a number that is not negative"),
        ('return Scores({"seconds": 0.5}, 12)', "a metric must not be named 'seconds'"),
        ('return Scores({"spread": 0.5}, 12, {"classes": ["a", "b"]})', "classes must be a number"),
        ('return Scores({"spread": 0.5}, 12, {"ties": True})', "ties must be a number that is not"),
        ('return Scores({"spread": 0.5}, 12, {"items": float("nan")})', "items must be a number"),
        ('return Scores({"spread": 0.5}, 12, [1])', "details must be a dict, got list"),
        ('return Scores({"spread": 0.5}, 12, {"all": "a" * 2**24})', "at most 16777216 bytes"),
        ('return Scores({"spread": 0.5}, "12")', "'str' object cannot be interpreted as"),
        ('return Scores({"spread": 0.5}, 12, {"why": object()})', "object is not JSON"),
        ('return {"spread": 0.5}', "a suite must return Scores, got dict"),
        ("pass", "a suite must return Scores, got NoneType"),
    ],
)
def test_scores_that_are_none_are_a_failed_set(line, reason, evaluate_with):
    result = evaluate_with(line)
    assert result.status == "failed"
    assert reason in result.error


def test_scores_may_be_tensors_and_arrays(evaluate_with, tmp_path):
    scores = 'Scores({"spread": images_ND.new_tensor(0.5)}, numpy.int64(3))'
    evaluate_with(f"import numpy; return {scores}")
    content = json.loads((tmp_path / "out/spread_six.json").read_text())
    assert (content["metrics"], content["samples"]) == ({"spread": 0.5}, 3)


@pytest.mark.parametrize("details", ['{"classes": 2, "captions": 24.0}', '{"per class": [0.5, 1]}'])
def test_other_details_are_a_row_of_the_table(details, evaluate_with, tmp_path):
    evaluate_with(f'return Scores({{"spread": 0.5}}, 12, {details})')
    assert "spread,six,done,12,0.5" in (tmp_path / "out/results.csv").read_text()


def test_a_suite_whose_code_changed_is_scored_again(evaluate_with):
    line = 'return Scores({"spread": 0.25}, 12)'
    assert evaluate_with(line).metrics == {"spread": 0.25}
    sys.modules.pop("their_suites")
    SUITES._entries.pop("spread")
    # Python takes a file of the same second and length for the one that it has compiled.
    assert evaluate_with(line.replace("0.25", "0.750")).metrics == {"spread": 0.75}


def test_a_split_that_a_suite_does_not_declare_is_refused(evaluate_with):
    result = evaluate_with('encoder.images(eval_set, split="train"); return None')
    assert result.status == "failed"
    assert "the suite spread must declare the split 'train', which it reads" in result.error


def test_suite_that_declares_too_little_is_refused():
    with pytest.raises(TypeError, match="main_metrics"):
        register_suite("half", title="Half", summary="", task="", types=(), metrics={}, unit="")


@pytest.mark.parametrize(
    ("was", "becomes", "sentence"),
    [
        ('unit="percent"', 'unit="seconds"', "must end in 'percent', in which its metrics are"),
        ('unit="percent"', 'unit=""', "must end in 'percent'"),
        ('{"spread": "spread"}', '{"spread": "spread", "error": "e"}', "must not be named 'error'"),
        ('main_metrics=("spread",)', 'main_metrics=("far",)', "one of its metrics, spread, got 'f"),
        ('main_metrics=("spread",)', 'main_metrics=("spread")', "one of its metrics, spread, got"),
    ],
)
def test_a_suite_that_declares_what_cannot_be_shown_is_refused_before_it_scores(
    was, becomes, sentence, run, options, capsys
):
    assert was in MODULE
    Path("wrong_suites.py").write_text(MODULE.replace(was, becomes))
    assert main([str(run), *options, "--suite", "wrong_suites:score"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cannot import suite 'wrong_suites:score': ValueError: ")
    assert sentence in said
    assert said.count("\n") == 1
    assert not (run / "eval").exists()


@pytest.mark.parametrize("name", ["no_such_module:score", "json:loads", "their_suites:nothing"])
def test_suite_that_is_not_there_is_told_in_a_sentence(name, dataset_list, data_root):
    with pytest.raises(ValueError, match=name.replace(":", ".")):
        load_suite(name, datasets=str(dataset_list), data_root=str(data_root))
