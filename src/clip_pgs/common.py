"""What commands share: arguments and what changes in them, errors of one sentence, exit codes.

An error reaches a terminal as one line on stderr, with exit code 2 for bad input. What is printed
may go to a full disk, to a pipe that nobody reads, or nowhere; see `run_program`.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import errno
import gc
import getpass
import hashlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from clip_pgs.files import DISK_FULL

# Exit codes; 1 is anything that is not below.
DONE, FAILED, BAD_INPUT, PREEMPTED, INTERRUPTED, UNREAD = 0, 1, 2, 85, 130, 141

# An installed package carries its configs; a clone keeps them at its top.
_PACKAGE = Path(__file__).resolve().parent
CONFIGS = next(p / "configs" for p in (_PACKAGE, _PACKAGE.parents[1]) if (p / "configs").is_dir())

# `timeout`, launchers and managers signal a process and its group; a human is slower.
ECHO_SECONDS = 1.0
# Models that bring their own weights, from the Hugging Face Hub or from a folder.
MODEL_SCHEMAS = ("hf-hub:", "local-dir:")
# OpenCLIP's contrastive loss of a validation.
BATCH_LOSS = "clip_val_loss"
# The longest that an import keeps a signal waiting.
_IMPORT_SECONDS = 10.0
_POLL_SECONDS = 0.05
_MAX_LOOK_SECONDS = 10.0
_MAX_MISSED_LOOKS = 3
_HEAD, _TAIL = 1500, 300
# Before a slash or the end, after `--flag=`, `KEY=`, both, or the `::` of several data sources.
_TILDE = re.compile(r"(?:^(?:--[\w-]+=)?(?:\w+=)?|::)~(?=/|$|::)")
# What a disk or a file system cannot do, whatever was asked of it.
_DISK_FAULTS = (*DISK_FULL, errno.EIO, errno.EMFILE, errno.ENFILE)


def one_sentence(error: BaseException | str) -> str:
    """Return a message on one line that a terminal can show.

    Messages quote what they complain of, whatever that is: line breaks become spaces, other
    characters that cannot be printed are escaped, and the middle of a long text is left out.

    Args:
        error: The message, or an error that has one. One of the system is told as FILE: REASON.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        error = f"{os.fsdecode(error.filename)}: {error.strerror}"
    text = " ".join(line.strip() for line in str(error).splitlines()).strip()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > _HEAD + _TAIL:
        return f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return text or (type(error).__name__ if isinstance(error, BaseException) else "")


def refusal_code(error: BaseException | str) -> int:
    """Return the exit code of a command that an error ends: its own, 1 for the disk, or else 2."""
    is_disk = isinstance(error, OSError) and error.errno in _DISK_FAULTS
    return FAILED if is_disk else getattr(error, "exit_code", BAD_INPUT)


def refuse(error: BaseException | str) -> int:
    """Say on stderr, in one sentence, why a command ends, and return its exit code."""
    sys.stderr.write(f"error: {one_sentence(error)}\n")
    return refusal_code(error)


class OutputError(BaseException):
    """Standard output cannot be written; no `except Exception` takes it for another file."""


