"""What every part shares: one-sentence errors, atomic writes, registries, names of a run's files.

Errors reach a terminal as one line on stderr, with exit code 2 for bad input. Files that others
read are there whole or not at all, whenever the process, or the machine, dies.
"""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Generic, NoReturn, TypeVar

# Exit codes; 1 is anything that is not below.
DONE, FAILED, BAD_INPUT, PREEMPTED, INTERRUPTED = 0, 1, 2, 85, 130

# What a run's folder holds.
OPTIONS_NAME = "options.json"
PARAMS_NAME = "params.txt"
ENVIRONMENT_NAME = "env.json"
LOG_NAME = "out.log"
METRICS_NAME = "metrics.jsonl"
SKIPPED_NAME = "skipped.jsonl"
EXIT_NAME = "exit.json"
LOCK_NAME = ".lock"
CHECKPOINTS_NAME = "checkpoints"
MASKS_NAME = "masks"
EXPORT_NAME = "export"
EVAL_NAME = "eval"
# What an export holds, as OpenCLIP names it.
MODEL_CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
# What holds the config of a model of transformers, and what that of a masked autoencoder says.
HF_CONFIG_NAME = "config.json"
MAE_TYPE = "vit_mae"

# How a mask ratio can go over training; here, as options know it before torch is there.
MASK_SCHEDULES = ("constant", "linear", "cosine")

# An installed package carries its configs; a clone keeps them at its top.
_PACKAGE = Path(__file__).resolve().parent
CONFIGS = next(p / "configs" for p in (_PACKAGE, _PACKAGE.parents[1]) if (p / "configs").is_dir())

UNFINISHED_ENDING = ".unfinished"

# Of a file in a run's folder: its options name each of its shards.
MAX_RUN_FILE_BYTES = 2**26
_MAX_JSON_BYTES = 2**20

_HEAD, _TAIL = 1500, 300
# Before a slash or the end, after `--flag=`, `KEY=`, both, or the `::` of several data sources.
_TILDE = re.compile(r"(?:^(?:--[\w-]+=)?(?:\w+=)?|::)~(?=/|$|::)")
# How modules register strategies and maskings of texts.
_REGISTRATION = re.compile(
    r'^(?:@register_masking|@TEXT_MASKINGS\.register|_register_reduction)\(\s*"([\w-]+)"', re.M
)
# What a disk or a file system cannot do, whatever was asked of it.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FAULTS = (*_FULL, errno.EIO, errno.EMFILE, errno.ENFILE)

Entry = TypeVar("Entry")
SameEntry = TypeVar("SameEntry")


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
    return text or type(error).__name__


def refusal_code(error: BaseException | str) -> int:
    """Return the exit code of a command that an error ends: 2 for bad input, 1 for the disk."""
    return FAILED if isinstance(error, OSError) and error.errno in _DISK_FAULTS else BAD_INPUT


