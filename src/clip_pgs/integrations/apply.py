"""Turn a model into a masked one, in place, and back; drive it between steps.

Which models, says the integration of their library that is imported: `integrations.open_clip` or
`integrations.transformers`. Both export what `__all__` names here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clip_pgs.common import check_choice
from clip_pgs.integrations.masked_tower import (
    WHEN,
    MaskedTower,
    PatchGrid,
    TowerMasking,
    has_own_forward,
    is_sharded,
    plain_type,
    tower_of,
    unwrap,
)
from clip_pgs.integrations.teacher import START_MOMENTUM, Teacher, teacher_momentum
from clip_pgs.masking import MaskingStrategy, PatchSelection
from clip_pgs.masking.merge import Merge
from clip_pgs.masking.sampling import exact_dtype
from clip_pgs.masking.strategy import (
    as_strategy,
    check_range,
    described,
    patch_sides,
    plain_number,
)

# What `integrations.open_clip` and `integrations.transformers` export.
__all__ = [
    "apply_masking",
    "calibrate_masking",
    "force_selection",
    "last_selection",
    "load_masking_state",
    "masked_inference",
    "masking_state",
    "num_patches",
    "patch_size",
    "pixel_dtype",
    "remove_masking",
    "set_mask_ratio",
    "set_masking_noise",
    "set_masking_progress",
    "update_masking",
]

Model = TypeVar("Model", bound=nn.Module)


def apply_masking(
    model: Model,
    masking: str | MaskingStrategy,
    *,
    when: str = "train",
    pack_tokens: bool | None = None,
    merge: str = "none",
    merge_counts: bool = False,
    image_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Model:
    """Mask the patches of a model's image tower.

    The model is changed in place. In eval mode it stays bit-identical to the plain one unless
    `when` says otherwise, its state dict keeps its keys, and a second call replaces the strategy
    of the first. A strategy that requires attention gets a teacher, which starts from the weights
    the tower has now.

    To encode images through the mask that a model was trained with:

        apply_masking(model.eval(), "pgs", mask_ratio=0.5, when="always")
        set_masking_progress(model, 1.0)  # similarities as at the end of training
        features = model.encode_image(images)

    Patches are then drawn anew in each pass, unless `set_masking_noise` gives the numbers.

    What calls the image tower is masked: the model itself, `encode_image`, CoCa's `generate`. Maps
    of whole images, `forward_intermediates`, are refused wherever a mask would act. A part of the
    tower that is called by itself knows of no mask: `visual.transformer`, timm's `visual.trunk` and
    its `forward_features` and `forward_head`.

    Args:
        model: An OpenCLIP model (CLIP, CustomTextCLIP, CoCa), also wrapped, whose image tower,
            `model.visual`, is OpenCLIP's own `VisionTransformer` or timm's, or one of the
            convolutional ones of `integrations.open_clip.conv`, for which masking saves no FLOPs;
            or a Hugging Face model that `integrations.transformers` names.
        masking: A name out of `clip_pgs.list_maskings()`, or a strategy.
        when: "train" masks in train mode, "always" in eval mode as well.
        pack_tokens: Where images keep different counts, put the kept tokens of all into one
            sequence, in place of padding each image to the longest; features stay the same. None
            does so on a CPU, where it is measured to be faster, unless the model is tiny. It
            needs the usual blocks, without dropout or drop path; on a CPU a model that is not
            compiled; on CUDA float16 or bfloat16, where it costs one synchronization per step,
            since the host has to know how many tokens there are, and is not yet measured. Where
            one of these is missing, `merge_counts` is set, or the model is one of Hugging Face,
            images are padded.
        merge: Groups of dropped patches whose mean is one more token each, after the kept ones: the
            cells of a grid, "2x2" (rows x columns); "candidates", a group for each of `pgs`'s, with
            the transport plan's weights; or both, "2x2+candidates". "none" loses what is dropped.
            Where the tower pools by mean, maximum or a query, a merged token counts as one.
        merge_counts: Let the blocks' attention weigh a merged token by the number of patches that
            it stands for (ToMe, https://arxiv.org/abs/2210.09461).
        image_size: Side, or (height, width), of the images that the tower is given where it masks,
            if they are smaller than its own: multiples of a patch's. Positions are interpolated
            (RECLIP, https://arxiv.org/abs/2304.06028). "none" then trains on whole small images.
        **options: The strategy's options, with a name alone.

    Returns:
        The same model.

    Raises:
        ValueError: If the tower cannot be masked, drops patches by itself, is sharded by
            `fully_shard` or has a forward pass in place of its own, if the name or an option is
            wrong, or if `merge` does not fit the strategy or the model.
    """
    check_choice(when, WHEN, name="when")
    tower, kind = image_tower(model)
    _check_class_runs(tower)
    strategy = as_strategy(masking, options)
    merging = Merge.parse(merge, counts=merge_counts)
    grid = kind.patch_grid(tower)
    if image_size is not None:
        grid = _smaller_grid(kind, grid, image_size)
    is_resized = grid != kind.patch_grid(tower)
    _check_fit(model, strategy, merging, grid)

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
        strategy,
        grid,
        is_resized=is_resized,
        when=when,
        teacher=teacher,
        pack_tokens=pack_tokens,
        merge=merging,
    )
    if teacher is not None:
        tower.masking.load_hook = tower.register_load_state_dict_post_hook(teacher.start_from)
    return model


def remove_masking(model: Model) -> Model:
    """Turn a masked model back into a plain one, in place; a plain one stays as it is.

    Raises:
        ValueError: If the model has no image tower that can be masked, or one is masked that is
            sharded or has a forward pass in place of its own.
    """
    tower, kind = image_tower(model)
    masking = masking_or_none(model)
    if masking is not None:
        _check_class_runs(tower)
        if masking.load_hook is not None:
            masking.load_hook.remove()
        del tower.masking
        tower.__class__ = kind.plain_class
    return model


@contextmanager
def masked_inference(
    model: nn.Module, masking: str | MaskingStrategy, **options: Any
) -> Iterator[None]:
    """Mask a model in eval mode inside a `with` block; what masked it before comes back.

    Args:
        model: As for `apply_masking`, masked or not; it must not be trained inside.
        masking: As for `apply_masking`.
        **options: As for `apply_masking`, without `when`.

    Raises:
        ValueError: As `apply_masking` does.
    """
    tower, kind = image_tower(model)
    _check_class_runs(tower)
    before = masking_or_none(model)
    if before is not None:
        del tower.masking
        tower.__class__ = kind.plain_class
    try:
        apply_masking(model, masking, when="always", **options)
        yield
    finally:
        remove_masking(model)
        if before is not None:
            tower.__class__ = kind
            # A teacher may have been left behind on another device.
            tower.masking = before.to(kind.patch_weight(tower).device)


def _smaller_grid(
    kind: type[MaskedTower], own: PatchGrid, image_size: int | tuple[int, int]
) -> PatchGrid:
    """Return how a tower of a grid of its own cuts images of another size."""
    size = patch_sides(image_size, name="image_size")
    sides = own.patch_size
    most = (own.size[0] * sides[0], own.size[1] * sides[1])
    is_cut = all(side % patch == 0 for side, patch in zip(size, sides, strict=True))
    if not is_cut or size[0] > most[0] or size[1] > most[1]:
        raise ValueError(
            f"image_size must be multiples of the patch of {sides[0]} x {sides[1]}, at most "
            f"{most[0]} x {most[1]}, got {size[0]} x {size[1]}"
        )
    if not kind.takes_smaller_images:
        raise ValueError(f"image_size cannot be set for {kind.supported}")
    return PatchGrid((size[0] // sides[0], size[1] // sides[1]), sides)


def _check_fit(
    model: nn.Module, strategy: MaskingStrategy, merge: Merge | None, grid: PatchGrid
) -> None:
    tower, kind = image_tower(model)
    if merge is not None:
        merge.check(strategy, grid.size)
        if strategy.attention_bias:
            raise ValueError("merge and attention_bias do not go together; set one of them")
    if "attention" in strategy.requires:
        reason = kind.attention_refusal(tower)
        if reason is not None:
            raise ValueError(
                f"{type(strategy).__name__} reads the attention of the class token or of the query "
                f"that makes the image feature, and {reason}; pgs and random need neither"
            )
        if grid != kind.patch_grid(tower):
            raise ValueError(
                f"{type(strategy).__name__} has a teacher, which looks at images of the tower's "
                "own size alone"
            )
    if strategy.attention_bias and not kind.takes_attention_bias:
        raise ValueError(
            f"attention_bias is made for OpenCLIP's own VisionTransformer, and the image tower is "
            f"a {kind.plain_class.__name__}"
        )
    kind.check_model(model, strategy, merge)


# ------------------------------------------------------------------------------------------------
# Which image towers can be masked, and where a model keeps its own
# ------------------------------------------------------------------------------------------------


def image_tower(model: nn.Module) -> tuple[Any, type[MaskedTower]]:
    """Return a model's image tower, masked or not, and the class that masks it.

    Args:
        model: A model of a library whose integration is imported, also wrapped.

    Raises:
        ValueError: If it has no image tower that can be masked.
    """
    tower: Any = tower_of(model)
    kinds = [] if tower is None else MaskedTower.kinds.get(plain_type(tower), [])
    kind = next((kind for kind in kinds if kind.takes(tower)), None)
    if kind is not None:
        if (reason := kind.refusal(tower)) is not None:
            raise ValueError(reason)
        return tower, kind
    found = "no image tower" if tower is None else f"the image tower {type(tower).__name__}"
    every = (kind for kinds in MaskedTower.kinds.values() for kind in kinds)
    supported = ", ".join(dict.fromkeys(kind.supported for kind in every))
    raise ValueError(f"{type(unwrap(model)).__name__} has {found}; masking supports {supported}")


def _check_class_runs(tower: nn.Module) -> None:
    """Refuse a tower whose class masking could not replace, or would replace without effect."""
    if is_sharded(tower):
        raise ValueError(
            f"the image tower is a {type(tower).__name__}: change its masking before fully_shard"
        )
    if has_own_forward(tower):
        raise ValueError(
            "the image tower has a forward pass that was put in place of its own, which knows of "
            "no change: change its masking before accelerate or torch.compile(tower.forward)"
        )


def patch_grid(model: nn.Module) -> PatchGrid:
    """Return how a model's image tower cuts its images; of a masked one, those that it masks.

    Raises:
        ValueError: If it has no image tower that can be masked.
    """
    tower, kind = image_tower(model)
    return tower.masking.grid if isinstance(tower, MaskedTower) else kind.patch_grid(tower)


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
    tower = tower_of(model)
    return tower.masking if isinstance(tower, MaskedTower) else None


# ------------------------------------------------------------------------------------------------
# What a caller sets and reads between the steps of a masked model
# ------------------------------------------------------------------------------------------------


def set_masking_progress(model: nn.Module, progress: float) -> None:
    """Tell the strategy how far training has come.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        progress: Completed share of the masked training steps, in [0, 1]; a number, or a tensor of
            one.

    Raises:
        ValueError: If the model is not masked or `progress` is out of its range.
    """
    progress = plain_number(progress)
    check_range(progress, name="progress", low=0, high=1)
    progress = float(progress)
    masking, (tower, kind) = tower_masking(model), image_tower(model)
    masking.progress = progress
    device = kind.patch_weight(tower).device
    masking.progress_tensor = torch.full((), progress, dtype=exact_dtype(device), device=device)


def set_mask_ratio(model: nn.Module, mask_ratio: float) -> None:
    """Change the strategy's mask ratio, as a schedule does; `MaskingStrategy` says how.

    Args:
        model: A masked model, also wrapped.
        mask_ratio: Share of patches dropped from now on, in [0, 1); a number, or a tensor of one.

    Raises:
        ValueError: If the model is not masked, its strategy has no mask ratio, or the ratio is
            out of its range.
    """
    tower_masking(model).strategy.set_mask_ratio(plain_number(mask_ratio))


def set_masking_noise(model: nn.Module, noise: Tensor | None) -> None:
    """Give the random numbers that the coming forward passes choose patches by.

    With the same noise a forward pass repeats its selection, which is what the second pass of
    gradient accumulation needs.

    Args:
        model: A masked model, also wrapped.
        noise: Uniform numbers in [0, 1) on the model's device, shape (B, N), float32. None goes
            back to drawing from the global stream.

    Raises:
        ValueError: If the model is not masked, or the noise is no tensor. The forward pass refuses
            noise of another shape, and on a CPU numbers out of range; another device would have to
            be waited for.
    """
    if not (noise is None or isinstance(noise, Tensor)):
        raise ValueError(f"noise must be a tensor or None, got {noise!r}")
    tower_masking(model).noise = noise


@contextmanager
def force_selection(model: nn.Module, selection: PatchSelection) -> Iterator[None]:
    """Use a given selection in place of the strategy's, inside a `with` block.

    Args:
        model: A masked model, also wrapped.
        selection: Patches to keep in every forward pass, in eval mode as well, and also where the
            strategy is "none".

    Raises:
        ValueError: If the model is not masked, or the selection is none.
    """
    masking = tower_masking(model)
    if not isinstance(selection, PatchSelection):
        raise ValueError(f"force_selection takes a PatchSelection, got {described(selection)}")
    before, masking.forced_selection = masking.forced_selection, selection
    try:
        yield
    finally:
        masking.forced_selection = before


def last_selection(model: nn.Module) -> PatchSelection | None:
    """Return what the latest masked forward pass kept, None before the first.

    Raises:
        ValueError: If the model is not masked.
    """
    return tower_masking(model).last_selection


def num_patches(model: nn.Module) -> int:
    """Return the number of patches that the image tower cuts an image into.

    Raises:
        ValueError: If the tower is one that cannot be masked.
    """
    return patch_grid(model).num_patches


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) in pixels of the image tower's patches.

    Raises:
        ValueError: If the tower is one that cannot be masked.
    """
    return patch_grid(model).patch_size


def pixel_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that images must have outside autocast.

    Raises:
        ValueError: If the tower is one that cannot be masked.
    """
    tower, kind = image_tower(model)
    return kind.patch_weight(tower).dtype


# ------------------------------------------------------------------------------------------------
# What a masking learns in training: its teacher and the numbers it was calibrated to
# ------------------------------------------------------------------------------------------------


def update_masking(model: nn.Module, *, step: int, total_steps: int) -> None:
    """Let a teacher follow the model; call it after each optimizer step.

    Nothing is sent between processes: each moves its own teacher towards weights they share. A
    masking without a teacher is left as it is.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        step: Number of the optimizer step just taken, from 0.
        total_steps: Masked steps of the whole training, > 0.

    Raises:
        ValueError: If the model is not masked, or a number is out of its range where it has a
            teacher.
    """
    teacher = tower_masking(model).teacher
    if teacher is not None:
        momentum = teacher_momentum(teacher.momentum, step=step, total_steps=total_steps)
        teacher.update(image_tower(model)[0], momentum=momentum)


def calibrate_masking(
    model: nn.Module, images: Tensor, *, average: Callable[[float], float] | None = None
) -> bool:
    """Fit the strategy to a batch of images, where it asks for that at the present progress.

    It runs outside the training step and may synchronize. Noise given by `set_masking_noise` is
    used where there is some.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        images: As the model receives them. Shape (B, 3, H, W).
        average: Takes this process's number and returns the mean over all of them. None stands
            for one process.

    Returns:
        Whether the strategy was fitted.

    Raises:
        ValueError: If the model is not masked, or images are needed and none, or of another size.
    """
    masking = tower_masking(model)
    if not masking.strategy.needs_calibration(masking.progress):
        return False
    tower, kind = image_tower(model)
    masking.check_images(images, kind.patch_weight(tower))
    with torch.no_grad():
        images = images.to(kind.patch_weight(tower).dtype)
        inputs = masking.inputs(images, tower.embed_patches(images))
        return masking.strategy.calibrate(inputs, average=average) is not False


def masking_state(model: nn.Module) -> dict[str, Any]:
    """Return what a resumed run needs of a masking, beside the model's state dict.

    Args:
        model: A model, masked or not, also wrapped.

    Returns:
        Tensors on the CPU and plain types: "strategy" (numbers the strategy found) and "teacher"
        (its weights), each where there is one.
    """
    masking = masking_or_none(model)
    if masking is None:
        return {}
    state: dict[str, Any] = {}
    if numbers := masking.strategy.state():
        state["strategy"] = numbers
    if masking.teacher is not None:
        state["teacher"] = masking.teacher.state()
    return state


def load_masking_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what `masking_state` returned; call it after `load_state_dict`.

    Loading weights into a model makes its teacher start from them, so that the other order would
    lose the teacher.

    Args:
        model: A model masked by the same strategy, also wrapped.
        state: What `masking_state` returned. An empty one changes nothing.

    Raises:
        ValueError: If the state is none, or that of another masking.
    """
    if not isinstance(state, Mapping) or not all(isinstance(p, Mapping) for p in state.values()):
        raise ValueError(f"a masking's state must map each part to a mapping, got {state!r:.200}")
    if not state:
        return
    masking = tower_masking(model)
    if unknown := set(state) - {"strategy", "teacher"}:
        raise ValueError(f"a masking's state has no part {', '.join(sorted(unknown))}")
    if "strategy" in state:
        masking.strategy.load_state(state["strategy"])
    if "teacher" in state:
        if masking.teacher is None:
            raise ValueError(
                f"the state holds a teacher, and {type(masking.strategy).__name__} has none"
            )
        masking.teacher.load_state(state["teacher"])
