"""Convolutional image towers, masked: OpenCLIP's `ModifiedResNet` and timm's `ConvNeXt`.

Cells of 32 pixels, one for each place of the last stage, take the part of patches. A convolution
cannot skip cells that lie scattered, so that they are hidden as in SparK
(https://arxiv.org/abs/2301.03580) and FCMAE (https://arxiv.org/abs/2301.00808): pixels of dropped
cells are zero, and so is whatever a layer puts out there, at every resolution; statistics of
BatchNorm and of GRN, and the pooling at the end, are over what is visible. So nothing of a dropped
cell reaches the feature. The maps stay dense: **this saves no FLOPs, it regularizes**. Where what
stays is a window (`saliency-crop`), its pixels alone go through the tower, which does save them.

There is no patch embedding. The token that a strategy compares a cell by, `PatchInputs.tokens`, is
what the first convolution puts out at all places of the cell, side by side: a learned linear view
of its pixels, as a patch embedding is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.layers import GlobalResponseNormMlp, SelectAdaptivePool2d, SyncBatchNormAct
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clip_pgs.integrations.masked_tower import (
    MaskedTower,
    PatchGrid,
    resize_positions,
    valid_mean,
)
from clip_pgs.masking.merge import Merge
from clip_pgs.masking.sampling import full_precision, gather_tokens, kept_patches, patchify
from clip_pgs.masking.strategy import MaskingStrategy, PatchSelection

# Pixels along each side of a cell: what all these towers reduce an image by.
CELL = 32
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


# ------------------------------------------------------------------------------------------------
# Layers over the visible cells
# ------------------------------------------------------------------------------------------------


@dataclass
class VisibleCells:
    """Which cells of a batch of images are visible, in maps of any resolution.

    Args:
        mask: True where a cell is, shape (B, 1, h, w).
    """

    mask: Tensor
    _by_size: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def on(self, x: Tensor) -> Tensor:
        """Return 1 where a map (B, C, H, W) is visible, else 0, shape (B, 1, H, W)."""
        scale = x.shape[-1] // self.mask.shape[-1]
        key = (scale, x.dtype)
        if key not in self._by_size:
            fine = self.mask.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            self._by_size[key] = fine.to(x.dtype)
        return self._by_size[key]


def hide(x: Tensor, cells: VisibleCells | None) -> Tensor:
    """Return a map (B, C, H, W), zero where it is not visible; None hides nothing."""
    return x if cells is None else x * cells.on(x)


def run_layer(layer: nn.Module, x: Tensor, cells: VisibleCells | None) -> Tensor:
    """Run a layer that mixes neighbors alone, or a normalization, over what is visible.

    Args:
        layer: Anything but BatchNorm may not mix places that lie apart.
        x: Map of shape (B, C, H, W), zero where it is not visible.
        cells: None runs the layer as it is.

    Returns:
        Its output, zero where it is not visible.
    """
    if cells is not None and isinstance(layer, _BatchNorm):
        return visible_batch_norm(layer, x, cells.on(x))
    return hide(layer(x), cells)


def visible_batch_norm(norm: _BatchNorm, x: Tensor, mask: Tensor) -> Tensor:
    """Normalize by BatchNorm whose statistics are those of visible places alone.

    In train mode the running statistics follow as PyTorch's do. Of `nn.SyncBatchNorm`, sums are
    over all processes.

    Args:
        norm: The layer.
        x: Map of shape (B, C, H, W).
        mask: 1 where it is visible, else 0, shape (B, 1, H, W).

    Returns:
        The normalized map, in its dtype, zero where it is not visible.
    """
    with full_precision(x):
        wide_x = x.to(torch.promote_types(x.dtype, torch.float32))
        mask = mask.to(wide_x.dtype)
        mean, var = norm.running_mean, norm.running_var
        if norm.training or mean is None or var is None:
            count = _over_ranks(norm, mask.sum())
            mean = _over_ranks(norm, (wide_x * mask).sum(dim=(0, 2, 3))) / count
            centered = (wide_x - mean[:, None, None]) * mask
            squares = _over_ranks(norm, centered.square().sum(dim=(0, 2, 3)))
            var = squares / count
            _track(norm, mean, squares / (count - 1).clamp_min(1))
        else:
            centered = (wide_x - mean[:, None, None]) * mask
        scale = torch.rsqrt(var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        y = centered * scale[:, None, None]
        if norm.bias is not None:
            y = torch.addcmul(y, norm.bias.to(y.dtype)[:, None, None], mask)
    return y.to(x.dtype)


def _over_ranks(norm: _BatchNorm, total: Tensor) -> Tensor:
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if is_alone or not isinstance(norm, nn.SyncBatchNorm):
        return total
    return all_reduce(total, group=norm.process_group or torch.distributed.group.WORLD)


class _LocalBatchNorm(_BatchNorm):
    """A synced BatchNorm while its process runs the model by itself."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


