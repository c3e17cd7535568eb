"""The demo: make the world, train with PGS, evaluate in all suites, draw what PGS keeps.

Everything goes to data/demo and logs/demo below the working directory. What is there already is
kept, and an interrupted run goes on; a world that is not whole, or of another size, is made again.
A run that is being trained is never removed, and there is one demo at a time in a folder.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

from clip_pgs.common import (
    BAD_INPUT,
    AskedToLeaveError,
    SentenceParser,
    as_plain,
    changes_of,
    early_end,
    one_sentence,
    refusal_code,
    refuse,
    run_program,
)
from clip_pgs.files import (
    EVAL_NAME,
    EXPORT_NAME,
    LOCK_NAME,
    LOG_NAME,
    MAX_RUN_FILE_BYTES,
    OPTIONS_NAME,
    folder_lock,
    read_file,
    read_json_object,
    write_text,
)
from clip_pgs.launch import start
from clip_pgs.training.stop import lock_holder, take_lock

_WORLD = Path("data", "demo")
_RUN = Path("logs", "demo")
# What becomes of a run that a fresh one takes the place of, until it is removed.
_REPLACED = Path("logs", ".demo.replaced")
_TABLE = _RUN / EVAL_NAME / "table.txt"
_PICTURE = _RUN / "pgs_keeps.png"
_CONFIG = ("--config", "demo")
_TRAIN = ("clip_pgs.training", *_CONFIG)
# The name of a fresh run until it is known to be possible, as the old one must not go before.
_FRESH = ("--logs", "logs", "--name", "demo.fresh")
_OWN_FLAGS = ("--config", "--logs", "--name", "--resume")
# Measured on 2026-11-29 by `clip-pgs train demo_random` and `clip-pgs test logs/demo_random`.
_RANDOM = """
With random patches in place of PGS (clip-pgs train demo_random, the same seed), in percent:
zero-shot shape 16.3, color 98.6; retrieval R@5 96.3 and 97.3; linear probe, shape 19.0, color 98.6.
One seed says little; docs/results.md of the repository has six, at ratio 0.75."""
# Asking what a fresh demo would do removes nothing.
_HELP = {"-h", "--help", "--help-all"}
_QUESTIONS = _HELP | {"--check-only", "--trial"}


class _DemoError(Exception):
    """A sentence, unless the part that failed has said one, and an exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0, 2 for bad input or a demo that is running, 85 where a signal asked it to
        leave, 130 for Ctrl-C, 1 for a full disk, else that of what failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_fresh = arguments[:1] == ["--fresh"]
    flags = arguments[1:] if is_fresh else []
    if not is_fresh:
        make_parser().parse_args(arguments)
    cure = "the same command begins again"
    try:
        if is_fresh and not _HELP & set(flags):
            _check_place()
        _check_flags(flags)
        with folder_lock(Path(), on_busy=_refuse_second):
            if _QUESTIONS & set(flags):
                _answer(flags)
                return 0
            _prepare(is_fresh, flags)
            cure = "clip-pgs demo goes on where it was"
            if flags:
                cure = f"clip-pgs train demo {shlex.join(flags)} --resume latest, then {cure}"
            _demo(flags)
    # OSError: what lies in the folder is not as it was left, or the disk is full.
    except (ValueError, OSError) as error:
        return refuse(error)
    except _DemoError as error:
        if str(error):
            sys.stderr.write(f"error: {error}\n")
        return error.code
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        sentence, code = early_end(error)
        sys.stderr.write(f"{sentence}; {cure}\n")
        return code
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = SentenceParser(
        prog="clip-pgs demo",
        usage="%(prog)s [--fresh [FLAGS]]",
        description=__doc__,
        allow_abbrev=False,
    )
    text = "train and evaluate anew; flags after it go to training"
    parser.add_argument("--fresh", action="store_true", help=text)
    return parser


