"""Which model a checkpoint file belongs to, as open_clip can build it."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip

from clip_pgs.evaluation.models.checkpoints import Checkpoint
from clip_pgs.integrations.open_clip.model_config import check_preprocessing, read_json_object
from clip_pgs.integrations.open_clip.weightless import check_buildable

CONFIG_NAME = "open_clip_config.json"

# Flags of the trainer, as params.txt names them, that change what open_clip builds.
_BUILD_FLAGS = (
    "force_quick_gelu",
    "force_custom_text",
    "force_image_size",
    "force_context_length",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)


@dataclass(frozen=True)
class Architecture:
    """How open_clip builds a model.

    Attributes:
        name: What `open_clip.create_model` takes: a model's name or `local-dir:PATH`.
        options: Keyword arguments beside it.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def find_architecture(
    checkpoint: Checkpoint, *, model: str | None = None, model_config: str | Path | None = None
) -> Architecture:
    """Find the architecture of a checkpoint.

    It is the caller's if named; else what the checkpoint itself records, as this trainer's do;
    else the `open_clip_config.json` beside it or in the export of its run; else the `params.txt`
    of its run, which open_clip's trainer leaves too.

    Args:
        checkpoint: From `read_checkpoint`.
        model: An open_clip model's name.
        model_config: An OpenCLIP model config, a JSON file.

    Raises:
        ValueError: If the caller's is unknown or there are two, or there is no record.
    """
    if model is not None and model_config is not None:
        raise ValueError("give the architecture as a model name or as a model config, not both")
    if model_config is not None:
        return Architecture(register_model_config(Path(model_config)))
    if model is not None:
        if model not in open_clip.list_models():
            raise ValueError(f"open_clip knows no model {model!r}; give a model config instead")
        return Architecture(model)
    if checkpoint.config is not None:
        return _from_config(checkpoint.config, what=f"the model config in {checkpoint.path}")

    folder = checkpoint.path.resolve().parent
    for config_folder in (folder, folder.parent / "export"):
        if (config_folder / CONFIG_NAME).is_file():
            read_export_config(config_folder)
            return Architecture(f"local-dir:{config_folder}")
    params_path = folder.parent / "params.txt"
    if params_path.is_file():
        return _from_params(params_path)
    raise ValueError(f"the architecture of {checkpoint.path} is unknown; give --model NAME")


def register_model_config(path: Path) -> str:
    """Make an OpenCLIP model config known to open_clip, under the name of its file.

    Args:
        path: A JSON file with `embed_dim`, `vision_cfg` and `text_cfg`.

    Returns:
        The name.

    Raises:
        ValueError: If it is no such file, or open_clip has another model of that name.
    """
    config = read_json_object(path, what=f"the model config {path}")
    check_buildable(config, name=f"the model config {path}")
    known = open_clip.get_model_config(path.stem)
    if known is None:
        open_clip.add_model_config(path)
    elif known != config:
        raise ValueError(f"open_clip has another model named {path.stem}; rename {path}")
    return path.stem


def read_export_config(folder: Path) -> dict[str, Any]:
    """Read and check the `open_clip_config.json` of a folder.

    Raises:
        ValueError: If it is damaged, or `check_export_config` refuses it.
    """
    path = folder / CONFIG_NAME
    config = read_json_object(path, what=str(path))
    check_export_config(config, what=str(path))
    return config


def check_export_config(config: Any, *, what: str) -> None:
    """Refuse the content of an `open_clip_config.json` that open_clip should not be given.

    Args:
        config: What the JSON holds.
        what: What to call it in messages.

    Raises:
        ValueError: If its model cannot be built, or its preprocessing is none.
    """
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise ValueError(f"{what} has no model_cfg")
    check_preprocessing(config.get("preprocess_cfg", {}), what=what)
    check_buildable(config["model_cfg"], name=what)


def _from_config(config: Any, *, what: str) -> Architecture:
    """Register the content of an `open_clip_config.json` under a name of its own.

    By name, not by folder: open_clip would look for a Hugging Face tokenizer in the folder.
    """
    check_export_config(config, what=what)
    text = json.dumps(config["model_cfg"], sort_keys=True)
    stem = f"recorded-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{stem}.json")
        path.write_text(text, encoding="utf-8")
        register_model_config(path)
    preprocess = config.get("preprocess_cfg", {})
    names = ("mean", "std", "interpolation", "resize_mode")
    return Architecture(stem, {f"image_{name}": preprocess.get(name) for name in names})


def _from_params(path: Path) -> Architecture:
    params: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(": ")
        try:
            params[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            params[name] = text
    config = params.get("model_config")
    if config and Path(config).is_file():
        register_model_config(Path(config))
    model = str(params.get("model"))
    if model not in open_clip.list_models():
        raise ValueError(f"{path} names a model {model!r} unknown here; give its --model-config")
    options = {name: params[name] for name in _BUILD_FLAGS if params.get(name)}
    match options.get("force_image_size"):
        case [side]:
            options["force_image_size"] = side
    return Architecture(model, options)
