"""What a masking strategy is given, what it returns, what it is, and how it is found by name.

A new strategy is one file: a subclass of `MaskingStrategy` with `forward`, under
`@register_masking(...)`. docs/own_strategy.md shows one.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import torch
from torch import Generator, Tensor, nn

from clip_pgs.registry import Registry, explained_arguments

# A number, or in a compiled model a tensor of shape (), and what is computed of it.
Number = TypeVar("Number", bound=float | Tensor)

# ------------------------------------------------------------------------------------------------
# What a strategy is given and what it returns
# ------------------------------------------------------------------------------------------------


@dataclass
class PatchInputs:
    """Everything a strategy may look at to choose patches.

    Args:
        pixels: Images as the model receives them (normalized). Shape (B, 3, H, W), any float dtype.
            An image that is not finite gets some mask: its features are none whatever that is, and
            training skips such a step. So may one whose numbers are beyond 1e15, or all below
            1e-10, which similarity takes for flat.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.
        tokens: Patch embeddings before positions are added, raster order. Shape (B, N, D).
        progress: Completed share of the masked training steps, in [0, 1]. In a compiled model a
            tensor of shape (), so that one graph serves all steps.
        noise: Uniform numbers in [0, 1) that replace the strategy's own draw, so that a caller
            decides which sample sees which mask. Shape (B, N); taken as float32.
        attention: How much a teacher attends to each patch, in any scale. Shape (B, N), float32.
        wants_candidate_weights: Asks for `candidate_weights` of the selection.

    Attributes:
        grid_size: Patches per column and per row, (h, w).

    Raises:
        ValueError: If a shape, the patch size or the progress breaks a rule above; on a CPU,
            unless compiled, also if a number of the noise does.
    """

    pixels: Tensor
    patch_size: int | tuple[int, int]
    tokens: Tensor | None = None
    progress: float | Tensor = 0.0
    noise: Tensor | None = None
    attention: Tensor | None = None
    wants_candidate_weights: bool = False
    grid_size: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        self.patch_size = patch_sides(self.patch_size)
        height, width = self.pixels.shape[-2:]
        self.grid_size = patch_grid((height, width), self.patch_size)
        if self.progress is None or (isinstance(self.progress, Tensor) and self.progress.ndim):
            raise ValueError(f"progress must be one number, got {described(self.progress)}")
        if not isinstance(self.progress, Tensor):
            check_range(self.progress, name="progress", low=0, high=1)
        expected = (self.batch_size, self.num_patches)
        for name, axes in (("tokens", "B, N, D"), ("noise", "B, N"), ("attention", "B, N")):
            values = getattr(self, name)
            if values is not None and not (
                isinstance(values, Tensor)
                and values.ndim == len(axes.split())
                and values.shape[:2] == expected
                and values.is_floating_point()
            ):
                raise ValueError(
                    f"{name} must be floating point, of shape ({axes}) with (B, N) = {expected}, "
                    f"got {described(values)}"
                )
        if self.noise is not None and is_broken(
            lambda noise: ((noise >= 0) & (noise < 1)).all(), self.noise
        ):
            raise ValueError(
                f"noise must lie in [0, 1), got {self.noise.min():g} to {self.noise.max():g}"
            )
        if self.noise is not None and self.noise.dtype != torch.float32:
            # Further numbers are made of its 24 bits, and float64 below 1 may be rounded up to it.
            self.noise = self.noise.float().clamp(max=1 - 2**-24)

    @property
    def compares_tokens(self) -> bool:
        """Whether embeddings are compared: above progress 0, and wherever it is a tensor."""
        return isinstance(self.progress, Tensor) or self.progress > 0

    @property
    def batch_size(self) -> int:
        """Number of images, B."""
        return self.pixels.shape[0]

    @property
    def num_patches(self) -> int:
        """Number of patches per image, N = h * w."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def device(self) -> torch.device:
        """Device of the pixels, on which a strategy draws and computes."""
        return self.pixels.device