class _Output:
    """A text stream, most likely a standard one, that raises no error of the system.

    Args:
        stream: The stream.
        is_needed: Raise `OutputError`, once, where it cannot be written. Else what is written is
            dropped, and all that comes after it.
    """

    def __init__(self, stream: Any, *, is_needed: bool) -> None:
        self._stream = stream
        self._is_needed = is_needed

    def write(self, text: str) -> int:
        """Write a text."""
        return self._done(self._stream.write, text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        self._done(self._stream.writelines, lines)

    def flush(self) -> None:
        """Write what waits to be written."""
        self._done(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _done(self, method: Callable[..., Any], *given: Any) -> Any:
        try:
            return method(*given)
        except OSError as error:
            is_process_wide = self._stream in (sys.__stdout__, sys.__stderr__)
            if is_process_wide:
                # Else Python fails again, at its end, at what it could not write.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._is_needed:
                raise OutputError from error


def run_program(main: Callable[[], int | None]) -> int:
    """Run a command line, whatever becomes of what it prints.

    Where standard output or stderr is closed, what would be printed is dropped, and so is what
    stderr cannot take: a full disk behind it, or a pipe that nobody reads, changes no exit code.

    Returns:
        The program's exit code; or, where standard output cannot be written, 1 after a sentence,
        and 141 in silence where it is a pipe that nobody reads any more, as for programs that
        SIGPIPE ends.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The next file that is opened would take its place, and what others print.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        # torch asks for the name where it is imported; a container may run as a user without any.
        os.environ["USER"] = str(os.getuid())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        # Inherited, as from daemons in Perl: the exit codes of children would all be 0.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Python would end by looking for garbage among all modules, for a second.
    atexit.register(gc.freeze)
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        errors: Any = _Output(nowhere if sys.stderr is None else sys.stderr, is_needed=False)
        if sys.stderr is not None and sys.stderr is sys.__stderr__:
            # A traceback that it cannot take would change the exit code at Python's end.
            atexit.register(errors.flush)
        stack.enter_context(redirect_stderr(errors))
        output: Any = _Output(nowhere if sys.stdout is None else sys.stdout, is_needed=True)
        stack.enter_context(redirect_stdout(output))
        try:
            try:
                return main() or DONE
            finally:
                output.flush()
        except OutputError as error:
            reason = error.__cause__
            if isinstance(reason, BrokenPipeError):
                return UNREAD
            assert isinstance(reason, OSError)
            sys.stderr.write(f"error: standard output: {reason.strerror}\n")
            return FAILED


def is_first_process() -> bool:
    """Return whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def silenced(level: int) -> Iterator[None]:
    """Keep to ourselves what libraries log in the block, up to a level, and their warnings."""
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class AskedToLeaveError(BaseException):
    """A signal asked this process to leave; no `except Exception` stops it."""


@contextmanager
def catching(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Hand signals to a handler within the block; a thread other than the main one catches none.

    What whoever started us wants ignored (nohup) stays ignored. A signal that comes while a module
    is imported waits for its end.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers} if is_main else {}
    careful = _AfterImports(handler)
    for number, earlier in before.items():
        if earlier is not signal.SIG_IGN:
            signal.signal(number, careful)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        careful.close()


@contextmanager
def signals_held(*numbers: int) -> Iterator[None]:
    """Let signals wait for the end of the block, where an error of their handler would be lost.

    So it is in `os.fork`, whose hooks raise nothing. Python's handlers are exchanged, since what
    the system holds back from one thread it hands to another.
    """
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in numbers} if is_main else {}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


class _AfterImports:
    """A handler of signals that has another one called, never in the midst of an import.

    An error that is raised there can meet extensions in C++, which abort, or code that swallows it.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self.handler = handler
        self._since = 0.0
        self._timer: threading.Timer | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not _is_importing(frame) or (self._since and now - self._since > _IMPORT_SECONDS):
            self.handler(number, frame)
            return
        self._since = self._since or now
        if self._timer is None or not self._timer.is_alive():
            self._timer = signal_later(number, _POLL_SECONDS)

    def close(self) -> None:
        """Forget a signal that still waits: what it was to end has ended."""
        if self._timer is not None:
            self._timer.cancel()


class Pauses:
    """Tells whether this process was suspended, as by `docker pause` or Slurm.

    All clocks go on meanwhile. Who has a time limit looks at regular times; where one misses many
    of them, it was no wait for anything, and what is limited has its time anew.

    Args:
        limit: Its seconds.

    Attributes:
        interval: Seconds between two looks.
    """

    def __init__(self, limit: float) -> None:
        self.interval = min(limit / 10, _MAX_LOOK_SECONDS)
        self._looked_at = time.monotonic()

    def look(self) -> bool:
        """Return whether this process was suspended since it last looked."""
        earlier, self._looked_at = self._looked_at, time.monotonic()
        return self._looked_at > earlier + _MAX_MISSED_LOOKS * self.interval


def signal_later(number: int, seconds: float) -> threading.Timer:
    """Send a signal to this thread in some seconds, unless what is returned is canceled."""
    target = (threading.get_ident(), number)
    timer = threading.Timer(seconds, signal.pthread_kill, target)
    timer.daemon = True
    timer.start()
    return timer


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


class _Leave:
    """A handler of signals: the first ends a block, its echo does nothing, a later one ends all."""

    def __init__(self) -> None:
        self.since = 0.0
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Processes that load data inherit this, and end by each signal as if it were not there.
        is_ours, now = os.getpid() == self._process, time.monotonic()
        is_first = is_ours and not self.since
        if is_first:
            self.since = now
            # Python takes its handlers back before it has ended.
            atexit.register(signal.signal, number, signal.SIG_IGN)
        elif is_ours and now - self.since <= ECHO_SECONDS:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not is_first:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise AskedToLeaveError(signal.Signals(number).name)


def leaving_when_told() -> AbstractContextManager[None]:
    """Let SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the block with an error, a second one at once.

    Within ECHO_SECONDS of the first, others are its echo. Such a block in another one does nothing.
    """
    current = getattr(signal.getsignal(signal.SIGTERM), "handler", None)
    if isinstance(current, _Leave) and not current.since:
        return nullcontext()
    return catching(_Leave(), signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def early_end(error: BaseException) -> tuple[str, int]:
    """Return what to say of AskedToLeaveError or KeyboardInterrupt, and the exit code."""
    if isinstance(error, AskedToLeaveError):
        return f"stopped by {error}", PREEMPTED
    return "interrupted", INTERRUPTED


def expand_home(argument: str) -> str:
    """Return an argument with the home folder for a `~`, as in `--logs=~/logs`.

    A shell expands it neither in quotes nor after an equals sign, and no YAML file does.
    """
    return _TILDE.sub(lambda found: found[0][:-1] + os.path.expanduser("~"), argument)


class SentenceParser(argparse.ArgumentParser):
    """Refuses arguments in one sentence, without the usage text; so do its subcommands.

    A `~` at the beginning of a path stands for the home folder.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Expand `~`, then parse."""
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(expand_home, arguments)), namespace)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(BAD_INPUT, f"error: {one_sentence(message)}\n")


def literal(text: str) -> Any:
    """Read a Python literal, or true, false, none and null in any case; else keep the text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    # Python gives up on deep nesting and long digits.
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check_choice(value: str | None, choices: Collection[str], *, name: str) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        ValueError: If it is.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


class Pairs(argparse.Action):
    """Collects KEY=VALUE pairs from every occurrence of a flag; a later one wins.

    A key that one occurrence gives twice is refused.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the pairs of one occurrence."""
        pairs: dict[str, Any] = {}
        for pair in values:
            key, separator, text = pair.partition("=")
            if not separator or not key:
                parser.error(f"{option_string} takes KEY=VALUE, got {pair!r}")
            name = key.replace("-", "_")
            if name in pairs:
                parser.error(f"{option_string} takes each key once, got {key!r} twice")
            pairs[name] = literal(text)
        setattr(namespace, self.dest, (getattr(namespace, self.dest, None) or {}) | pairs)


def find_config(name: str, kind: str) -> str:
    """Return the path of a config that a user names, or of the bundled one of that name.

    Args:
        name: A file; or, where there is none, even if there is a folder, that of a bundled config:
            "demo" or "configs/train/demo.yaml".
        kind: Folder of the bundled ones: "train", "models", "eval" or "study".

    Returns:
        The path; `name` itself where nothing is found.
    """
    try:
        if not Path(name).exists() or Path(name).is_dir():
            plain = [p for p in CONFIGS.joinpath(kind).iterdir() if name in (p.stem, p.name)]
            path = CONFIGS.parent / name
            if plain or (name.startswith(f"{CONFIGS.name}/") and path.is_file()):
                return str(plain[0] if plain else path)
    except (OSError, ValueError):
        # A name that cannot be looked up; who opens the file says so.
        pass
    return name


def number_in(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: the numbers of a kind from `low` to `high`, both included."""

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {high}], got {text}")
        return value

    # argparse names the kind in its messages.
    read.__name__ = kind.__name__
    return read


def output_path(text: str) -> Path:
    """Return where something is to be written; an argparse type.

    An empty one, as of a variable that is not set, would be the working directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("must name a place, got ''; . is the working directory")
    return Path(text)


@contextmanager
def explained(
    what: str, *kinds: type[Exception], as_kind: type[Exception] = ValueError
) -> Iterator[None]:
    """Let an error of the block, of these kinds or else a ValueError, say what it is about.

    Raises:
        ValueError: "WHAT: ERROR", or the kind that is asked for.
    """
    kinds = kinds or (ValueError,)
    try:
        yield
    except kinds as error:
        raise as_kind(f"{what}: {one_sentence(error)}") from error


def changed_values(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return the changes of what was saved, as JSON has it, such as "lr 0.1 -> 0.2"."""
    changes = []
    for name, value in present.items():
        now = as_plain(value)
        if name in saved and saved[name] != now:
            before, after = _differing(saved[name], now)
            changes.append(f"{name} {before!r} -> {after!r}")
    return changes


def _differing(before: Any, after: Any) -> tuple[Any, Any]:
    """Return two values without the entries in which they are the same."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return before, after
    left = {k: v for k, v in before.items() if k not in after or after[k] != v}
    right = {k: v for k, v in after.items() if k not in before or before[k] != v}
    for key in left.keys() & right.keys():
        left[key], right[key] = _differing(left[key], right[key])
    return left, right


def as_plain(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists, what else there is its text."""
    return json.loads(json.dumps(value, default=str))


# What a run's contents call the code of a masking of one's own before the option's name, and what
# `experiment_of` calls the masking's.
CODE_OF = "code of"
CODE_OF_MASKING = f"contents of {CODE_OF} masking"


def experiment_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run this experiment, but for its seed, and wherever its files lie.

    Args:
        saved: The run's `options.json`; what is not there stays unknown.
    """
    known = {n: v for n, v in saved.items() if n not in ("seed", "launch", "train_indexes")}
    contents, files = known.pop("contents", None), known.pop("train_files", None)
    contents = list(map(str, contents)) if isinstance(contents, list) else []
    named = {what: digest for what, _, digest in (each.rpartition(": ") for each in contents)}
    known |= {f"contents of {what}": digest for what, digest in named.items()}
    place = str(known.get("train_data") or "")
    if place:
        # Of runs of earlier versions, which tell the pattern alone.
        known["train_data"] = "::".join(last_parts(part, 2) for part in place.split("::"))
    if files and isinstance(files, list) and not _is_elsewhere(place):
        text = "\n".join(map(str, files))
        known["train_files"] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    if isinstance(known.get("pretrained"), str):
        # As far as the run's name, which the name of a checkpoint does not tell.
        known["pretrained"] = last_parts(known["pretrained"], 3)
    if str(known.get("model")).startswith("local-dir:"):
        known["model"] = "local-dir:"
    return without_texts(known, named)


def history_of(record: Mapping[str, Any]) -> list[str]:
    """Return what a run's options of now do not tell: how it began, and what it had changed.

    Args:
        record: What a checkpoint says of its run.

    Returns:
        Such as "began with the weights laion2b_e16" and "had lr 0.1, seed 3 until step 40".
    """
    told, (data, options) = [], (record.get(part) for part in ("data", "options"))
    known, model = data if isinstance(data, Mapping) else {}, str(record.get("model"))
    weights = model if model.startswith(MODEL_SCHEMAS) else known.get("pretrained")
    if weights:
        told.append(f"began with the weights {weights}")
    for step, was in changes_of(options):
        if "resume" in was:
            told.append(f"went on from {was['resume']}, of whose training nothing is known")
            continue
        values = (
            f"other {name}" if name == "train_files" or " " in name else f"{name} {value}"
            for name, value in was.items()
        )
        told.append(f"had {', '.join(values)} until step {step}")
    return told


def changes_of(options: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return which options a run had until which step, as a checkpoint's record tells them.

    Args:
        options: The record's "options", of any shape.
    """
    changes = options.get("changes") if isinstance(options, Mapping) else None
    return [
        (pair[0], pair[1])
        for pair in (changes if isinstance(changes, list) else [])
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict)
    ]


def measured_alike(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two validations measured something on the same data, as far as they tell.

    Args:
        name: Of the measurement, by OpenCLIP's names or `SUITE/DATASET/METRIC`.
        one: A line of kind "val" of `metrics.jsonl`. Those of earlier versions have no "data".
        other: Another.
    """
    told, told_other = (_data_of(name, line.get("data")) for line in (one, other))
    if told and told_other and told != told_other:
        return False
    counts = [] if "/" in name or name.startswith("imagenet") else ["num_samples"]
    # Over the pairs of a batch, so that it grows with the logarithm of their number.
    counts += ["batch_size"] if name == BATCH_LOSS else []
    pairs = [(one.get(count), other.get(count)) for count in counts]
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _data_of(name: str, data: Any) -> dict[str, Any]:
    """Return the digests of what a measurement is of: one set, or all of an average's suite."""
    data = data if isinstance(data, dict) else {}
    suite, _, rest = name.partition("/")
    place = f"{suite.partition('@')[0]}/"
    if rest:
        own = place + rest.rpartition("/")[0]
        names = [own] if own in data else [each for each in data if each.startswith(place)]
    else:
        of_imagenet = "imagenet_v2" if name.startswith("imagenetv2") else "imagenet_val"
        names = [of_imagenet if name.startswith("imagenet") else "val_data"]
    return {each: data[each] for each in names if each in data}


def without_texts(options: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Return options without the files of a text masking of which the content is compared.

    Args:
        options: By name.
        named: What is compared by its content, as a run's `contents` names it.
    """
    texts = options.get("text_masking_options")
    if not isinstance(texts, dict):
        return dict(options)
    left = {n: value for n, value in texts.items() if f"text_masking_option {n}" not in named}
    return {**options, "text_masking_options": left}


def last_parts(path: str, count: int) -> str:
    """Return the last parts of where a file is; an address stays whole."""
    return path if _is_elsewhere(path) else "/".join(re.split(r"[/\\]", path)[-count:])


def _is_elsewhere(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")