def _check_flags(flags: Sequence[str]) -> None:
    """Refuse what can be told to be wrong without the world, before one is made.

    Raises:
        ValueError: In one sentence.
    """
    for flag in (word.partition("=")[0] for word in flags):
        if flag in _OWN_FLAGS:
            raise ValueError(f"{flag} is the demo's own; clip-pgs train demo takes it")
    # Training itself checks what it is asked, where its data are there.
    if flags and not (_QUESTIONS & set(flags) and _can_answer(flags)):
        from clip_pgs.training.options import check_values, read_options, register_model_config

        options = read_options([*_CONFIG, *flags])
        check_values(options)
        # It imports torch, which takes seconds.
        from clip_pgs.training.checks import check_options

        register_model_config(options)
        check_options(options, has_files=False)


def _can_answer(flags: Sequence[str]) -> bool:
    return bool(_HELP & set(flags)) or (_WORLD / "train").is_dir()


def _answer(flags: Sequence[str]) -> None:
    """Say what a fresh run would take or, before there are data, that its options are valid.

    Raises:
        ValueError: If a trial has no data.
    """
    if _can_answer(flags):
        _call(*_TRAIN, *flags, *_FRESH)
    elif "--trial" in flags:
        raise ValueError(
            f"--trial needs the data in {_WORLD}, which clip-pgs data world {_WORLD} makes"
        )
    else:
        _say(f"the options are valid; what the run takes is told once {_WORLD} is there")


def _check_place() -> None:
    """Refuse what cannot be removed as the folder of a run is.

    Raises:
        ValueError: In one sentence.
    """
    if _RUN.is_symlink():
        what = "a link"
    elif _RUN.is_mount():
        what = "a mount point"
    elif _RUN.exists() and not _RUN.is_dir():
        what = "no folder"
    else:
        return
    raise ValueError(f"{_RUN} is {what}, which --fresh does not replace; move or remove it first")


def _prepare(is_fresh: bool, flags: Sequence[str]) -> None:
    """Make the world, and remove the run that a fresh one takes the place of."""
    if is_fresh:
        with _run_lock():
            pass

    _heading("1 of 4: the demo world")
    _call("clip_pgs.data", "world", str(_WORLD))
    if is_fresh:
        _call(*_TRAIN, *flags, *_FRESH, "--check-only")
        try:
            _remove_run()
        except OSError as error:
            sentence = f"the run before cannot be removed: {one_sentence(error)}"
            raise _DemoError(sentence, refusal_code(error)) from None


def _remove_run() -> None:
    with _run_lock():
        # A demo that was killed may have left one.
        if _REPLACED.exists():
            shutil.rmtree(_REPLACED)
        if _RUN.exists():
            _RUN.rename(_REPLACED)
    # NFS keeps a folder as long as a file in it is open, as the lock was.
    if _REPLACED.exists():
        shutil.rmtree(_REPLACED)


def _demo(flags: Sequence[str]) -> None:
    """Train, evaluate and draw."""
    _heading("2 of 4: training")
    export = _RUN / EXPORT_NAME
    if export.is_dir():
        _say("done before; clip-pgs demo --fresh trains anew")
    else:
        _call(*_TRAIN, *flags, "--logs", "logs", "--name", "demo", "--resume", "latest")

    _heading("3 of 4: evaluation")
    table, has_picture = _read_table(export), _is_newer(_PICTURE, export)
    has_table = bool(table.strip())
    scenes = map(str, sorted(_WORLD.glob("scenes/*.png")))
    options = ["--masking", "random", "cluster", "pgs", "--mask-ratio", "0.5"]
    view = ["--model", str(_RUN), "--output", str(_PICTURE)]
    drawing = ("clip_pgs.inspection", "masks", *scenes, *options, *view)
    with nullcontext() if has_picture else _meanwhile(*drawing):
        if has_table:
            _say(table.rstrip("\n"))
        else:
            _TABLE.parent.mkdir(parents=True, exist_ok=True)
            scoring = ("clip_pgs.cli", "export", str(_RUN), "--suite", "all")
            table = _call(*scoring, output=subprocess.PIPE)
    # What is newer than the export is not made anew.
    if not has_table:
        write_text(_TABLE, table)
    if not has_picture:
        _PICTURE.touch()
    if _is_as_configured():
        _say(_RANDOM)

    _heading("4 of 4: what PGS keeps of six scenes")
    _say(str(_PICTURE))

    _heading("Where everything lies")
    places = {
        f"{export}/": f"the model; open_clip opens it as local-dir:{export.absolute()}",
        f"{_RUN}/{EVAL_NAME}/report/report.html": "the report: figures, and the published numbers "
        "beside it",
        str(_TABLE): "the table above; beside it, one JSON per data set",
        str(_PICTURE): "the picture",
        str(_RUN / LOG_NAME): "what training said; curves: "
        f"tensorboard --logdir {_RUN}/tensorboard",
        f"{_RUN}/checkpoints/": "weights and optimizer, to continue from",
        f"{_WORLD}/": "the generated images and captions",
    }
    for place, meaning in places.items():
        _say(f"{place:34} {meaning}")


