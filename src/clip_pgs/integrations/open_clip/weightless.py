"""Build open_clip's models without memory for their weights, to find out whether they work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import open_clip
import torch

from clip_pgs.integrations.open_clip.model_config import check_model_config

# What open_clip, timm and torch raise on numbers that do not go together.
MISFITS = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    AttributeError,
    LookupError,
    ArithmeticError,
)
# It takes the place of a text tower that would have to be fetched.
_TINY_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_BYTES = 4


def check_buildable(config: Any, *, name: str) -> None:
    """Refuse the model config of a stranger unless it makes a model that runs on this machine.

    Args:
        config: What the JSON of an OpenCLIP model config holds.
        name: What to call it in messages.

    Raises:
        ValueError: If it is no model config, or makes no such model.
    """
    check_model_config(config, what=name)
    model = build_weightless(config, name=name)
    if not config["text_cfg"].get("hf_model_name"):
        length = config["text_cfg"].get("context_length", open_clip.CLIPTextCfg().context_length)
        check_model_runs(model, name=name, context_length=length)


def build_weightless(
    config: dict[str, Any],
    *,
    name: str,
    with_text: bool = True,
    image_size: int | Sequence[int] | None = None,
    context_length: int | None = None,
) -> Any:
    """Build a model on torch's device "meta".

    Args:
        config: OpenCLIP's model config.
        name: What to call the model in messages.
        with_text: Build its text tower too, unless that is of Hugging Face.
        image_size: As `--force-image-size` has it.
        context_length: As `--force-context-length` has it.

    Raises:
        ValueError: If open_clip cannot build it.
    """
    config = {
        key: dict(value) if isinstance(value, dict) else value for key, value in config.items()
    }
    custom_text = config.pop("custom_text", False)
    if config["vision_cfg"].get("timm_model_name"):
        # Whatever weights there will be, their download tells nothing here.
        config["vision_cfg"]["timm_model_pretrained"] = False
    config["vision_cfg"]["patch_dropout"] = 0.0
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    has_own_text = not config["text_cfg"].get("hf_model_name")
    if not with_text or not has_own_text:
        config["text_cfg"] = dict(_TINY_TEXT)
        if "multimodal_cfg" in config:
            config["multimodal_cfg"] = dict(_TINY_TEXT)
    elif context_length is not None:
        config["text_cfg"]["context_length"] = context_length
    if "multimodal_cfg" in config:
        model_class: Any = open_clip.CoCa
    else:
        model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    try:
        with torch.device("meta"):
            return model_class(**config)
    except MISFITS as error:
        raise ValueError(f"open_clip cannot build {name}: {_reason(error)}") from None


def check_model_runs(model: Any, *, name: str, context_length: int) -> None:
    """Refuse a model that is too large for this machine, or cannot take an image and a caption.

    Args:
        model: From `build_weightless`, with its text tower.
        name: What to call it in messages.
        context_length: Tokens of a caption.

    Raises:
        ValueError: If it is.
    """
    num_bytes = _BYTES * sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if num_bytes > largest_memory():
        raise ValueError(
            f"the weights of {name} take {num_bytes / 2**30:.0f} GiB, more than the "
            f"{largest_memory() / 2**30:.0f} GiB of this machine"
        )
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.empty(1, 3, height, width, device="meta")
    text = torch.empty(1, context_length, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model.eval()(image, text)
    except MISFITS as error:
        raise ValueError(f"{name} cannot take an image and a caption: {_reason(error)}") from None


def largest_memory() -> int:
    """Return the bytes of the largest memory that could hold weights."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = range(torch.cuda.device_count())
    return max(host, *(torch.cuda.get_device_properties(i).total_memory for i in devices), 0)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
