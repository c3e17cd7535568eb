"""Files that are there whole or not at all, whenever the process, or the machine, dies.

What a run's folder and an export hold is named here once. A path of a user's is opened only where a
regular file is: a pipe or a device may never end.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

# What a run's folder holds.
OPTIONS_NAME = "options.json"
PARAMS_NAME = "params.txt"
ENVIRONMENT_NAME = "env.json"
LOG_NAME = "out.log"
METRICS_NAME = "metrics.jsonl"
SKIPPED_NAME = "skipped.jsonl"
WANDB_ID_NAME = "wandb_id.txt"
EXIT_NAME = "exit.json"
LOCK_NAME = ".lock"
CHECKPOINTS_NAME = "checkpoints"
MASKS_NAME = "masks"
EXPORT_NAME = "export"
EVAL_NAME = "eval"
# What an export holds, as OpenCLIP names it.
MODEL_CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
# What holds the config of a model of transformers.
HF_CONFIG_NAME = "config.json"

UNFINISHED_ENDING = ".unfinished"
# What the system says of a disk that has no room.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a file in a run's folder: its options name each of its shards.
MAX_RUN_FILE_BYTES = 2**26
# Of the lines of a run, of which a long one has millions.
MAX_LINES_BYTES = 2**30
_MAX_JSON_BYTES = 2**20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the block name the file that a user knows.

    The system names none where a disk has no room, and else the one that is being written.
    """
    try:
        yield
    except OSError as error:
        is_disk_full = error.filename is None and error.errno in DISK_FULL
        if is_disk_full or error.filename == str(unfinished_path(path)):
            error.filename = str(path)
        raise


