"""What pyproject.toml asks for, and what the documents beside it say."""

from __future__ import annotations

import re
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import clip_pgs

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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
        ours = EXTRAS["train"].get(requirement.name)
        newest = [each.version for each in requirement.specifier if each.operator == "<="]
        if ours is not None and newest:
            assert ours.contains(newest[0]), requirement


@pytest.mark.parametrize("version", ["0.2.86", "1.0.2"])
def test_old_and_new_webdataset_are_admitted(version):
    for requirements in EXTRAS.values():
        assert requirements.get("webdataset", SpecifierSet()).contains(version)


def test_numpy_is_bounded_from_above_for_clip_benchmark_alone():
    for requirements in EXTRAS.values():
        bounds = [each.operator for each in requirements.get("numpy", ())]
        assert "clip-benchmark" in requirements or not {"<", "<=", "=="} & set(bounds)


def test_what_runs_the_tests_is_what_is_asked_for():
    installed = {each.metadata["Name"].lower().replace("_", "-"): each for each in distributions()}
    for extra in ("train", "eval", "dev"):
        for name, specifier in EXTRAS[extra].items():
            found = installed.get(name.lower().replace("_", "-"))
            if found is not None:
                assert specifier.contains(found.version, prereleases=True), name


def test_version_is_the_cited_one_and_has_a_place_in_the_changelog():
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert version == clip_pgs.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_named_file_is_there(document):
    text = (ROOT / document).read_text()
    names = re.findall(r"\]\((?!http)([^)#]+)", text)
    names += re.findall(r"`((?:src|tests|configs|scripts)/[\w./]+)`", text)
    named = [name for name in names if "NAME" not in name]
    if document == "CHANGELOG.md":
        # It also says what is gone.
        named = [name for name in named if name.endswith(".md")]
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
