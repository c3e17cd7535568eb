"""Turn an OpenCLIP model into a masked one, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip_pgs.integrations.open_clip.compat import check_versions
from clip_pgs.integrations.open_clip.state import TowerMasking
from clip_pgs.integrations.open_clip.vision import MaskedVisionTransformer
from clip_pgs.masking import MaskingStrategy, PatchSelection, create_masking

Model = TypeVar("Model", bound=nn.Module)


def apply_masking(model: Model, masking: str | MaskingStrategy, **options: Any) -> Model:
    """Mask the patches of a model's image tower in train mode.

    The model is changed in place. In eval mode it stays bit-identical to plain OpenCLIP, its
    state dict keeps its keys, and a second call replaces the strategy of the first.

    Args:
        model: An OpenCLIP model whose image tower, `model.visual`, is OpenCLIP's own
            `VisionTransformer`.
        masking: A name out of `clip_pgs.list_maskings()`, or a strategy.
        **options: The strategy's options, with a name alone.

    Returns:
        The same model.

    Raises:
        ValueError: If the tower cannot be masked or drops patches by itself, or if the name or
            an option is wrong.
    """
    check_versions()
    tower = _image_tower(model)
    if isinstance(masking, str):
        strategy = create_masking(masking, **options)
    elif options:
        raise ValueError(f"options go with a masking's name, got {', '.join(options)} beside one")
    else:
        strategy = masking
    tower.__class__ = MaskedVisionTransformer
    tower.masking = TowerMasking(strategy)
    return model


def remove_masking(model: Model) -> Model:
    """Turn a masked model back into a plain one, in place; a plain one stays as it is."""
    tower = _image_tower(model)
    if isinstance(tower, MaskedVisionTransformer):
        del tower.masking
        tower.__class__ = VisionTransformer
    return model


def set_masking_progress(model: nn.Module, progress: float) -> None:
    """Tell the strategy how far training has come.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        progress: Completed share of the masked training steps, in [0, 1].

    Raises:
        ValueError: If the model is not masked or `progress` is out of its range.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    _masking(model).progress = float(progress)


def set_masking_noise(model: nn.Module, noise: Tensor | None) -> None:
    """Give the random numbers that the coming forward passes choose patches by.

    With the same noise a forward pass repeats its selection, which is what the second pass of
    gradient accumulation needs.

    Args:
        model: A masked model, also wrapped.
        noise: Uniform numbers in [0, 1) on the model's device, shape (B, N), float32. None goes
            back to drawing from the global stream.

    Raises:
        ValueError: If the model is not masked.
    """
    _masking(model).noise = noise


@contextmanager
def force_selection(model: nn.Module, selection: PatchSelection) -> Iterator[None]:
    """Use a given selection in place of the strategy's, inside a `with` block.

    Args:
        model: A masked model, also wrapped.
        selection: Patches to keep in every forward pass.

    Raises:
        ValueError: If the model is not masked.
    """
    masking = _masking(model)
    masking.forced_selection = selection
    try:
        yield
    finally:
        masking.forced_selection = None


def last_selection(model: nn.Module) -> PatchSelection | None:
    """Return what the latest masked forward pass kept, None before the first.

    Raises:
        ValueError: If the model is not masked.
    """
    return _masking(model).last_selection


def num_patches(model: nn.Module) -> int:
    """Return the number of patches that the image tower cuts an image into.

    Raises:
        ValueError: If the tower is not OpenCLIP's `VisionTransformer`.
    """
    rows, columns = _image_tower(model).grid_size
    return rows * columns


def _masking(model: nn.Module) -> TowerMasking:
    tower = _image_tower(model)
    if not isinstance(tower, MaskedVisionTransformer):
        raise ValueError("the model is not masked; call apply_masking first")
    return tower.masking


def _image_tower(model: nn.Module) -> VisionTransformer:
    # DDP wraps as `module`, torch.compile as `_orig_mod`.
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    tower = getattr(model, "visual", None)
    # A subclass may have a forward pass of its own, which masking would undo without a word.
    if tower is None or type(tower) not in (VisionTransformer, MaskedVisionTransformer):
        found = "no image tower" if tower is None else f"the image tower {type(tower).__name__}"
        raise ValueError(
            f"{type(model).__name__} has {found}; masking supports OpenCLIP's own "
            "VisionTransformer (its ViT models, not ResNet, ConvNeXt or timm towers)"
        )
    if not isinstance(tower.patch_dropout, nn.Identity):
        raise ValueError(
            f"the image tower drops patches by itself (patch_dropout={tower.patch_dropout.prob}); "
            "build the model with force_patch_dropout=0 to mask it"
        )
    return tower
