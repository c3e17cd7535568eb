"""An image tower that leaves out the patches a strategy drops, and what it carries for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from clip_pgs.integrations.teacher import Teacher
from clip_pgs.integrations.varlen_tokens import (
    BlockParts,
    PackedTokens,
    PaddedTokens,
    can_pack,
    packs_by_default,
    released_attention_bias,
)
from clip_pgs.masking.merge import Merge, merge_tokens
from clip_pgs.masking.sampling import gather_tokens
from clip_pgs.masking.strategy import (
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    check_selection,
)

WHEN = ("train", "always")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and `torch.compile`."""
    # DDP wraps as `module`, torch.compile as `_orig_mod`.
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` has put a class of its own in front of a module's."""
    return type(module).__bases__[0].__name__ == "FSDPModule"


def plain_type(module: nn.Module) -> type:
    """Return the class of a module, of a sharded one that which it had before."""
    return type(module).__bases__[1] if is_sharded(module) else type(module)


def is_exactly(module: nn.Module, kind: type) -> bool:
    """Return whether a module is of a class and of no subclass but the one that FSDP makes."""
    return plain_type(module) is kind and not has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a forward pass was put in place of the class's, as accelerate's hooks do."""
    return "forward" in vars(module)


def has_plain_weights(module: Any, *kinds: type) -> bool:
    """Return whether a module does with its weights what its class does, so that they tell all.

    An adapter (LoRA), a quantized layer or a parametrization is of another class; pruning and
    weight normalization make the weight in a hook before the forward pass.
    """
    is_kind = type(module) in kinds and not has_own_forward(module)
    return is_kind and not module._forward_pre_hooks


def has_hooks(module: Any) -> bool:
    """Return whether somebody looks at, or changes, what a module is given or gives."""
    return any(getattr(module, name) for name in _HOOKS)


def run_as_forward(block: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a function of a block's weights as its forward pass, so that the block's hooks act.

    FSDP gathers a block's weights in hooks on its forward pass, and gives them up again; a user's
    hook may collect features. Nothing is set on the block, which threads may share.
    """
    if not has_hooks(block):
        return run(x)
    stand_in: Any = nn.Module()
    stand_in.forward = run
    vars(stand_in).update({name: vars(block)[name] for name in _HOOK_OPTIONS})
    for name in _HOOKS:
        hooks = {key: partial(_called_for, block, hook) for key, hook in vars(block)[name].items()}
        vars(stand_in)[name].update(hooks)
    return stand_in(x)


# Where torch keeps the hooks of a module, and how they are called.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_OPTIONS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def _called_for(block: nn.Module, hook: Callable[..., Any], _: nn.Module, *given: Any) -> Any:
    return hook(block, *given)


@dataclass(frozen=True)
class PatchGrid:
    """How an image tower cuts its images.

    Args:
        size: Patches per column and per row, (h, w).
        patch_size: (height, width) of a patch in pixels.
    """

    size: tuple[int, int]
    patch_size: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """Number of patches, h * w."""
        return self.size[0] * self.size[1]


def tower_of(model: nn.Module) -> nn.Module | None:
    """Return a model's image tower, of whatever kind; model and tower may be wrapped."""
    model = unwrap(model)
    if plain_type(model) in MaskedTower.kinds:
        return model
    # OpenCLIP's name, and that of Hugging Face.
    tower = getattr(model, "visual", getattr(model, "vision_model", None))
    return None if tower is None else unwrap(tower)


class TowerMasking(nn.Module):
    """The masking of one image tower; it holds no parameter and no buffer.

    Args:
        strategy: Chooses the patches.
        grid: How the tower cuts the images that it masks.
        is_resized: Whether these are smaller than the tower's own, so that its plain forward pass
            cannot take them.
        when: "train" masks in train mode, "always" in eval mode as well.
        teacher: Scores the patches of a strategy that requires attention.
        pack_tokens: Whether tokens of adaptive selections are packed; see `apply_masking`.
        merge: How dropped patches are merged into further tokens; None drops them.

    Attributes:
        progress: Completed share of the masked training steps, in [0, 1].
        progress_tensor: The same for compiled models, which would guard on a number and be
            compiled anew once it is no longer 0. Shape (), `exact_dtype`, on the model's device.
        noise: Uniform numbers in [0, 1) for the coming forward passes, shape (B, N); None draws
            from the global stream.
        forced_selection: Takes the strategy's place where set.
        last_selection: What the latest masked forward pass kept.
        load_hook: Hands weights that are loaded into the tower to the teacher, where there is one.
    """

    def __init__(
        self,
        strategy: MaskingStrategy,
        grid: PatchGrid,
        *,
        is_resized: bool = False,
        when: str = "train",
        teacher: Teacher | None = None,
        pack_tokens: bool | None = None,
        merge: Merge | None = None,
    ) -> None:
        super().__init__()
        self.strategy = strategy
        self.grid = grid
        self.is_resized = is_resized
        self.when = when
        self.teacher = teacher
        self.pack_tokens = pack_tokens
        self.merge = merge
        self.progress = 0.0
        self.progress_tensor = torch.zeros((), dtype=torch.float64)
        self.noise: Tensor | None = None
        self.forced_selection: PatchSelection | None = None
        self.last_selection: PatchSelection | None = None
        self.load_hook: RemovableHandle | None = None

    def is_active(self, *, training: bool) -> bool:
        """Return whether a forward pass in train mode, or in eval mode, is not the plain one."""
        if self.forced_selection is not None:
            return True
        does_something = self.is_resized or not self.strategy.keeps_all
        return does_something and (training or self.when == "always")

    def check_images(self, pixels: Any, weight: Tensor) -> None:
        """Refuse what is no batch of images that the tower cuts into its patches.

        Args:
            pixels: Anything.
            weight: What meets the pixels first.

        Raises:
            ValueError: If it is.
        """
        (rows, columns), (height, width) = self.grid.size, self.grid.patch_size
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else ()
        # In front of some stems it is none of a convolution.
        channels = weight.shape[1] if weight.ndim == 4 else 3
        cells = (shape[2] // height, shape[3] // width) if len(shape) == 4 else None
        if cells != (rows, columns) or shape[0] < 1 or shape[1] != channels:
            raise ValueError(
                f"images must have shape (B, {channels}, H, W), with B >= 1 and {rows} x {columns} "
                f"patches of {height} x {width} pixels, got {shape or type(pixels).__name__}"
            )

    @torch.no_grad()
    def inputs(self, pixels: Tensor, tokens: Tensor) -> PatchInputs:
        """Gather what the strategy may look at.

        Args:
            pixels: Images as the tower receives them. Shape (B, 3, H, W).
            tokens: Patch embeddings without positions. Shape (B, N, D).
        """
        # A convolution with a stride never sees the last pixels where the patch leaves a rest.
        (rows, columns), (height, width) = self.grid.size, self.grid.patch_size
        pixels = pixels[:, :, : rows * height, : columns * width]
        return PatchInputs(
            pixels,
            self.grid.patch_size,
            tokens=tokens,
            progress=self.progress_tensor if torch.compiler.is_compiling() else self.progress,
            noise=self.noise,
            attention=None if self.teacher is None else self.teacher.scores(pixels),
            wants_candidate_weights=self.merge is not None and self.merge.by_candidate,
        )

    @torch.no_grad()
    def select(self, pixels: Tensor, tokens: Tensor) -> PatchSelection:
        """Choose the patches of a batch; see `inputs` for the arguments."""
        selection = self.forced_selection
        if selection is None:
            selection = self.strategy(self.inputs(pixels, tokens))
        else:
            batch_size, num_patches, _ = tokens.shape
            check_selection(
                selection, batch_size=batch_size, num_patches=num_patches, name="force_selection"
            )
        self.last_selection = selection
        return selection

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Every move of the model passes here; the teacher is no submodule, and follows.
        if self.teacher is not None:
            self.teacher.follow(fn)
        return super()._apply(fn, recurse)


class MaskedTower:
    """Mixed in front of an image tower's class; a subclass says how that kind of tower is built.

    It is never constructed: `apply_masking` turns an existing tower into one and adds `masking`.
    Parameters and buffers are those of the tower. Where masking is not active, the tower's own
    forward pass runs.

    Attributes:
        kinds: The classes that mask a tower, by the tower's class before and after.
        plain_class: The class of the tower before and after.
        supported: Which towers these are, for those who bring others.
        saves_flops: Whether it leaves out the work of what is dropped, wherever that lies.
        takes_smaller_images: Whether it can be trained on images smaller than its own.
        takes_attention_bias: Whether `run_block` takes one.
        casts_images: Whether it brings images to the dtype of its weights.
        masking: What chooses the patches.
    """

    # A subclass of a tower may have a forward pass of its own, which masking would undo without a
    # word; so kinds go by the very class.
    kinds: ClassVar[dict[type, list[type[MaskedTower]]]] = {}
    plain_class: ClassVar[type[nn.Module]]
    supported: ClassVar[str]
    saves_flops: ClassVar[bool] = True
    takes_smaller_images: ClassVar[bool] = True
    takes_attention_bias: ClassVar[bool] = False
    casts_images: ClassVar[bool] = False
    masking: TowerMasking
    training: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "plain_class" in vars(cls):
            for tower_class in (cls, cls.plain_class):
                MaskedTower.kinds.setdefault(tower_class, []).append(cls)

    def forward(self, x: Tensor) -> Any:
        """Encode images.

        Args:
            x: Images of shape (B, 3, H, W).

        Returns:
            What the plain tower returns: features (B, D); where it also returns tokens, those of
            the kept patches (B, K, D), then the merged ones, zero in padding slots. A tower that
            pools its tokens pools the merged ones too, each as one token.

        Raises:
            ValueError: If masking is active, and there are no images, or those of another size,
                number of channels or dtype.
        """
        if not self.masking.is_active(training=self.training):
            return super().forward(x)  # type: ignore[misc]
        self.check_images(x)
        return self.encode_masked(x)

    def check_images(self, x: Any) -> None:
        """Refuse what the tower cannot encode while it is masked.

        Raises:
            ValueError: If it is.
        """
        weight = self.patch_weight(self)
        self.masking.check_images(x, weight)
        is_right = x.is_floating_point()
        if is_right and weight.ndim == 4 and x.dtype != weight.dtype and not self.casts_images:
            # Autocast leaves float64 as it is, and there is none on "meta".
            is_left = x.is_meta or x.dtype == torch.float64
            is_right = not is_left and torch.is_autocast_enabled(x.device.type)
        if not is_right:
            raise ValueError(f"images must be {weight.dtype}, as the weights are, got {x.dtype}")

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        """Return the plain tower's intermediate features, which are maps of whole images.

        Raises:
            ValueError: If masking is active.
        """
        if self.masking.is_active(training=self.training):
            raise ValueError(
                "forward_intermediates gives maps of whole images, and this model is masked; call "
                "it in eval mode with when='train', or after remove_masking"
            )
        return super().forward_intermediates(*args, **options)  # type: ignore[misc]

    def encode_masked(self, x: Tensor) -> Any:
        """Encode what a selection keeps of images; see `forward`."""
        tokens_BND = self.embed_patches(x)
        selection = self.masking.select(x, tokens_BND)
        placed = self.add_positions(tokens_BND, grid_size=self.masking.grid.size)
        return self.read_out(*self.run_kept(placed, selection))

    def run_kept(self, placed: Tensor, selection: PatchSelection) -> tuple[Tensor, Tensor | None]:
        """Run the blocks over what is kept, and over what the rest is merged into.

        Args:
            placed: Patch embeddings with positions, shape (B, N, D).
            selection: Which of them to keep.

        Returns:
            Tokens (B, T, D) and True where one is valid, (B, 1, 1, T), None where all are; or,
            where the tower reads nothing else, the first token of each image, (B, 1, D), and None.
        """
        valid, weights_BGN = selection.valid, None
        if (merge := self.masking.merge) is not None:
            weights_BGN = merge.weights(selection, self.masking.grid.size)
            if valid is None:
                valid = torch.ones_like(selection.index, dtype=torch.bool)
            counts_BG = weights_BGN.sum(dim=2)
            valid = torch.cat([valid, counts_BG > 0], dim=1)
        patches = _keep(placed, selection, weights_BGN)
        rotations = self.rotations_on(self.masking.grid.size)
        if rotations is not None:
            rotations = _keep_rotations(rotations, placed.shape[1], selection, weights_BGN)
        x = self.add_prefix(patches)
        weighs_counts = merge is not None and merge.counts
        key_mask: Tensor | None = None
        layout: Tensor | PackedTokens | None = None
        if valid is not None:
            # Class token and registers stand first and are always valid.
            num_prefix = x.shape[1] - patches.shape[1]
            key_mask = functional.pad(valid, (num_prefix, 0), value=True)[:, None, None, :]
            layout = _count_bias(counts_BG, key_mask, x.dtype) if weighs_counts else key_mask
        is_first_enough = self.reads_first_token()
        if selection.similar is not None:
            num_heads = self.num_heads()
            layout = released_attention_bias(selection.similar, num_heads=num_heads, dtype=x.dtype)
            is_first_enough = False
        elif selection.valid is not None and not weighs_counts and self._packs_tokens(x):
            assert key_mask is not None
            layout = PackedTokens.of(key_mask[:, 0, 0])
            x = layout.pack(x)
            rotations = None if rotations is None else layout.pack(rotations)
        *others, (last, rotation) = self.turned_blocks(rotations)
        for block, its_rotation in others:
            x = self._run(self._run_block, block, x, layout, its_rotation)
        parts = self.block_parts(last)
        is_first_enough = is_first_enough and parts is not None and parts.is_all
        x = self._run(self._run_block, last, x, layout, rotation, is_first_enough)
        if is_first_enough:
            return x.reshape(len(placed), 1, -1), None
        return layout.unpack(x) if isinstance(layout, PackedTokens) else x, key_mask

    # What a kind of tower says of itself follows; without it there is nothing to run. No abstract
    # methods: those are looked at when an object is made, and none ever is.

    @staticmethod
    def takes(tower: Any) -> bool:
        """Return whether a tower of `plain_class` is of this kind; no two take the same one."""
        return True

    @staticmethod
    def refusal(tower: Any) -> str | None:
        """Return why a tower of this kind cannot be masked, None where it can."""
        return None

    @staticmethod
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse what a model around its tower cannot do, by a `ValueError`.

        Args:
            model: As the caller gave it, also wrapped.
            strategy: What shall mask it.
            merge: How dropped patches shall be merged.
        """

    @staticmethod
    def attention_refusal(tower: Any) -> str | None:
        """Return why `feature_attention` cannot be had from a tower, None where it can."""
        return None

    @staticmethod
    def patch_grid(tower: Any) -> PatchGrid:
        """Return how a tower of `plain_class`, masked or not, cuts its images."""
        raise NotImplementedError

    @staticmethod
    def patch_weight(tower: Any) -> Tensor:
        """Return the weight that meets the pixels first, whose dtype they must have."""
        raise NotImplementedError

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings without positions, shape (B, N, D), of images of any size."""
        raise NotImplementedError

    def patch_positions(self, dtype: torch.dtype) -> Tensor | None:
        """Return position embeddings as they are added to tokens of a dtype, shape (N, D).

        None where attention alone knows the places.
        """
        raise NotImplementedError

    def add_positions(self, tokens: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Add to patch embeddings (B, N, D) their positions.

        Args:
            tokens: Patch embeddings.
            grid_size: Their grid, to which positions are interpolated; None is the tower's own.
        """
        positions_ND = self.patch_positions(tokens.dtype)
        if positions_ND is None:
            return tokens
        own_size = self.patch_grid(self).size
        if grid_size is not None and grid_size != own_size:
            positions_ND = resize_positions(positions_ND, own_size, grid_size)
        return tokens + positions_ND

    def rotations(self) -> Tensor | None:
        """Return how attention turns queries and keys by the places of their tokens.

        Returns:
            Rotary embeddings, sines and then cosines, of the prefix and of all patches, shape
            (1, P + N, L, H, R): for each of L blocks, or one for all; for each of H heads, or one
            for all. The prefix is not turned: sine 0, cosine 1. None where positions are added
            alone.
        """
        return None

    def rotations_on(self, grid_size: tuple[int, int]) -> Tensor | None:
        """Return `rotations` of patches on another grid, spread over the same image."""
        rotations, own_size = self.rotations(), self.patch_grid(self).size
        if rotations is None or grid_size == own_size:
            return rotations
        return _resize_rotations(rotations, own_size, grid_size)

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Turn patch tokens (B, K, D) into the input of the blocks, shape (B, P + K, D)."""
        raise NotImplementedError

    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer's blocks, in order."""
        raise NotImplementedError

    def uses_checkpointing(self) -> bool:
        """Return whether the blocks are to be computed again in the backward pass."""
        return False

    def num_heads(self) -> int:
        """Return how many heads a block has; asked of towers that take an attention bias."""
        raise NotImplementedError

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        attn_mask: Tensor | None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Run a block over tokens.

        Args:
            block: One of `blocks()`.
            x: Tokens of shape (B, T, D).
            attn_mask: Boolean, True where a token may be attended to, shape (B, 1, 1, T); or, in
                the dtype of the tokens, what is added to the logits, of that shape or, in towers
                that take an attention bias, (B, H, T, T). None for neither.
            rotation: The block's of `rotations`, of each token of each image or of all images,
                (B or 1, T, H or 1, R).

        Returns:
            Tokens of shape (B, T, D); those in padding slots are finite and without meaning.
        """
        raise NotImplementedError

    def block_parts(self, block: Any, rotation: Tensor | None = None) -> BlockParts | None:
        """Return a block's parts, None where it runs whole alone.

        Args:
            block: One of `blocks()`.
            rotation: As for `run_block`, laid out as the tokens are.
        """
        return None

    def reads_first_token(self) -> bool:
        """Return whether the tower's output depends on the first token of each image alone."""
        return False

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> Any:
        """Pool the valid tokens (B, T, D) and project them, as the plain tower does."""
        raise NotImplementedError

    def feature_attention(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Return how much the image feature attends to each token.

        Where the feature is read from the class token, this is its attention, mean over heads and
        blocks; where a query pools the last block's tokens, the query's, mean over heads.

        Args:
            x: Input of the blocks, shape (B, P + N, D).
            rotations: What `rotations` returns of these tokens.

        Returns:
            Attention of shape (B, T), float32; the patches are the last N of the T tokens.
        """
        raise NotImplementedError

    def class_token_attention(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Return the first token's attention to all, mean over heads and blocks.

        Args:
            x: Input of the blocks, shape (B, T, D).
            rotations: As for `feature_attention`.

        Returns:
            Attention of shape (B, T), float32. No block's full attention matrix is kept.
        """
        *first, (last, last_rotation) = self.turned_blocks(rotations)
        attention_BT = x.new_zeros(x.shape[:2], dtype=torch.float32)
        for block, rotation in first:
            attention_BT = attention_BT + self.first_row(block, x, rotation)
            x = self.run_block(block, x, None, rotation)
        # Nothing reads what the last block puts out.
        attention_BT = attention_BT + self.first_row(last, x, last_rotation)
        return attention_BT / (len(first) + 1)

    def first_row(self, block: Any, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Return a block's attention of the first token to all, mean over heads, (B, T)."""
        parts = self.block_parts(block, rotation)
        assert parts is not None
        return parts.first_row(x)

    def turned_blocks(self, rotations: Tensor | None) -> list[tuple[nn.Module, Tensor | None]]:
        """Return each block with its rotation, out of rotations (..., L, H, R)."""
        blocks = self.blocks()
        if rotations is None:
            return [(block, None) for block in blocks]
        every = rotations.unbind(-3)
        return list(zip(blocks, every if len(every) > 1 else every * len(blocks), strict=True))

    def _packs_tokens(self, x: Tensor) -> bool:
        wanted = self.masking.pack_tokens
        if wanted is None:
            wanted = packs_by_default(x)
        if not wanted:
            return False
        every = [self.block_parts(block) for block in self.blocks()]
        return all(
            parts is not None and parts.is_all and can_pack(x, head_width=parts.head_width)
            for parts in every
        )

    def _run(self, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.uses_checkpointing():
            return checkpoint(run, *inputs, use_reentrant=False)
        return run(*inputs)

    def _run_block(
        self,
        block: nn.Module,
        x: Tensor,
        layout: Tensor | PackedTokens | None,
        rotation: Tensor | None,
        is_first_enough: bool = False,
    ) -> Tensor:
        """Run a block over tokens of any layout, or for the first token of each image alone."""
        if not (is_first_enough or isinstance(layout, PackedTokens)):
            return self.run_block(block, x, layout, rotation)
        tokens = layout if isinstance(layout, PackedTokens) else PaddedTokens(layout)

        def run(x: Tensor) -> Tensor:
            parts = self.block_parts(block, rotation)
            assert parts is not None
            return (parts.run_for_first_tokens if is_first_enough else parts.run)(x, tokens)

        return run_as_forward(block, run, x)


def _keep(tokens: Tensor, selection: PatchSelection, weights: Tensor | None) -> Tensor:
    """Return the kept ones of tokens (B, N, D), and after them the merged ones, if any."""
    kept = gather_tokens(tokens, selection)
    return kept if weights is None else torch.cat([kept, merge_tokens(tokens, weights)], dim=1)


def _keep_rotations(
    rotations: Tensor, num_patches: int, selection: PatchSelection, weights: Tensor | None
) -> Tensor:
    """Return rotations of the prefix, the kept and the merged tokens, (B, T, L, H, R).

    A merged token's is the mean of its patches', so that its query and key are the means of those
    that its content would have in their places.
    """
    flat = rotations.flatten(2).expand(len(selection.index), -1, -1)
    prefix, patches = flat.tensor_split([flat.shape[1] - num_patches], dim=1)
    kept = torch.cat([prefix, _keep(patches, selection, weights)], dim=1)
    return kept.unflatten(2, rotations.shape[2:])


def _count_bias(counts_BG: Tensor, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the logits where the last G keys stand for several patches each."""
    bias_BT = functional.pad(counts_BG.log(), (key_mask.shape[-1] - counts_BG.shape[1], 0))
    return bias_BT[:, None, None].masked_fill(~key_mask, -torch.inf).to(dtype)


def _resize_rotations(
    rotations: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]
) -> Tensor:
    prefix, patches = rotations.tensor_split([-old_size[0] * old_size[1]], dim=1)
    grid = patches.float().flatten(2).mT.unflatten(2, old_size)
    # In the middle of two places stands, after scaling, the rotation by their mean angle.
    grid = functional.interpolate(grid, size=new_size, mode="bilinear")
    sine, cosine = grid.flatten(2).mT.unflatten(2, rotations.shape[2:]).chunk(2, dim=-1)
    patches = torch.cat([sine, cosine], dim=-1) / torch.hypot(sine, cosine).repeat(1, 1, 1, 1, 2)
    return torch.cat([prefix, patches.to(prefix.dtype)], dim=1)


def valid_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of the valid ones of tokens (B, T, D), shape (B, D); None is all."""
    if valid is None:
        return tokens.mean(dim=1)
    valid_BT1 = valid[:, :, None]
    # float16 cannot hold the sum of many tokens.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    sums_BD = torch.where(valid_BT1, tokens, 0.0).sum(dim=1, dtype=dtype)
    return (sums_BD / valid_BT1.sum(dim=1)).to(tokens.dtype)


def resize_positions(
    positions_ND: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]
) -> Tensor:
    """Return position embeddings (N, D) of a grid, interpolated to another, in their dtype."""
    grid = positions_ND.float().T.reshape(1, -1, *old_size)
    grid = functional.interpolate(grid, size=new_size, mode="bicubic", antialias=True)
    return grid.flatten(2)[0].T.to(positions_ND.dtype)
