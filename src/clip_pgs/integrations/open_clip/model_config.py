"""Whether the model config of a stranger is one that open_clip may be given, and can build.

open_clip hands what it finds on to constructors and tokenizers: a name from the Hub is fetched, an
option can let a tokenizer run code of its folder, and any number of layers is built. Models are
built on torch's device "meta", without memory for their weights, to find out whether they work.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import open_clip
import timm
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from clip_pgs.common import as_plain, changed_values, explained
from clip_pgs.files import read_json_object

_REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
_TOWERS = {"text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
_LENGTH = CLIPTextCfg().context_length
# Everything else of transformers' tokenizers stays shut, "trust_remote_code" above all.
_TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language")

MAX_LAYERS = 1000
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
# What trained weights do not depend on: what they started from, what training alone does, and the
# classes that hold them.
_NOT_COMPUTED = (
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "custom_text",
    "mask_ratio",
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "hf_model_pretrained",
)
# Of a `preprocess_cfg`, beside the size, which the tower has.
IMAGE_SETTINGS = ("mean", "std", "interpolation", "resize_mode")
# It takes the place of a text tower that would have to be fetched.
_TINY_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_BYTES = 4


# What a value is held to, and what it takes, for messages.
Rule = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _is_color(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def whole_number(least: int, most: int, *, length: int | None = None) -> Rule:
    """Return the rule of a whole number in [least, most], or of a list of so many."""

    def is_whole(value: Any) -> bool:
        each = value if isinstance(value, list | tuple) and len(value) == length else [value]
        return all(type(number) is int and least <= number <= most for number in each)

    return is_whole, f"a whole number from {least} to {most}"


_SWITCH: Rule = (lambda value: isinstance(value, bool), "true or false")
_NUMBER: Rule = (_is_number, "a finite number")
_MODEL: dict[str, Rule] = {
    "embed_dim": whole_number(1, _MAX_SIZE),
    "custom_text": _SWITCH,
    "quick_gelu": _SWITCH,
    "nonscalar_logit_scale": _SWITCH,
    "init_logit_scale": _NUMBER,
    "init_logit_bias": _NUMBER,
}
_CAN_BE_NULL = {"init_logit_scale", "init_logit_bias"}
_PREPROCESSING: dict[str, Rule] = {
    "size": (whole_number(1, _MAX_SIZE, length=2)[0], "a size or two"),
    "mode": (lambda value: value == "RGB", "RGB"),
    "mean": (_is_color, "3 finite numbers"),
    "std": (lambda value: _is_color(value) and min(value) > 0, "3 finite numbers > 0"),
    "interpolation": (("bicubic", "bilinear", "random").__contains__, "bicubic or bilinear"),
    "resize_mode": (("shortest", "longest", "squash").__contains__, "shortest or the like"),
    "fill_color": (lambda value: type(value) is int and 0 <= value < 256, "a value below 256"),
}
_BUILDING: dict[str, Rule] = {
    **{f"image_{key}": rule for key, rule in _PREPROCESSING.items()},
    "force_image_size": _PREPROCESSING["size"],
    "force_context_length": (whole_number(1, _MAX_SIZE)[0], "a whole number"),
    "force_quick_gelu": _SWITCH,
    "force_custom_text": _SWITCH,
}


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
    towers = {key: config[key] for key in ("vision_cfg", *_TOWERS) if key in config}
    check_vision_config(towers["vision_cfg"], what=what)
    for key in towers.keys() & _TOWERS.keys():
        _check_tower(towers[key], _TOWERS[key], what=f"{what}: {key}")
    rest = {key: value for key, value in config.items() if key not in towers}
    check_values(_MODEL, rest, what=what, never_null=_MODEL.keys() - _CAN_BE_NULL)
    if "multimodal_cfg" in towers:
        if not config.get("custom_text"):
            raise ValueError(f"{what}: multimodal_cfg needs custom_text to be true")
        longest = [towers[key].get("context_length", _LENGTH) for key in _TOWERS]
        # The decoder predicts each token from those before it, so that it never sees the last.
        if longest[0] - 1 > longest[1] and not towers["text_cfg"].get("hf_model_name"):
            raise ValueError(
                f"{what}: multimodal_cfg.context_length must be at least that of text_cfg less "
                f"one, {longest[0] - 1}, got {longest[1]}"
            )
    for key in ("vision_cfg", "text_cfg"):
        if bool(towers[key].get("output_tokens")) != ("multimodal_cfg" in towers):
            raise ValueError(
                f"{what}: {key}.output_tokens must be true with multimodal_cfg, and only with it"
            )


def check_vision_config(vision: Any, *, what: str) -> None:
    """Refuse the `vision_cfg` of a model config as `check_model_config` does."""
    what = f"{what}: vision_cfg"
    _check_tower(vision, CLIPVisionCfg, what=what)
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list):
        return
    sides = [vision.get("image_size", 224), vision.get("patch_size", 16)]
    image, patch = (side if isinstance(side, list) else [side, side] for side in sides)
    if None not in sides and any(map(operator.lt, image, patch)):
        raise ValueError(f"{what}: image_size {image} is smaller than patch_size {patch}")


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
    known = {key: preprocess.get(key) for key in _PREPROCESSING}
    check_values(_PREPROCESSING, known, what=f"{what}: preprocess_cfg")


def check_build_options(options: Mapping[str, Any], *, what: str) -> None:
    """Refuse flags of OpenCLIP's trainer with which open_clip could build no model.

    Args:
        options: Such as `force_image_size` and `image_mean`, as a run's `params.txt` has them.
        what: What to call the file in messages.

    Raises:
        ValueError: If a value is of the wrong type or out of its range.
    """
    check_values(_BUILDING, {key: options.get(key) for key in _BUILDING}, what=what)


def check_values(
    rules: Mapping[str, Rule],
    options: Mapping[str, Any],
    *,
    what: str,
    never_null: Collection[str] = (),
) -> None:
    """Refuse options without a rule, and values against theirs.

    Args:
        rules: Of each option.
        options: Their values.
        what: What to call the file in messages.
        never_null: Options that a null does not fit; for others it stands for their default.

    Raises:
        ValueError: "WHAT: OPTION takes ..."
    """
    for key, value in options.items():
        if key not in rules:
            raise ValueError(f"{what} has no option {key!r}")
        is_good, kind = rules[key]
        is_left_out = value is None and key not in never_null
        if not is_left_out and not is_good(value):
            raise ValueError(f"{what}: {key} takes {kind}, got {value!r}")


def _check_tower(tower: Any, tower_class: Any, *, what: str) -> None:
    if not isinstance(tower, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(tower).__name__}")
    hints = get_type_hints(tower_class)
    # open_clip's own configs have these: no patches in a ResNet, no projection in timm's towers.
    has_no_patches = isinstance(tower.get("layers"), list) or "timm_model_name" in tower
    never_null = [
        field.name
        for field in fields(tower_class)
        if field.default is not None and hints[field.name] is not str
        if NoneType not in get_args(hints[field.name])
        if not (field.name == "patch_size" and has_no_patches)
    ]
    rules = {key: _rule(key, hint) for key, hint in hints.items()}
    check_values(rules, tower, what=what, never_null=never_null)
    for option in tower.get("tokenizer_kwargs") or ():
        if option not in _TOKENIZER_OPTIONS:
            choices = ", ".join(_TOKENIZER_OPTIONS)
            raise ValueError(f"{what}: tokenizer_kwargs takes {choices}, got {option!r}")
    name = tower.get("timm_model_name")
    if name is not None and not timm.is_model(name):
        raise ValueError(f"{what}: timm has no model {name!r}")


def _rule(key: str, hint: Any) -> Rule:
    allowed = get_args(hint) or (hint,)
    if key == "attentional_pool":
        return lambda value: isinstance(value, bool | str), "true, false or a text"
    if bool in allowed:
        return _SWITCH
    if str in allowed:
        return lambda value: isinstance(value, str), "a text"
    if float in allowed:
        is_good = lambda value: _is_number(value) and 0 <= value <= _MAX_SIZE  # noqa: E731
        return is_good, f"a number from 0 to {_MAX_SIZE}"
    if dict in allowed:
        return lambda value: isinstance(value, dict), "a JSON object"
    most = MAX_LAYERS if key == "layers" else _MAX_SIZE
    return whole_number(0 if key in _CAN_BE_ZERO else 1, most, length=_LISTS.get(key))


def changed_model(recorded: Any, present: Mapping[str, Any]) -> list[str]:
    """Return what a model computes otherwise than the one that a file records.

    Args:
        recorded: What should be the content of an `open_clip_config.json`; anything else tells of
            no change.
        present: The same of the model. What either does not say of its images is not compared.

    Returns:
        Such as "vision_cfg.head_width 32 -> 16", with OpenCLIP's defaults filled in.
    """
    try:
        before = _computed(as_plain(recorded))
    except (LookupError, TypeError, ValueError, AttributeError):
        return []
    return changed_values(before, _computed(present))


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name what decides what a model makes of an image or text beside its weights."""
    model, preprocess = config["model_cfg"], config.get("preprocess_cfg") or {}
    towers = {"vision_cfg": CLIPVisionCfg, **_TOWERS}
    computed = {"quick_gelu": False, **{k: v for k, v in model.items() if k not in towers}}
    for key, tower_class in towers.items():
        if key in model:
            tower = {**asdict(tower_class()), **model[key]}
            computed |= {f"{key}.{name}": value for name, value in tower.items()}
    is_filled = preprocess.get("resize_mode") == "longest"
    settings = (*IMAGE_SETTINGS, "fill_color") if is_filled else IMAGE_SETTINGS
    computed |= {f"image_{k}": preprocess[k] for k in settings if k in preprocess}
    return {
        name: _as_written_once(name, value)
        for name, value in computed.items()
        if name.rpartition(".")[2] not in _NOT_COMPUTED
    }


