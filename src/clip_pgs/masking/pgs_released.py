"""What the released code of CLIP-PGS selects, for reproducing runs made with it.

Source: the authors' public snapshot cdeb109 (November 2024) of https://arxiv.org/abs/2503.17080.
Its two checkpoints come from these rules, which are not those of the paper; `pgs` follows the
paper. Its "edges" are rounding noise, so that its order of operations is kept: candidates, and what
exceeds the threshold, are the same to the last patch. Deliberate differences from that code (how
much the fourth and fifth change was not measured):

- The kept count is `int(N * (1 - mask_ratio_min))` in every batch. There it could grow with the
  other images of a batch, which happened in practice never.
- Which unmasked patches are kept is drawn at random. There it was left to the order in which an
  unstable sort returns equal values.
- The balancing never stops before its 50 passes. There it did if the whole batch was balanced.
- The share of embeddings in the similarity grows with every step; there with every epoch.
- Embeddings are compared without their position embedding, which is added later here.
- Grids need not be square.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from clip_pgs.masking.sampling import draw_noise, full_precision, patchify, second_draw
from clip_pgs.masking.strategy import (
    MASK_RATIO,
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    check_mask_ratio,
    check_range,
    lower_bound,
    register_masking,
)

NUM_BALANCING_PASSES = 50

_MIX_EPOCHS = 32  # hard-coded there, whatever the number of epochs
_EPSILON = 1e-6
_BALANCING_EPSILON = 1e-3


@register_masking(
    "pgs-released",
    keeps="as the authors' released code does it, for reproduction",
    paper="CLIP-PGS as its authors' released code computes it, arXiv 2503.17080",
    requires={"tokens"},
    variants=[{"mask_ratio_min": 0.3}, {"attention_bias": True}],
)
class PGSReleasedMasking(MaskingStrategy):
    """Select patches as the released code of CLIP-PGS does; use `pgs` for the paper's method.

    Every image keeps `int(N * (1 - mask_ratio_min))` patches: 137 or 98 of 196 in the two
    published models, `mask_ratio` 0.5 with `mask_ratio_min` 0.3 or 0.5.

    Args:
        mask_ratio: That code's `target_mask_ratio`, in [0, 1): the default of `threshold`, and no
            ratio at all.
        mask_ratio_min: That code's `min_mask_ratio`, in [0, mask_ratio]: the share dropped in
            every image. None takes `mask_ratio`.
        threshold: A patch is masked if its balanced similarity to any candidate exceeds it. None
            takes `mask_ratio`, also after `set_mask_ratio`.
        candidate_ratio: That code's `force_patch_dropout`: share of candidates, in [0, 1).
        edges: That code's `use_ed`: candidates are the patches with the highest "edge" values,
            which are rounding noise. False draws them uniformly.
        transport: That code's `use_otn`: add a balanced similarity matrix to the plain one.
        num_epochs: Length of the training run, in [1e-6, 1e6]: the share of embeddings in the
            similarity is epoch / 32, that is `progress * num_epochs / 32`.
        attention_bias: Ask the tower for that code's attention bias as well.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = MASK_RATIO,
        mask_ratio_min: float | None = None,
        threshold: float | None = None,
        candidate_ratio: float = 0.05,
        edges: bool = True,
        transport: bool = True,
        num_epochs: float = 32,
        attention_bias: bool = False,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.mask_ratio_min = lower_bound(mask_ratio, mask_ratio_min)
        check_mask_ratio(candidate_ratio, name="candidate_ratio")
        check_range(threshold, name="threshold", low=-1e6, high=1e6, optional=True)
        check_range(num_epochs, name="num_epochs", low=1e-6, high=1e6)
        self._threshold = threshold
        self.candidate_ratio = candidate_ratio
        self.edges = edges
        self.transport = transport
        self.num_epochs = num_epochs
        self.attention_bias = attention_bias

    @property
    def threshold(self) -> float:
        """The similarity above which a patch is masked."""
        return self.mask_ratio if self._threshold is None else self._threshold

    def idle_options(self) -> dict[str, str]:
        """Return `mask_ratio` where a threshold was given."""
        is_idle = self._threshold is not None
        return {"mask_ratio": "but on mask_ratio_min beside threshold"} if is_idle else {}

    @torch.no_grad()
    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Mark what resembles a candidate, then keep a fixed count, unmarked patches first."""
        assert isinstance(inputs.patch_size, tuple)
        noise_BN = draw_noise(inputs, generator)
        patches_BNF = _standardized(_channels_last(inputs.pixels.float(), inputs.patch_size))
        candidate_index = self._candidates(noise_BN, patches_BNF, inputs.grid_size)
        similarity_BNN = self._similarity(inputs, patches_BNF)
        if self.transport:
            similarity_BNN = similarity_BNN + balance(similarity_BNN)
        index_BCN = candidate_index[:, :, None].expand(-1, -1, inputs.num_patches)
        is_similar_BN = (similarity_BNN.gather(1, index_BCN) > self.threshold).any(dim=1)
        num_keep = max(1, int(inputs.num_patches * (1 - self.mask_ratio_min)))
        order_BN = (second_draw(noise_BN) + 2 * is_similar_BN).sort(dim=1, stable=True).indices
        index_BK = order_BN[:, :num_keep].sort(dim=1).values
        similar_BK = is_similar_BN.gather(1, index_BK) if self.attention_bias else None
        return PatchSelection(index=index_BK, similar=similar_BK)

    def _candidates(
        self, noise_BN: Tensor, patches_BNF: Tensor, grid_size: tuple[int, int]
    ) -> Tensor:
        num_patches = noise_BN.shape[1]
        if self.edges:
            noise_BN = noise_BN + 1e6 * _edges_of_means(patches_BNF, grid_size)
        num_kept = int(num_patches * (1 - self.candidate_ratio))
        return noise_BN.sort(dim=1, stable=True).indices[:, num_kept:]

    def _similarity(self, inputs: PatchInputs, patches_BNF: Tensor) -> Tensor:
        pixel_similarity = _cosine(patches_BNF)
        share = inputs.progress * self.num_epochs / _MIX_EPOCHS
        if not inputs.compares_tokens:
            return pixel_similarity
        if inputs.tokens is None:
            raise ValueError(
                f"pgs-released needs tokens once progress > 0, got none at progress "
                f"{inputs.progress}"
            )
        return share * _cosine(inputs.tokens.float()) + (1 - share) * pixel_similarity


def balance(similarity: Tensor) -> Tensor:
    """Divide a matrix by its column sums and its row sums, both taken before either division.

    It is no Sinkhorn scaling: with negative entries the sums cross zero and values grow by
    orders of magnitude, as in the released code.

    Args:
        similarity: Shape (B, N, N).

    Returns:
        Values of the same shape, possibly not finite.
    """
    for _ in range(NUM_BALANCING_PASSES):
        sums_B1N = similarity.sum(dim=1, keepdim=True)
        sums_BN1 = similarity.sum(dim=2, keepdim=True)
        similarity = similarity / (sums_B1N + _BALANCING_EPSILON) / (sums_BN1 + _BALANCING_EPSILON)
    return similarity


def _channels_last(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut patches, the colors of a pixel side by side: the order decides how sums are rounded."""
    patches_BNF = patchify(pixels, patch_size)
    return patches_BNF.unflatten(2, (pixels.shape[1], -1)).transpose(2, 3).flatten(2)


