"""What OpenCLIP's trainer takes on its command line, found out without importing torch.

It leans on details of OpenCLIP that it does not promise to keep, as `open_clip.compat` does; that
module imports open_clip, and with it torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

from clip_pgs.integrations import check_versions

check_versions()

import open_clip_train.params  # noqa: E402 - the check comes first


def bundled_models() -> list[str]:
    """Return the names of the model configs that open_clip itself ships, sorted."""
    spec = importlib.util.find_spec("open_clip")
    folders = map(Path, (spec and spec.submodule_search_locations) or ())
    return sorted(file.stem for each in folders for file in each.glob("model_configs/*.json"))


def known_models() -> list[str]:
    """Return the models that open_clip knows by name, those registered in this process included."""
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].list_models()
    return bundled_models()


def default_optimization(model: str) -> dict[str, float]:
    """Return OpenCLIP's learning rate, betas and epsilon for a model's name."""
    return open_clip_train.params.get_default_params(model)


class _ParserBuilt(Exception):  # noqa: N818 - a signal, not an error
    """Its argument is the parser."""


class _ReportingParser(argparse.ArgumentParser):
    """Hands itself over at the moment in which it is asked to parse."""

    def parse_args(self, *_args: Any, **_options: Any) -> NoReturn:
        raise _ParserBuilt(self)


@functools.cache
def trainer_parser() -> argparse.ArgumentParser:
    """Return the parser of OpenCLIP's trainer, for its flags, types, choices and help texts.

    OpenCLIP builds its parser inside `parse_args` and never returns it. For the length of one
    call, the name `argparse` of that one module stands for a module whose parser reports itself
    instead of parsing; nobody else's `argparse` changes.
    """
    params = open_clip_train.params
    params.argparse = types.SimpleNamespace(ArgumentParser=_ReportingParser)
    try:
        params.parse_args([])
    except _ParserBuilt as built:
        return built.args[0]
    finally:
        params.argparse = argparse
    raise RuntimeError("open_clip_train.params.parse_args no longer builds an ArgumentParser")


@functools.cache
def trainer_actions() -> dict[str, argparse.Action]:
    """Return what each flag of OpenCLIP's trainer does, by its long name ("--train-data")."""
    return {
        action.option_strings[-1]: action
        for action in trainer_parser()._actions
        if action.option_strings and action.dest != "help"
    }
