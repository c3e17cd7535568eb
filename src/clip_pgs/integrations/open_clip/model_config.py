"""Whether the model config of a stranger is one that open_clip may be given, and can build.

open_clip hands what it finds on to constructors and tokenizers: a name from the Hub is fetched, an
option can let a tokenizer run code of its folder, and any number of layers is built. Models are
built on torch's device "meta", without memory for their weights, to find out whether they work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import open_clip
import timm
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from clip_pgs.common import explained
from clip_pgs.files import read_json_object

_TOWERS = {"text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
_REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
_SWITCHES = ("custom_text", "quick_gelu", "nonscalar_logit_scale")
_NUMBERS = ("init_logit_scale", "init_logit_bias")
# Everything else of transformers' tokenizers stays shut, "trust_remote_code" above all.
_TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language")

_MAX_LAYERS = 1000
_MAX_SIZE = 2**24
_CAN_BE_ZERO = ("pad_id", "eos_id")
# Sizes that open_clip takes as a list too, and how long it is.
_LISTS = {"image_size": 2, "patch_size": 2, "layers": 4}

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


def check_model_config(config: Any, *, what: str) -> None:
    """Refuse a model config that open_clip could not build, or should not.

    Args:
        config: What the JSON of an OpenCLIP model config holds.
        what: What to call it in messages.

    Raises:
        ValueError: If a key is missing or unknown, a value is of the wrong type or out of any
            sensible range, or an option would let a tokenizer run code.
    """
    if not isinstance(config, dict) or any(key not in config for key in _REQUIRED):
        raise ValueError(f"{what} must hold {', '.join(_REQUIRED)}")
    for key, value in config.items():
        if key == "vision_cfg":
            check_vision_config(value, what=what)
            continue
        if key in _TOWERS:
            _check_tower(value, _TOWERS[key], what=f"{what}: {key}")
            continue
        if key == "embed_dim":
            problem = _size_problem(key, value)
        elif key in _SWITCHES:
            problem = "" if isinstance(value, bool) else "takes true or false"
        elif key in _NUMBERS:
            problem = "" if value is None or _is_number(value) else "takes a finite number"
        else:
            raise ValueError(f"{what} has no option {key!r}")
        if problem:
            raise ValueError(f"{what}: {key} {problem}, got {value!r}")
    if "multimodal_cfg" in config and not config.get("custom_text"):
        raise ValueError(f"{what}: multimodal_cfg needs custom_text to be true")


def check_vision_config(vision: Any, *, what: str) -> None:
    """Refuse the `vision_cfg` of a model config as `check_model_config` does."""
    _check_tower(vision, CLIPVisionCfg, what=f"{what}: vision_cfg")
    _check_patches(vision, what=f"{what}: vision_cfg")


def check_preprocessing(preprocess: Any, *, what: str) -> None:
    """Refuse a `preprocess_cfg` with which open_clip could not read an image.

    Args:
        preprocess: What an `open_clip_config.json` holds under that name.
        what: What to call the file in messages.

    Raises:
        ValueError: If it is no JSON object, or a value is of the wrong type.
    """
    if not isinstance(preprocess, dict):
        raise ValueError(f"{what}: preprocess_cfg must be a JSON object")
    _check_by(_PREPROCESSING, preprocess, what=f"{what}: preprocess_cfg")


def check_build_options(options: Mapping[str, Any], *, what: str) -> None:
    """Refuse flags of OpenCLIP's trainer with which open_clip could build no model.

    Args:
        options: Such as `force_image_size` and `image_mean`, as a run's `params.txt` has them.
        what: What to call the file in messages.

    Raises:
        ValueError: If a value is of the wrong type or out of its range.
    """
    switch = (lambda value: isinstance(value, bool), "true or false")
    rules = {
        **{f"image_{key}": rule for key, rule in _PREPROCESSING.items()},
        "force_image_size": _PREPROCESSING["size"],
        "force_context_length": (lambda value: not _size_problem("", value), "a whole number"),
        "force_quick_gelu": switch,
        "force_custom_text": switch,
    }
    _check_by(rules, options, what=what)


def _check_by(rules: Mapping[str, Any], options: Mapping[str, Any], *, what: str) -> None:
    for key, (is_good, kind) in rules.items():
        value = options.get(key)
        if value is not None and not is_good(value):
            raise ValueError(f"{what}: {key} takes {kind}, got {value!r}")


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return not any(_size_problem("size", side) for side in sides)


def _is_color(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def _check_tower(tower: Any, tower_class: Any, *, what: str) -> None:
    if not isinstance(tower, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(tower).__name__}")
    hints = get_type_hints(tower_class)
    known = {field.name: field.default for field in fields(tower_class)}
    for key, value in tower.items():
        if key not in known:
            raise ValueError(f"{what} has no option {key!r}")
        problem = "" if value is None else _problem(key, value, hints[key])
        if value is None and known[key] is not None and not _may_be_null(key, hints[key], tower):
            problem = "cannot be null"
        if problem:
            raise ValueError(f"{what}: {key} {problem}, got {value!r}")
    for option in tower.get("tokenizer_kwargs") or ():
        if option not in _TOKENIZER_OPTIONS:
            choices = ", ".join(_TOKENIZER_OPTIONS)
            raise ValueError(f"{what}: tokenizer_kwargs takes {choices}, got {option!r}")
    name = tower.get("timm_model_name")
    if name is not None and not timm.is_model(name):
        raise ValueError(f"{what}: timm has no model {name!r}")


def _problem(key: str, value: Any, hint: Any) -> str:
    """Say what is wrong with a value, as the rest of a sentence; "" if nothing is."""
    allowed = get_args(hint) or (hint,)
    if key == "attentional_pool" and isinstance(value, str):
        return ""
    if bool in allowed:
        return "" if isinstance(value, bool) else "takes true or false"
    if str in allowed:
        return "" if isinstance(value, str) else "takes a text"
    if float in allowed:
        is_good = _is_number(value) and 0 <= value <= _MAX_SIZE
        return "" if is_good else f"takes a number from 0 to {_MAX_SIZE}"
    if dict in allowed:
        return "" if isinstance(value, dict) else "takes a JSON object"
    if isinstance(value, list) and len(value) == _LISTS.get(key):
        return next((p for p in (_size_problem(key, item) for item in value) if p), "")
    return _size_problem(key, value)


def _size_problem(key: str, value: Any) -> str:
    least = 0 if key in _CAN_BE_ZERO else 1
    most = _MAX_LAYERS if key == "layers" else _MAX_SIZE
    if type(value) is int and least <= value <= most:
        return ""
    return f"takes a whole number from {least} to {most}"


def _may_be_null(key: str, hint: Any, tower: Mapping[str, Any]) -> bool:
    # open_clip's own configs have these: no patches in a ResNet, no projection in timm's towers.
    has_no_patches = isinstance(tower.get("layers"), list) or "timm_model_name" in tower
    return NoneType in get_args(hint) or hint is str or (key == "patch_size" and has_no_patches)


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _check_patches(vision: Mapping[str, Any], *, what: str) -> None:
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list):
        return
    sides = [vision.get("image_size", 224), vision.get("patch_size", 16)]
    image, patch = (side if isinstance(side, list) else [side, side] for side in sides)
    if any(image_side < patch_side for image_side, patch_side in zip(image, patch, strict=True)):
        raise ValueError(f"{what}: image_size {image} is smaller than patch_size {patch}")


_PREPROCESSING = {
    "size": (_is_size, "a size or two"),
    "mode": (lambda value: value == "RGB", "RGB"),
    "mean": (_is_color, "3 finite numbers"),
    "std": (lambda value: _is_color(value) and min(value) > 0, "3 finite numbers > 0"),
    "interpolation": (("bicubic", "bilinear", "random").__contains__, "bicubic or bilinear"),
    "resize_mode": (("shortest", "longest", "squash").__contains__, "shortest or the like"),
    "fill_color": (lambda value: type(value) is int and 0 <= value < 256, "a value below 256"),
}


# ------------------------------------------------------------------------------------------------
# Building without memory for the weights
# ------------------------------------------------------------------------------------------------


def check_buildable(config: Any, *, name: str) -> None:
    """Refuse the model config of a stranger unless it makes a model that runs on this machine.

    Args:
        config: What the JSON of an OpenCLIP model config holds.
        name: What to call it in messages.

    Raises:
        ValueError: If it is no model config, or makes no such model.
    """
    check_model_config(config, what=name)
    model = build_on_meta(config, name=name)
    if not config["text_cfg"].get("hf_model_name"):
        length = config["text_cfg"].get("context_length", open_clip.CLIPTextCfg().context_length)
        check_model_runs(model, name=name, context_length=length)


def register_model_config(path: Path) -> str:
    """Make an OpenCLIP model config known to open_clip, and return its name, that of the file.

    Raises:
        ValueError: If it is none, makes no model that runs on this machine, or open_clip has
            another model of that name.
    """
    config = read_json_object(path, what=f"the model config {path}")
    check_buildable(config, name=f"the model config {path}")
    known = open_clip.get_model_config(path.stem)
    if known is None:
        open_clip.add_model_config(path)
    elif known != config:
        raise ValueError(f"open_clip has another model named {path.stem}; rename {path}")
    return path.stem


def build_on_meta(
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
    with explained(f"open_clip cannot build {name}", *MISFITS), torch.device("meta"):
        return model_class(**config)


def check_model_runs(model: Any, *, name: str, context_length: int) -> None:
    """Refuse a model that is too large for this machine, or cannot take an image and a caption.

    Args:
        model: From `build_on_meta`, with its text tower.
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
    with explained(f"{name} cannot take an image and a caption", *MISFITS), torch.no_grad():
        model.eval()(image, text)


def largest_memory() -> int:
    """Return the bytes of the largest memory that could hold weights."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = range(torch.cuda.device_count())
    return max(host, *(torch.cuda.get_device_properties(i).total_memory for i in devices), 0)


def usable_device(name: str) -> torch.device:
    """Return torch's device of a name.

    Raises:
        ValueError: If it is not on this machine, or computes nothing.
    """
    try:
        device = torch.device(name)
        # A GPU is counted, not used: memory on it would be held for hours.
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "meta": 0}
        if (device.index or 0) >= counts.get(device.type, 1):
            raise RuntimeError(f"there is no {device}")
        if device.type not in counts:
            torch.empty(0, device=device)
    # torch raises the first, or one of the others where it was built without the backend.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} is not available on this machine") from error
    return device
