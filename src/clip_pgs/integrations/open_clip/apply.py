"""Turn an OpenCLIP model into a masked one, in place, and back."""

from __future__ import annotations

from typing import Any, TypeVar

from open_clip import CoCa
from open_clip.transformer import VisionTransformer
from torch import nn

from clip_pgs.integrations.open_clip.compat import check_versions
from clip_pgs.integrations.open_clip.state import TowerMasking, check_when
from clip_pgs.integrations.open_clip.teacher import START_MOMENTUM, Teacher
from clip_pgs.integrations.open_clip.towers import image_tower, masking_or_none, unwrap
from clip_pgs.masking import MaskingStrategy, create_masking

Model = TypeVar("Model", bound=nn.Module)


def apply_masking(
    model: Model,
    masking: str | MaskingStrategy,
    *,
    when: str = "train",
    pack_tokens: bool | None = None,
    **options: Any,
) -> Model:
    """Mask the patches of a model's image tower.

    The model is changed in place. In eval mode it stays bit-identical to plain OpenCLIP unless
    `when` says otherwise, its state dict keeps its keys, and a second call replaces the strategy
    of the first. A strategy that requires attention gets a teacher, which starts from the weights
    the tower has now.

    Args:
        model: An OpenCLIP model (CLIP, CustomTextCLIP, CoCa), also wrapped, whose image tower,
            `model.visual`, is OpenCLIP's own `VisionTransformer` or timm's.
        masking: A name out of `clip_pgs.list_maskings()`, or a strategy.
        when: "train" masks in train mode, "always" in eval mode as well.
        pack_tokens: Where images keep different counts, put the kept tokens of all into one
            sequence, in place of padding each image to the longest; features stay the same. None
            does so on a CPU, where it is measured to be faster, unless the model is tiny. It
            needs the usual blocks, without dropout or drop path; on a CPU a model that is not
            compiled; on CUDA float16 or bfloat16, where it costs one synchronisation per step,
            since the host has to know how many tokens there are, and is not yet measured. Where
            one of these is missing, images are padded.
        **options: The strategy's options, with a name alone.

    Returns:
        The same model.

    Raises:
        ValueError: If the tower cannot be masked or drops patches by itself, or if the name or
            an option is wrong.
    """
    check_versions()
    check_when(when)
    tower, kind = image_tower(model)
    if isinstance(masking, str):
        strategy = create_masking(masking, **options)
    elif options:
        raise ValueError(f"options go with a masking's name, got {', '.join(options)} beside one")
    else:
        strategy = masking
    _check_fit(model, strategy)

    remove_masking(model)
    tower.__class__ = kind
    teacher = None
    if "attention" in strategy.requires:
        teacher = Teacher(
            tower,
            resolution=getattr(strategy, "resolution", 1.0),
            momentum=getattr(strategy, "momentum", START_MOMENTUM),
        )
    tower.masking = TowerMasking(
        strategy, kind.patch_grid(tower), when=when, teacher=teacher, pack_tokens=pack_tokens
    )
    if teacher is not None:
        tower.masking.load_hook = tower.register_load_state_dict_post_hook(_load_into_teacher)
    return model


def remove_masking(model: Model) -> Model:
    """Turn a masked model back into a plain one, in place; a plain one stays as it is.

    Raises:
        ValueError: If the model has no image tower that can be masked.
    """
    tower, kind = image_tower(model)
    masking = masking_or_none(model)
    if masking is not None:
        if masking.load_hook is not None:
            masking.load_hook.remove()
        del tower.masking
        tower.__class__ = kind.plain_class
    return model


def _check_fit(model: nn.Module, strategy: MaskingStrategy) -> None:
    tower, kind = image_tower(model)
    if "attention" in strategy.requires:
        reason = kind.attention_refusal(tower)
        if reason is not None:
            raise ValueError(
                f"{type(strategy).__name__} reads the attention of the class token or of the query "
                f"that makes the image feature, and {reason}"
            )
    if strategy.attention_bias and not kind.takes_attention_bias:
        raise ValueError(
            f"attention_bias is made for OpenCLIP's own VisionTransformer, and the image tower is "
            f"a {kind.plain_class.__name__}"
        )
    is_adaptive = getattr(strategy, "mask_ratio_min", None) not in (
        None,
        getattr(strategy, "mask_ratio", None),
    )
    if (
        is_adaptive
        and isinstance(unwrap(model), CoCa)
        and isinstance(tower, VisionTransformer)
        and tower.attn_pool is None
    ):
        raise ValueError(
            "this CoCa hands patch tokens to its text decoder, which would read the padding of an "
            f"adaptive mask; set mask_ratio_min to mask_ratio = {strategy.mask_ratio} or build the "
            "model with attentional_pool"
        )


def _load_into_teacher(tower: Any, _incompatible_keys: Any) -> None:
    """Let the teacher start from the weights that the tower starts from."""
    tower.masking.teacher.load_state(tower.state_dict())
