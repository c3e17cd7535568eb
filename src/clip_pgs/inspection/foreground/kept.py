"""How much of the foreground each strategy keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clip_pgs.inspection.foreground.annotations import ForegroundImages
from clip_pgs.inspection.strategies import StrategySpec
from clip_pgs.inspection.view import View, fit_strategy, seeded_noise
from clip_pgs.masking import MaskingStrategy, PatchInputs
from clip_pgs.masking.sampling import kept_patches

NUM_SEEDS = 20

_CHUNK = 128  # images looked at together


@dataclass(frozen=True)
class Kept:
    """What a strategy keeps at a mask ratio.

    Attributes:
        masking: The strategy's title.
        mask_ratio: What was asked for.
        measured_ratio: Mean share of patches dropped.
        kept: Share of an image's foreground patches that is kept, mean over images and seeds.
        spread: Standard deviation over seeds of the mean over images; 0 for a single seed.
    """

    masking: str
    mask_ratio: float
    measured_ratio: float
    kept: float
    spread: float


def measure_kept(
    images: ForegroundImages,
    specs: Sequence[StrategySpec],
    mask_ratios: Sequence[float],
    *,
    view: View,
    num_seeds: int = NUM_SEEDS,
    progress: Callable[[], object] | None = None,
) -> list[Kept]:
    """Measure the share of foreground patches that strategies keep.

    Each seed draws one set of random numbers for all strategies and ratios. A strategy that
    training would calibrate (`cluster`) is fitted to these images, seeds and ratio.

    Args:
        images: With their foreground.
        specs: The strategies.
        mask_ratios: Each in [0, 1).
        view: How the strategies see the images.
        num_seeds: Seeds 0 to `num_seeds` - 1, at least 1.
        progress: Called `num_steps` times.

    Returns:
        Strategies in their order, each with the ratios in theirs.

    Raises:
        ValueError: If an argument is out of its range, or a strategy needs a model.
    """
    if num_seeds < 1:
        raise ValueError(f"the number of seeds must be at least 1, got {num_seeds}")
    num_images, num_patches = images.foreground.shape
    noises = [seeded_noise(num_images, num_patches, seed=seed) for seed in range(num_seeds)]
    rows = []
    for spec in specs:
        chunks = _look(images, view, spec.build(mask_ratio=mask_ratios[0]))
        for mask_ratio in mask_ratios:
            strategy = spec.build(mask_ratio=mask_ratio)
            everything = (batch for noise in noises for batch in _with_noise(chunks, noise))
            strategy = fit_strategy(strategy, everything, progress=view.progress)
            seeds = []
            for noise in noises:
                batches = _with_noise(chunks, noise)
                seeds.append(_measure(strategy, batches, images.foreground))
                if progress is not None:
                    progress()
            dropped, kept = torch.tensor(seeds, dtype=torch.float64).unbind(1)
            spread = kept.std().item() if num_seeds > 1 else 0.0
            rows.append(
                Kept(spec.title, mask_ratio, dropped.mean().item(), kept.mean().item(), spread)
            )
    return rows


def num_steps(specs: Sequence[StrategySpec], mask_ratios: Sequence[float], num_seeds: int) -> int:
    """Return how often `measure_kept` reports progress."""
    return len(specs) * len(mask_ratios) * num_seeds


def _look(images: ForegroundImages, view: View, strategy: MaskingStrategy) -> list[PatchInputs]:
    """Return what a strategy sees of the images, in chunks and without noise."""
    chunks = [images.crops[start : start + _CHUNK] for start in range(0, len(images.crops), _CHUNK)]
    return [view.inputs(view.model_input.normalise(crops), strategy) for crops in chunks]


def _with_noise(chunks: Sequence[PatchInputs], noise_BN: Tensor) -> Iterator[PatchInputs]:
    parts = noise_BN.split(_CHUNK)
    for inputs, noise in zip(chunks, parts, strict=True):
        yield replace(inputs, noise=noise)


@torch.no_grad()
def _measure(
    strategy: MaskingStrategy, batches: Iterable[PatchInputs], foreground_BN: Tensor
) -> tuple[float, float]:
    """Return the share of patches dropped and of foreground patches kept, means over images."""
    keep_mask_BN = torch.cat([kept_patches(strategy(b), b.num_patches) for b in batches])
    kept_B = (keep_mask_BN & foreground_BN).sum(dim=1) / foreground_BN.sum(dim=1)
    return 1 - keep_mask_BN.double().mean().item(), kept_B.double().mean().item()
