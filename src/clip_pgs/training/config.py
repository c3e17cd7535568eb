"""YAML files of options: nothing but defaults, turned into arguments put before the user's."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

# These say what to do with a config or with one call; none of them describes a run.
COMMAND_LINE_ONLY = frozenset({"--config", "--check-only", "--no-check-only", "--help"})
_PAIR_FLAGS = frozenset({"--aug-cfg", "--masking-option", "--text-masking-option"})
# Either names the model; a config's own word replaces its base's, whichever it uses.
_MODEL_FLAGS = frozenset({"--model", "--model-config"})
_DATA_FLAGS = frozenset({"--train-data", "--val-data"})
_OPTION_NAME = re.compile(r"[A-Za-z][\w-]*")
_MAX_BYTES = 2**20


def config_arguments(
    path: str,
    actions: Mapping[str, argparse.Action],
    *,
    model: str | None = None,
    model_config: str | None = None,
) -> list[str]:
    """Read options from a YAML file, and from the file that its key `base` names.

    Args:
        path: File whose keys are flags without their dashes; hyphens and underscores are equal.
            `base` names another such file, relative to this one; this one's values win, and null
            takes a value of the base back.
        actions: Every flag there is, with its long name ("--batch-size") as key.
        model: The model that the command line names; it replaces the config's, whichever flag
            named that.
        model_config: The same.

    Returns:
        Command-line arguments. False gives a flag's `--no-` form where there is one, and nothing
        where false is what a switch is without it.

    Raises:
        ValueError: If a file cannot be read, is no mapping, names an option twice or an unknown
            one, gives a value of the wrong type, or is its own base.
    """
    options: dict[str, Any] = {}
    for file, content in reversed(_with_bases(path)):
        own = _checked(file, content, actions)
        if _MODEL_FLAGS & own.keys():
            options = {flag: value for flag, value in options.items() if flag not in _MODEL_FLAGS}
        options |= own
    configured = options.get("--model-config")
    if model_config is not None and model is None:
        options["--model"] = None
    elif model is not None and configured is not None and Path(configured).stem != model:
        options["--model-config"] = None

    arguments: list[str] = []
    for flag, value in options.items():
        if isinstance(value, bool):
            negation = f"--no-{flag[2:]}"
            arguments += [flag] if value else [negation] if negation in actions else []
        elif isinstance(value, Mapping):
            arguments += [flag, *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def _with_bases(path: str) -> list[tuple[str, dict[Any, Any]]]:
    """Return a config, its base, that one's base and so on, each with its content."""
    files: dict[Path, tuple[str, dict[Any, Any]]] = {}
    next_path: str | None = path
    while next_path is not None:
        path, next_path = next_path, None
        if Path(path).resolve() in files:
            raise ValueError(f"{path} is its own base")
        content = _read_mapping(path)
        files[Path(path).resolve()] = (path, content)
        if "base" in content:
            base = content.pop("base")
            if not isinstance(base, str) or not _is_encodable(base):
                raise ValueError(f"{path}: 'base' takes the name of a config, got {base!r}")
            next_path = str(Path(path).parent / base)
    return list(files.values())


class _Loader(yaml.SafeLoader):
    """Plain values, without what makes a small file a large object or says a thing twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise yaml.YAMLError(f"{key.value!r} is given twice")
                seen.add(str(key.value))
        return node


def _read_mapping(path: str) -> dict[Any, Any]:
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
        content = yaml.load(data.decode("utf-8"), Loader=_Loader)
    # ValueError: a date or a number that is none, such as 2001-99-99.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a plain YAML file: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold one mapping of options to values, got {type(content).__name__}"
        )
    return content


def _checked(
    path: str, content: Mapping[Any, Any], actions: Mapping[str, argparse.Action]
) -> dict[str, Any]:
    """Return one file's values by flag, None for those set to null."""
    options: dict[str, Any] = {}
    negations = {flag for flag, action in actions.items() if action.option_strings[0] != flag}
    known = actions.keys() - COMMAND_LINE_ONLY - negations
    for key, value in content.items():
        flag = "--" + str(key).replace("_", "-")
        if flag in COMMAND_LINE_ONLY:
            raise ValueError(f"{path}: {key!r} can only be given on the command line")
        if flag not in known:
            raise ValueError(f"{path}: unknown option {key!r}; {nearest_names(flag, known)}")
        if flag in options:
            raise ValueError(f"{path}: {key!r} is given twice")
        problem = "" if value is None else _problem(flag, actions[flag], value)
        if problem:
            raise ValueError(f"{path}: {key!r} {problem}, got {value!r}")
        options[flag] = value
    return options


def nearest_names(flag: str, known: Iterable[str]) -> str:
    """Name the flags most like an unknown one, as the end of a sentence."""
    known = sorted(known)
    near = [name for name in known if name.startswith(flag)][:4]
    for name in difflib.get_close_matches(flag, known, n=3):
        if name not in near:
            near.append(name)
    return f"nearest: {', '.join(near)}" if near else "--help lists all of them"


def _problem(flag: str, action: argparse.Action, value: Any) -> str:
    """Say what is wrong with a value, as the rest of a sentence; "" if nothing is."""
    if flag in _PAIR_FLAGS:
        names = value if isinstance(value, dict) else [None]
        is_good = all(isinstance(name, str) and _OPTION_NAME.fullmatch(name) for name in names)
        return "" if is_good else "takes a mapping of names to values"
    if flag in _DATA_FLAGS and isinstance(value, str) and _may_run_command(value):
        return "runs no command from a config; give it on the command line"
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "takes true or false"
    if action.nargs in ("+", "*"):
        items = value if isinstance(value, list) else [value]
        return "takes a list of numbers" if any(_item_problem(action, i) for i in items) else ""
    return _item_problem(action, value)


def _item_problem(action: argparse.Action, value: Any) -> str:
    if isinstance(value, str) and not _is_encodable(value):
        return "takes a text without null bytes and lone surrogates"
    if action.choices is not None:
        choices = ", ".join(map(str, action.choices))
        return "" if value in action.choices else f"takes one of {choices}"
    if action.type in (None, str):
        return "" if isinstance(value, str) else "takes a text (put it in quotes)"
    assert callable(action.type)
    try:
        # Through a text, since YAML 1.1 reads 1e-3 as one.
        action.type(str(value))
    except argparse.ArgumentTypeError as error:
        return str(error).partition(", got ")[0]
    except ValueError:
        is_whole = getattr(action.type, "__name__", "") == "int"
        return "takes a whole number" if is_whole else "takes a number"
    return ""


def _is_encodable(text: str) -> bool:
    """Return whether a text could stand on a command line."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _may_run_command(pattern: str) -> bool:
    """Return whether a source of a pattern is a `pipe:` command, or braces could make it one."""
    schemes = (source.partition(":")[0] for source in pattern.split("::") if ":" in source)
    return any(scheme.lower() == "pipe" or set(scheme) & set("{\\") for scheme in schemes)
