"""Who scores what: data sets in pieces, spread over the processes of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_pgs.evaluation.datasets.datasets import EvalSet
from clip_pgs.evaluation.datasets.presence import local_files


@dataclass(frozen=True)
class Piece:
    """One data set of one suite.

    Attributes:
        number: Its position among the data sets of the call.
        num_bytes: What has to be read for it that no piece before it reads; None where unknown.
    """

    number: int
    num_bytes: int | None


def divide(eval_sets: Sequence[EvalSet], world_size: int) -> list[list[Piece]]:
    """Spread data sets over ranks, the largest first.

    Suites that read the same folder go to one rank, one after the other, as they share its image
    features.

    Args:
        eval_sets: All data sets.
        world_size: Number of ranks.

    Returns:
        The pieces of each rank, in the order to score them. The same on every rank.
    """
    groups: dict[str, list[Piece]] = {}
    seen: set[Path] = set()
    for number, eval_set in enumerate(eval_sets):
        piece = Piece(number, _new_bytes(eval_set, seen))
        groups.setdefault(eval_set.location, []).append(piece)
    pieces = list(groups.values())
    sizes = [sum(piece.num_bytes or 0 for piece in group) for group in pieces]
    return [
        [piece for group in share for piece in pieces[group]]
        for share in share_out(sizes, world_size)
    ]


def share_out(sizes: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal out work, the largest piece first, each to the rank with the least so far.

    Args:
        sizes: Size of each piece, >= 0.
        world_size: Number of ranks.

    Returns:
        The pieces of each rank, by position in `sizes` and in that order.
    """
    loads = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        # The number of pieces decides among those whose size is not known.
        rank = min(range(world_size), key=lambda rank: (loads[rank], len(shares[rank]), rank))
        loads[rank] += sizes[piece]
        shares[rank].append(piece)
    return [sorted(share) for share in shares]


def _new_bytes(eval_set: EvalSet, seen: set[Path]) -> int | None:
    if "://" in eval_set.location:
        return None
    try:
        paths = set(local_files(eval_set)) - seen
        num_bytes = sum(path.stat().st_size for path in paths)
    # A data set that is not there, or damaged, is told when its turn comes.
    except (OSError, ValueError):
        return 0
    seen |= paths
    return num_bytes