def _read_table(export: Path) -> str:
    """Return the table, or "" where it is older than the export, damaged or not there."""
    if _is_newer(_TABLE, export):
        with suppress(ValueError):
            return read_file(_TABLE, what=str(_TABLE), max_bytes=MAX_RUN_FILE_BYTES).decode("utf-8")
    return ""


def _is_as_configured() -> bool:
    """Return whether the run was trained as the config says, from its first step to its last."""
    from clip_pgs.evaluation.results import read_results
    from clip_pgs.training.options import IDENTITY, RECIPE, names_of, read_options

    options = read_options(_CONFIG)
    names = [*names_of(IDENTITY), *names_of(RECIPE), "train_data"]
    wanted = as_plain({name: getattr(options, name) for name in names})
    path = _RUN / OPTIONS_NAME
    try:
        saved = read_json_object(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
    except ValueError:
        return False
    results = read_results(_RUN / EVAL_NAME)
    is_changed = any(changes_of(result.training.get("options")) for result in results)
    return not is_changed and all(saved.get(name) == value for name, value in wanted.items())


def _call(module: str, *arguments: str, output: int | None = None) -> str:
    """Run a module as a process of its own.

    Args:
        module: Its name.
        *arguments: For its command line.
        output: Where what it prints goes, as `subprocess` takes it; a PIPE's is shown as well.

    Returns:
        What came through the pipe, else "".

    Raises:
        _DemoError: If it fails.
    """
    return _output_of(_start(module, *arguments, output=output))


@contextmanager
def _meanwhile(module: str, *arguments: str) -> Iterator[None]:
    """Run a module as a process of its own while the body runs; what it prints is dropped.

    Raises:
        _DemoError: If it fails.
    """
    process = _start(module, *arguments, output=subprocess.DEVNULL)
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise
    _output_of(process)


def _start(module: str, *arguments: str, output: int | None) -> subprocess.Popen[str]:
    # The lock on the folder stays as long as something of the demo runs.
    command = [sys.executable, "-m", module, *arguments]
    return start(command, stdout=output, close_fds=False, text=True)


def _output_of(process: subprocess.Popen[str]) -> str:
    lines = []
    try:
        for line in process.stdout or ():
            lines.append(line)
            sys.stdout.write(line)
        code = process.wait()
    except (AskedToLeaveError, KeyboardInterrupt) as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        process.send_signal(number)
        try:
            # It saves what it has.
            process.wait()
        except KeyboardInterrupt:
            # A second Ctrl-C does not let it.
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
    if code:
        raise _DemoError("", code if code > 0 else 128 - code)
    return "".join(lines)


def _is_newer(path: Path, than: Path) -> bool:
    return path.is_file() and path.stat().st_mtime_ns > than.stat().st_mtime_ns


def _refuse_second() -> NoReturn:
    sentence = "another demo is running in this folder; wait for its end, or stop it"
    raise _DemoError(sentence, BAD_INPUT)


@contextmanager
def _run_lock() -> Iterator[None]:
    """Hold the lock that training holds on its run, where there is a run."""
    try:
        lock = (_RUN / LOCK_NAME).open("rb+", buffering=0)
    except FileNotFoundError:
        yield
        return
    with lock:
        if not take_lock(lock):
            sentence = f"{_RUN} is being trained by {lock_holder(lock)}"
            raise _DemoError(f"{sentence}; wait for its end, or stop it", BAD_INPUT)
        yield


def _heading(text: str) -> None:
    _say(f"\n== {text}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    # What the parts print comes in between.
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_program(main))
