"""The recipe for a strategy of one's own, to the letter, and README's table of strategies."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clip_pgs import list_maskings
from clip_pgs.masking import describe_masking

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "docs" / "own_strategy.md").read_text(encoding="utf-8")
USE = """
import torch
from clip_pgs import PatchInputs, create_masking, list_maskings
from clip_pgs.inspection.model_input import parse_specs
from clip_pgs.integrations.open_clip import apply_masking, last_selection
from clip_pgs.masking import describe_masking
from support.models import image_batch, small_clip

name = "bright:BrightMasking"
plain, changed, known = parse_specs([name, f"{name}:mask_ratio=0.25", "random:mask_ratio=0.3"])
assert (plain.name, plain.options) == (name, {})
assert (changed.name, changed.options) == (name, {"mask_ratio": 0.25})
assert (known.name, known.options) == ("random", {"mask_ratio": 0.3})
strategy = create_masking(name, mask_ratio=0.75)
assert "bright" in list_maskings()
assert parse_specs([name])[0].name == name
declared = describe_masking(name)
assert (declared.name, declared.keeps, declared.random) == ("bright", "the brightest", False)
assert [option.name for option in declared.options] == ["mask_ratio"]
images = image_batch()
brightest = images.unfold(2, 16, 16).unfold(3, 16, 16).mean(dim=(1, 4, 5)).flatten(1).topk(4)
for model in (
    apply_masking(small_clip(), strategy),
    apply_masking(small_clip(), name, mask_ratio=0.75),
    apply_masking(small_clip(), "bright", mask_ratio=0.75),
):
    model.train().visual(images)
    assert torch.equal(last_selection(model).index, brightest.indices.sort().values)
try:
    create_masking(name, mask_ratio="half")
except ValueError as error:
    assert "mask_ratio takes a finite number" in str(error)
else:
    raise AssertionError
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder outside the package with the recipe's file."""
    folder = tmp_path_factory.mktemp("outside")
    code = re.search(r"```python\n(.*?)```", RECIPE, re.DOTALL)[1]
    (folder / code.split()[1].rstrip(",")).write_text(code, encoding="utf-8")
    return folder


def run(command, folder):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment(folder), check=False
    )


def environment(folder):
    import os

    path = [str(folder), str(ROOT / "src"), str(ROOT / "tests")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@pytest.mark.slow
def test_a_strategy_outside_the_package_is_created_applied_declared_and_inspected(folder):
    done = run([sys.executable, "-W", "ignore", "-c", USE], folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [line for line in RECIPE.splitlines() if line.startswith("python -")],
    ids=lambda line: " ".join(line.split()[:3]),
)
def test_the_commands_of_the_recipe_run(folder, command):
    done = run([sys.executable, *shlex.split(command)[1:]], folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_training_takes_the_import_path(folder):
    (line,) = [line for line in RECIPE.splitlines() if line.startswith("clip-pgs train")]
    arguments = shlex.split(line)[2:]
    data = arguments.index("--train-data")
    arguments[data : data + 2] = ["--dataset-type", "synthetic", "--train-num-samples", "64"]
    command = [sys.executable, "-m", "clip_pgs.training", *arguments, "--check-only"]
    done = run([*command, "--batch-size", "8", "--warmup", "1"], folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", list_maskings())
def test_the_readme_says_of_each_strategy_what_it_declares(name):
    table = README.partition("| `--masking` | ")[2].partition("\n\n")[0]
    (row,) = [line for line in table.splitlines() if f"`{name}`" in line.split("|")[1:2][0]]
    declared = describe_masking(name)
    assert declared.keeps in row
    assert declared.paper.rpartition("arXiv ")[2] in row or name == "none"