class _LocalBatchNormAct(_LocalBatchNorm):
    """The same of timm's, which holds the activation that follows."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


_LOCAL = {nn.SyncBatchNorm: _LocalBatchNorm, SyncBatchNormAct: _LocalBatchNormAct}


@contextmanager
def aside_from_training(model: nn.Module) -> Iterator[None]:
    """Let one process run a model in train mode beside its training, inside a `with` block.

    Buffers, such as the statistics that BatchNorm gathers, are afterwards as they were, and
    `nn.SyncBatchNorm` waits for no other process.

    Args:
        model: A model, or a part of one.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    synced: dict[Any, Any] = {each: type(each) for each in model.modules() if type(each) in _LOCAL}
    for norm, kind in synced.items():
        norm.__class__ = _LOCAL[kind]
    try:
        yield
    finally:
        for norm, kind in synced.items():
            norm.__class__ = kind
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Let the running statistics follow those of a batch."""
    if not (norm.training and norm.track_running_stats):
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share: Any = norm.momentum
    if share is None:
        share = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), share)


# ------------------------------------------------------------------------------------------------
# The towers
# ------------------------------------------------------------------------------------------------


class MaskedConvTower(MaskedTower):
    """A tower of convolutions; see the module. A subclass runs its stages and pools."""

    saves_flops: ClassVar[bool] = False

    def encode_masked(self, x: Tensor) -> Any:
        """Encode the visible cells of images (B, 3, H, W)."""
        with torch.no_grad():
            tokens_BNF = self.embed_patches(x)
        selection = self.masking.select(x, tokens_BNF)
        batch_size, (rows, columns) = len(x), self.masking.grid.size
        x = x[:, :, : rows * CELL, : columns * CELL]
        cells, is_cut = None, selection.window is not None
        if selection.window is not None:
            x = cut_window(x, selection, selection.window)
        elif selection.valid is not None or selection.index.shape[1] < rows * columns:
            is_kept_BN = kept_patches(selection, rows * columns)
            cells = VisibleCells(is_kept_BN.reshape(batch_size, 1, rows, columns))
            # Not a product, in which what is not finite would stay.
            x = torch.where(cells.on(x) > 0, x, 0.0)
        last_BNC = self.run_stages(x, cells).flatten(2).mT
        kept_BKC = last_BNC if is_cut else gather_tokens(last_BNC, selection)
        return self.pool_cells(kept_BKC, selection)

    def run_stages(self, x: Tensor, cells: VisibleCells | None) -> Tensor:
        """Return the map of the last stage, (B, C, h, w), of images (B, 3, H, W)."""
        raise NotImplementedError

    def pool_cells(self, kept: Tensor, selection: PatchSelection) -> Tensor:
        """Return features of kept cells (B, K, C), of which the selection tells the places."""
        raise NotImplementedError

    @staticmethod
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse merging, which makes tokens."""
        if merge is not None:
            raise ValueError(
                "merge makes tokens of what is dropped, and a convolutional tower has none; "
                "leave it out"
            )

    @staticmethod
    def attention_refusal(tower: Any) -> str | None:
        """Return why there is no attention over the image as it comes in."""
        return "the image tower is of convolutions"


