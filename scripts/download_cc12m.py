"""Download CC12M as webdataset shards: pixparse/cc12m-wds of the Hugging Face Hub.

    python scripts/download_cc12m.py data/cc12m --dry-run      # what there is to fetch
    python scripts/download_cc12m.py data/cc12m --shards 0-9   # a first piece
    python scripts/download_cc12m.py data/cc12m                # all of it

A shard that is there with the right size is not fetched again, so the same command continues after
an interruption. Each new shard is compared with the Hub's SHA-256, and `sizes.json` beside the
shards tells the trainer how many pairs each one holds.
"""

from __future__ import annotations

import clip_pgs  # isort: skip  (first, so that Ctrl-C while the rest loads is a word)
import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from clip_pgs.common import (
    BAD_INPUT,
    FAILED,
    AskedToLeaveError,
    SentenceParser,
    early_end,
    explained,
    leaving_when_told,
    one_sentence,
    run_program,
)
from clip_pgs.data.shards import read_sizes
from clip_pgs.files import check_room, folder_lock, unfinished_path, write_text

SIZES_NAME = "sizes.json"
MAX_WORKERS = 64
MAX_LISTED = 100_000
MAX_PAGES = 1_000
# Of silence, and of an answer's whole text.
LIST_SECONDS = 30
MAX_TRIES, RETRY_SECONDS = 3, 2
MAX_REDIRECTS = 5
MAX_ANSWER_BYTES = 2**26
# A shard is a plain file name, short enough for any disk with what is appended while it comes;
# what only ends like one could lie anywhere on this machine.
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}-train-([0-9]{1,9})\.tar")
SHARD_ENDING = re.compile(r"-train-\d+\.tar\s*$", re.IGNORECASE)
# Each member of an archive has a header of this many bytes.
TAR_BLOCK = 512

# The Hub client raises OSError or the errors of the HTTP library of its version, which is not
# always the same one.
NETWORK_ERRORS = (OSError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True)
class Shard:
    """A shard as the Hub describes it."""

    name: str
    number: int
    size: int
    sha256: str | None

    def is_intact(self, path: Path, *, checksum: bool) -> bool:
        """Tell whether the file at `path` is this shard, by size or also by content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return not checksum or self.sha256 in (None, sha256_of(path))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    try:
        with leaving_when_told():
            return download(arguments)
    except (ValueError, *NETWORK_ERRORS) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        return say_end(error)


def say_end(error: BaseException) -> int:
    """Say that a signal ended the command, and return the exit code."""
    sentence, code = early_end(error)
    print(f"{sentence}; the same command continues", file=sys.stderr, flush=True)
    return code


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = SentenceParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--shards", help="numbers to take, such as 0-9 or 0-9,20 (all)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, only")
    parser.add_argument(
        "--verify", action="store_true", help="compare shards that are there by SHA-256, not size"
    )
    parser.add_argument("--workers", type=int, default=8, help="parallel downloads")
    parser.add_argument("--repo", default="pixparse/cc12m-wds", help="dataset repository")
    return parser.parse_args(argv)


def download(arguments: argparse.Namespace) -> int:
    """Fetch what is missing and count the pairs.

    Raises:
        ValueError: If an argument is out of its range or names no shard, if the Hub lists what
            cannot be a shard, if the `sizes.json` that is there cannot be true, or if the disk has
            no room.
        OSError: If the Hub cannot be reached, or a shard arrives damaged or holds no pairs.
    """
    if not 1 <= arguments.workers <= MAX_WORKERS:
        raise ValueError(f"--workers must be from 1 to {MAX_WORKERS}, got {arguments.workers}")
    wanted = None if arguments.shards is None else parse_numbers(arguments.shards)
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder; name one for the shards")
    shards = [
        shard
        for shard in list_shards(arguments.repo)
        if wanted is None or any(shard.number in numbers for numbers in wanted)
    ]
    if not shards:
        which = "training shards" if wanted is None else f"shard {arguments.shards}"
        raise ValueError(f"{arguments.repo} has no {which}")
    # What cannot be true is told before anything is fetched.
    known_sizes(out / SIZES_NAME, shards)

    verify = arguments.verify
    missing = [shard for shard in shards if not shard.is_intact(out / shard.name, checksum=verify)]
    num_present = len(shards) - len(missing)
    print(f"{describe(shards)}; {num_present:,} of them complete in {out}")
    if arguments.dry_run:
        print(f"would fetch {describe(missing)}")
        return 0

    check_room(out, sum(shard.size for shard in missing))
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out, on_busy=refuse_second):
        # Another process may have fetched some meanwhile.
        missing = [s for s in missing if not s.is_intact(out / s.name, checksum=verify)]
        return complete(shards, missing, arguments)


def refuse_second() -> None:
    """Refuse a folder that another process fetches into."""
    raise ValueError("another process fetches shards into this folder; wait for its end")


def complete(shards: list[Shard], missing: list[Shard], arguments: argparse.Namespace) -> int:
    """Fetch what is missing, count the pairs, and return 0."""
    out = arguments.out
    sizes = known_sizes(out / SIZES_NAME, shards)
    # Before the first of them is replaced, as an interruption may come between shard and count.
    stale = sizes.keys() & {shard.name for shard in missing}
    if stale:
        sizes = {name: size for name, size in sizes.items() if name not in stale}
        write_sizes(out, sizes)
    fetch_all(missing, arguments)
    num_pairs = count_pairs(out, shards, sizes)
    print(f"complete: {describe(shards)}, {num_pairs:,} pairs, {out / SIZES_NAME}")
    return 0


def parse_numbers(text: str) -> list[range]:
    """Expand `0-9,20` into ranges of numbers.

    Raises:
        ValueError: If the text is something else.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--shards must look like 0-9 or 0-9,20, got {text!r}")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return ranges


