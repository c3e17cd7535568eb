"""What our own flags take: one-sentence errors, numbers that can be taken back, KEY=VALUE pairs."""

from __future__ import annotations

import argparse
import ast
from typing import Any, NoReturn


class OwnParser(argparse.ArgumentParser):
    """Raises one sentence instead of printing a usage text and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(message)


class StorePairs(argparse.Action):
    """Collect KEY=VALUE pairs from every occurrence of a flag; a later one wins."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the pairs of one occurrence."""
        pairs = dict(getattr(namespace, self.dest))
        for pair in values:
            key, separator, text = pair.partition("=")
            if not separator or not key:
                parser.error(f"{option_string} takes KEY=VALUE, got {pair!r}")
            pairs[key.replace("-", "_")] = _literal(text)
        setattr(namespace, self.dest, pairs)


def _literal(text: str) -> Any:
    """Read a Python literal, or true, false, none and null in any case; else keep the text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def ratio(text: str) -> float | None:
    """Read a number; "none" takes back what a config set."""
    return None if text.lower() == "none" else float(text)


def count(text: str) -> int | None:
    """Read a whole number; "none" takes back what a config set."""
    return None if text.lower() == "none" else int(text)