def cut_window(x: Tensor, selection: PatchSelection, window: tuple[int, int]) -> Tensor:
    """Cut the window that stays out of images.

    Args:
        x: Images of shape (B, C, H, W), a multiple of cells.
        selection: Its cells.
        window: Their rows and columns.

    Returns:
        Shape (B, C, rows * 32, columns * 32).
    """
    cells_BKF = gather_tokens(patchify(x, (CELL, CELL)), selection)
    cells = cells_BKF.unflatten(2, (x.shape[1], CELL, CELL)).unflatten(1, window)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def size_refusal(image_size: tuple[int, int]) -> str | None:
    """Return why images of a size cannot be cut into cells, None where they can."""
    if any(side < CELL or side % CELL for side in image_size):
        return (
            f"the image tower takes images of {image_size[0]} x {image_size[1]}, and masking a "
            f"convolutional tower needs sides that are multiples of {CELL}"
        )
    return None


class MaskedModifiedResNet(MaskedConvTower, ModifiedResNet):
    """OpenCLIP's ResNet that sees some cells of its images; its query attends to those alone."""

    plain_class = ModifiedResNet
    supported = "OpenCLIP's own ModifiedResNet"

    @staticmethod
    def refusal(tower: ModifiedResNet) -> str | None:
        """Return why a tower cannot be masked, None where it can."""
        return size_refusal((tower.image_size, tower.image_size))

    @staticmethod
    def patch_grid(tower: ModifiedResNet) -> PatchGrid:
        """Return the tower's cells."""
        side = tower.image_size // CELL
        return PatchGrid((side, side), (CELL, CELL))

    @staticmethod
    def patch_weight(tower: ModifiedResNet) -> Tensor:
        """Return the weight that meets the pixels first."""
        return tower.conv1.weight

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return what the first convolution puts out, by cells, shape (B, N, D)."""
        return _by_cells(self.conv1(pixels), stride=self.conv1.stride[0])

    def run_stages(self, x: Tensor, cells: VisibleCells | None) -> Tensor:
        """Return the map of the last stage, (B, C, h, w)."""
        for conv, norm, act in (
            (self.conv1, self.bn1, self.act1),
            (self.conv2, self.bn2, self.act2),
            (self.conv3, self.bn3, self.act3),
        ):
            x = act(run_layer(norm, hide(conv(x), cells), cells))
        x = self.avgpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = _run_bottleneck(block, x, cells)
        return x

    def pool_cells(self, kept: Tensor, selection: PatchSelection) -> Tensor:
        """Let the mean of the kept cells attend to itself and to them."""
        pool: AttentionPool2d = self.attnpool
        positions = pool.positional_embedding
        placed, size = positions[1:], self.masking.grid.size
        if size != (own := self.patch_grid(self).size):
            placed = resize_positions(placed, own, size)
        mean_B1C = valid_mean(kept, selection.valid)[:, None]
        query = mean_B1C + positions[:1].to(kept.dtype)
        tokens = torch.cat([query, kept + placed.to(kept.dtype)[selection.index]], dim=1)
        mask = selection.valid
        if mask is not None:
            mask = functional.pad(mask, (1, 0), value=True)[:, None, None, :]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

        pooled = functional.scaled_dot_product_attention(
            heads(pool.q_proj(query)),
            heads(pool.k_proj(tokens)),
            heads(pool.v_proj(tokens)),
            attn_mask=mask,
        )
        return pool.c_proj(pooled.flatten(1))


def _run_bottleneck(block: Bottleneck, x: Tensor, cells: VisibleCells | None) -> Tensor:
    y = block.act1(run_layer(block.bn1, block.conv1(x), cells))
    y = block.act2(run_layer(block.bn2, block.conv2(y), cells))
    y = run_layer(block.bn3, block.conv3(block.avgpool(y)), cells)
    if block.downsample is not None:
        for layer in block.downsample:
            x = run_layer(layer, x, cells)
    return block.act3(y + x)


class MaskedConvNeXt(MaskedConvTower, TimmModel):
    """timm's ConvNeXt in OpenCLIP's `TimmModel` that sees some cells of its images."""

    plain_class = TimmModel
    supported = "timm's ConvNeXt in OpenCLIP's TimmModel"

    @staticmethod
    def takes(tower: Any) -> bool:
        """Return whether the tower is a ConvNeXt."""
        return type(tower.trunk) is ConvNeXt

    @staticmethod
    def refusal(tower: TimmModel) -> str | None:
        """Return why a tower cannot be masked, None where it can."""
        trunk: Any = tower.trunk
        stride = trunk.feature_info[-1]["reduction"]
        if stride != CELL:
            return f"the image tower reduces images by {stride}, and masking needs {CELL}"
        pool = trunk.head.global_pool
        is_mean = isinstance(pool, SelectAdaptivePool2d) and pool.pool_type == "avg"
        if not is_mean or hasattr(tower.head, "pool"):
            return "the image tower pools otherwise than by a mean, and masking needs timm_pool avg"
        for layer in trunk.modules():
            is_other_batch_norm = isinstance(layer, _BatchNorm) and type(layer) not in _BATCH_NORMS
            if isinstance(layer, nn.GroupNorm) or is_other_batch_norm:
                return (
                    f"the image tower normalizes by {type(layer).__name__}, and masking needs "
                    "BatchNorm2d or what normalizes each place by itself"
                )
        return size_refusal(tower.image_size)

    @staticmethod
    def patch_grid(tower: TimmModel) -> PatchGrid:
        """Return the tower's cells."""
        height, width = tower.image_size
        return PatchGrid((height // CELL, width // CELL), (CELL, CELL))

    @staticmethod
    def patch_weight(tower: TimmModel) -> Tensor:
        """Return the weight that meets the pixels first."""
        return tower.trunk.stem[0].weight

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return what the first convolution puts out, by cells, shape (B, N, D)."""
        conv = self.trunk.stem[0]
        return _by_cells(conv(pixels), stride=conv.stride[0])

    def uses_checkpointing(self) -> bool:
        """Return whether blocks are computed again in the backward pass."""
        return self.trunk.stages[0].grad_checkpointing

    def run_stages(self, x: Tensor, cells: VisibleCells | None) -> Tensor:
        """Return the map of the last stage, (B, C, h, w)."""
        trunk = self.trunk
        for layer in trunk.stem:
            x = run_layer(layer, x, cells)
        for stage in trunk.stages:
            # An identity where the first stage keeps the stem's resolution.
            for layer in stage.downsample.children():
                x = run_layer(layer, x, cells)
            for block in stage.blocks:
                x = self._run(_run_convnext_block, block, x, cells)
        return run_layer(trunk.norm_pre, x, cells)

    def pool_cells(self, kept: Tensor, selection: PatchSelection) -> Tensor:
        """Take the mean of the kept cells, and the head's normalization and projection."""
        # The head's own mean, of one place, changes nothing.
        return self.head(self.trunk.head(valid_mean(kept, selection.valid)[:, :, None, None]))


def _run_convnext_block(block: ConvNeXtBlock, x: Tensor, cells: VisibleCells | None) -> Tensor:
    y = hide(block.conv_dw(x), cells)
    if block.use_conv_mlp:
        y = _run_mlp(block.mlp, run_layer(block.norm, y, cells), lambda h: hide(h, cells))
    else:
        y = _run_mlp(
            block.mlp,
            block.norm(y.permute(0, 2, 3, 1)),
            lambda h: hide(h.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1),
        ).permute(0, 3, 1, 2)
    if block.gamma is not None:
        y = y * block.gamma.reshape(1, -1, 1, 1)
    return hide(block.drop_path(y) + block.shortcut(x), cells)


def _run_mlp(mlp: Any, x: Tensor, hide_hidden: Callable[[Tensor], Tensor]) -> Tensor:
    if not isinstance(mlp, GlobalResponseNormMlp):
        return mlp(x)
    # GRN alone looks at all places: at their norm, to which what is zero adds nothing.
    hidden = hide_hidden(mlp.drop1(mlp.act(mlp.fc1(x))))
    return mlp.drop2(mlp.fc2(mlp.grn(hidden)))


def _by_cells(x: Tensor, *, stride: int) -> Tensor:
    """Cut a map of the whole image (B, C, H, W) into its cells' values, (B, N, D)."""
    side = CELL // stride
    rows, columns = x.shape[-2] // side, x.shape[-1] // side
    return patchify(x[:, :, : rows * side, : columns * side], (side, side))
