"""Errors as the commands print them: one line on stderr, and exit code 2 for bad input."""

from __future__ import annotations

import argparse
from typing import NoReturn

_HEAD, _TAIL = 1500, 300


def one_sentence(error: BaseException | str) -> str:
    """Return a message on one line that a terminal can show.

    Messages quote what they complain of, whatever that is: line breaks become spaces, other
    characters that cannot be printed are escaped, and the middle of a long text is left out.

    Args:
        error: The message, or an error that has one.
    """
    text = " ".join(line.strip() for line in str(error).splitlines()).strip()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > _HEAD + _TAIL:
        return f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return text or type(error).__name__


class SentenceParser(argparse.ArgumentParser):
    """Refuses arguments in one sentence, without the usage text; so do its subcommands."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"error: {one_sentence(message)}\n")