def refuse(error: BaseException | str) -> int:
    """Say on stderr, in one sentence, why a command ends, and return its exit code."""
    sys.stderr.write(f"error: {one_sentence(error)}\n")
    return refusal_code(error)


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
def leaving_when_told() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGUSR1 end the block with an error, the second time at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, before = os.getpid(), {}

    def leave(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        # Processes that load data inherit this, and end by signals.
        if os.getpid() != process:
            os.kill(os.getpid(), number)
        raise AskedToLeaveError(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        # What whoever started us wants ignored (nohup) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def usable_device(name: str) -> Any:
    """Return torch's device of a name.

    Raises:
        ValueError: If it is not on this machine, or computes nothing.
    """
    import torch

    try:
        device = torch.device(name)
        # A GPU is counted, not used: memory on it would be held for hours.
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "meta": 0}
        if (device.index or 0) >= counts.get(device.type, 1):
            raise RuntimeError(f"there is no {device}")
        if device.type not in counts:
            torch.empty(0, device=device)
    # torch raises the first, or one of the others where it was built without the backend.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} is not available on this machine") from error
    return device


def is_mae_config(config: Any) -> bool:
    """Return whether a model's config, whatever was read, is that of a masked autoencoder."""
    return isinstance(config, dict) and config.get("model_type") == MAE_TYPE


def explained_arguments(documented: type) -> dict[str, str]:
    """Return what the "Args:" of a class's docstring say of each name, on one line each."""
    _, _, text = inspect.cleandoc(documented.__doc__ or "").partition("\nArgs:\n")
    entries = re.split(r"\n(?= {4}\S)", re.split(r"\n(?=\S)", text)[0])
    parts = (entry.strip().partition(":") for entry in entries)
    return {name: " ".join(said.split()) for name, _, said in parts}


def find_config(name: str, kind: str) -> str:
    """Return the path of a config that a user names, or of the bundled one of that name.

    Args:
        name: A file; or, where there is none, that of a bundled config: "demo" or
            "configs/train/demo.yaml".
        kind: Folder of the bundled ones: "train", "models" or "study".

    Returns:
        The path; `name` itself where nothing is found.
    """
    try:
        if not Path(name).exists():
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the block say which file a disk had no room for; the system does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` to be written, which takes its place when all went well.

    Args:
        path: The file, or a link to it; what is there stays until the new one is on the disk.

    Raises:
        OSError: If it cannot be written, or something is there that is no regular file, as a
            device; what was there is still there.
    """
    path = regular_file(path)
    unfinished = unfinished_path(path)
    try:
        with naming(path), unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path` to be filled, which takes its place when all went well.

    Args:
        path: The folder; what is there stays until the new one is whole.

    Raises:
        OSError: If it cannot be written, or something is there that is no folder, as a link; what
            was there is still there.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, "it is no folder of its own", str(path))
    unfinished, replaced = unfinished_path(path), path.with_name(f".{path.name}.replaced")
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with naming(path):
            yield unfinished
        # A folder cannot take another's place: between the two there is none, but never half.
        if path.exists():
            os.replace(path, replaced)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: If it cannot be written; what was there is still there.
    """
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Raises:
        OSError: If it cannot be written; what was there is still there.
    """
    # Where the locale is no UTF-8, Python reads foreign letters of a command line as these.
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file that several processes may share, whole or not at all.

    Raises:
        OSError: If it cannot be written; the file is as it was.
    """
    data = f"{line}\n".encode()
    file = os.open(regular_file(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # Over NFS two machines' appends can meet at one place; not every file system has locks.
        with suppress(OSError, ImportError):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        # A disk that fills up takes a part without an error.
        if os.write(file, data) < len(data):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


@contextmanager
def folder_lock(folder: Path, *, on_busy: Callable[[], object]) -> Iterator[None]:
    """Hold a folder, together with the processes started meanwhile; some file systems cannot.

    Args:
        folder: It is there, and nothing is written into it.
        on_busy: Called where another process holds it, which is waited for unless this raises.
    """
    with ExitStack() as stack:
        with suppress(OSError, ImportError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            os.set_inheritable(descriptor, True)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_busy()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def read_file(path: Path, *, what: str, max_bytes: int) -> bytes:
    """Return what a regular file holds; a pipe or a device, which may never end, is not opened.

    Args:
        path: The file.
        what: What to call it in messages, such as "--model-config tiny.json".
        max_bytes: Largest size that is read.

    Raises:
        ValueError: If it cannot be read, or is large.
    """
    try:
        with regular_file(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"cannot read {what}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise ValueError(f"{what} is larger than {max_bytes} bytes")
    return data


def read_json(path: Path, *, what: str, max_bytes: int = _MAX_JSON_BYTES) -> Any:
    """Read a JSON file; see `read_file`.

    Raises:
        ValueError: If it cannot be read, is large, or is not JSON.
    """
    data = read_file(path, what=what, max_bytes=max_bytes)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def read_json_object(path: Path, *, what: str, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `read_file`.

    Raises:
        ValueError: If it cannot be read, is large, or holds anything else.
    """
    content = read_json(path, what=what, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold one JSON object, got {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any] | None]:
    """Return the objects of a file, one a line, and None for a line that is none.

    A killed run can leave half a line, and a damaged disk anything; a file that is not there has
    no line.
    """
    entries: list[dict[str, Any] | None] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        entries.append(entry if isinstance(entry, dict) else None)
    return entries


def check_writable(*paths: Path) -> None:
    """Refuse files that cannot be written, before the work whose results they are to hold.

    Nothing is made, not even a folder that is missing.

    Raises:
        ValueError: If one is a folder, a device or the like, or would lie where no file can be
            made.
    """
    for path in paths:
        if "\0" in str(path):
            raise ValueError(f"cannot write {path}: its name holds a null byte")
        try:
            unfinished_path(regular_file(path)).is_file()
            above = path.absolute().parents
            with tempfile.TemporaryFile(dir=next(folder for folder in above if folder.exists())):
                pass
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None


