"""Open a model for evaluation: a run, an export, a checkpoint, or a published model."""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from clip_pgs.checkpoint_io import newest_checkpoint
from clip_pgs.common import CHECKPOINTS_NAME
from clip_pgs.evaluation.models.architectures import (
    CONFIG_NAME,
    find_architecture,
    read_export_config,
)
from clip_pgs.evaluation.models.checkpoints import load_weights, read_checkpoint

# What open_clip looks for beside an export's config.
_EXPORT_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored.

    Attributes:
        model: An open_clip model, in eval mode where `load_model` made it.
        transform: From a PIL image to the (C, H, W) tensor the model takes.
        tokenizer: From a list of texts to the (num_texts, context_length) tensor it takes.
        name: A short name, for tables and folders.
        source: Where the weights came from, for the record.
    """

    model: nn.Module
    transform: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    name: str
    source: str


def load_model(
    source: str | Path,
    *,
    model: str | None = None,
    model_config: str | Path | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """Open a model in float32 and eval mode.

    Args:
        source: A run folder (its `export`), a folder with `open_clip_config.json`, a checkpoint
            file, `local-dir:PATH`, `hf-hub:OWNER/NAME`, or the name of an open_clip model.
        model: Architecture of a checkpoint file, by its open_clip name. By default it is what
            the file or its run records.
        model_config: The same as an OpenCLIP model config, a JSON file.
        pretrained: open_clip's tag of published weights, for `source` an open_clip model.
        device: Where the model goes.

    Raises:
        ValueError: If there is nothing at `source`, the architecture of a checkpoint is unknown,
            or the weights do not fit it.
    """
    source = str(source)
    check_source(source, model=model, model_config=model_config, pretrained=pretrained)
    path = Path(source.removeprefix("local-dir:"))
    name = model_name(source, pretrained=pretrained)

    if path.is_file():
        checkpoint = read_checkpoint(path)
        architecture = find_architecture(checkpoint, model=model, model_config=model_config)
        with _weights_follow():
            built, transform, tokenizer = _create(
                architecture.name,
                load_weights=False,
                pretrained_text=False,
                **architecture.options,
            )
        load_weights(built, checkpoint, architecture=architecture.name)
    elif path.is_dir():
        folder = _export_folder(path)
        built, transform, tokenizer = _create(f"local-dir:{folder}")
        source = str(folder)
    elif source.startswith("hf-hub:"):
        built, transform, tokenizer = _create(source)
    else:
        built, transform, tokenizer = _create(source, pretrained=pretrained)
        source = f"{source},{pretrained}"
    return LoadedModel(built.to(device).eval(), transform, tokenizer, name, source)


def check_source(
    source: str,
    *,
    model: str | None = None,
    model_config: str | Path | None = None,
    pretrained: str | None = None,
) -> None:
    """Check the arguments of `load_model` without building a model.

    Args:
        source: As for `load_model`.
        model: The same.
        model_config: The same.
        pretrained: The same.

    Raises:
        ValueError: As `load_model` does, except for weights that do not fit.
    """
    path = Path(source.removeprefix("local-dir:"))
    if path.is_file():
        find_architecture(read_checkpoint(path), model=model, model_config=model_config)
    elif path.is_dir():
        _export_folder(path)
    elif source in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(source)
        if pretrained not in tags:
            choices = f"one of {', '.join(tags)}" if tags else "but open_clip knows none"
            raise ValueError(f"{source} needs published weights, --pretrained TAG, {choices}")
    elif not source.startswith("hf-hub:"):
        raise ValueError(f"no run, export or checkpoint at {source}, and no open_clip model")


def model_name(source: str, *, pretrained: str | None = None) -> str:
    """Return a short name for a source that `load_model` opens.

    Args:
        source: As `load_model` takes it.
        pretrained: The same.
    """
    path = Path(source.removeprefix("local-dir:"))
    if not path.exists():
        last_part = source.rsplit("/", 1)[-1].removeprefix("hf-hub:")
        return f"{last_part}_{pretrained}" if pretrained else last_part
    path = path.resolve()
    if path.is_dir():
        return path.parent.name if path.name == "export" else path.name
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}_{path.stem}"
    return path.stem


def _export_folder(path: Path) -> Path:
    for folder in (path, path / "export"):
        if (folder / CONFIG_NAME).is_file():
            read_export_config(folder)
            if not any(folder.glob(f"*{ending}") for ending in _EXPORT_ENDINGS):
                raise ValueError(f"{folder} holds {CONFIG_NAME} but no weights")
            return folder
    newest = newest_checkpoint(path / CHECKPOINTS_NAME)
    if newest is not None:
        raise ValueError(
            f"{path} has no export yet; evaluate a checkpoint instead, such as {newest}"
        )
    raise ValueError(f"{path} is no run and no export: it holds no {CONFIG_NAME}")


@contextlib.contextmanager
def _weights_follow() -> Iterator[None]:
    """Silence open_clip's warning that a model has no weights yet."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _create(name: str, **options: Any) -> tuple[nn.Module, Any, Any]:
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, **options)
        return model, transform, open_clip.get_tokenizer(name)
    # open_clip reports unreachable, absent and unfitting weights alike, as these.
    except (RuntimeError, OSError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"open_clip cannot open {name}: {reason}") from error
