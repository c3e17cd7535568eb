"""The README's snippets, run as they stand there."""

import re
from pathlib import Path

import pytest

from clip_pgs.integrations.open_clip import last_selection
from support.models import image_batch, small_clip

README = Path(__file__).parents[1] / "README.md"


def snippet(marker):
    """Return the first Python block of the README that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return next(block for block in blocks if marker in block)


def test_three_lines_mask_a_strangers_model():
    model = small_clip()
    names = {"model": model, "step": 30, "total_steps": 120}
    exec(snippet("apply_masking(model"), names)
    model.train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 8)
    assert model.visual.masking.progress == 0.25


def test_three_lines_are_three():
    lines = [line for line in snippet("apply_masking(model").splitlines() if line.strip()]
    assert len(lines) == 3


def test_the_core_snippet_gives_what_its_comment_says():
    names = {}
    exec(snippet("import clip_pgs"), names)
    selection = names["selection"]
    assert selection.index.shape == selection.valid.shape == (8, 138)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))
def test_every_linked_file_is_there(path):
    assert (README.parent / path).exists()


@pytest.mark.parametrize(
    "config", sorted(set(re.findall(r"configs/\S+\.yaml", README.read_text())))
)
def test_every_named_config_is_there(config):
    assert (README.parent / config).is_file()


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))])
def test_every_file_that_a_page_names_is_there(page):
    roots = README.parent, README.parent / "src" / "clip_pgs"
    named = re.findall(r"`([a-z_]+/[A-Za-z0-9_/.]+\.(?:py|sh|yaml|txt))`", page.read_text())
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_every_file_of_the_tree_is_there():
    tree = README.read_text().split("## Where things are")[1].split("```")[1]
    sources = {path.name for path in (README.parent / "src" / "clip_pgs").rglob("*")}
    named = re.findall(r"\w+\.py|\w+(?=/)", tree.split("src/clip_pgs/")[1].split("\ntests/")[0])
    assert len(named) > 10
    assert set(named) <= sources
