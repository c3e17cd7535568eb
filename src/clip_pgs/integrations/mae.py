"""Let a strategy choose what a masked autoencoder (https://arxiv.org/abs/2111.06377) is shown.

Hugging Face's `ViTMAEForPreTraining` keeps the patches with the lowest `noise`, as many as its
`mask_ratio` leaves. `mae_noise` turns a strategy into such numbers and `feed_mae_noise` gives them
to a model. PGS keeps objects for CLIP; methods that hide them from an autoencoder (AttMask, SemMAE,
AutoMAE) are the other sign. Torch alone is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clip_pgs.common import check_choice
from clip_pgs.integrations.masked_tower import unwrap
from clip_pgs.masking import MaskingStrategy, PatchInputs, create_masking
from clip_pgs.masking.sampling import draw_noise, kept_patches, second_draw
from clip_pgs.masking.strategy import as_strategy, options_at

SIGNS = ("keep", "hide")


def mae_noise(
    strategy: MaskingStrategy,
    pixels: Tensor,
    *,
    sign: str = "keep",
    patch_size: int | tuple[int, int] = 16,
    tokens: Tensor | None = None,
    progress: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Return numbers by which an autoencoder keeps, or hides, the patches that a strategy keeps.

    Where the strategy keeps as many patches as the model shows (or, with "hide", as it hides), the
    model's choice is the strategy's. Otherwise random patches fill up, or random ones fall out.

    Args:
        strategy: Chooses the patches.
        pixels: Images as the model receives them. Shape (B, 3, H, W).
        sign: "keep" shows the model what the strategy keeps, "hide" lets it reconstruct that.
        patch_size: Side of a patch in pixels, or (height, width).
        tokens: Patch embeddings without positions, for similarity. Shape (B, N, D).
        progress: Completed share of the training steps, in [0, 1].
        noise: Uniform numbers in [0, 1) that the strategy draws by, shape (B, N); None draws from
            the global stream.

    Returns:
        Numbers in [0, 1), shape (B, N), float32: below 0.5 the patches to show.

    Raises:
        ValueError: If `sign` is neither, or the inputs do not fit the strategy.
    """
    check_choice(sign, SIGNS, name="sign")
    inputs = PatchInputs(pixels, patch_size, tokens=tokens, progress=progress, noise=noise)
    inputs.noise = draw_noise(inputs, None)
    return patch_order(strategy, inputs, sign=sign)


def patch_order(strategy: MaskingStrategy, inputs: PatchInputs, *, sign: str) -> Tensor:
    """Do what `mae_noise` does, for inputs that have noise."""
    assert inputs.noise is not None
    is_shown_BN = kept_patches(strategy(inputs), inputs.num_patches) == (sign == "keep")
    return 0.5 * second_draw(inputs.noise) + torch.where(is_shown_BN, 0.0, 0.5)


@dataclass(eq=False)
class MaeNoise:
    """Feeds a model's embeddings with a strategy's numbers; `feed_mae_noise` makes it.

    Args:
        strategy: Chooses the patches.
        sign: See `mae_noise`.
        progress: Completed share of the training steps, in [0, 1]; whoever trains sets it.
        handle: Of the hook on the embeddings.
    """

    strategy: MaskingStrategy
    sign: str
    progress: float = 0.0
    handle: RemovableHandle | None = None

    def remove(self) -> None:
        """Let the model draw its own numbers again."""
        if self.handle is not None:
            self.handle.remove()

    @torch.no_grad()
    def __call__(
        self, embeddings: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add `noise` to the arguments of the embeddings' forward pass where there is none."""
        if options.get("noise") is not None or len(args) > 1:
            return None
        pixels: Tensor = args[0] if args else options["pixel_values"]
        tokens = None
        if self.progress > 0 and "tokens" in self.strategy.requires:
            tokens = embeddings.patch_embeddings(pixels)
        noise = mae_noise(
            self.strategy,
            pixels,
            sign=self.sign,
            patch_size=embeddings.patch_size,
            tokens=tokens,
            progress=self.progress,
        )
        return args, {**options, "noise": noise}


def create_fitting_masking(
    name: str, *, num_patches: int, num_shown: int, sign: str, **options: Any
) -> MaskingStrategy:
    """Create a strategy that keeps just as many patches as an autoencoder shows, or hides.

    Args:
        name: A registered strategy, or "package.module:Class".
        num_patches: Of an image.
        num_shown: Those that the autoencoder is shown.
        sign: See `mae_noise`.
        **options: The strategy's options; a mask ratio among them goes first.

    Raises:
        ValueError: If there is no such strategy, an option is wrong, or none is shown, or hidden.
    """
    num_kept = num_shown if sign == "keep" else num_patches - num_shown
    if num_kept == 0:
        raise ValueError(
            f"the model {'shows' if sign == 'keep' else 'hides'} none of its {num_patches} patches "
            "at its mask_ratio, and a strategy keeps at least one"
        )
    return create_masking(name, **options_at(name, options, 1 - num_kept / num_patches))


def feed_mae_noise(
    model: nn.Module, masking: str | MaskingStrategy, *, sign: str = "keep", **options: Any
) -> MaeNoise:
    """Let a strategy choose what a ViT-MAE is shown, in train and eval mode.

    A caller's own `noise` goes first, and a second call replaces the strategy of the first. Weights
    and state dict stay as they are.

    Args:
        model: `ViTMAEForPreTraining` or `ViTMAEModel`, also wrapped.
        masking: A name out of `clip_pgs.list_maskings()`, or a strategy. By name, a mask ratio
            that is not given is the one at which the model, as its config is now, shows, or hides,
            exactly the patches that the strategy keeps.
        sign: "keep" shows the model what the strategy keeps, "hide" lets it reconstruct that.
        **options: The strategy's options, with a name alone.

    Returns:
        What feeds the model: set its `progress` before each step, call its `remove` to end it.

    Raises:
        ValueError: If the model is no ViT-MAE, or the strategy, an option or the sign is wrong.
    """
    found = [each for each in unwrap(model).modules() if type(each).__name__ == "ViTMAEEmbeddings"]
    if len(found) != 1:
        raise ValueError(f"{type(unwrap(model)).__name__} is no ViT-MAE of transformers")
    embeddings: Any = found[0]
    check_choice(sign, SIGNS, name="sign")
    num_patches = embeddings.patch_embeddings.num_patches
    # As the model counts them.
    num_shown = int(num_patches * (1 - embeddings.config.mask_ratio))
    counts = {"num_patches": num_patches, "num_shown": num_shown}
    create = partial(create_fitting_masking, **counts, sign=sign)
    strategy = as_strategy(masking, options, create=create)
    if "attention" in strategy.requires:
        raise ValueError(
            f"{type(strategy).__name__} reads a teacher's attention, and an autoencoder has none"
        )
    # The first would go on to choose, and a copied model's handle is that of the original.
    hooks = embeddings._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, MaeNoise)]:
        del hooks[key]
    feed = MaeNoise(strategy, sign)
    feed.handle = embeddings.register_forward_pre_hook(feed, with_kwargs=True)
    return feed
