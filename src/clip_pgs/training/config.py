"""YAML files of options: nothing but defaults, turned into arguments put before the user's."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from clip_pgs.common import expand_home, explained, find_config
from clip_pgs.files import read_file

# These say what to do with a config or with one call; none of them describes a run.
COMMAND_LINE_ONLY = frozenset(
    {"--config", "--check-only", "--help", "--help-all", "--nproc", "--trial"}
)
_PAIR_FLAGS = frozenset({"--aug-cfg", "--masking-option", "--text-masking-option"})
# Either names the model; a config's own word replaces its base's, whichever it uses.
_MODEL_FLAGS = frozenset({"--model", "--model-config"})
_DATA_FLAGS = frozenset({"--train-data", "--val-data"})
_OPTION_NAME = re.compile(r"[A-Za-z][\w-]*")
_MAX_BYTES = 2**20
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
_NUMBER_STARTS = list("-+.0123456789")


def config_arguments(
    path: str, parser: argparse.ArgumentParser, said: Mapping[str, Any]
) -> list[str]:
    """Read options from a YAML file, and from the file that its key `base` names.

    Args:
        path: File whose keys are flags without their dashes, or the name of a bundled one; hyphens
            and underscores are equal.
            `base` names another such file, relative to this one, or a bundled one; this one's
            values win, and null takes a value of the base back.
        parser: Knows every flag, and refuses a value in one sentence.
        said: What the command line says: a model that it names replaces the config's, whichever
            flag named that.

    Returns:
        Command-line arguments.

    Raises:
        ValueError: If a file cannot be read, is no mapping, names an option twice or an unknown
            one, gives a value of the wrong type, or is its own base.
    """
    options: dict[str, Any] = {}
    for file, content in reversed(_with_bases(find_config(path, "train"))):
        own = _checked(file, content, parser)
        if _MODEL_FLAGS & own.keys():
            options = {flag: value for flag, value in options.items() if flag not in _MODEL_FLAGS}
        options |= own
    configured = options.get("--model-config")
    if said.get("model_config") is not None and said.get("model") is None:
        options.pop("--model", None)
    elif said.get("model") and configured and Path(configured[0]).stem != said["model"]:
        del options["--model-config"]
    return [token for flag, words in options.items() for token in _tokens(flag, words)]


def _tokens(flag: str, words: list[str] | bool | None) -> list[str]:
    """Return an option's arguments; joined where there is one word, which may begin with a dash."""
    if words is None:
        return []
    if isinstance(words, bool):
        return [flag] if words else [f"--no-{flag[2:]}"]
    return [f"{flag}={words[0]}"] if len(words) == 1 else [flag, *words]


def _with_bases(path: str) -> list[tuple[str, dict[Any, Any]]]:
    """Return a config, its base, that one's base and so on, each with its content."""
    files: dict[Path, tuple[str, dict[Any, Any]]] = {}
    next_path: str | None = path
    while next_path is not None:
        path, next_path = next_path, None
        if Path(path).resolve() in files:
            raise ValueError(f"{path} is its own base")
        content = read_mapping(path)
        files[Path(path).resolve()] = (path, content)
        if "base" in content:
            base = content.pop("base")
            if not isinstance(base, str) or not _is_encodable(base):
                raise ValueError(f"{path}: 'base' takes the name of a config, got {base!r}")
            beside, bundled = Path(path).parent / expand_home(base), find_config(base, "train")
            is_bundled = bundled != base and not beside.is_file()
            next_path = bundled if is_bundled else str(beside)
    return list(files.values())


class _Loader(yaml.SafeLoader):
    """Plain values, without what makes a small file a large object or says a thing twice.

    Numbers are decimal: 1:30 is a text, not YAML 1.1's 90, nor is 010 an 8.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, shape) for tag, shape in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag == _MERGE:
                    raise yaml.YAMLError("merge keys (<<) are not taken")
                if str(key.value) in seen:
                    raise yaml.YAMLError(f"{key.value!r} is given twice")
                seen.add(str(key.value))
        return node


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), _NUMBER_STARTS)
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$"), _NUMBER_STARTS
)


def read_mapping(path: str) -> dict[Any, Any]:
    """Read a YAML file of plain values that holds one mapping; an empty one is an empty mapping.

    Raises:
        ValueError: If it cannot be read, is no mapping, or says a thing twice.
    """
    data = read_file(Path(path), what=f"the config {path}", max_bytes=_MAX_BYTES)
    # ValueError: a date or a number that is none, such as 2001-99-99.
    with explained(f"{path} is not a plain YAML file", Exception):
        content = yaml.load(data.decode("utf-8"), Loader=_Loader)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold one mapping of options to values, got {type(content).__name__}"
        )
    return content


def _checked(
    path: str, content: Mapping[Any, Any], parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """Return one file's values by flag, as words of a command line; None for those set to null."""
    named = {action.option_strings[0]: action for action in parser._actions}
    # Without the --no- forms: false says the same.
    actions = {flag: a for flag, a in named.items() if flag[2:] == a.dest.replace("_", "-")}
    options: dict[str, Any] = {}
    for key, value in content.items():
        flag = "--" + str(key).replace("_", "-")
        if flag in COMMAND_LINE_ONLY:
            raise ValueError(f"{path}: {key!r} can only be given on the command line")
        if flag not in actions:
            raise ValueError(f"{path}: unknown option {key!r}; {nearest_names(flag, actions)}")
        if flag in options:
            raise ValueError(f"{path}: {key!r} is given twice")
        with explained(f"{path}: {key!r}", ValueError, SyntaxError):
            options[flag] = None if value is None else _words(flag, actions[flag], value)
            parser.parse_known_args(_tokens(flag, options[flag]))
    return options


def _words(flag: str, action: argparse.Action, value: Any) -> list[str] | bool:
    """Return a value as the words of a command line, or a switch as it is.

    Raises:
        ValueError: If it is of the wrong kind.
    """
    got = f", got {reprlib.repr(value)}"
    if action.nargs == 0 or isinstance(value, bool):
        if action.nargs != 0 or not isinstance(value, bool):
            raise ValueError(f"takes {'true or false' if action.nargs == 0 else 'no switch'}{got}")
        return value
    if flag in _PAIR_FLAGS:
        names = value if isinstance(value, dict) else [None]
        if not all(isinstance(name, str) and _OPTION_NAME.fullmatch(name) for name in names):
            raise ValueError(f"takes a mapping of names to values{got}")
        return [f"{name}={item}" for name, item in value.items()]
    words = value if isinstance(value, list) and action.nargs in ("+", "*") else [value]
    if any(isinstance(word, (list, dict)) for word in words):
        raise ValueError(f"takes one value{got}")
    # YAML reads 12:30 as a number, and 2001-01-01 as a date.
    if action.type in (None, str) and not all(isinstance(word, str) for word in words):
        raise ValueError(f"takes a text (put it in quotes){got}")
    if not all(map(_is_encodable, map(str, words))):
        raise ValueError(f"takes a text without null bytes and lone surrogates{got}")
    if flag in _DATA_FLAGS and _may_run_command(value):
        raise ValueError("runs no command from a config; give it on the command line")
    return [str(word) for word in words]


def nearest_names(flag: str, known: Iterable[str], *, lists: str = "--help-all") -> str:
    """Name the flags most like an unknown one, or what lists them, as the end of a sentence."""
    known = sorted(known)
    near = [name for name in known if name.startswith(flag)][:4]
    for name in difflib.get_close_matches(flag, known, n=3):
        if name not in near:
            near.append(name)
    return f"nearest: {', '.join(near)}" if near else f"{lists} lists all of them"


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