@dataclass
class PatchSelection:
    """The patches that stay.

    Args:
        index: Positions of kept patches in raster order, ascending. Shape (B, K), int64.
        valid: True where `index` holds a kept patch, False where a slot is padding. Valid slots
            come first. None means that every slot is valid. Shape (B, K), bool. A padding slot
            repeats the last kept patch of its row, so that gathering it reads no masked patch.
        similar: True where a kept patch resembles a candidate. It serves the attention bias of
            `pgs-released` alone, and is None elsewhere. Shape (B, K), bool.
        candidate_weights: How much of each patch each candidate absorbs: the transport plan times
            N, columns summing to 1, or to 0 where no candidate reaches. `pgs` gives it, where it is
            asked for. Shape (B, C, N), float32.
        window: Rows and columns, (r, c), where the kept patches of every image are a rectangle of
            these sides without a gap; a convolutional tower then cuts it out. K = r * c.
    """

    index: Tensor
    valid: Tensor | None = None
    similar: Tensor | None = None
    candidate_weights: Tensor | None = None
    window: tuple[int, int] | None = None

    def kept_counts(self) -> Tensor:
        """Return the number of kept patches of each image, shape (B,), int64."""
        if self.valid is None:
            return self.index.new_full((self.index.shape[0],), self.index.shape[1])
        return self.valid.sum(dim=1)


def check_inputs(inputs: Any) -> None:
    """Refuse what are no inputs, such as the pixels alone.

    Raises:
        ValueError: If it is.
    """
    if not isinstance(inputs, PatchInputs):
        raise ValueError(f"inputs must be PatchInputs, got {described(inputs)}")


def check_selection(selection: Any, *, batch_size: int, num_patches: int, name: str) -> None:
    """Refuse what a strategy must not return; no device is waited for.

    Args:
        selection: What a strategy returned.
        batch_size: Number of images that it was given, B.
        num_patches: Number of patches of each, N.
        name: What to call it in messages.

    Raises:
        ValueError: If it is no `PatchSelection`, or has an index, or beside it `valid` or
            `similar`, of another shape or type; on a CPU, unless compiled, also if a number in the
            index is that of no patch, or an image's valid slots name one twice, or none.
    """
    if not isinstance(selection, PatchSelection):
        raise ValueError(
            f"the selection of {name} must be a PatchSelection, got {described(selection)}"
        )
    index = selection.index
    size = {"batch_size": batch_size, "num_patches": num_patches}
    check_index(index, **size, name=f"the selection of {name} must have an index")
    for part, values in (("valid", selection.valid), ("similar", selection.similar)):
        if values is not None and not (
            isinstance(values, Tensor)
            and values.shape == index.shape
            and values.dtype == torch.bool
        ):
            raise ValueError(
                f"the selection of {name} must have {part} of the shape of its index, "
                f"{tuple(index.shape)}, bool, got {described(values)}"
            )

    def names_each_once(index: Tensor) -> Tensor:
        is_kept_BN = index.new_zeros((batch_size, num_patches), dtype=torch.bool)
        # A padding slot repeats a kept patch.
        return (is_kept_BN.scatter(1, index, True).sum(dim=1) == selection.kept_counts()).all()

    if is_broken(names_each_once, index):
        raise ValueError(
            f"the selection of {name} must keep a patch or more of each image, each once, and "
            "repeat one in padding slots"
        )


def check_index(index: Any, *, batch_size: int, num_patches: int, name: str) -> None:
    """Refuse what does not name patches of each image; no device is waited for.

    Args:
        index: Positions of patches. Shape (B, K), int64.
        batch_size: Number of images, B.
        num_patches: Number of patches of each, N.
        name: How a message begins, such as "pgs_scores needs a candidate_index".

    Raises:
        ValueError: If it has another shape or type; on a CPU, unless compiled, also if a number in
            it is that of no patch.
    """
    if (
        not isinstance(index, Tensor)
        or index.dtype != torch.int64
        or index.ndim != 2
        or index.shape[0] != batch_size
        or index.shape[1] < 1
    ):
        raise ValueError(
            f"{name} of shape (B, K), with B = {batch_size} and K >= 1, int64, "
            f"got {described(index)}"
        )
    if is_broken(lambda index: ((index >= 0) & (index < num_patches)).all(), index):
        raise ValueError(
            f"{name} in [0, N) with N = {num_patches}, got {index.min()} to {index.max()}"
        )


