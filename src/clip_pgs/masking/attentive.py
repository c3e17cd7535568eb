"""Attentive masking (A-CLIP, https://arxiv.org/abs/2212.08653).

The patches a teacher attends to most are kept. The paper's teacher is an exponential moving
average of the image encoder, whose class-token attention counts, mean over heads and layers. The
strategy itself sees scores alone; whoever masks a tower keeps the teacher, by the options below.
Deliberate differences: it trains on one masked view of each image and without the auxiliary losses,
the patch projection is trained, which A-CLIP's released code freezes, and single patches are chosen
unless `cell=2` chooses whole cells, as that code does.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from clip_pgs.masking.sampling import draw_noise
from clip_pgs.masking.strategy import (
    MASK_RATIO,
    FixedRatioMasking,
    PatchInputs,
    PatchSelection,
    check_range,
    check_share,
    keep_count,
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
        cell: Patches per side of the square cells that stay or go as one, by their mean attention;
            2 is the released code's. It must divide the grid of patches. The ratio counts for
            cells: at 0.5, 25 of the 49 cells of a 14 x 14 grid stay.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = MASK_RATIO,
        resolution: float = 1.0,
        momentum: float = 0.996,
        cell: int = 1,
    ) -> None:
        super().__init__(mask_ratio=mask_ratio)
        check_share(resolution, name="resolution")
        check_range(momentum, name="momentum", low=0, high=1)
        self.resolution = resolution
        self.momentum = momentum
        check_range(cell, name="cell", low=1, high=1024, whole=True)
        self.cell = cell

    def num_keep(self, inputs: PatchInputs) -> int:
        """Return how many patches of each image stay: those of whole cells."""
        patches = self.cell**2
        return keep_count(inputs.num_patches // patches, self.mask_ratio) * patches

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Keep the patches with the highest attention.

        Raises:
            ValueError: If `inputs.attention` is missing, or cells do not fit the grid.
        """
        if inputs.attention is None:
            raise ValueError("attentive masking needs the teacher's attention, got none")
        (height, width), cell = inputs.grid_size, self.cell
        if height % cell or width % cell:
            raise ValueError(f"cell must divide the grid of {height} x {width} patches, got {cell}")

        def in_cells(values_BN: Tensor) -> Tensor:
            return values_BN.unflatten(1, (height // cell, cell, width // cell, cell))

        attention_BC = in_cells(inputs.attention.detach().float()).mean(dim=(2, 4)).flatten(1)
        noise_BC = in_cells(draw_noise(inputs, generator))[:, :, 0, :, 0].flatten(1)
        # Sorted by noise first, equal attentions stay in that order under a stable sort.
        order_BC = noise_BC.argsort(dim=1)
        place_BC = attention_BC.gather(1, order_BC).argsort(dim=1, descending=True, stable=True)
        kept_BC = order_BC.gather(1, place_BC[:, : self.num_keep(inputs) // cell**2])
        across = width // cell
        top, left = (
            cell * each[:, :, None, None] for each in (kept_BC // across, kept_BC % across)
        )
        inside = torch.arange(cell, device=kept_BC.device)
        index_BK = ((top + inside[:, None]) * width + left + inside).flatten(1)
        return PatchSelection(index_BK.sort(dim=1).values)