def regular_file(path: Path) -> Path:
    """Return the file that a path leads to, one that is to be made included.

    Raises:
        OSError: If something else is there: a folder, or a device or a pipe, which opening may wait
            for without an end, and writing would destroy.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def unfinished_path(path: Path) -> Path:
    """Return where a file or folder is while it is being written."""
    return path.with_name(f".{path.name}{UNFINISHED_ENDING}")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Registry(Generic[Entry]):
    """Classes or functions by name, each with a declaration of what others need to know of it.

    Help texts, checks, tests and tables read the declarations, so that a new entry is registered
    in one place. An entry outside this package is named "package.module:Class"; its module is
    imported and must have registered it.

    Args:
        kind: What the entries are, in one or two words for messages: "masking".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._declarations: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **declaration: Any) -> Callable[[SameEntry], SameEntry]:
        """Register what is decorated.

        Args:
            name: What users type; it holds no colon.
            **declaration: What there is to know of it.

        Raises:
            ValueError: If the name is empty or holds a colon, or something else has it. A class
                or function that is defined anew, as in a notebook, replaces itself.
        """
        if not name or ":" in name:
            raise ValueError(f"the name of a {self.kind} must hold no colon, got {name!r}")

        def decorate(entry: SameEntry) -> SameEntry:
            if name in self._entries and _origin(self._entries[name]) != _origin(entry):
                raise ValueError(
                    f"{self.kind} {name!r} is registered already; taken: {', '.join(self.names())}"
                )
            self._entries[name] = entry  # type: ignore[assignment]
            self._declarations[name] = MappingProxyType(declaration)
            return entry

        return decorate

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._entries)

    def name(self, name: str) -> str:
        """Return the registered name of what a user names, importing "package.module:Class".

        Raises:
            ValueError: If nothing is registered under it, or the import fails.
        """
        if not isinstance(name, str):
            raise ValueError(f"the name of a {self.kind} must be a text, got {name!r}")
        if ":" not in name:
            if name not in self._entries:
                choices = ", ".join(self.names())
                raise ValueError(f"unknown {self.kind} {name!r}; choose from {choices}")
            return name
        module_name, _, attribute = name.partition(":")
        try:
            entry = getattr(importlib.import_module(module_name), attribute)
        # A stranger's module can raise anything.
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {one_sentence(error)}"
            raise ValueError(f"cannot import {self.kind} {name!r}: {reason}") from error
        for registered, other in self._entries.items():
            if other is entry:
                return registered
        raise ValueError(
            f"{name!r} is not registered as a {self.kind}; its module has to register it"
        )

    def get(self, name: str) -> Entry:
        """Return an entry by its name or "package.module:Class".

        Raises:
            ValueError: See `name`.
        """
        return self._entries[self.name(name)]

    def declaration(self, name: str) -> Mapping[str, Any]:
        """Return what an entry declared when it was registered.

        Raises:
            ValueError: See `name`.
        """
        return self._declarations[self.name(name)]


def late_names(package: str, names: Collection[str], *modules: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports a module when one of its names is asked for.

    Help and refusals of a command, which import its package, have no seconds for torch.

    Args:
        package: Its name.
        names: What it offers.
        modules: Those of the package that hold them, in the order to look.
    """

    def find(name: str) -> Any:
        if name in names:
            for module in modules:
                found = importlib.import_module(f"{package}.{module}")
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def registered_names(package: str) -> list[str]:
    """Return the names that the modules of a package of ours register, sorted.

    They are read from the modules' text, unless this process has imported them anyway: importing
    them takes torch, and with it seconds.

    Args:
        package: "masking" for the strategies, "data" for the maskings of texts.
    """
    if package == "masking" and "clip_pgs.masking" in sys.modules:
        return sys.modules["clip_pgs.masking"].list_maskings()
    if package == "data" and "clip_pgs.data.text_masking" in sys.modules:
        return sys.modules["clip_pgs.data.text_masking"].TEXT_MASKINGS.names()
    texts = (path.read_text("utf-8") for path in _PACKAGE.joinpath(package).glob("*.py"))
    return sorted(name for text in texts for name in _REGISTRATION.findall(text))


def _origin(entry: Any) -> Any:
    """Return where a class or function is defined; anything else stands for itself."""
    if hasattr(entry, "__qualname__"):
        return entry.__module__, entry.__qualname__
    return id(entry)