def check_pixels(pixels: Any, *, num_channels: int | None = None) -> None:
    """Refuse what is no batch of images in floating point, with so many channels or with any.

    Raises:
        ValueError: If it is.
    """
    is_batch = isinstance(pixels, Tensor) and pixels.ndim == 4 and 0 not in pixels.shape[1:]
    if not is_batch or num_channels not in (None, pixels.shape[1]):
        raise ValueError(f"pixels must have shape (B, 3, H, W), got {described(pixels)}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels must be floating point, got {pixels.dtype}")


def is_broken(rule: Callable[[Tensor], Tensor], values: Tensor) -> bool:
    """Return whether a rule, of shape () and bool, does not hold for some numbers.

    False on a device, which would have to be waited for, and where compiled.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        # Without reading a number, as whoever traces the operators could not go on.
        torch._assert_async(rule(values))
    except RuntimeError:
        return True
    return False


def described(value: Any) -> str:
    """Return what a message says of a value that is no tensor, or not the right one."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)}, {value.dtype}"


def patch_sides(size: Any, *, name: str = "patch_size") -> tuple[int, int]:
    """Return (height, width) of a patch, or of an image, given as one side or as both.

    Raises:
        ValueError: If a side is no whole number from 1 on, or there are more than two.
    """
    pair = (size, size) if isinstance(size, Integral) else size
    try:
        height, width = [0 if isinstance(side, bool) else operator.index(side) for side in pair]
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, or two, got {size!r}")
    return height, width


def patch_grid(image_size: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Return how many patches of these sides lie below and beside each other in an image.

    Args:
        image_size: (height, width) in pixels.
        sides: (height, width) of a patch.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    (height, width), (patch_height, patch_width) = image_size, sides
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"patch_size must divide the image: {height} x {width} pixels "
            f"in patches of {patch_height} x {patch_width}"
        )
    return height // patch_height, width // patch_width


# ------------------------------------------------------------------------------------------------
# What a strategy is
# ------------------------------------------------------------------------------------------------


