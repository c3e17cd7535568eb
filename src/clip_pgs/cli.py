"""The command `clip-pgs`: it hands over to the commands, and imports what they need with them."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clip_pgs.common import (
    CONFIGS,
    AskedToLeaveError,
    early_end,
    leaving_when_told,
    refuse,
    run_program,
)
from clip_pgs.integrations import check_versions
from clip_pgs.registry import registered_names

# What runs each command, and what it does.
COMMANDS = {
    "train": ("clip_pgs.launch:train", "train a model, in one process or many"),
    "mae": ("clip_pgs.launch:train_autoencoder", "train a masked autoencoder on images alone"),
    "test": ("clip_pgs.launch:evaluate", "evaluate models, list data sets, write a report"),
    "data": ("clip_pgs.data.__main__:main", "make, pack, check and count image-caption data"),
    "inspect": ("clip_pgs.inspection.__main__:main", "draw and measure what maskings do"),
    "study": ("clip_pgs.study.__main__:main", "compare trainings over seeds"),
    "export": ("clip_pgs.training.export_command:main", "export a run for OpenCLIP and the Hub"),
    "demo": ("clip_pgs.demo:main", "data, training, evaluation and a picture, in some minutes"),
    "completion": ("clip_pgs.cli:completion", "print a shell's completion of this command"),
}
# What makes the parser of each command, and of those below it that have one of their own.
_PARSERS = {
    ("train",): "clip_pgs.training.options:option_parser",
    ("mae",): "clip_pgs.training.options:option_parser",
    ("test",): "clip_pgs.evaluation.command:make_parser",
    ("test", "sets"): "clip_pgs.evaluation.command:make_sets_parser",
    ("test", "report"): "clip_pgs.evaluation.report.command:make_parser",
    ("data",): "clip_pgs.data.__main__:make_parser",
    ("inspect",): "clip_pgs.inspection.__main__:make_parser",
    ("study",): "clip_pgs.study.__main__:make_parser",
    ("export",): "clip_pgs.training.export_command:make_parser",
    ("demo",): "clip_pgs.demo:make_parser",
}
_EXAMPLES = """\
clip-pgs demo                                      from nothing to a report
clip-pgs train configs/train/demo.yaml --nproc 2   in two processes
clip-pgs COMMAND --help                            what a command takes
eval "$(clip-pgs completion bash)"                 completion in this shell; or zsh
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The command's exit code; 2 for a command that there is not, or that lacks a package, 85
        where a signal asked it to leave, 130 for Ctrl-C; see `run_program` for standard output.
    """
    return run_program(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    command, *rest = [*argv, ""]
    if command in ("", "-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if command else 2
    if command == "--version":
        from clip_pgs import __version__

        sys.stdout.write(f"clip-pgs {__version__}\n")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1) or COMMANDS
        return refuse(f"unknown command {command!r}; nearest: {', '.join(near)}")
    try:
        check_versions()
        os.getcwd()
    except ValueError as error:
        return refuse(error)
    except FileNotFoundError:
        return refuse("the working directory was removed; change to one that is there")
    # GNU OpenMP's threads wait for each other at full load, for milliseconds, before they sleep.
    # Where another program has one of two cores, that keeps the awaited thread from running.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Where the home folder cannot be written, it warns of its cache at each call.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        with leaving_when_told():
            return _function(COMMANDS[command][0])(rest[:-1])
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        sentence, code = early_end(error)
        sys.stderr.write(f"{sentence}\n")
        return code
    # A folder of somebody else's; most are looked into before any work.
    except PermissionError as error:
        return refuse(error)
    except ModuleNotFoundError as error:
        return refuse(f"clip-pgs {command} needs {error.name}: pip install 'clip-pgs[all]'")


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _usage() -> str:
    lines = ["usage: clip-pgs COMMAND ...", "", "commands:"]
    lines += [f"  {name:11} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", _EXAMPLES])


# ------------------------------------------------------------------------------------------------
# Completion
# ------------------------------------------------------------------------------------------------

_BASH = """\
_clip_pgs() {{
    local words="" current="${{COMP_WORDS[COMP_CWORD]}}" last="${{COMP_WORDS[COMP_CWORD - 1]}}"
    if ((COMP_CWORD == 1)); then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $last" in
{values}
        *)
            case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{flags}
            esac
            ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _clip_pgs clip-pgs
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def completion(argv: Sequence[str]) -> int:
    """Print the completion of a shell: commands, options, and the names that options take.

    Args:
        argv: "bash" or "zsh".
    """
    if list(argv) not in (["bash"], ["zsh"]):
        sys.stdout.write("usage: clip-pgs completion bash|zsh\n")
        return 0 if list(argv) in (["-h"], ["--help"]) else 2
    named_values = {
        "config": [path.stem for path in sorted((CONFIGS / "train").glob("*.yaml"))],
        "masking": registered_names("masking"),
        "text-masking": registered_names("data"),
    }
    values = [f'        "train --{k}") words="{" ".join(v)}" ;;' for k, v in named_values.items()]
    flags: list[str] = []
    for path, parser in _parsers():
        named = {word for action in parser._actions for word in action.option_strings}
        choices = [action for action in parser._actions if action.choices]
        for action in choices:
            words = " ".join(map(str, action.choices or ()))
            if action.option_strings:
                pattern = " | ".join(f'"{path[0]} {flag}"' for flag in action.option_strings)
                values.append(f'        {pattern}) words="{words}" ;;')
            else:
                named |= set(words.split())
        pattern = f'"{" ".join(path)}"' if len(path) > 1 else f'"{path[0]} "*'
        flags.append(f'            {pattern}) words="{" ".join(sorted(named))}" ;;')
    # What is more exact comes first.
    flags.sort(key=lambda line: '"*)' in line)
    script = _BASH.format(
        commands=" ".join(COMMANDS),
        values="\n".join(dict.fromkeys(values)),
        flags="\n".join(flags),
    )
    sys.stdout.write(_ZSH + script if argv[0] == "zsh" else script)
    return 0


def _parsers() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield the parser of each command, and of each command below it, with their names.

    Those of a command that lacks a package are left out.
    """
    for path, place in _PARSERS.items():
        try:
            parser = _function(place)()
        except ModuleNotFoundError:
            continue
        yield path, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    yield (*path, name), inner


if __name__ == "__main__":
    sys.exit(main())
