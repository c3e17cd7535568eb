"""The teacher of attentive masking: an image tower that follows the trained one slowly.

A-CLIP (https://arxiv.org/abs/2212.08653) scores patches by the attention of the class token in an
exponential moving average (EMA) of the image tower, mean over heads and blocks; its efficient form
runs that tower on images of half the side. Where a query pools the tokens instead, its attention
takes the place of the class token's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clip_pgs.common import explained
from clip_pgs.masking.strategy import check_range, plain_number

# As in A-CLIP and BYOL.
START_MOMENTUM = 0.996


def teacher_momentum(start: float, *, step: int, total_steps: int) -> float:
    """Return the share of itself that the teacher keeps in a step.

    It rises from `start` to 1 along a cosine, as in BYOL (https://arxiv.org/abs/2006.07733).

    Args:
        start: Momentum of step 0, in [0, 1].
        step: Number of the optimizer step, from 0; those beyond the last keep all.
        total_steps: Steps of the whole training, > 0.

    Raises:
        ValueError: If a number is out of its range.
    """
    step, total_steps = plain_number(step), plain_number(total_steps)
    check_range(step, name="step", low=0, high=math.inf)
    check_range(total_steps, name="total_steps", low=1, high=math.inf)
    done = min(step, total_steps) / total_steps
    return 1.0 - (1.0 - start) * (math.cos(math.pi * done) + 1.0) / 2.0


class Teacher:
    """A copy of an image tower that scores patches.

    It is no module, so that no parameter, buffer or state-dict key of the model is the teacher's.
    It follows weights that all processes share, and so is the same in all of them. Its weights
    are float32 whatever those of the tower are: a momentum of 0.996 rounds to 1 in half precision.

    Args:
        tower: The image tower, a `MaskedTower` that has no masking yet; it is copied.
        resolution: Side of the images it sees, as a share of the tower's, in (0, 1].
        momentum: Where its momentum starts, in [0, 1].
    """

    def __init__(self, tower: Any, *, resolution: float, momentum: float) -> None:
        self.tower = copy.deepcopy(tower)
        # A masking around this one has a teacher of its own, which its tower's loading tells.
        self.tower._load_state_dict_post_hooks.clear()
        # Whoever collects features of the tower is shown none of the teacher's.
        for module in self.tower.modules():
            module._forward_hooks.clear()
        self.tower.float().eval().requires_grad_(False).zero_grad(set_to_none=True)
        self.resolution = resolution
        self.momentum = momentum

    @torch.no_grad()
    def scores(self, pixels: Tensor) -> Tensor:
        """Return how much the teacher attends to each patch.

        The teacher computes in the precision of the forward pass around it; attention itself is
        float32.

        Args:
            pixels: Images as the tower receives them. Shape (B, 3, H, W).

        Returns:
            Scores of shape (B, N), float32.
        """
        grid = self.tower.patch_grid(self.tower)
        rows, columns = (max(1, round(side * self.resolution)) for side in grid.size)
        size = (rows * grid.patch_size[0], columns * grid.patch_size[1])
        small = pixels.float()
        if size != tuple(pixels.shape[-2:]):
            small = functional.interpolate(small, size=size, mode="bilinear", antialias=True)
        with _precision_of(pixels):
            tokens_BND = self.tower.embed_patches(small)
            tokens_BND = self.tower.add_positions(tokens_BND, grid_size=(rows, columns))
            attention_BT = self.tower.feature_attention(
                self.tower.add_prefix(tokens_BND), self.tower.rotations_on((rows, columns))
            )
        scores = attention_BT[:, -rows * columns :].reshape(-1, 1, rows, columns)
        if (rows, columns) != grid.size:
            scores = functional.interpolate(scores, size=grid.size, mode="bilinear")
        return scores.flatten(1)

    def update(self, tower: nn.Module, *, momentum: float) -> None:
        """Move towards the tower's weights: teacher = momentum * teacher + (1 - momentum) * tower.

        Args:
            tower: The trained tower.
            momentum: Share that stays, in [0, 1].
        """
        get_ema_multi_avg_fn(momentum)(_float_weights(self.tower), _float_weights(tower), None)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the teacher's weights, on the CPU."""
        return {
            name: weight.detach().cpu().clone() for name, weight in self.tower.state_dict().items()
        }

    def start_from(self, tower: nn.Module, incompatible_keys: Any = None) -> None:
        """Take the weights that were loaded into the tower, as a hook on its loading does.

        Args:
            tower: The trained tower.
            incompatible_keys: What loading found to be missing; where that is all of the tower, as
                of a model whose text tower alone was loaded, the teacher stays.
        """
        weights = tower.state_dict()
        missing = [] if incompatible_keys is None else incompatible_keys.missing_keys
        # They have the whole model's names.
        if all(any(f".{name}".endswith(f".{own}") for name in missing) for own in weights):
            return
        self.tower.load_state_dict(weights)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take weights that `state` returned.

        Raises:
            ValueError: If they belong to another tower, or one is not finite.
        """
        for name, weight in state.items():
            if isinstance(weight, Tensor) and not weight.isfinite().all():
                raise ValueError(
                    f"the teacher's weights must be finite, and those of {name} are not"
                )
        with explained("the teacher's weights do not fit the image tower", RuntimeError):
            self.tower.load_state_dict(dict(state))

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go to the device to which a function of `nn.Module._apply` moves a tensor."""
        weight = next(self.tower.parameters())
        self.tower.to(fn(weight.new_empty(0)).device)


def _float_weights(tower: nn.Module) -> list[Tensor]:
    # Of a tower that several processes shard, each takes part in gathering them.
    weights = tower.state_dict().values()
    every = (w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights)
    return [weight.detach().float() for weight in every]


def _precision_of(pixels: Tensor) -> AbstractContextManager:
    if pixels.dtype == torch.float32:
        return nullcontext()
    if pixels.dtype not in (torch.float16, torch.bfloat16):
        # float64, to which autocast says that it does not support it.
        return torch.autocast(pixels.device.type, enabled=False)
    return torch.autocast(pixels.device.type, dtype=pixels.dtype)
