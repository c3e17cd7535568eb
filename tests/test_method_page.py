"""docs/method.md sets equations beside code: the code is there."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
# Of a row whose first cell is a link, and after it what the line is of.
LINK = r"\[`([\w.]+)`\]\(\.\./src/([\w/]+)\.py\)"
ROWS = re.findall(rf"^\| {LINK}(?:, [^|]+)? \| `(.+)` \|$", PAGE, re.M)


@pytest.mark.parametrize(("name", "module", "line"), ROWS, ids=[row[2][:40] for row in ROWS])
def test_each_equation_stands_beside_a_line_of_the_function_it_names(name, module, line):
    found = importlib.import_module(module.replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    assert line in [text.strip() for text in inspect.getsource(found).splitlines()]


def test_every_step_has_its_lines_and_every_link_leads_somewhere():
    steps = re.split(r"^## \d\. ", PAGE, flags=re.M)[1:]
    assert len(steps) == 5
    assert all("| computed by | line |" in step for step in steps)
    tables = re.findall(r"^\| computed by \| line \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.M)
    assert sum(table.count("\n") for table in tables) == len(ROWS)
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
