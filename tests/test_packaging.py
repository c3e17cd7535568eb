"""What pyproject.toml asks for."""

from __future__ import annotations

from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: {
        requirement.name: requirement.specifier for requirement in map(Requirement, requirements)
    }
    for extra, requirements in PROJECT["optional-dependencies"].items()
}


def test_our_extra_goes_beside_that_of_open_clips_trainer():
    theirs = [Requirement(text) for text in requires("open_clip_torch")]
    trainer = [each for each in theirs if each.marker and "training" in str(each.marker)]
    assert trainer
    for requirement in trainer:
        ours = EXTRAS["training"].get(requirement.name)
        newest = [each.version for each in requirement.specifier if each.operator == "<="]
        if ours is not None and newest:
            assert ours.contains(newest[0]), requirement


@pytest.mark.parametrize("version", ["0.2.86", "1.0.2"])
def test_old_and_new_webdataset_are_admitted(version):
    assert EXTRAS["training"]["webdataset"].contains(version)


def test_only_the_tests_bound_numpy_from_above():
    bounded = {
        extra
        for extra, requirements in EXTRAS.items()
        if any(each.operator in ("<", "<=", "==") for each in requirements.get("numpy", ()))
    }
    assert bounded <= {"dev"}


def test_what_runs_the_tests_is_what_is_asked_for():
    installed = {each.metadata["Name"].lower().replace("_", "-"): each for each in distributions()}
    for extra in ("training", "eval", "dev"):
        for name, specifier in EXTRAS[extra].items():
            found = installed.get(name.lower().replace("_", "-"))
            if found is not None:
                assert specifier.contains(found.version, prereleases=True), name
