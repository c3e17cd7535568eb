"""OpenCLIP's losses without the whole matrix of similarities: `--loss-chunk N` rows of it at once.

A batch of 32,768 has a matrix of 4 GiB in float32, and its softmax and gradient are as large. Here
each chunk of rows is made, summed and dropped, and made again in the backward pass. Which features
meet, and how gradients cross processes, is OpenCLIP's; value and gradients equal its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss, gather_features
from torch import Tensor, nn, stack
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint


def in_chunks(loss: Any, num_rows: int) -> nn.Module:
    """Make a loss of OpenCLIP's hold `num_rows` rows of its similarities at once; return it."""
    kinds: dict[type, type] = {
        ClipLoss: _ChunkedClipLoss,
        CoCaLoss: _ChunkedCoCaLoss,
        SigLipLoss: _ChunkedSigLipLoss,
    }
    # It keeps what OpenCLIP made it with.
    loss.__class__ = kinds[type(loss)]
    loss.num_rows = num_rows
    return loss


class _ChunkedClipLoss(ClipLoss):
    """The softmax loss; see `open_clip.loss.ClipLoss`."""

    num_rows: int

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        images, texts = all_images, all_texts = image_features, text_features
        if self.world_size > 1:
            all_images, all_texts = gather_features(
                images,
                texts,
                local_loss=self.local_loss,
                gather_with_grad=self.gather_with_grad,
                rank=self.rank,
                world_size=self.world_size,
            )
            if not self.local_loss:
                images, texts = all_images, all_texts
        labels = self.get_ground_truth(images.device, len(images)).split(self.num_rows)

        def row_sum(start: int, rows: Tensor, others: Tensor) -> Tensor:
            logits = _logits(rows, others, logit_scale, logit_bias)
            return cross_entropy(logits, labels[start // self.num_rows], reduction="sum")

        total = _sum_over_rows(row_sum, images, all_texts, num_rows=self.num_rows)
        total = total + _sum_over_rows(row_sum, texts, all_images, num_rows=self.num_rows)
        loss = total / (2 * len(images))
        return {"contrastive_loss": loss} if output_dict else loss


class _ChunkedCoCaLoss(CoCaLoss, _ChunkedClipLoss):
    """CoCa's, whose contrastive part is the softmax loss."""


class _ChunkedSigLipLoss(SigLipLoss):
    """The sigmoid loss; see `open_clip.loss.SigLipLoss`, which passes features around."""

    num_rows: int

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        def row_sum(start: int, rows: Tensor, others: Tensor) -> Tensor:
            logits = _logits(rows, others, logit_scale, logit_bias)
            signs = rows.new_full(logits.shape, -1)
            if not negative_only:
                signs.diagonal(start).fill_(1)
            return -logsigmoid(signs * logits).sum()

        total = _sum_over_rows(row_sum, image_features, text_features, num_rows=self.num_rows)
        return total / len(image_features)


def _logits(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * rows @ others.T
    return logits if bias is None else logits + bias


def _sum_over_rows(
    row_sum: Callable[[int, Tensor, Tensor], Tensor],
    features: Tensor,
    others: Tensor,
    *,
    num_rows: int,
) -> Tensor:
    """Add up `row_sum(number of the first row, rows, others)`, of which backward keeps nothing."""
    sums = [
        checkpoint(
            row_sum,
            number * num_rows,
            rows,
            others,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for number, rows in enumerate(features.split(num_rows))
    ]
    return stack(sums).sum()
