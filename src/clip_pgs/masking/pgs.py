"""Patch generation-to-selection (CLIP-PGS, https://arxiv.org/abs/2503.17080, CVPR 2025).

A few random candidate patches are drawn, edges protect the objects, and the similarity of every
patch to the candidates, balanced by optimal transport, decides what is masked. This module puts the
steps together in the order in which they happen: edges, candidates, similarity and transport,
score, selection. `edges.py`, `similarity.py` and `sinkhorn.py` hold the mathematics of one step
each. What goes beyond the method is computed by the functions below it, which the steps call where
an option asks for it. docs/method.md sets each equation beside its function, and says where the
authors' released code (`pgs_released.py`) computes something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from clip_pgs.common import check_choice
from clip_pgs.masking.calibration import CalibratedMasking, ThresholdRecord
from clip_pgs.masking.edges import canny_edges, sobel_edges
from clip_pgs.masking.sampling import (
    draw_noise,
    exact_dtype,
    grid_coordinates,
    gumbel,
    image_draw,
    log_center_weight,
    mask_top,
    mask_top_counts,
    share_at_random,
)
from clip_pgs.masking.schedule import scheduled_ratio
from clip_pgs.masking.similarity import mixed_similarity
from clip_pgs.masking.sinkhorn import (
    NUM_ITERS,
    SOLVER,
    TEMPERATURE,
    check_sinkhorn_options,
    plan_average,
    sinkhorn_plan,
)
from clip_pgs.masking.strategy import (
    MASK_RATIO,
    Number,
    PatchInputs,
    PatchSelection,
    check_index,
    check_inputs,
    check_range,
    check_share,
    create_masking,
    drawn_count,
    interpolate,
    is_broken,
    lower_bound,
    mask_count,
    register_masking,
)

EDGE_DETECTORS = {"sobel": sobel_edges, "canny": canny_edges}
CANDIDATE_REGIONS = ("image", "border")

# (progress, threshold) of the adaptive count; docs/threshold.md says how they were found.
CALIBRATED_THRESHOLDS = ((0.0, 0.42), (0.5, 0.52), (1.0, 0.73))
# The patches N that they were found on, and the range over which other grids were measured: what
# a threshold leaves to 1 goes with the cube root of 1 / N.
_CALIBRATED_PATCHES = 196
_MEASURED_PATCHES = (49, 729)
# (progress, exponent) with fewer than 196 patches, where 1/3 masks too few at the end of training.
_FEW_PATCHES_EXPONENTS = ((0.5, 1 / 3), (1.0, 10 / 21))

# (center_weight, what it takes off the threshold): the mean over 200 images each of Flickr8k and
# ImageNet and 50 of COCO, at progress 0 and 1, that brings their mean mask ratio back to 0.40.
CENTER_SHIFTS = ((0.0, 0.0), (0.5, 0.11), (1.0, 0.205), (2.0, 0.345))

# Edges take 4 off a patch's draw as a candidate where they take 0.5 off its score, 8 times as much;
# the middle does likewise.
_CENTER_PROTECTION = 8.0
# More than the largest Gumbel number of a float32 draw lies above the smallest.
_GUMBEL_SPAN = 32.0
# Far beyond what has an effect, and float32 still tells a candidate's score from another's.
_MAX_WEIGHT = 1e6

_ALIASES = {"neighbourhood": "neighborhood"}


@dataclass(frozen=True)
class PGSOptions:
    """The options of PGS.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1); the upper bound where the count adapts.
        mask_ratio_min: Lower bound of an adaptive count, in [0, mask_ratio]. None, or the same
            value as `mask_ratio`, drops the same count in every image.
        mask_ratio_mean: Mean of an adaptive count, between its bounds; training finds the threshold
            for it, as that of `cluster` (ours). None takes `threshold`.
        candidate_ratio: Share of patches drawn as candidates, in (0, 1]; at least one patch.
        candidate_region: Where candidates come from: "image", or "border" for the outermost rows
            and columns of patches, where objects seldom are; only if those are fewer than the
            candidates, others follow.
        edge_protection: How strongly edges keep a patch from becoming a candidate, in [0, 1e6].
        edge_weight: What an edge strength of 1 takes off a patch's score, in [0, 1e6].
        edge_detector: "sobel", or "canny" for the share of Canny's edge pixels (the paper's
            ablation).
        center_weight: What the middle of the image takes off a patch's score, in [0, 1e6]: there
            objects tend to be. It falls off as the Gaussian of `gaussian` does, and keeps patches
            from becoming candidates in the same proportion as edges do. 0 leaves it out.
        neighborhood: How many rows and columns of patches away a candidate reaches, in [0, 1e6].
            None reaches the whole image (the paper's ablation is a window).
        threshold: Score above which an adaptive count masks a patch. None follows
            `calibrated_threshold`, which fits photographs in 49 to 729 patches, the other
            defaults, both regions of candidates and any `center_weight` up to 2; a small
            `neighborhood` lowers the scores and wants a lower one.
        temperature: Entropy weight of the transport plan, in [1e-6, 1e6].
        num_iters: Sinkhorn sweeps, in [1, 10000].
        solver: "log" or "pot"; see `sinkhorn_plan`.
        edges: False draws candidates uniformly and drops the edge term (the paper's ablation).
        transport: False takes the highest similarity to any candidate (the paper's ablation).
        random_share: Share of the kept patches that is drawn uniformly from all but those that
            stay for their low scores, in [0, 1]; what was masked may come back, so that training
            sees background, too.
        random_share_end: The random share at the end of training, in [0, 1], reached in five
            equal levels. None keeps it constant.
        random_images: Share of the images, in [0, 1], each drawn by itself, whose patches are kept
            at random, as with a random share of 1: training sees whole grounds and insides, too,
            and evaluation on whole images meets nothing new.

    Raises:
        ValueError: If an option is out of its range, or two do not go together.
    """

    mask_ratio: float = MASK_RATIO
    mask_ratio_min: float | None = None
    mask_ratio_mean: float | None = None
    candidate_ratio: float = 0.05
    candidate_region: str = "image"
    edge_protection: float = 4.0
    edge_weight: float = 0.5
    edge_detector: str = "sobel"
    center_weight: float = 0.0
    neighborhood: int | None = None
    threshold: float | None = None
    temperature: float = TEMPERATURE
    num_iters: int = NUM_ITERS
    solver: str = SOLVER
    edges: bool = True
    transport: bool = True
    random_share: float = 0.0
    random_share_end: float | None = None
    random_images: float = 0.0

    def __post_init__(self) -> None:
        low = lower_bound(self.mask_ratio, self.mask_ratio_min)
        mean = self.mask_ratio_mean
        check_range(mean, name="mask_ratio_mean", low=low, high=self.mask_ratio, optional=True)
        # At a ratio of 0, where a schedule may end, the three are one.
        is_fixed = low == self.mask_ratio > 0
        if mean is not None and (is_fixed or self.threshold is not None):
            raise ValueError(
                "mask_ratio_mean needs mask_ratio_min below mask_ratio and no threshold, got "
                f"mask_ratio_min={self.mask_ratio_min}, threshold={self.threshold}"
            )
        check_share(self.candidate_ratio, name="candidate_ratio")
        check_choice(self.candidate_region, CANDIDATE_REGIONS, name="candidate_region")
        check_choice(self.edge_detector, EDGE_DETECTORS, name="edge_detector")
        for name in ("edge_protection", "edge_weight", "center_weight"):
            check_range(getattr(self, name), name=name, low=0, high=_MAX_WEIGHT)
        for name in ("random_share", "random_share_end", "random_images"):
            optional = name == "random_share_end"
            check_range(getattr(self, name), name=name, low=0, high=1, optional=optional)
        most = _MAX_WEIGHT
        check_range(self.threshold, name="threshold", low=-most, high=most, optional=True)
        reach = self.neighborhood
        check_range(reach, name="neighborhood", low=0, high=most, whole=True, optional=True)
        check_sinkhorn_options(**self.sinkhorn())
        if self.neighborhood is not None and self.transport and self.solver != "log":
            raise ValueError(f"neighborhood goes with solver='log', got solver={self.solver!r}")

    def sinkhorn(self) -> dict[str, Any]:
        """Return the options of `sinkhorn_plan` and `plan_average`."""
        names = ("temperature", "num_iters", "solver")
        return {name: getattr(self, name) for name in names}


def edge_strength(inputs: PatchInputs, options: PGSOptions) -> Tensor | None:
    """Return the edge strength of each patch, shape (B, N), None where edges are left out."""
    if not options.edges:
        return None
    return EDGE_DETECTORS[options.edge_detector](inputs.pixels, inputs.patch_size)


def draw_candidates(
    inputs: PatchInputs, noise: Tensor, edges: Tensor | None, options: PGSOptions
) -> Tensor:
    """Draw candidates without replacement, with odds exp(-edge_protection * edge).

    The C highest of Gumbel numbers shifted by the log of the odds are such a draw.

    Args:
        inputs: Whose patches are drawn.
        noise: Uniform numbers in [0, 1), shape (B, N), float32.
        edges: Edge strength in [0, 1], shape (B, N); None draws uniformly.
        options: See `PGSOptions`.

    Returns:
        Positions of the candidates, in no order, shape (B, C), int64.
    """
    keys_BN = gumbel(noise)
    if edges is not None:
        keys_BN = keys_BN - options.edge_protection * edges
    keys_BN = _prefer_border(_spare_center(keys_BN, inputs, options), inputs, options)
    num_candidates = drawn_count(inputs.num_patches, options.candidate_ratio)
    return keys_BN.topk(num_candidates, dim=1).indices


def balanced_similarity(
    inputs: PatchInputs, candidate_index: Tensor, options: PGSOptions
) -> Tensor:
    """Measure how well the candidates stand for every patch: its redundancy.

    With transport each candidate may absorb only its fair share of the image: column j of the
    plan, times N, sums to 1 and weighs the similarities of patch j. Without, it is the highest of
    them.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        options: See `PGSOptions`.

    Returns:
        Redundancy in [-1, 1] up to rounding, shape (B, N), float32.
    """
    if options.neighborhood is not None:
        return _balanced_in_reach(inputs, candidate_index, options)
    similarity_BCN = mixed_similarity(inputs, candidate_index, name="pgs")
    if not options.transport:
        return similarity_BCN.amax(dim=1)
    return plan_average(similarity_BCN, **options.sinkhorn())


def patch_scores(
    inputs: PatchInputs, candidate_index: Tensor, edges: Tensor | None, options: PGSOptions
) -> Tensor:
    """Score every patch: its redundancy less what edges protect.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        edges: Edge strength in [0, 1], shape (B, N); None leaves the edge term out.
        options: See `PGSOptions`.

    Returns:
        Scores of shape (B, N), float32, without the bonus that `select` gives candidates.
    """
    scores_BN = balanced_similarity(inputs, candidate_index, options)
    if edges is not None:
        scores_BN = scores_BN - options.edge_weight * edges
    if options.center_weight:
        scores_BN = scores_BN - options.center_weight * _center_strength(inputs)
    return scores_BN


def calibrated_threshold(
    progress: Number, *, num_patches: int = _CALIBRATED_PATCHES, center_weight: float = 0.0
) -> Number:
    """Return the adaptive threshold at a training progress in [0, 1], for images of N patches.

    Straight lines join the points of `CALIBRATED_THRESHOLDS`, and those of `CENTER_SHIFTS`. More
    patches are more alike, so that the distance from 1 falls as (196 / N)^(1/3), in the second half
    of training with fewer than 196 faster; below 49 and above 729 patches the nearest holds.
    """
    low, high = _MEASURED_PATCHES
    exponent: Any = 1 / 3
    if num_patches < _CALIBRATED_PATCHES:
        exponent = interpolate(_FEW_PATCHES_EXPONENTS, progress)
    scale = (_CALIBRATED_PATCHES / min(max(num_patches, low), high)) ** exponent
    threshold: Any = interpolate(CALIBRATED_THRESHOLDS, progress)
    threshold = threshold + (1 - threshold) * (1 - scale)
    return threshold - interpolate(CENTER_SHIFTS, center_weight)


class PGSSteps(NamedTuple):
    """What PGS finds on its way to a selection.

    Attributes:
        edges: Edge strength in [0, 1], shape (B, N). None where edges are left out.
        candidate_index: Positions of the candidates, in no order, shape (B, C), int64.
        scores: Redundancy less what edges and the middle protect, without the bonus that `select`
            gives candidates. Shape (B, N).
    """

    edges: Tensor | None
    candidate_index: Tensor
    scores: Tensor


@register_masking(
    "pgs",
    keeps="unlike random candidates, under optimal transport; edges protected",
    paper="CLIP-PGS, arXiv 2503.17080",
    adaptive=True,
    requires={"tokens"},
    options=PGSOptions,
    aliases=_ALIASES,
    variants=[
        {"candidate_region": "border"},
        {"candidate_region": "border", "candidate_ratio": 0.6, "mask_ratio_min": 0.3},
        {"edge_detector": "canny"},
        {"center_weight": 1.0},
        {"neighborhood": 1},
        {"neighborhood": 2, "mask_ratio_min": 0.3},
        {"neighborhood": 2, "transport": False},
        {"mask_ratio_mean": 0.4, "mask_ratio_min": 0.3},
        {"random_share": 0.5},
        {"random_share": 1.0, "random_share_end": 0.2, "mask_ratio_min": 0.3},
        {"random_images": 0.5},
    ],
)
class PGSMasking(CalibratedMasking):
    """Mask patches that resemble random candidates; keep edges and what is unique.

    Args:
        **options: See `PGSOptions`.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = PGSOptions(**options)
        self.weighs_candidates = self.options.transport
        self.mask_ratio = self.options.mask_ratio
        self.mask_ratio_min = lower_bound(self.mask_ratio, self.options.mask_ratio_min)
        self.is_calibrated_in_training = self.options.mask_ratio_mean is not None
        self.record = ThresholdRecord() if self.is_calibrated_in_training else None
        self.threshold = self.options.threshold

    def idle_options(self) -> dict[str, str]:
        """Return the options of steps that others leave out."""
        edges = dict.fromkeys(("edge_protection", "edge_weight", "edge_detector"), "edges=false")
        transport = dict.fromkeys(("temperature", "num_iters", "solver"), "transport=false")
        shares = dict.fromkeys(("random_share", "random_share_end"), "random_images=1")
        idle = {
            **({} if self.options.edges else edges),
            **({} if self.options.transport else transport),
            **({} if self.options.random_images < 1 else shares),
            **({} if self.keeps_different_counts() else {"threshold": "a fixed count"}),
        }
        return {name: f"with {reason}" for name, reason in idle.items()}

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Draw candidates, score every patch against them and mask the highest scores."""
        noise_BN = draw_noise(inputs, generator)
        _, candidate_index, scores_BN = self.steps(inputs, noise_BN)
        selection = self.select(
            scores_BN, candidate_index, noise=noise_BN, progress=inputs.progress
        )
        if inputs.wants_candidate_weights:
            selection.candidate_weights = candidate_weights(inputs, candidate_index, self.options)
        return selection

    def steps(self, inputs: PatchInputs, noise: Tensor) -> PGSSteps:
        """Draw candidates and score every patch against them; all but the selection.

        Args:
            inputs: What there is to look at.
            noise: Uniform numbers in [0, 1), shape (B, N), float32.
        """
        edges_BN = edge_strength(inputs, self.options)
        candidate_index = draw_candidates(inputs, noise, edges_BN, self.options)
        scores_BN = patch_scores(inputs, candidate_index, edges_BN, self.options)
        return PGSSteps(edges_BN, candidate_index, scores_BN)

    def select(
        self, scores: Tensor, candidate_index: Tensor, *, noise: Tensor, progress: float | Tensor
    ) -> PatchSelection:
        """Mask the candidates and the highest scores: a fixed count, or each image its own.

        An adaptive count is that of the candidates and of the scores above the threshold, brought
        between the bounds that `mask_ratio_min` and `mask_ratio` set.

        Args:
            scores: Shape (B, N).
            candidate_index: Shape (B, C), int64.
            noise: Uniform numbers in [0, 1) for a random share, shape (B, N), float32; those that
                the candidates were drawn by.
            progress: Completed share of the masked training steps, in [0, 1].
        """
        options = self.options
        # Puts candidates first: they score at least -1 less both weights, any other at most 1.
        bonus = 3.0 + options.edge_weight + options.center_weight
        bonus_BN = torch.zeros_like(scores).scatter(1, candidate_index, bonus)
        num_patches = scores.shape[1]
        num_mask_min, num_mask_max = self._bounds(num_patches)
        if num_mask_min == num_mask_max:
            keys_BN = _some_at_random(scores + bonus_BN, noise, num_mask_max, progress, options)
            return mask_top(keys_BN, num_mask=num_mask_max)
        threshold: float | Tensor | None = self.threshold
        if threshold is None:
            threshold = calibrated_threshold(
                progress, num_patches=num_patches, center_weight=options.center_weight
            )
        scores_BN = scores.scatter(1, candidate_index, torch.inf)
        num_mask_B = self.masked_counts(scores_BN, threshold)
        keys_BN = _some_at_random(scores + bonus_BN, noise, num_mask_B, progress, options)
        return mask_top_counts(keys_BN, num_mask=num_mask_B, num_mask_min=num_mask_min)

    def _bounds(self, num_patches: int) -> tuple[int, int]:
        """Return how many patches go at least and at most."""
        ratios = (self.mask_ratio_min, self.mask_ratio)
        low, high = (mask_count(num_patches, ratio) for ratio in ratios)
        return low, high

    def masked_counts(self, scores: Tensor, threshold: float | Tensor) -> Tensor:
        """Return how many patches of each image score above a threshold, within the bounds."""
        return (scores > threshold).sum(dim=1).clamp(*self._bounds(scores.shape[1]))

    def score_for_threshold(self, inputs: PatchInputs, noise: Tensor) -> Tensor:
        """Return the scores, infinite for a candidate."""
        _, candidate_index, scores_BN = self.steps(inputs, noise)
        return scores_BN.scatter(1, candidate_index, torch.inf)

    def lowest_score(self) -> float:
        """Return what edges and the middle leave of the lowest similarity."""
        options = self.options
        weights = options.edge_weight + options.center_weight
        # Of a patch that no candidate reaches they are taken off twice.
        return -1.0 - weights if options.neighborhood is None else -2.0 - 2 * weights

    def mean_ratio(self) -> float:
        """Return `mask_ratio_mean`, which follows a schedule of `mask_ratio`."""
        mean, first = self.options.mask_ratio_mean, self.options.mask_ratio
        assert mean is not None
        # Rounding must not lead out of the bounds.
        followed = mean * self.mask_ratio / first if first else self.mask_ratio
        return min(max(followed, self.mask_ratio_min), self.mask_ratio)

    def first_threshold(self) -> None:
        """Return None: `calibrated_threshold` holds before any was found."""


def pgs_scores(inputs: PatchInputs, candidate_index: Tensor, **options: Any) -> Tensor:
    """Score every patch for given candidates; the highest are to be masked.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates, no two alike in a row. Shape (B, C), int64.
        **options: See `PGSOptions`; those of candidates and counts have no effect.

    Returns:
        Scores of shape (B, N), float32, without the bonus that `select` gives candidates. With a
        `neighborhood`, a patch that no candidate reaches scores below all others.

    Raises:
        ValueError: If `progress` > 0 without tokens, an option is out of its range, or the index is
            none; see `check_index`. Candidates that are alike are told on a CPU, unless compiled.
    """
    check_inputs(inputs)
    size = {"batch_size": inputs.batch_size, "num_patches": inputs.num_patches}
    check_index(candidate_index, **size, name="pgs_scores needs a candidate_index")

    def differ(index: Tensor) -> Tensor:
        return (index.sort(dim=1).values.diff(dim=1) > 0).all()

    if is_broken(differ, candidate_index):
        raise ValueError("pgs_scores needs a candidate_index of which no two in a row are alike")
    strategy = create_masking("pgs", **options)
    assert isinstance(strategy, PGSMasking)
    known = strategy.options
    return patch_scores(inputs, candidate_index, edge_strength(inputs, known), known)


# ------------------------------------------------------------------------------------------------
# Beyond the method: the paper's windows, a prior of the center, candidates from the border,
# merging, a share of the kept patches or of the images drawn at random
# ------------------------------------------------------------------------------------------------


def candidate_weights(inputs: PatchInputs, candidate_index: Tensor, options: PGSOptions) -> Tensor:
    """Return how much of each patch each candidate absorbs, N * Pi, for `clip_pgs.masking.merge`.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        options: See `PGSOptions`.

    Returns:
        Weights of shape (B, C, N), float32. Columns sum to 1, to 0 where no candidate reaches.
    """
    similarity_BCN = reached_similarity(inputs, candidate_index, options.neighborhood)
    return inputs.num_patches * sinkhorn_plan(similarity_BCN, **options.sinkhorn())


def reached_similarity(
    inputs: PatchInputs, candidate_index: Tensor, neighborhood: int | None
) -> Tensor:
    """Compare candidates with the patches in their reach.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        neighborhood: A candidate reaches the patches at most this many rows and this many columns
            away. None reaches all.

    Returns:
        Similarity, and -inf beyond the reach, shape (B, C, N), float32.
    """
    similarity_BCN = mixed_similarity(inputs, candidate_index, name="pgs")
    if neighborhood is None:
        return similarity_BCN
    row_N, column_N = grid_coordinates(inputs.grid_size, candidate_index.device)
    row_distance = (row_N[candidate_index][:, :, None] - row_N).abs()
    column_distance = (column_N[candidate_index][:, :, None] - column_N).abs()
    is_near_BCN = torch.maximum(row_distance, column_distance) <= neighborhood
    return similarity_BCN.masked_fill(~is_near_BCN, -torch.inf)


def _balanced_in_reach(inputs: PatchInputs, candidate_index: Tensor, options: PGSOptions) -> Tensor:
    """Balance similarities inside windows; a patch that no candidate reaches takes no part."""
    similarity_BCN = reached_similarity(inputs, candidate_index, options.neighborhood)
    is_near_BCN = similarity_BCN > -torch.inf
    if options.transport:
        plan_BCN = sinkhorn_plan(similarity_BCN, **options.sinkhorn())
        # Where the plan is 0, -inf must not meet it.
        similarity_BCN = similarity_BCN.masked_fill(~is_near_BCN, 0.0)
        redundancy_BN = similarity_BCN.shape[2] * (plan_BCN * similarity_BCN).sum(dim=1)
    else:
        redundancy_BN = similarity_BCN.amax(dim=1)
    # Below the score of any patch that a candidate reaches.
    unreached = -2.0 - options.edge_weight - options.center_weight
    return torch.where(is_near_BCN.any(dim=1), redundancy_BN, unreached)


def _center_strength(inputs: PatchInputs) -> Tensor:
    """Return how near each patch is to the middle of the image, in (0, 1], shape (N,)."""
    return log_center_weight(inputs.grid_size, inputs.device).exp()


def _spare_center(keys_BN: Tensor, inputs: PatchInputs, options: PGSOptions) -> Tensor:
    protection = _CENTER_PROTECTION * options.center_weight
    return keys_BN - protection * _center_strength(inputs) if protection else keys_BN


def _prefer_border(keys_BN: Tensor, inputs: PatchInputs, options: PGSOptions) -> Tensor:
    """Bring the keys of patches inside below all those of the border."""
    if options.candidate_region != "border":
        return keys_BN
    (rows, columns), device = inputs.grid_size, inputs.device
    row_N, column_N = grid_coordinates((rows, columns), device)
    is_outer_N = (row_N == 0) | (row_N == rows - 1) | (column_N == 0) | (column_N == columns - 1)
    center_protection = _CENTER_PROTECTION * options.center_weight
    below_all = _GUMBEL_SPAN + options.edge_protection + center_protection
    return keys_BN - below_all * ~is_outer_N


def _some_at_random(
    scores_BN: Tensor,
    noise_BN: Tensor,
    num_mask: int | Tensor,
    progress: float | Tensor,
    options: PGSOptions,
) -> Tensor:
    """Let the share of kept patches that this point of training asks for be drawn, or all."""
    share = scheduled_ratio(options.random_share, options.random_share_end, progress=progress)
    if options.random_images:
        is_random_B1 = image_draw(noise_BN) < options.random_images
        share = share + (1 - share) * is_random_B1.to(exact_dtype(noise_BN.device))
    return share_at_random(scores_BN, noise_BN, num_mask=num_mask, random_share=share)
