"""Mask the image tower of every model that OpenCLIP knows, and print which can be, as a table.

    python scripts/towers.py [NAME...]

Each tower is built with two blocks, or one a stage, images of 4 x 4 patches and random weights. A
convolutional tower is regularized: masked without saving FLOPs. What is masked is checked: in eval
mode it has the bits of the plain tower, keeping every patch it agrees with the plain tower in train
mode, adaptive `pgs` runs forward and backward, and the state dict stays as it is. Towers that are
refused are built without weights. Exit code 1 where a check fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.model import CustomTextCLIP
from torch import nn

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import (
    apply_masking,
    force_selection,
    last_selection,
    num_patches,
)

SIDE = 4
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
ATOL = 1e-4
MASKED = ("masked", "regularized")


def build(name: str) -> nn.Module:
    """Build a model with a small image tower; without weights where it is not built of blocks."""
    config = open_clip.get_model_config(name)
    vision: dict[str, Any] = dict(config["vision_cfg"])
    trunk = vision.get("timm_model_name")
    patch_size = vision.get("patch_size", 16)
    vision.update(timm_model_pretrained=False, patch_dropout=0.0)
    small: dict[str, Any] = {"depth": 2}
    if isinstance(vision.get("layers"), list):
        vision.update(layers=[1] * 4, width=8, image_size=SIDE * 32)
    elif trunk is None:
        vision.update(layers=2, image_size=SIDE * patch_size)
    elif trunk.startswith("convnext"):
        vision["image_size"] = SIDE * 32
        small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
    else:
        digits = trunk.split("patch")[-1].split("_")[0] if "patch" in trunk else "16"
        small["img_size"] = SIDE * int(digits)
    make = partial(CustomTextCLIP, config["embed_dim"], vision, TEXT)
    try:
        with mock.patch.object(timm, "create_model", partial(timm.create_model, **small)):
            return make(quick_gelu=config.get("quick_gelu", False))
    except TypeError:
        pass  # not built of equal blocks
    with torch.device("meta"):
        return make()


def describe(model: nn.Module) -> str:
    """Name the class of an image tower, of timm's with its patch embedding."""
    tower: Any = model.visual
    if not hasattr(tower, "trunk"):
        return f"OpenCLIP `{type(tower).__name__}`"
    embed = type(getattr(tower.trunk, "patch_embed", None)).__name__
    behind = " behind a convolutional stem" if embed == "HybridEmbed" else ""
    return f"timm `{type(tower.trunk).__name__}`{behind}"


def encode(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return an image tower's first output; drop path draws the same in each call."""
    torch.manual_seed(0)
    outputs = model.visual(images)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check(plain: nn.Module) -> str:
    """Mask a model; return one of `MASKED`, what is wrong with it, or why it is refused."""
    try:
        model = apply_masking(copy.deepcopy(plain), "pgs", mask_ratio=0.5, mask_ratio_min=0.3)
    except ValueError as error:
        return str(error)
    count, patch = num_patches(model), model.visual.masking.grid.patch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, SIDE * patch[0], SIDE * patch[1], generator=generator)
    with torch.no_grad():
        if not torch.equal(encode(model.eval(), images), encode(plain.eval(), images)):
            return "FAILED: not bit-identical in eval mode"
        with force_selection(model, PatchSelection(torch.arange(count).repeat(2, 1))):
            kept, whole = encode(model.train(), images), encode(plain.train(), images)
        if not torch.allclose(kept, whole, atol=ATOL * float(whole.abs().max()), rtol=0):
            return "FAILED: keeping every patch changes the features"
    encode(model, images).square().sum().backward()
    kept_counts = last_selection(model).kept_counts()
    if not (0.5 * count <= kept_counts.min() and kept_counts.max() <= 0.7 * count + 1):
        return f"FAILED: keeps {kept_counts.tolist()} of {count} patches"
    gradients = [p.grad for p in model.visual.parameters() if p.grad is not None]
    if not gradients or not all(torch.isfinite(gradient).all() for gradient in gradients):
        return "FAILED: gradients"
    if model.state_dict().keys() != plain.state_dict().keys():
        return "FAILED: another state dict"
    return "masked" if model.visual.saves_flops else "regularized"


def main() -> int:
    """Print one row per kind of tower and outcome; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every model")
    names = parser.parse_args().names or open_clip.list_models()
    rows: dict[tuple[str, str], list[str]] = {}
    for name in names:
        model = build(name)
        row = describe(model), check(model)
        rows.setdefault(row, []).append(name)
        print(f"{name}: {row[1]}", file=sys.stderr, flush=True)
    print("| image tower | models | outcome | which |\n|---|---|---|---|")
    for (tower, outcome), found in sorted(rows.items()):
        print(f"| {tower} | {len(found)} | {outcome} | {', '.join(found)} |")
    masked = sum(len(found) for (_, outcome), found in rows.items() if outcome in MASKED)
    print(
        f"\n{masked} of {len(names)} masked or regularized; open_clip {open_clip.__version__}, "
        f"timm {timm.__version__}, torch {torch.__version__}"
    )
    return int(any(outcome.startswith("FAILED") for _, outcome in rows))


if __name__ == "__main__":
    sys.exit(main())