def file_state(status: os.stat_result) -> tuple[int, int, int]:
    """Return what tells that a file was not changed since: its size and both of its times.

    Tools that copy or build set the one time (mtime) as they like; nobody sets the other (ctime).
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` to be written, which takes its place when all went well.

    Args:
        path: The file; what is there stays until the new one is on the disk. A link makes place
            itself: in a folder of somebody else's it may lead to any file of the user's.

    Raises:
        OSError: If it cannot be written, or something is there that is no regular file, as a
            device; what was there is still there. Or if another process has begun to write it.
    """
    regular_file(path)
    unfinished = unfinished_path(path)
    with naming(path):
        # What a killed process left, or a stranger: to open a pipe is to wait.
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:
            own = os.fstat(file.fileno())

            def is_own() -> bool:
                """Return whether no other process has taken the name since."""
                with suppress(FileNotFoundError):
                    return os.path.samestat(own, unfinished.lstat())
                return False

            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if not is_own():
                    raise OSError(errno.EBUSY, "another process is writing it, too", str(path))
                os.replace(unfinished, path)
            finally:
                if is_own():
                    unfinished.unlink()
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path` to be filled, which takes its place when all went well.

    Args:
        path: The folder; what is there stays until the new one is whole. Where a process dies
            between the two, the next one finds the old and puts it back first.

    Raises:
        OSError: If it cannot be written, or something is there that is no folder, as a link, or
            one whose place none can take, as a mount point; what was there is still there.
        ValueError: If another process is about to write it.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, "it is no folder of its own", str(path))
    place = path.resolve()
    if path.exists() and place in (Path.cwd(), *Path.cwd().parents):
        # Neither this process nor the shell that started it would be in what takes its place.
        reason = "it holds the working directory, whose place no folder can take; leave it first"
        raise OSError(errno.EBUSY, reason, str(path))
    if place.is_mount():
        reason = "it is a mount point, whose place no folder can take; name one below it"
        raise OSError(errno.EBUSY, reason, str(path))
    unfinished = unfinished_path(path)
    replaced, removed = (path.with_name(f".{path.name}.{end}") for end in ("replaced", "removed"))

    def put_back() -> None:
        """Give the old folder its place again where no other is in it."""
        if replaced.is_dir() and not replaced.is_symlink() and not path.exists():
            os.replace(replaced, path)

    def remove_replaced() -> None:
        # Half removed it is under another name, as it is not to be put back.
        with suppress(OSError):
            os.replace(replaced, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def refuse_second() -> None:
        raise ValueError(f"{path} is being written by another process; wait for its end")

    if unfinished.is_symlink():
        unfinished.unlink()
    with naming(path):
        unfinished.mkdir(parents=True, exist_ok=True)
    with folder_lock(unfinished, on_busy=refuse_second):
        if not unfinished.is_dir():
            # The one before took its place meanwhile.
            refuse_second()
        try:
            put_back()
            remove_replaced()
            # What a killed process left.
            for leftover in (*unfinished.iterdir(), replaced, removed):
                shutil.rmtree(leftover, ignore_errors=True)
                leftover.unlink(missing_ok=True)
            with naming(path):
                yield unfinished
            # A folder cannot take another's place: between the two there is none, but never half.
            if path.exists():
                os.replace(path, replaced)
            os.replace(unfinished, path)
            sync(path.parent)
        except BaseException:
            put_back()
            # Once it has its place, another process may begin one of that name.
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            if path.exists():
                remove_replaced()


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


def write_json(path: Path, content: Any) -> None:
    """Write plain types as JSON, whole or not at all, into a folder that is made if need be.

    Raises:
        OSError: If it cannot be written; what was there is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file that several processes may share, whole or not at all.

    Raises:
        OSError: If it cannot be written; the file is as it was.
    """
    data = f"{line}\n".encode()
    file = os.open(own_file(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
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
        return read_within(path, what=what, max_bytes=max_bytes)
    except OSError as error:
        raise ValueError(f"cannot read {what}: {error.strerror}") from None


def read_within(path: Path, *, what: str, max_bytes: int) -> bytes:
    """Do what `read_file` does, but for what the system says of a file that cannot be read.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is large.
    """
    with regular_file(path).open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{what} is larger than {max_bytes} bytes")
    return data


def read_json(path: Path, *, what: str, max_bytes: int = _MAX_JSON_BYTES) -> Any:
    """Read a JSON file; see `read_file`.

    Raises:
        ValueError: If it cannot be read, is large, is not JSON, or says a thing twice.
    """
    data = read_file(path, what=what, max_bytes=max_bytes)
    try:
        return json.loads(data, object_pairs_hook=_without_doubles)
    except LookupError as error:
        raise ValueError(f"{what}: {error.args[0]!r} is given twice") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's content, of which Python would keep the last of two in silence."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise LookupError(name)
        content[name] = value
    return content


def read_json_object(path: Path, *, what: str, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `read_file`.

    Raises:
        ValueError: If it cannot be read, is large, or holds anything else.
    """
    content = read_json(path, what=what, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold one JSON object, got {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the objects of a file, one a line, and None for a line that is none.

    A killed run can leave half a line, and a damaged disk anything; a file that is not there has
    no line.

    Raises:
        OSError: If the file cannot be read, or has more than `MAX_LINES_BYTES`.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_LINES_BYTES:
            reason = f"it is larger than {MAX_LINES_BYTES} bytes"
            raise OSError(errno.EINVAL, reason, str(path))
        # What is longer is no line of a run.
        while line := file.readline(_MAX_JSON_BYTES):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            yield entry if isinstance(entry, dict) else None


def list_folder(folder: Path) -> list[Path]:
    """Return what a folder holds, in the order of the names; nothing where there is no folder.

    Hidden files are left out: macOS writes one beside each file of its own on other disks. To
    `Path.glob` a folder that may not be read is one that holds nothing.

    Raises:
        OSError: If it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


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


def absence(path: Path | str) -> str:
    """Say what is there in place of a regular file, as the rest of a sentence on a path."""
    try:
        os.stat(path)
    except PermissionError:
        return "may not be read"
    except (OSError, ValueError):
        return "does not exist"
    return "is a folder" if os.path.isdir(path) else "is no regular file"


def check_room(path: Path, num_bytes: int) -> None:
    """Refuse what the disk has no room for, before the work that makes it.

    Args:
        path: Where it is to go; folders on the way may be missing.
        num_bytes: At least what it takes.

    Raises:
        ValueError: If that is more than is free.
    """
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if num_bytes > (free := shutil.disk_usage(place).free):
        raise ValueError(
            f"{path} needs {num_bytes / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB free"
        )


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


def own_file(path: Path) -> Path:
    """Return a file, to be made or appended to, of a folder that may be somebody else's.

    A link is removed, with a warning: it may lead to any file of the user's.

    Raises:
        OSError: If something else is there; see `regular_file`.
    """
    regular_file(path)
    if path.is_symlink():
        logger.warning("%s was a link, through which nothing is written: it is begun anew", path)
        path.unlink()
    return path


def linked_folders(folder: Path) -> list[Path]:
    """Return the links to folders below a folder; in a stranger's each may lead anywhere."""
    below = (Path(place, name) for place, names, _ in os.walk(folder) for name in names)
    return [path for path in below if path.is_symlink()]


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
