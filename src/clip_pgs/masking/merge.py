"""Merge what is dropped: the mean of each group of dropped patches is one more token.

It goes beyond the papers and with every strategy. All groupings are one matrix of weights
(B, G, N), zero on kept patches: a merged token is its row's weighted mean of the patches' tokens,
and a row of zeros is an empty group, which is padding. G depends on the options alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_pgs.masking.sampling import full_precision, grid_coordinates, kept_patches
from clip_pgs.masking.strategy import MaskingStrategy, PatchSelection


@dataclass(frozen=True)
class Merge:
    """How dropped patches are grouped.

    Args:
        cells: (rows, columns) of a grid whose cells are groups, over the grid of patches; None for
            none.
        by_candidate: Whether each candidate of PGS has a group, to which a patch belongs as far as
            the transport plan sends it there.
        counts: Whether attention weighs a merged token by the number of patches that it stands
            for: the logarithm is added to its logits (ToMe, https://arxiv.org/abs/2210.09461).
    """

    cells: tuple[int, int] | None
    by_candidate: bool
    counts: bool = False

    @classmethod
    def parse(cls, text: str, *, counts: bool = False) -> Merge | None:
        """Read "none", "2x2" (rows x columns), "candidates" or "2x2+candidates".

        Args:
            text: What to read.
            counts: See `Merge`.

        Returns:
            The grouping, None for "none".

        Raises:
            ValueError: If the text is none of these, or counts are asked for without a merge.
        """
        pattern = r"none|candidates|([1-9]\d{0,3})x([1-9]\d{0,3})(\+candidates)?"
        found = re.fullmatch(pattern, str(text))
        if found is None:
            raise ValueError(
                "merge must be none, ROWSxCOLUMNS such as 2x2, candidates, or both as in "
                f"2x2+candidates, got {text!r}"
            )
        if text == "none":
            if counts:
                raise ValueError("merge_counts needs merge, got merge='none'")
            return None
        cells = (int(found[1]), int(found[2])) if found[1] else None
        return cls(cells, by_candidate=text.endswith("candidates"), counts=counts)

    def check(self, strategy: MaskingStrategy, grid_size: tuple[int, int]) -> None:
        """Refuse a strategy or a grid of patches (h, w) without such groups.

        Raises:
            ValueError: If the strategy drops nothing or weighs no candidates, or a cell would be
                smaller than a patch.
        """
        name = type(strategy).__name__
        if strategy.keeps_all:
            raise ValueError(f"merge needs a masking that drops patches, got {name}")
        if self.by_candidate and not strategy.weighs_candidates:
            raise ValueError(f"merge by candidates needs pgs with its transport, got {name}")
        if self.cells is not None and (
            self.cells[0] > grid_size[0] or self.cells[1] > grid_size[1]
        ):
            raise ValueError(
                f"merge must be at most as fine as the {grid_size[0]}x{grid_size[1]} patches of "
                f"the image tower, got {self.cells[0]}x{self.cells[1]}"
            )

    def weights(self, selection: PatchSelection, grid_size: tuple[int, int]) -> Tensor:
        """Return how much of each dropped patch each group takes.

        Args:
            selection: What is kept, with `candidate_weights` where groups are candidates'.
            grid_size: (h, w) of the patches.

        Returns:
            Weights of shape (B, G, N), float32, at least 0; 0 on kept patches. Cells come first, in
            raster order; of a cell, a patch's weight is 1.

        Raises:
            ValueError: If candidates' weights are asked for and not given.
        """
        is_kept_BN = kept_patches(selection, grid_size[0] * grid_size[1])
        groups: list[Tensor] = []
        if self.cells is not None:
            row_N, column_N = grid_coordinates(grid_size, is_kept_BN.device)
            rows, columns = self.cells
            cell_N = row_N * rows // grid_size[0] * columns + column_N * columns // grid_size[1]
            cell_G = torch.arange(rows * columns, device=cell_N.device)
            groups.append((cell_G[:, None] == cell_N).float().expand(len(is_kept_BN), -1, -1))
        if self.by_candidate:
            if selection.candidate_weights is None:
                raise ValueError(
                    "merge by candidates needs candidate_weights, got a bare selection"
                )
            groups.append(selection.candidate_weights)
        return torch.cat(groups, dim=1).masked_fill(is_kept_BN[:, None], 0.0)


def merge_tokens(tokens: Tensor, weights: Tensor) -> Tensor:
    """Average tokens within groups.

    Args:
        tokens: One token per patch. Shape (B, N, D).
        weights: What each group takes of each patch, at least 0. Shape (B, G, N), float32.

    Returns:
        Weighted means of shape (B, G, D), in the tokens' dtype; 0 for an empty group.
    """
    sum_BG1 = weights.sum(dim=2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    dtype = torch.promote_types(tokens.dtype, weights.dtype)
    # Half precision would round counts, and float16 cannot hold the sum of many tokens.
    with full_precision(tokens):
        sums_BGD = torch.bmm(weights.to(dtype), tokens.to(dtype))
        return (sums_BGD / sum_BG1).to(tokens.dtype)
