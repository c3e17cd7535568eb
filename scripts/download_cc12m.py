"""Download CC12M as webdataset shards: pixparse/cc12m-wds of the Hugging Face Hub.

    python scripts/download_cc12m.py data/cc12m --dry-run      # what there is to fetch
    python scripts/download_cc12m.py data/cc12m --shards 0-9   # a first piece
    python scripts/download_cc12m.py data/cc12m                # all of it

A shard that is there with the right size is not fetched again, so the same command continues after
an interruption. Each new shard is compared with the Hub's SHA-256, and `sizes.json` beside the
shards tells the trainer how many pairs each one holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, logging

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
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        return download(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NETWORK_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--shards", default="", help="numbers to take, such as 0-9 or 0-9,20")
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
        ValueError: If an argument is out of its range or names no shard.
        OSError: If the Hub cannot be reached or a shard arrives damaged.
    """
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    wanted = parse_numbers(arguments.shards)
    shards = [
        shard for shard in list_shards(arguments.repo) if not wanted or shard.number in wanted
    ]
    if not shards:
        raise ValueError(f"{arguments.repo} has no shard {arguments.shards}".rstrip())

    missing = [
        shard
        for shard in shards
        if not shard.is_intact(arguments.out / shard.name, checksum=arguments.verify)
    ]
    num_present = len(shards) - len(missing)
    print(f"{describe(shards)}; {num_present:,} of them complete in {arguments.out}")
    if arguments.dry_run:
        print(f"would fetch {describe(missing)}")
        return 0

    arguments.out.mkdir(parents=True, exist_ok=True)
    fetch_all(missing, arguments)
    num_pairs = write_sizes(arguments.out, shards)
    print(f"complete: {describe(shards)}, {num_pairs:,} pairs, {arguments.out / 'sizes.json'}")
    return 0


def parse_numbers(text: str) -> set[int]:
    """Expand `0-9,20` into numbers; the empty text means all and gives an empty set.

    Raises:
        ValueError: If the text is something else.
    """
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"--shards must look like 0-9 or 0-9,20, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers.update(range(first, last + 1))
    return numbers


def list_shards(repo: str) -> list[Shard]:
    """Ask the Hub for the training shards of a dataset repository, in order.

    Raises:
        OSError: If the Hub cannot be reached or has no such repository.
    """
    hub = HfApi()
    print(f"asking {hub.endpoint} for the shards of {repo}", flush=True)
    try:
        entries = list(hub.list_repo_tree(repo, repo_type="dataset"))
    except NETWORK_ERRORS as error:
        raise OSError(f"{hub.endpoint} did not list {repo}: {reason(error)}") from error
    shards = []
    for entry in entries:
        match = re.fullmatch(r".*-train-(\d+)\.tar", entry.path)
        if match:
            sha256 = entry.lfs.sha256 if entry.lfs else None
            shards.append(Shard(entry.path, int(match[1]), entry.size, sha256))
    return sorted(shards, key=lambda shard: shard.number)


def fetch_all(shards: list[Shard], arguments: argparse.Namespace) -> None:
    """Fetch shards in parallel, one line for each; stop at the first that fails."""
    total = sum(shard.size for shard in shards)
    fetched, start = 0, time.monotonic()
    executor = ThreadPoolExecutor(max_workers=arguments.workers)
    jobs = {executor.submit(fetch, shard, arguments): shard for shard in shards}
    try:
        for done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            fetched += jobs[job].size
            rate = fetched / (time.monotonic() - start)
            minutes = (total - fetched) / rate / 60
            print(
                f"[{done}/{len(shards)}] {jobs[job].name}  {fetched / 1e9:.1f} of "
                f"{total / 1e9:.1f} GB  {rate / 1e6:.1f} MB/s  {minutes:.0f} min left",
                flush=True,
            )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        # Leaving in the ordinary way would first finish every download under way.
        os._exit(130)
    finally:
        executor.shutdown(cancel_futures=True)


def fetch(shard: Shard, arguments: argparse.Namespace) -> None:
    """Fetch one shard and compare it with what the Hub promised."""
    path = arguments.out / shard.name
    path.unlink(missing_ok=True)
    try:
        hf_hub_download(arguments.repo, shard.name, repo_type="dataset", local_dir=arguments.out)
    except NETWORK_ERRORS as error:
        raise OSError(
            f"{shard.name} could not be fetched: {reason(error)}; the same command continues"
        ) from error
    if not shard.is_intact(path, checksum=True):
        path.unlink(missing_ok=True)
        raise OSError(f"{shard.name} arrived damaged and was removed; the same command continues")


def write_sizes(out: Path, shards: list[Shard]) -> int:
    """Write `sizes.json` for all complete shards, and return the number of pairs in `shards`."""
    path = out / "sizes.json"
    sizes = json.loads(path.read_text()) if path.is_file() else {}
    with ThreadPoolExecutor() as executor:
        unknown = [shard.name for shard in shards if shard.name not in sizes]
        counts = executor.map(count_pairs, [out / name for name in unknown])
        sizes.update(zip(unknown, counts, strict=True))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(sizes.items())), indent=2) + "\n")
    partial.replace(path)
    return sum(sizes[shard.name] for shard in shards)


def count_pairs(path: Path) -> int:
    """Count the samples of a shard: the distinct member names up to their first dot."""
    with tarfile.open(path) as tar:
        return len({member.name.split(".")[0] for member in tar if member.isfile()})


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """Return the first line of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def describe(shards: list[Shard]) -> str:
    """Return number and size of shards in words."""
    return f"{len(shards):,} shards, {sum(shard.size for shard in shards) / 1e9:,.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