def _standardized(patches_BNF: Tensor) -> Tensor:
    # Not std_mean, whose mean is rounded in another way.
    mean_BN1 = patches_BNF.mean(dim=2, keepdim=True)
    std_BN1 = patches_BNF.std(dim=2, keepdim=True)
    return (patches_BNF - mean_BN1) / (std_BN1 + _EPSILON)


def _cosine(features_BNF: Tensor) -> Tensor:
    unit_BNF = features_BNF / (features_BNF.norm(dim=2, keepdim=True) + _EPSILON)
    with full_precision(features_BNF):
        return torch.bmm(unit_BNF, unit_BNF.transpose(1, 2))


def _edges_of_means(patches_BNF: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Return the min-max scaled Sobel magnitude between the means of patches, shape (B, N)."""
    # Standardized patches have mean 0, so that this is what rounding left of it.
    means = functional.pad(patches_BNF.mean(dim=2).unflatten(1, grid_size), (1, 1, 1, 1))
    smooth_rows = means[:, :-2] + 2 * means[:, 1:-1] + means[:, 2:]
    smooth_columns = means[:, :, :-2] + 2 * means[:, :, 1:-1] + means[:, :, 2:]
    gradient_x = smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2]
    gradient_y = smooth_columns[:, 2:] - smooth_columns[:, :-2]
    magnitude_BN = torch.hypot(gradient_x, gradient_y).flatten(1)
    low_B1, high_B1 = magnitude_BN.aminmax(dim=1, keepdim=True)
    return (magnitude_BN - low_B1) / (high_B1 - low_B1 + _EPSILON)
