"""Controls: masks that share all but one thing with a method, to see what that one thing does.

They are no methods, and are named by their place: `--masking clip_pgs.study.controls:ShuffledPGS`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clip_pgs.masking.pgs import PGSMasking, PGSOptions
from clip_pgs.masking.sampling import draw_noise
from clip_pgs.masking.strategy import PatchInputs, PatchSelection, register_masking


@register_masking(
    "pgs-shuffled",
    keeps="what pgs keeps of another image of the batch: a control",
    paper="a control of CLIP-PGS, arXiv 2503.17080",
    adaptive=True,
    requires={"tokens"},
    options=PGSOptions,
)
class ShuffledPGS(PGSMasking):
    """Give each image the mask that PGS gives the image before it in the batch.

    Masks are those of PGS, as a set: their places, shapes and counts. They only know nothing of
    the images that they fall on, so that what PGS gains over this control comes from looking at
    the image. On purpose it breaks the rule that the mask of an image does not depend on other
    images: it depends on the batch of the process, and on a batch of one nothing is shuffled.

    Args:
        **options: See `PGSOptions`.

    Raises:
        ValueError: If an option is out of its range.
    """

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Choose patches as PGS does, for the batch moved on by one image."""
        moved = replace(
            inputs,
            pixels=inputs.pixels.roll(1, dims=0),
            tokens=None if inputs.tokens is None else inputs.tokens.roll(1, dims=0),
            noise=draw_noise(inputs, generator).roll(1, dims=0),
        )
        return super().forward(moved)
