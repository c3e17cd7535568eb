"""Hooks of mkdocs: pages made of README.md, of the notebooks and of the code, links, and equations.

Links are written for the repository's own pages. On the site, those to files outside docs/ lead to
the repository.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# What the reference has, package by package: all that these export.
_PACKAGES = {
    "clip_pgs.masking": "The core, on torch alone. `clip_pgs` exports the most used of these.",
    "clip_pgs.integrations.open_clip": "Masking of OpenCLIP's models.",
    "clip_pgs.evaluation": "Suites, and what they score.",
    "clip_pgs.inspection": "Looking at what strategies keep.",
}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that have no file in docs/."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "reference/options.md": options_page(),
        "reference/python.md": python_page(),
    }
    for path in sorted((ROOT / "docs").glob("notebooks/*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn the links of a page into those of the site."""
    uri = PurePosixPath(page.file.src_uri)
    if uri.parent.name == "reference":
        return markdown
    folder = ROOT if uri.name == "index.md" else ROOT / "docs" / uri.parent
    return _LINK.sub(lambda link: f"]({site_link(link[1], folder, config['repo_url'])}", markdown)


def site_link(target: str, folder: Path, repository: str) -> str:
    """Return where a link from a page in a folder of the repository leads on the site.

    Raises:
        PluginError: If it leads nowhere.
    """
    path = (folder / target).resolve()
    if path.is_relative_to(ROOT / "docs"):
        page = path.with_suffix(".md") if path.suffix == ".ipynb" else path
        return Path(os.path.relpath(page, ROOT / "docs" if folder == ROOT else folder)).as_posix()
    if not path.exists():
        raise PluginError(f"{target} is not in {folder}")
    kind = "tree" if path.is_dir() else "blob"
    return f"{repository}/{kind}/main/{path.relative_to(ROOT).as_posix()}"


def on_page_content(html: str, **_: Any) -> str:
    """Write equations as MathML, which browsers show without a script, and mend code in tables."""

    def as_mathml(found: re.Match) -> str:
        latex = found[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(latex, display="inline" if found[1] == "span" else "block")

    # GitHub wants a bar inside of a table escaped even in code, where Python-Markdown shows both.
    html = re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace("\\|", "|"), html)
    return _EQUATION.sub(as_mathml, html)


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what the code printed and drew."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/jpeg" in data:
                pixels = data["image/jpeg"].strip()
                parts.append(f'<img alt="its picture" src="data:image/jpeg;base64,{pixels}">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts)


def options_page() -> str:
    """Return the page of every flag of training, and every option of a strategy."""
    from clip_pgs.data.text_masking import TEXT_MASKINGS
    from clip_pgs.masking import describe_masking, list_maskings
    from clip_pgs.training.options import REFUSED_FLAGS, option_parser

    lines = [
        "# Options of training",
        "",
        "Every flag of `clip-pgs train`, made of the code. A config names them without the dashes; "
        "each switch has a `--no-` form. [Train](../training.md) says what they are for.",
    ]
    for group in option_parser()._action_groups:
        rows = [_flag_row(action) for action in group._group_actions if _is_shown(action)]
        if rows:
            lines += ["", f"## {group.title}", "", group.description or "", ""]
            lines += [*_header("flag", "meaning"), *rows]
    lines += ["", "## Refused", "", *_header("flag of OpenCLIP's", "instead")]
    lines += [f"| `{flag}` | {_cell(why)} |" for flag, why in REFUSED_FLAGS.items()]
    lines += ["", "## Strategies", "", "Each takes its options as `--masking-option KEY=VALUE`."]
    for declared in map(describe_masking, list_maskings()):
        lines += ["", f"### {declared.name}", "", f"Keeps {declared.keeps} ({declared.paper}).", ""]
        rows = [f"| `{each.name}` | {_cell(each.help)} |" for each in declared.options]
        lines += [*_header("option", "meaning"), *rows] if rows else []
    lines += ["", "## Text maskings", "", *_header("`--text-masking`", "leaves of a caption")]
    for name in TEXT_MASKINGS.names():
        declaration = TEXT_MASKINGS.declaration(name)
        lines.append(f"| `{name}` | {_cell(declaration['summary'])} ({declaration['source']}) |")
    return "\n".join(lines)


def python_page() -> str:
    """Return the page that mkdocstrings fills with the docstrings of what is public."""
    lines = ["# Python", "", "What the packages export, with its docstrings."]
    for package, text in _PACKAGES.items():
        lines += ["", f"## {package}", "", text]
        exports = importlib.import_module(package)
        for name in exports.__all__:
            if not inspect.ismodule(getattr(exports, name)):
                lines += ["", f"::: {package}.{name}"]
    return "\n".join(lines)


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _flag_row(action: argparse.Action) -> str:
    value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    flag = action.option_strings[0] + (f" {value}" if action.nargs != 0 else "")
    return f"| `{_cell(flag)}` | {_cell((action.help or '').replace('%%', '%'))} |"


def _header(*names: str) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
