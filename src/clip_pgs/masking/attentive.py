"""Attentive masking (A-CLIP, https://arxiv.org/abs/2212.08653).

The patches a teacher attends to most are kept. The paper's teacher is an exponential moving
average of the image encoder, whose class-token attention counts, mean over heads and layers. The
strategy itself sees scores alone; whoever masks a tower keeps the teacher, by the options below.
Unlike the paper it trains on one masked view of each image and without the auxiliary losses.
"""

from __future__ import annotations

import torch

from clip_pgs.masking.sampling import draw_noise
from clip_pgs.masking.strategy import (
    FixedRatioMasking,
    PatchInputs,
    PatchSelection,
    check_range,
    check_share,
    register_masking,
)


@register_masking(
    "attentive",
    keeps="where an EMA copy of the image tower looks",
    paper="A-CLIP, arXiv 2212.08653",
    random=False,
    requires={"attention"},
)
class AttentiveMasking(FixedRatioMasking):
    """Keep the patches with the highest attention; random numbers decide between equal ones.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).
        resolution: Side of the images the teacher sees, as a share of the model's, in (0, 1]; 0.5
            is the paper's efficient form.
        momentum: Share of itself that the teacher keeps in the first step, in [0, 1]; it rises to
            1 along a cosine over training.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self, *, mask_ratio: float = 0.5, resolution: float = 1.0, momentum: float = 0.996
    ) -> None:
        super().__init__(mask_ratio=mask_ratio)
        check_share(resolution, name="resolution")
        check_range(momentum, name="momentum", low=0, high=1)
        self.resolution = resolution
        self.momentum = momentum

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Keep the patches with the highest attention.

        Raises:
            ValueError: If `inputs.attention` is missing.
        """
        if inputs.attention is None:
            raise ValueError("attentive masking needs the teacher's attention, got none")
        # Sorted by noise first, equal attentions stay in that order under a stable sort.
        order_BN = draw_noise(inputs, generator).argsort(dim=1)
        attention_BN = inputs.attention.detach().float().gather(1, order_BN)
        rank_BN = attention_BN.argsort(dim=1, descending=True, stable=True)
        index_BK = order_BN.gather(1, rank_BN[:, : self.num_keep(inputs)])
        return PatchSelection(index=index_BK.sort(dim=1).values)
