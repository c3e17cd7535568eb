"""Reading YAML that a stranger may have written: one mapping of plain values, and nothing else.

Tags, anchors and aliases are refused before anything is made of them: a config needs none, and
they are how a small file becomes a large object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 2**20
_MAX_DEPTH = 20


def read_mapping(path: str) -> dict[Any, Any]:
    """Read a YAML file that holds one mapping, or nothing.

    Args:
        path: The file.

    Returns:
        Texts, numbers, dates, booleans and None, in lists and mappings of these.

    Raises:
        ValueError: If it cannot be read, is large or deep, has tags, anchors or aliases, names a
            key twice, or holds anything but a mapping.
    """
    text = _read_text(path)
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    # ValueError: a date or a number that is none, such as 2001-99-99.
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a plain YAML file: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold one mapping of options to values, got {type(content).__name__}"
        )
    _refuse_repeated_keys(root, path)
    return content


def _read_text(path: str) -> str:
    try:
        # A device never ends.
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"cannot read the config {path}: it is no file")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise ValueError(f"the config {path} is larger than {_MAX_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a plain YAML file: {error}") from None


def _check_events(text: str) -> None:
    """Raise a YAMLError for what is not plain, before Python recurses into it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        problem, tag = "", getattr(event, "tag", None)
        if getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not taken"
        elif tag is not None:
            problem = f"the tag {tag!r} is not taken"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            problem = f"it nests deeper than {_MAX_DEPTH}" if depth > _MAX_DEPTH else ""
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if problem:
            line = f" (line {event.start_mark.line + 1})" if event.start_mark else ""
            raise yaml.YAMLError(problem + line)


def _refuse_repeated_keys(root: yaml.Node | None, path: str) -> None:
    """PyYAML keeps the last of two equal keys and says nothing."""
    assert isinstance(root, yaml.MappingNode)
    inner = [value for _, value in root.value if isinstance(value, yaml.MappingNode)]
    for mapping in (root, *inner):
        seen = set()
        for key, _ in mapping.value:
            if key.value in seen:
                raise ValueError(f"{path}: {key.value!r} is given twice")
            seen.add(key.value)
