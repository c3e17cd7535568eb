"""Which image towers can be masked, and where a model keeps its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from clip_pgs.integrations.open_clip.masked_tower import MaskedTower
from clip_pgs.integrations.open_clip.state import PatchGrid, TowerMasking
from clip_pgs.integrations.open_clip.timm_vision import MaskedTimmModel
from clip_pgs.integrations.open_clip.vision import MaskedVisionTransformer

_KINDS: tuple[type[MaskedTower], ...] = (MaskedVisionTransformer, MaskedTimmModel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and `torch.compile`."""
    # DDP wraps as `module`, torch.compile as `_orig_mod`.
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model


def image_tower(model: nn.Module) -> tuple[Any, type[MaskedTower]]:
    """Return a model's image tower, masked or not, and the class that masks it.

    Args:
        model: An OpenCLIP model, also wrapped.

    Raises:
        ValueError: If it has no image tower that can be masked.
    """
    model = unwrap(model)
    tower: Any = getattr(model, "visual", None)
    for kind in _KINDS:
        # A subclass may have a forward pass of its own, which masking would undo without a word.
        if type(tower) in (kind, kind.plain_class):
            if (reason := kind.refusal(tower)) is not None:
                raise ValueError(reason)
            return tower, kind
    found = "no image tower" if tower is None else f"the image tower {type(tower).__name__}"
    raise ValueError(
        f"{type(model).__name__} has {found}; masking supports OpenCLIP's own VisionTransformer "
        "and timm's (ViT models, not ResNet or ConvNeXt)"
    )


def patch_grid(model: nn.Module) -> PatchGrid:
    """Return how a model's image tower cuts its images, masked or not.

    Raises:
        ValueError: If it has no image tower that can be masked.
    """
    tower, kind = image_tower(model)
    return kind.patch_grid(tower)


def tower_masking(model: nn.Module) -> TowerMasking:
    """Return the masking of a model.

    Raises:
        ValueError: If the model is not masked.
    """
    tower, _ = image_tower(model)
    if not isinstance(tower, MaskedTower):
        raise ValueError("the model is not masked; call apply_masking first")
    return tower.masking


def masking_or_none(model: nn.Module) -> TowerMasking | None:
    """Return the masking of a model of any kind, None where it has none."""
    tower = getattr(unwrap(model), "visual", None)
    return tower.masking if isinstance(tower, MaskedTower) else None