def _as_written_once(name: str, value: Any) -> Any:
    """Return a square as its side, and no options as none."""
    is_size = name.endswith((".image_size", ".patch_size")) and isinstance(value, list | tuple)
    return value[0] if is_size and len(set(value)) == 1 else (value if value != {} else None)


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
        length = config["text_cfg"].get("context_length", _LENGTH)
        check_model_runs(model, name=name, context_length=length)


def check_model_name(config: dict[str, Any], path: Path) -> None:
    """Refuse a name for which open_clip has a tokenizer that no checkpoint or export would tell.

    Args:
        config: A model config that `check_model_config` takes.
        path: Its file.

    Raises:
        ValueError: If it is of SigLIP, and the config names no tokenizer.
    """
    if "siglip" in path.stem.lower() and not config["text_cfg"].get("hf_tokenizer_name"):
        raise ValueError(
            f"open_clip takes SigLIP's tokenizer for any model of this name: give {path} "
            "text_cfg.hf_tokenizer_name, or rename it for OpenCLIP's own tokenizer"
        )


def register_model_config(path: Path) -> str:
    """Make an OpenCLIP model config known to open_clip, and return its name, that of the file.

    Raises:
        ValueError: If it is none, makes no model that runs on this machine, or open_clip has
            another model of that name.
    """
    config = read_json_object(path, what=f"the model config {path}")
    check_buildable(config, name=f"the model config {path}")
    check_model_name(config, path)
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


def build_image_tower(config: Any, *, source: str) -> Any:
    """Build a model on torch's device "meta" with its image tower, and a tiny one for text.

    Args:
        config: What the JSON of an OpenCLIP model config holds; nothing is read of `text_cfg`.
        source: What to call it in messages.

    Raises:
        ValueError: If it is no such config, or open_clip cannot build the image tower.
    """
    needed = ("vision_cfg", "embed_dim")
    for key in needed:
        if not isinstance(config, dict) or config.get(key) is None:
            raise ValueError(f"{source} is no model config: it has no {key}")
    check_vision_config(config["vision_cfg"], what=source)
    check_values(_MODEL, {"embed_dim": config["embed_dim"]}, what=source)
    # A CoCa is one by its decoder.
    read = {key: config[key] for key in (*needed, "multimodal_cfg") if key in config}
    name = f"the image tower of {source}"
    return build_on_meta({**read, "text_cfg": {}}, name=name, with_text=False)


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
