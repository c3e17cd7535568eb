"""What pyproject.toml asks for, and what the documents beside it say."""

from __future__ import annotations

import ast
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


def text_files_without_encoding(path):
    """Yield the calls of a module that read or write text in the encoding of the locale."""
    for call in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(call, ast.Call) or any(k.arg == "encoding" for k in call.keywords):
            continue
        name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
        is_method = isinstance(call.func, ast.Attribute)
        texts = [a.value for a in call.args if isinstance(a, ast.Constant)]
        if name in ("read_text", "write_text"):
            if is_method and "utf-8" not in texts:
                yield ast.unparse(call)
        elif name == "open":
            modes = [text for text in texts if re.fullmatch(r"[rwax]\+?t?", str(text))]
            is_default = not is_method and len(call.args) == 1
            if (modes and "tarfile" not in ast.unparse(call.func)) or is_default:
                yield ast.unparse(call)


@pytest.mark.parametrize("folder", ["src", "scripts"])
def test_every_text_file_is_read_and_written_as_utf_8(folder):
    found = {
        path: [*text_files_without_encoding(path)] for path in ROOT.joinpath(folder).rglob("*.py")
    }
    assert {path: calls for path, calls in found.items() if calls} == {}


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