def list_shards(repo: str) -> list[Shard]:
    """Ask the Hub for the training shards of a dataset repository, in order.

    Raises:
        ValueError: If it lists a shard whose name leads elsewhere, one twice, or too many files.
        OSError: If the Hub cannot be reached or has no such repository.
    """
    hub = HfApi()
    print(f"asking {hub.endpoint} for the shards of {repo}", flush=True)
    shards: dict[str, Shard] = {}
    try:
        for entry in list_files(hub.endpoint, repo):
            name, size = entry["path"], entry.get("size")
            match = SHARD_NAME.fullmatch(name)
            if match is None and SHARD_ENDING.search(name):
                raise ValueError(f"{repo} lists the shard {name!r}, which is no plain file name")
            if match is None:
                continue
            if entry["type"] != "file" or not isinstance(size, int) or size < 0:
                raise ValueError(f"{repo} lists {name} without a size")
            # On some file systems X.tar and x.tar are one file.
            if name.casefold() in shards:
                raise ValueError(f"{repo} lists {name} twice")
            sha256 = (entry.get("lfs") or {}).get("oid")
            shards[name.casefold()] = Shard(name, int(match[1]), size, sha256)
    except NETWORK_ERRORS as error:
        raise OSError(f"{hub.endpoint} did not list {repo}: {one_sentence(error)}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise OSError(_no_list(hub.endpoint, repo)) from error
    return sorted(shards.values(), key=lambda shard: (shard.number, shard.name))


def _no_list(endpoint: str, repo: str) -> str:
    return f"{endpoint} gave no list of the files of {repo}"


def list_files(endpoint: str, repo: str) -> list[dict[str, Any]]:
    """Ask the Hub for the top folder of a dataset repository, page by page.

    The Hub's client would follow pages for ever, and say nothing while it tries a failure again.

    Raises:
        ValueError: If there are too many files or pages, or a page is too long or was there before.
        OSError: If the Hub takes too long.
    """
    entries: list[dict[str, Any]] = []
    url, seen = f"{endpoint}/api/datasets/{quote(repo)}/tree/main", set()
    for _ in range(MAX_PAGES):
        seen.add(url)
        page, links = read_page(url, repo)
        # No JSON, a number of thousands of digits, or too deep a nesting.
        with explained(_no_list(endpoint, repo), ValueError, RecursionError, as_kind=OSError):
            entries += json.loads(page)
        if len(entries) > MAX_LISTED:
            raise ValueError(f"{repo} lists more than {MAX_LISTED:,} files")
        if "next" not in links:
            return entries
        url = links["next"]["url"]
        if url in seen:
            raise ValueError(f"{repo} lists its files in a circle: {url} follows itself")
    raise ValueError(f"{repo} lists its files on more than {MAX_PAGES:,} pages")


def read_page(url: str, repo: str) -> tuple[bytes, dict[str, dict[str, str]]]:
    """Return the text and the links of an answer, which may be endless or come byte by byte."""
    text, start = bytearray(), time.monotonic()
    with opened(url) as (answer, pieces):
        for piece in pieces:
            text += piece
            if len(text) > MAX_ANSWER_BYTES:
                raise ValueError(f"{repo} lists its files in more than {MAX_ANSWER_BYTES:,} bytes")
            if time.monotonic() - start > LIST_SECONDS:
                raise TimeoutError(f"its answer took more than {LIST_SECONDS} seconds")
        return bytes(text), answer.links


@contextmanager
def opened(url: str, redirects: int = MAX_REDIRECTS) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Ask for a URL and nothing else, and give the answer with its bytes as they come.

    The Hub's client asks for more on the way, and waits for the end of whatever comes, also of what
    only says where the answer is.
    """
    session, headers = get_session(), {"user-agent": f"clip-pgs/{clip_pgs.__version__}"}
    if (token := get_token()) and url.startswith(f"{HfApi().endpoint}/"):
        headers["authorization"] = f"Bearer {token}"
    # The Hub's client has httpx's session since its version 1, and that of requests before.
    is_httpx = callable(getattr(session, "stream", None))
    options: dict[str, Any] = {"headers": headers, "timeout": LIST_SECONDS}
    if is_httpx:
        stream = session.stream("GET", url, follow_redirects=False, **options)
    else:
        stream = session.get(url, allow_redirects=False, stream=True, **options)
    with stream as answer:
        place = answer.headers.get("location") if answer.status_code // 100 == 3 else None
        if place is None or not redirects:
            if answer.status_code != 200:
                raise OSError(f"it answered {answer.status_code}")
            yield answer, answer.iter_bytes() if is_httpx else answer.iter_content(2**16)
            return
    with opened(urljoin(url, place), redirects - 1) as found:
        yield found


def known_sizes(path: Path, shards: list[Shard]) -> dict[str, int]:
    """Return what an earlier call counted.

    Raises:
        ValueError: If the file is something else, or states more than a shard could hold.
    """
    if not path.exists():
        return {}
    sizes = read_sizes(path)
    for shard in shards:
        if sizes.get(shard.name, 0) > shard.size // TAR_BLOCK:
            raise ValueError(
                f"{path} states {sizes[shard.name]} pairs for {shard.name}, which has "
                f"{shard.size:,} bytes; remove it to have the pairs counted"
            )
    return sizes


def fetch_all(shards: list[Shard], arguments: argparse.Namespace) -> None:
    """Fetch shards in parallel, one line for each; stop at the first that fails."""
    total = sum(shard.size for shard in shards)
    fetched, start = 0, time.monotonic()
    executor = ThreadPoolExecutor(max_workers=arguments.workers)
    jobs = {executor.submit(fetch, shard, arguments): shard for shard in shards}
    try:
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                fetched += jobs[job].size
                rate = fetched / (time.monotonic() - start)
                minutes = (total - fetched) / rate / 60 if rate else 0
                print(
                    f"[{done}/{len(shards)}] {jobs[job].name}  {fetched / 1e9:.1f} of "
                    f"{total / 1e9:.1f} GB  {rate / 1e6:.1f} MB/s  {minutes:.0f} min left",
                    flush=True,
                )
        except Exception:
            # What is under way comes to its end.
            executor.shutdown(cancel_futures=True)
            raise
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        for shard in shards:
            unfinished_path(arguments.out / shard.name).unlink(missing_ok=True)
        # Leaving in the ordinary way would first finish every download under way.
        os._exit(say_end(error))


def fetch(shard: Shard, arguments: argparse.Namespace) -> None:
    """Fetch one shard and compare it with what the Hub promised."""
    path = arguments.out / shard.name
    unfinished = unfinished_path(path)
    path.unlink(missing_ok=True)
    try:
        receive(shard, arguments.repo, unfinished)
        if not shard.is_intact(unfinished, checksum=True):
            raise OSError(
                f"{shard.name} arrived damaged and was removed; the same command continues"
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def receive(shard: Shard, repo: str, path: Path) -> None:
    """Write what the Hub has as a shard into a file, until it is longer than the Hub lists it."""
    url = f"{HfApi().endpoint}/datasets/{quote(repo)}/resolve/main/{quote(shard.name)}"
    for tries_left in reversed(range(MAX_TRIES)):
        try:
            with opened(url) as (_, pieces), path.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    if file.tell() > shard.size:
                        break
            return
        except NETWORK_ERRORS as error:
            if not tries_left:
                why = f"{shard.name} could not be fetched: {one_sentence(error)}"
                raise OSError(f"{why}; the same command continues") from error
            time.sleep(RETRY_SECONDS)


def count_pairs(out: Path, shards: list[Shard], sizes: dict[str, int]) -> int:
    """Count the pairs of the shards that `sizes` leaves out, and write it down with the rest.

    Returns:
        The number of pairs in `shards`.

    Raises:
        OSError: If one of them is no shard.
    """
    from clip_pgs.data.tar import size_shards  # imports torch, for seconds

    unknown = [str(out / shard.name) for shard in shards if shard.name not in sizes]
    counts, failures = size_shards(unknown, use_stated=False)
    bad = {failure.shard for failure in failures}
    sizes = dict(sizes)
    for path, size in zip(unknown, counts, strict=True):
        if path not in bad:
            sizes[Path(path).name] = size
    write_sizes(out, sizes)
    if failures:
        raise OSError(
            f"{len(bad)} of the shards arrived as the Hub has them and cannot be used, the first: "
            f"{failures[0]}"
        )
    return sum(sizes[shard.name] for shard in shards)


def write_sizes(out: Path, sizes: dict[str, int]) -> None:
    """Write `sizes.json`, from which the trainer takes how many pairs each shard holds."""
    write_text(out / SIZES_NAME, json.dumps(dict(sorted(sizes.items())), indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(shards: list[Shard]) -> str:
    """Return number and size of shards in words."""
    return f"{len(shards):,} shards, {sum(shard.size for shard in shards) / 1e9:,.2f} GB"


if __name__ == "__main__":
    sys.exit(run_program(main))
