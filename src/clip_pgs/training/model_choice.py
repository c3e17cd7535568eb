"""Which model a run trains: one that open_clip knows, one's own config, or a folder or repository.

OpenCLIP's trainer takes RN50 where nothing is named, and passes over a broken config file.
"""

from __future__ import annotations

from pathlib import Path

import open_clip

from clip_pgs.integrations.open_clip.compat import is_bundled_model
from clip_pgs.integrations.open_clip.model_config import check_model_config, read_json_object
from clip_pgs.training.flags.config import nearest_names

# Models that bring their own weights, from a folder or from the Hugging Face Hub.
MODEL_SCHEMAS = ("hf-hub:", "local-dir:")


def choose_model(model: str | None, model_config: str | None) -> str:
    """Return the model's name; a config of the user's own is registered in open_clip.

    Args:
        model: The value of `--model`, or None.
        model_config: The value of `--model-config`, or None.

    Raises:
        ValueError: If both are missing or disagree, the model is unknown, or the file is no
            model config or takes the name of a model of open_clip.
    """
    if model_config is not None:
        name = Path(model_config).stem
        if model not in (None, name):
            raise ValueError(
                f"--model {model} and --model-config {model_config} name two models; "
                f"leave out --model or give --model {name}"
            )
        _register_model(model_config)
        return name
    if model is None:
        raise ValueError("no model is named; give --model NAME or --model-config FILE.json")
    if not model.startswith(MODEL_SCHEMAS) and model not in open_clip.list_models():
        near = nearest_names(model, open_clip.list_models())
        raise ValueError(
            f"open_clip knows no model {model!r} ({near}); a config of your own goes "
            "after --model-config"
        )
    return model


def _register_model(path: str) -> None:
    """Add a model config to open_clip, which passes over a broken file without a word."""
    if Path(path).suffix != ".json":
        raise ValueError(f"--model-config must end in .json, got {path}")
    what = f"--model-config {path}"
    check_model_config(read_json_object(Path(path), what=what), what=what)
    if is_bundled_model(Path(path).stem):
        raise ValueError(
            f"--model-config {path} has the name of a model of open_clip; rename the file"
        )
    open_clip.add_model_config(Path(path).resolve())