class MaskingStrategy(nn.Module):
    """Choose the patches of each image that a vision transformer will see.

    A strategy has no parameter and no buffer but with `persistent=False`, so that the model's state
    dict keeps its keys. It never tests `self.training` and never moves devices. The shape of what
    it returns depends on its options and on N alone.

    Attributes:
        requires: Optional inputs it reads: "tokens" once `progress` > 0, "attention" always.
        adaptive: Whether a `mask_ratio_min` below `mask_ratio` lets images keep different counts.
        keeps_all: True for the strategy that masks nothing; a tower then skips masking.
        attention_bias: True asks the tower for the attention bias of the released CLIP-PGS code.
        weighs_candidates: Whether it gives the `candidate_weights` of a selection.
        keeps_window: Whether it gives the `window` of a selection.
        mask_ratio: Share of patches dropped, in [0, 1), where the strategy has such an option.
        mask_ratio_min: Lower bound of an adaptive share, where the strategy has such an option.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    adaptive: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False
    keeps_window: ClassVar[bool] = False
    attention_bias: bool = False
    weighs_candidates: bool = False

    mask_ratio: float
    mask_ratio_min: float

    def __init__(self) -> None:
        super().__init__()
        self._min_share: float | None = None

    def __call__(
        self, inputs: PatchInputs, *, generator: Generator | None = None
    ) -> PatchSelection:
        """Choose patches by `forward`, and refuse a selection that is none; see `check_selection`.

        Args:
            inputs: What there is to look at.
            generator: Source of randomness; see `forward`.

        Raises:
            ValueError: If `inputs` are none, or `forward` returned what a strategy must not return.
        """
        check_inputs(inputs)
        selection = super().__call__(inputs, generator=generator)
        check_selection(
            selection,
            batch_size=inputs.batch_size,
            num_patches=inputs.num_patches,
            name=type(self).__name__,
        )
        return selection

    def extra_repr(self) -> str:
        """Show the ratios in the module's printed form."""
        names = [name for name in ("mask_ratio", "mask_ratio_min") if hasattr(self, name)]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def set_mask_ratio(self, mask_ratio: float) -> None:
        """Change the mask ratio between two steps, as a schedule does.

        A lower bound follows: `mask_ratio_min / mask_ratio` stays what it was before the first
        change; of 0 / 0 an adaptive count has no bound, and a fixed one stays fixed.

        Args:
            mask_ratio: Share of patches dropped from now on, in [0, 1).

        Raises:
            ValueError: If the strategy has no mask ratio, or the ratio is out of its range.
        """
        if not hasattr(self, "mask_ratio"):
            raise ValueError(f"{type(self).__name__} has no mask ratio, got {mask_ratio}")
        check_mask_ratio(mask_ratio)
        if hasattr(self, "mask_ratio_min"):
            # Kept from the first call on, since a schedule may pass through 0.
            if self._min_share is None:
                share_at_0 = 0.0 if self.keeps_different_counts() else 1.0
                is_0 = self.mask_ratio == 0
                self._min_share = share_at_0 if is_0 else self.mask_ratio_min / self.mask_ratio
            self.mask_ratio_min = mask_ratio * self._min_share
        self.mask_ratio = mask_ratio

    def keeps_different_counts(self) -> bool:
        """Return whether images may keep different numbers of patches, so that some are padded.

        That is where `mask_ratio_min` lies below `mask_ratio`, if the class is `adaptive`; a
        strategy whose `mask_ratio` is no upper bound says so itself.
        """
        ratio = getattr(self, "mask_ratio", None)
        return self.adaptive and getattr(self, "mask_ratio_min", None) not in (None, ratio)

    def idle_options(self) -> dict[str, str]:
        """Return the options that change nothing beside the others, each with the reason."""
        return {}

    def state(self) -> dict[str, float | list[float]]:
        """Return what training found and a resumed run needs, as plain numbers."""
        return {}

    def load_state(self, state: Mapping[str, float | list[float]]) -> None:
        """Restore what `state` returned.

        Args:
            state: The numbers; empty for a strategy that finds none.

        Raises:
            ValueError: If the numbers belong to another strategy.
        """
        if set(state) != set(self.state()):
            raise ValueError(
                f"the state of {type(self).__name__} must hold {sorted(self.state())}, "
                f"got {sorted(state)}"
            )

    def needs_calibration(self, progress: float) -> bool:
        """Return whether `calibrate` should see the coming batch.

        Args:
            progress: Completed share of the masked training steps, in [0, 1].
        """
        return False

    def calibrate(
        self, inputs: PatchInputs, *, average: Callable[[float], float] | None = None
    ) -> bool | None:
        """Fit the strategy to a batch; called in eager mode, outside the training step.

        It alone may look across images and synchronize with the host.

        Args:
            inputs: What the coming batch gives to look at.
            average: Takes this process's number and returns the mean over all of them. None
                stands for one process.

        Returns:
            False where the batch changed nothing, as one without a finite image; all else says that
            it was fitted.
        """
        return False

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Choose patches; see the class that implements it.

        Args:
            inputs: What there is to look at.
            generator: Source of randomness on the device of the pixels; None draws from the
                global stream. `inputs.noise` takes its place where given.
        """
        raise NotImplementedError


# What a strategy drops where nobody says it.
MASK_RATIO = 0.5


class FixedRatioMasking(MaskingStrategy):
    """A strategy with one number for the share of patches that goes.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).

    Raises:
        ValueError: If `mask_ratio` is out of its range.
    """

    def __init__(self, *, mask_ratio: float = MASK_RATIO) -> None:
        super().__init__()
        check_mask_ratio(mask_ratio)
        self.mask_ratio = mask_ratio

    def num_keep(self, inputs: PatchInputs) -> int:
        """Return how many patches of each image stay."""
        return keep_count(inputs.num_patches, self.mask_ratio)


# ------------------------------------------------------------------------------------------------
# Strategies by name
# ------------------------------------------------------------------------------------------------

StrategyClass = TypeVar("StrategyClass", bound=type[MaskingStrategy])

_REGISTRY: Registry[type[MaskingStrategy]] = Registry("masking")


@dataclass(frozen=True)
class MaskingOption:
    """An option of a strategy.

    Attributes:
        name: Its name.
        default: Its default; `inspect.Parameter.empty` where it has none.
        help: What it does, in one sentence, out of the docstring.
        hint: Its type, as annotated; None where it is not, or a type of the strategy's options
            is known to a type checker alone.
    """

    name: str
    default: Any
    help: str
    hint: Any


@dataclass(frozen=True)
class MaskingDeclaration:
    """What help texts, checks, contract tests, tables and the report know of a strategy.

    Attributes:
        name: What users type after `--masking`.
        source: The class whose signature and docstring have the options.
        keeps: Which patches stay, in a few words.
        paper: Where it comes from, as "FLIP, arXiv 2212.00794".
        random: Whether another seed gives another selection.
        adaptive: Whether images may keep different numbers of patches: where `mask_ratio_min` is
            below `mask_ratio`.
        requires: See `MaskingStrategy`.
        variants: Further sets of options that the contract tests run with.
        aliases: Other spellings of options, with the option that each stands for.
    """

    name: str
    source: type
    keeps: str = ""
    paper: str = ""
    random: bool = True
    adaptive: bool = False
    requires: Set[str] = frozenset()
    variants: Collection[Mapping[str, Any]] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> tuple[MaskingOption, ...]:
        """The options, in the order of the constructor."""
        is_dataclass = "__dataclass_fields__" in vars(self.source)
        annotated: Any = self.source
        hints: dict[str, Any] = {}
        # Names that are imported for a type checker alone mean nothing here.
        with suppress(NameError, AttributeError, TypeError):
            hints = get_type_hints(annotated if is_dataclass else annotated.__init__)
        explained: dict[str, str] = {}
        for one in reversed(self.source.__mro__[:-1]):
            explained |= explained_arguments(one)
        return tuple(
            MaskingOption(
                option,
                parameter.default,
                # The first sentence will do.
                re.split(r"(?<=[.;])\s", explained.get(option, ""))[0].rstrip(".;"),
                hints.get(option),
            )
            for option, parameter in inspect.signature(self.source).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        )


def register_masking(
    name: str, *, options: type | None = None, **declaration: Any
) -> Callable[[StrategyClass], StrategyClass]:
    """Register a strategy class under a name, with what others need to know of it.

    Args:
        name: What users type after `--masking`.
        options: A dataclass that holds the options, where the constructor takes them as keywords
            without naming them. Names, types, defaults and explanations come from it or from the
            constructor, and from the docstring's Args.
        **declaration: The other fields of `MaskingDeclaration`.

    Raises:
        ValueError: If the name is taken.
        TypeError: If a field is unknown.
    """

    def register(strategy_class: StrategyClass) -> StrategyClass:
        declared = MaskingDeclaration(name, options or strategy_class, **declaration)
        strategy_class.requires = frozenset(declared.requires)
        strategy_class.adaptive = declared.adaptive
        return _REGISTRY.register(name, declared=declared)(strategy_class)

    return register


def list_maskings() -> list[str]:
    """Return the registered names, sorted."""
    return _REGISTRY.names()


def describe_masking(name: str) -> MaskingDeclaration:
    """Return what a strategy declares.

    Args:
        name: A registered name, or "package.module:Class".

    Raises:
        ValueError: If there is no such strategy.
    """
    return _REGISTRY.declaration(name)["declared"]


def masking_class(name: str) -> type[MaskingStrategy]:
    """Return a strategy's class.

    Args:
        name: A registered name, or "package.module:Class".

    Raises:
        ValueError: If there is no such strategy.
    """
    return _REGISTRY.get(name)


def masking_options(name: str) -> dict[str, Any]:
    """Return a strategy's options and their defaults, in the order of its constructor.

    Args:
        name: A registered name, or "package.module:Class".

    Raises:
        ValueError: If there is no such strategy.
    """
    return {option.name: option.default for option in describe_masking(name).options}


def create_masking(name: str, **options: Any) -> MaskingStrategy:
    """Build a strategy from its name and options.

    Args:
        name: A registered name, or "package.module:Class".
        **options: The strategy's own options; see `describe_masking`. A default lower bound gives
            way to a ratio below it.

    Raises:
        ValueError: If there is no such strategy, an option is unknown, missing, of the wrong type
            or out of its range, or the strategy has a parameter or a persistent buffer.
    """
    declared = describe_masking(name)
    known = {option.name: option for option in declared.options}
    given: dict[str, Any] = {}
    for typed, value in options.items():
        option = declared.aliases.get(typed, typed)
        if option in given:
            raise ValueError(f"masking {name!r}: {option} is given twice")
        if option not in known:
            choices = ", ".join(known) or "none at all"
            takers = [other for other in list_maskings() if typed in masking_options(other)]
            hint = f"; {', '.join(takers)} would take {typed!r}" if takers else ""
            raise ValueError(f"masking {name!r} has no option {typed!r}; it takes {choices}{hint}")
        problem = _type_problem(known[option].hint, value)
        if problem:
            raise ValueError(f"masking {name!r}: {option} takes {problem}, got {value!r}")
        given[option] = value
    given = options_at(name, given, None)
    for option in known:
        if known[option].default is inspect.Parameter.empty and option not in given:
            raise ValueError(f"masking {name!r} needs the option {option}")
    return _checked(_REGISTRY.get(name)(**given))


def as_strategy(
    masking: str | MaskingStrategy,
    options: Mapping[str, Any],
    *,
    create: Callable[..., MaskingStrategy] = create_masking,
) -> MaskingStrategy:
    """Return a strategy as it is, or the one that a name and options mean.

    Args:
        masking: A registered name, "package.module:Class", or a strategy.
        options: Its options, with a name alone.
        create: Makes a strategy of name and options.

    Raises:
        ValueError: If it is neither, has options beside it, cannot be created, or has a parameter
            or a persistent buffer.
    """
    if isinstance(masking, str):
        return create(masking, **options)
    if options:
        raise ValueError(f"options go with a masking's name, got {', '.join(options)} beside one")
    if not isinstance(masking, MaskingStrategy):
        raise ValueError(f"masking must be a name or a MaskingStrategy, got {masking!r}")
    return _checked(masking)


def _checked(strategy: MaskingStrategy) -> MaskingStrategy:
    """Refuse a strategy that would add keys to the state dict of the model that it masks."""
    if keys := ", ".join(strategy.state_dict()):
        raise ValueError(
            f"{type(strategy).__name__} would put {keys} into the model's state dict, which then "
            "fits no plain model; a strategy has no parameter, and a buffer with persistent=False"
        )
    return strategy


def options_at(
    name: str,
    options: Mapping[str, Any],
    mask_ratio: float | None,
    mask_ratio_min: float | None = None,
) -> dict[str, Any]:
    """Return a strategy's options with those of the ratios that it takes.

    A default lower bound gives way to a ratio below it.

    Args:
        name: A registered name, or "package.module:Class".
        options: They win over the ratios.
        mask_ratio: Share of patches dropped; None is none.
        mask_ratio_min: Lower bound of an adaptive share; None is none.

    Raises:
        ValueError: If there is no such strategy.
    """
    known, options = masking_options(name), dict(options)
    for option, ratio in (("mask_ratio", mask_ratio), ("mask_ratio_min", mask_ratio_min)):
        if ratio is not None and option in known:
            options.setdefault(option, ratio)
    default, ratio = known.get("mask_ratio_min"), options.get("mask_ratio")
    if default is not None and isinstance(ratio, int | float):
        options.setdefault("mask_ratio_min", min(default, ratio))
    return options


def _type_problem(hint: Any, value: Any) -> str:
    """Say what an option takes instead of a value; "" if it takes that, or anything.

    Options come from command lines and configs, and `0.0 <= "a"` is an error that names nothing.
    """
    allowed = get_args(hint) or (hint,)
    if value is None and NoneType in allowed:
        return ""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # A whole number may be too large for a float.
    is_finite = is_number and (value < 2**1000 if isinstance(value, int) else math.isfinite(value))
    rules = {
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "a name"),
        int: (is_number and isinstance(value, Integral), "a whole number"),
        float: (is_finite, "a finite number"),
    }
    fits, kind = next((rules[kind] for kind in rules if kind in allowed), (True, ""))
    return "" if fits else kind


# ------------------------------------------------------------------------------------------------
# Ratios of patches, and the checks of options
# ------------------------------------------------------------------------------------------------


def mask_count(num_patches: int, mask_ratio: float) -> int:
    """Return how many of `num_patches` patches a mask ratio drops.

    One patch stays, however near to 1 the ratio is. The small constant keeps 100 * 0.29 at 29,
    which floating point would floor to 28.
    """
    return min(math.floor(num_patches * mask_ratio + 1e-9), num_patches - 1)


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """Return how many of `num_patches` patches a mask ratio keeps."""
    return num_patches - mask_count(num_patches, mask_ratio)


def drawn_count(num_patches: int, ratio: float) -> int:
    """Return how many of `num_patches` patches a share draws as candidates: at least one."""
    return max(1, round(ratio * num_patches))


def check_mask_ratio(mask_ratio: float, *, name: str = "mask_ratio") -> None:
    """Refuse a mask ratio outside [0, 1).

    Raises:
        ValueError: If it is.
    """
    if not isinstance(mask_ratio, Real) or not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {mask_ratio!r}")


def lower_bound(mask_ratio: float, mask_ratio_min: float | None) -> float:
    """Return the lower bound of a mask ratio: the ratio itself where None is given.

    Raises:
        ValueError: If one is outside [0, 1), or the bound exceeds the ratio.
    """
    check_mask_ratio(mask_ratio)
    if mask_ratio_min is None:
        return mask_ratio
    check_mask_ratio(mask_ratio_min, name="mask_ratio_min")
    if mask_ratio_min > mask_ratio:
        raise ValueError(
            f"mask_ratio_min must not exceed mask_ratio = {mask_ratio}, got {mask_ratio_min}"
        )
    return mask_ratio_min


def plain_number(value: Any) -> Any:
    """Return the number that a tensor or array of one element holds, and anything else as it is."""
    if getattr(value, "shape", None) is not None and math.prod(value.shape) == 1:
        # One on the meta device holds none.
        with suppress(RuntimeError):
            return value.item()
    return value


def check_range(
    value: Any,
    *,
    name: str,
    low: float,
    high: float,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Refuse what is no number in [low, high], as a NaN and True are none.

    Numbers that float32 cannot hold, or that take for ever, are outside of every option's range.

    Args:
        value: Anything.
        name: What to call it.
        low: Lowest number.
        high: Highest number.
        whole: Whether it must be a whole number.
        optional: Whether None will do.

    Raises:
        ValueError: If it is.
    """
    if optional and value is None:
        return
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        kind = "a whole number " if whole and not is_number else ""
        raise ValueError(f"{name} must be {kind}in [{low:g}, {high:g}], got {value!r}")


def check_share(share: float, *, name: str) -> None:
    """Refuse a share outside (0, 1].

    Raises:
        ValueError: If it is.
    """
    if not isinstance(share, Real) or not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {share!r}")


def interpolate(points: tuple[tuple[float, float], ...], position: Number) -> Number:
    """Return the height at a position of the straight lines that join points.

    Args:
        points: (position, height), ascending by position.
        position: Where to read; beyond either end the last height holds.
    """
    (start, low), *rest = points
    height: Any = low
    # Without a branch, a compiled model need not tell the lines apart.
    for end, high in rest:
        if isinstance(position, Tensor):
            reached: Any = position.clamp(start, end)
        else:
            reached = min(max(position, start), end)
        height = height + (high - low) * ((reached - start) / (end - start))
        start, low = end, high
    return height
