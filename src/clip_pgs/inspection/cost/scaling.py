"""How the time of a selection grows with patches, candidates and images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from clip_pgs.inspection.cost.random_data import draw_images
from clip_pgs.inspection.cost.stopwatch import Stopwatch
from clip_pgs.masking import PatchInputs, create_masking

PATCH_SIZE = 16
SWEEPS = ("patches", "candidates", "images")


@dataclass(frozen=True)
class Size:
    """The size of a selection.

    Args:
        sweep: What varies around it, one of `SWEEPS`.
        side: Patches per row and per column of an image.
        candidate_ratio: Share of patches drawn as candidates.
        num_images: Images selected from together.
    """

    sweep: str
    side: int = 14
    candidate_ratio: float = 0.05
    num_images: int = 16

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return self.side**2

    @property
    def num_candidates(self) -> int:
        """C, the candidates of an image."""
        return max(1, round(self.candidate_ratio * self.num_patches))

    def varied(self) -> int:
        """Return what the sweep varies."""
        counts = (self.num_patches, self.num_candidates, self.num_images)
        return counts[SWEEPS.index(self.sweep)]


@dataclass(frozen=True)
class ScalingRow:
    """A size and what a selection of that size took.

    Attributes:
        sweep: What varies, one of `SWEEPS`.
        num_patches: N.
        num_candidates: C.
        num_images: B.
        seconds: Median over rounds.
        exponent: Of the power law from the sweep's first size to this one; 1 is linear growth,
            None for the first size.
    """

    sweep: str
    num_patches: int
    num_candidates: int
    num_images: int
    seconds: float
    exponent: float | None


def default_sizes(num_images: int) -> list[Size]:
    """Return three sweeps around 196 patches, 10 candidates and a number of images."""
    patches = [Size("patches", side=side, num_images=num_images) for side in (14, 20, 28)]
    candidates = [
        Size("candidates", candidate_ratio=ratio, num_images=num_images)
        for ratio in (0.05, 0.1, 0.2, 0.4)
    ]
    images = [Size("images", num_images=factor * num_images) for factor in (1, 2, 4)]
    return [*patches, *candidates, *images]


def measure_scaling(
    sizes: Sequence[Size],
    *,
    device: torch.device,
    num_rounds: int,
    progress: float = 0.0,
    width: int = 768,
    tick: Callable[[], object] | None = None,
) -> list[ScalingRow]:
    """Time selections by `pgs`, of every size once in each round.

    Args:
        sizes: Each sweep's in ascending order.
        device: Where the images are.
        num_rounds: Rounds that count; one more comes first.
        progress: Share of training; above 0 embeddings are compared too.
        width: Of the embeddings.
        tick: Called after every selection.
    """
    selections = [_selection(size, device, progress, width) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for round_number in range(num_rounds + 1):
        for select, record in zip(selections, seconds, strict=True):
            stopwatch = Stopwatch(device)
            select()
            stopwatch.mark()
            if round_number > 0:
                record += stopwatch.parts()
            if tick is not None:
                tick()
    return _rows(sizes, [median(record) for record in seconds])


def _selection(
    size: Size, device: torch.device, progress: float, width: int
) -> Callable[[], object]:
    side = size.side * PATCH_SIZE
    pixels = draw_images((side, side), batch_size=size.num_images).to(device)
    tokens = torch.randn(size.num_images, size.num_patches, width, device=device)
    inputs = PatchInputs(pixels, PATCH_SIZE, tokens=tokens, progress=progress)
    strategy = create_masking("pgs", candidate_ratio=size.candidate_ratio)

    def select() -> object:
        with torch.no_grad():
            return strategy(inputs)

    return select


def _rows(sizes: Sequence[Size], seconds: Sequence[float]) -> list[ScalingRow]:
    first: dict[str, tuple[Size, float]] = {}
    rows = []
    for size, taken in zip(sizes, seconds, strict=True):
        start, start_taken = first.setdefault(size.sweep, (size, taken))
        growth = size.varied() / start.varied()
        rows.append(
            ScalingRow(
                size.sweep,
                size.num_patches,
                size.num_candidates,
                size.num_images,
                taken,
                None if growth == 1 else math.log(taken / start_taken) / math.log(growth),
            )
        )
    return rows
