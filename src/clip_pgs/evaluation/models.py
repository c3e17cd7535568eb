"""Open a model for evaluation: a run, an export, a checkpoint, or a published model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from clip_pgs import checkpoint_reading
from clip_pgs.checkpoint_reading import (
    check_sum,
    config_of,
    find_non_finite,
    fit_weights,
    named_latest,
    newest_checkpoint,
    read_checkpoint,
    recorded_config,
)
from clip_pgs.common import (
    explained,
    find_config,
    is_first_process,
    literal,
    one_sentence,
    silenced,
)
from clip_pgs.evaluation.masked_inference import InferenceMasking, choose_masking
from clip_pgs.evaluation.results import model_name, plain_record
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EXPORT_NAME,
    HF_CONFIG_NAME,
    MAX_RUN_FILE_BYTES,
    MODEL_CONFIG_NAME,
    PARAMS_NAME,
    absence,
    list_folder,
    read_file,
    read_json_object,
)
from clip_pgs.integrations import is_mae_config
from clip_pgs.integrations.open_clip.compat import no_foreign_code, weights_read_by
from clip_pgs.integrations.open_clip.model_config import (
    IMAGE_SETTINGS,
    changed_model,
    check_build_options,
    check_buildable,
    check_preprocessing,
    register_model_config,
)

logger = logging.getLogger(__name__)

# What open_clip looks for beside an export's config.
_EXPORT_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
# Which kind of source each of these arguments of `load_model` is about.
_CHECKPOINT, _NAME = "checkpoint file", "open_clip model"
KIND_OF = {"model": _CHECKPOINT, "model_config": _CHECKPOINT, "pretrained": _NAME}
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
class LoadedModel:
    """A model ready to be scored.

    Attributes:
        model: An open_clip model, in eval mode where `load_model` made it.
        transform: From a PIL image to the (C, H, W) tensor the model takes.
        tokenizer: From a list of texts to the (num_texts, context_length) tensor it takes.
        name: A short name, for tables and folders.
        source: Where the weights came from, for the record.
        masking: How images are masked before they are encoded; None leaves them whole.
        training: What this trainer's checkpoint of just these weights says of its run; {} where
            nothing is known.
    """

    model: nn.Module
    transform: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    name: str
    source: str
    masking: InferenceMasking | None = None
    training: dict[str, Any] = field(default_factory=dict)


def load_model(
    source: str | Path,
    *,
    model: str | None = None,
    model_config: str | Path | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    inference_masking: str | None = None,
    inference_options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Open a model in float32 and eval mode.

    Args:
        source: A run folder (its `export`), a folder with `open_clip_config.json` or of a ViT-MAE
            of transformers, a checkpoint file, `local-dir:PATH`, `hf-hub:OWNER/NAME`, or the name
            of an open_clip model.
        model: Architecture of a checkpoint file: its open_clip name, or `local-dir:FOLDER` of an
            export, whose weights are not read. By default it is what the file or its run records.
        model_config: The same as an OpenCLIP model config, a JSON file.
        pretrained: open_clip's tag of published weights, for `source` an open_clip model.
        device: Where the model goes.
        inference_masking: A strategy through which images are encoded, or "run"; see
            `choose_masking`. The model itself stays a plain one.
        inference_options: Its options, such as {"mask_ratio": 0.5}.

    Raises:
        ValueError: If there is nothing at `source`, the architecture of a checkpoint is unknown,
            the weights do not fit it, or its images cannot be masked so.
    """
    source = str(source)
    build, origin, kind = _resolve(source, model, model_config, pretrained)
    masking = choose_masking(inference_masking, inference_options, weights=origin)
    built, transform, tokenizer = build()
    training: dict[str, Any] = {}
    if kind == _CHECKPOINT:
        training = plain_record(read_checkpoint(origin, use_mmap=True).get("clip_pgs"))
    elif Path(origin).name == EXPORT_NAME:
        training = _training_of_export(Path(origin).parent, built)
    built = built.to(device).eval()
    if masking is not None:
        # Whether the tower can be masked shows before any image is read.
        with masking.applied(built):
            pass
    name = model_name(source, pretrained=pretrained)
    return LoadedModel(built, transform, tokenizer, name, origin, masking, training)


def check_source(
    source: str,
    *,
    model: str | None = None,
    model_config: str | Path | None = None,
    pretrained: str | None = None,
    inference_masking: str | None = None,
    inference_options: Mapping[str, Any] | None = None,
) -> str:
    """Check the arguments of `load_model` without building a model.

    Args:
        source: As for `load_model`.
        model: The same.
        model_config: The same.
        pretrained: The same.
        inference_masking: The same.
        inference_options: The same.

    Returns:
        The kind of source; `KIND_OF` says which arguments are about it.

    Raises:
        ValueError: As `load_model` does, except for what the model's weights and tower decide.
    """
    _, origin, kind = _resolve(source, model, model_config, pretrained)
    choose_masking(inference_masking, inference_options, weights=origin)
    return kind


Built = tuple[nn.Module, Any, Any]  # a model, its transform and its tokenizer
# How open_clip builds a model: what `create_model` takes, and keyword arguments beside it.
_Architecture = tuple[str, dict[str, Any]]


def _resolve(
    source: str, model: str | None, model_config: str | Path | None, pretrained: str | None
) -> tuple[Callable[[], Built], str, str]:
    """Return what builds the model of a source, where its weights come from, and its kind.

    Results are read from another folder, and hold two models of one name apart by their place: it
    is absolute.
    """
    path = Path(source.removeprefix("local-dir:"))
    # os.path: a name that is too long is that of none.
    if os.path.isfile(path):
        source = full_path(path)
        checkpoint = _read(path)
        recorded = checkpoint.config if isinstance(checkpoint.config, dict) else {}
        if is_mae_config(recorded.get("model_cfg")) and model is None and model_config is None:
            return partial(_build_autoencoder, checkpoint), source, _CHECKPOINT
        architecture = _find_architecture(checkpoint, model=model, model_config=model_config)
        return partial(_build_checkpoint, checkpoint, architecture), source, _CHECKPOINT
    if os.path.isdir(path):
        folder = next((f for f in (path, path / EXPORT_NAME) if _holds_autoencoder(f)), None)
        if folder is not None:
            return partial(_build_autoencoder, folder), full_path(folder), "folder"
        folder = _export_folder(path)
        return partial(_create, f"local-dir:{folder}"), full_path(folder), "folder"
    if source.startswith("hf-hub:"):
        return partial(_create, source), source, "model of the Hub"
    if source not in open_clip.list_models():
        raise ValueError(
            f"no run, export or checkpoint at {source}, which {absence(path)}, and no open_clip "
            "model"
        )
    tags = open_clip.list_pretrained_tags_by_model(source)
    if pretrained not in tags:
        choices = f"one of {', '.join(tags)}" if tags else "but open_clip knows none"
        raise ValueError(f"{source} needs published weights, --pretrained TAG, {choices}")
    return partial(_create, source, pretrained=pretrained), f"{source},{pretrained}", _NAME


def full_path(path: str | Path) -> str:
    """Return where a model lies, the same from each working directory and through each link."""
    if not os.path.isfile(path):
        return os.path.realpath(path)
    # A file's own name stays where it is a link: it may tell the epoch.
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _holds_autoencoder(folder: Path) -> bool:
    """Return whether transformers would open a folder as a masked autoencoder."""
    path = folder / HF_CONFIG_NAME
    if not path.is_file() or (folder / MODEL_CONFIG_NAME).is_file():
        return False
    return is_mae_config(read_json_object(path, what=str(path)))


def _build_autoencoder(source: _Checkpoint | Path) -> Built:
    from clip_pgs.integrations.open_clip.mae import build_mae, load_mae, no_tokens

    if isinstance(source, Path):
        model = load_mae(source)
    else:
        check_sum(source.path)
        model = build_mae(source.config or {}, source.state_dict, what=str(source.path))
    return model, model.transform(is_train=False), no_tokens


def _export_folder(path: Path) -> Path:
    for folder in (path, path / EXPORT_NAME):
        if (folder / MODEL_CONFIG_NAME).is_file():
            _check_export_folder(folder)
            weights = _weight_files(folder)
            if not weights or not all(map(Path.is_file, weights)):
                raise ValueError(f"{folder} holds {MODEL_CONFIG_NAME} but no file of weights")
            return folder
    newest = newest_checkpoint(path / CHECKPOINTS_NAME)
    if newest is not None:
        raise ValueError(f"{path} has no export yet; evaluate a checkpoint, such as {newest}")
    raise ValueError(f"{path} is no run and no export: it holds no {MODEL_CONFIG_NAME}")


def _weight_files(export: Path) -> list[Path]:
    return [path for path in list_folder(export) if path.suffix in _EXPORT_ENDINGS]


def _training_of_export(run: Path, exported: nn.Module) -> dict[str, Any]:
    """Return what a run's newest checkpoint says, or say that the run has trained on since.

    Args:
        run: The run's folder.
        exported: The model of its export.
    """
    export = run / EXPORT_NAME
    # Of copies no time tells which is later.
    try:
        newest = named_latest(run / CHECKPOINTS_NAME)
        if newest is not None and newest.is_file():
            checkpoint = read_checkpoint(newest, use_mmap=True)
            if _are_weights(checkpoint["state_dict"], exported):
                return plain_record(checkpoint.get("clip_pgs"))
            if is_first_process():
                logger.warning(
                    "%s has trained on since it was exported: %s is evaluated, and %s is newer; "
                    "`clip-pgs export %s` exports it",
                    *(run, export, newest, run),
                )
    except PermissionError as error:
        if is_first_process():
            said = "the results will not tell the training of %s: %s"
            logger.warning(said, run, one_sentence(error))
    except (OSError, ValueError):
        # A run that trains may remove a checkpoint meanwhile.
        pass
    return {}


def _are_weights(given: Mapping[str, Tensor], model: nn.Module) -> bool:
    own = model.state_dict()
    fitted = fit_weights(given, model)
    return all(torch.equal(tensor.to(own[name]), own[name]) for name, tensor in fitted.items())


def _create(name: str, **options: Any) -> Built:
    # Of a folder; what the Hub has is as its author trained it.
    is_local = name.startswith("local-dir:")
    reading = weights_read_by(_read_weights, _say_misfit) if is_local else nullcontext()
    try:
        with no_foreign_code(), reading:
            model, _, transform = open_clip.create_model_and_transforms(name, **options)
            length = options.get("force_context_length")
            return model, transform, open_clip.get_tokenizer(name, context_length=length)
    # open_clip reports unreachable, absent and unfitting weights alike, as these.
    except (RuntimeError, OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"open_clip cannot open {name}: {reason}") from error


def _read_weights(path: str) -> dict[str, Tensor]:
    return read_checkpoint(path, use_mmap=True)["state_dict"]


def _say_misfit(model: nn.Module, path: str, error: Exception) -> str:
    return str(error)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint file: its weights, and the `open_clip_config.json` that this trainer adds."""

    path: Path
    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None


def _read(path: Path) -> _Checkpoint:
    """Open a checkpoint; nothing in it is run, and weights are read when they are used."""
    content = read_checkpoint(path, use_mmap=True)
    return _Checkpoint(path, content["state_dict"], recorded_config(content))


def _build_checkpoint(checkpoint: _Checkpoint, architecture: _Architecture) -> Built:
    """Build a model and copy the weights of a checkpoint into it.

    Unlike open_clip's own loading it never resizes a position embedding: a wrong image size
    would change the scores in silence.
    """
    name, options = architecture
    options = dict(options)
    fill_color = options.pop("image_fill_color", None)
    # open_clip warns that a model has no weights yet.
    with silenced(logging.WARNING):
        model, transform, tokenizer = _create(
            name, load_weights=False, pretrained_text=False, **options
        )
    check_sum(checkpoint.path)
    state_dict = dict(checkpoint.state_dict)
    if "logit_bias" in state_dict and getattr(model, "logit_bias", None) is None:
        model.logit_bias = nn.Parameter(torch.zeros_like(state_dict["logit_bias"]))
    with explained(f"{checkpoint.path} does not fit {name}"):
        state_dict = fit_weights(state_dict, model)
    model.load_state_dict(state_dict)
    visual: Any = model.visual
    if fill_color is not None:
        # open_clip has no option for it.
        visual.preprocess_cfg = {**visual.preprocess_cfg, "fill_color": fill_color}
        transform = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    present = {**_described(name, options), "preprocess_cfg": visual.preprocess_cfg}
    recorded = checkpoint.config or config_of(checkpoint.path, {})
    if recorded is None and (of_run := _of_run(checkpoint)) is not None:
        recorded = _described(*of_run)
    changes = changed_model(recorded, present)
    if changes and is_first_process():
        logger.warning(
            "%s was trained with other settings than those of %s, which is evaluated: %s",
            *(checkpoint.path, name, ", ".join(changes)),
        )
    return model, transform, tokenizer


def _find_architecture(
    checkpoint: _Checkpoint, *, model: str | None, model_config: str | Path | None
) -> _Architecture:
    """Find the architecture of a checkpoint.

    It is the caller's if named; else what the checkpoint itself records, as this trainer's do;
    else the `open_clip_config.json` beside it or in the export of its run; else the `params.txt`
    of its run, which open_clip's trainer leaves too.
    """
    if model is not None and model_config is not None:
        raise ValueError("give the architecture as a model name or as a model config, not both")
    if model_config is not None:
        return register_model_config(Path(find_config(str(model_config), "models"))), {}
    if model is not None:
        if not _is_known(model):
            raise ValueError(
                f"open_clip knows no model {model!r}, and it is no local-dir:FOLDER with "
                f"{MODEL_CONFIG_NAME}; give a model config instead"
            )
        of_run = None if config_of(checkpoint.path, {}) else _of_run(checkpoint)
        return of_run if of_run is not None and of_run[0] == model else (model, {})
    if checkpoint.config is not None:
        return _from_config(checkpoint.config, what=f"the model config in {checkpoint.path}")

    for folder in _folders_of(checkpoint):
        for config_folder in (folder, folder.parent / EXPORT_NAME):
            if (config_folder / MODEL_CONFIG_NAME).is_file():
                _check_export_folder(config_folder)
                return f"local-dir:{config_folder}", {}
    if (params_path := _params_of(checkpoint)) is not None:
        return _from_params(params_path)
    raise ValueError(f"the architecture of {checkpoint.path} is unknown; give --model NAME")


def _folders_of(checkpoint: _Checkpoint) -> list[Path]:
    """Return where a file lies, and where the one that it links to does, as in the Hub's cache."""
    path = checkpoint.path
    return list(dict.fromkeys((path.absolute().parent, path.resolve().parent)))


def _params_of(checkpoint: _Checkpoint) -> Path | None:
    paths = (folder.parent / PARAMS_NAME for folder in _folders_of(checkpoint))
    return next((path for path in paths if path.is_file()), None)


def _of_run(checkpoint: _Checkpoint) -> _Architecture | None:
    """Return the architecture in the parameters of a run; None where it cannot be had.

    It is asked for beside the caller's, who may have named another for just that reason.
    """
    path = None if checkpoint.config is not None else _params_of(checkpoint)
    with suppress(ValueError):
        return None if path is None else _from_params(path)
    return None


def _described(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an `open_clip_config.json` would say of an architecture."""
    config: Any = open_clip.get_model_config(name)
    towers = (("vision_cfg", "image_size"), ("text_cfg", "context_length"))
    for tower, key in towers:
        if options.get(f"force_{key}"):
            config[tower][key] = options[f"force_{key}"]
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    given = {key: options.get(f"image_{key}") for key in IMAGE_SETTINGS}
    known = PreprocessCfg(**{key: value for key, value in given.items() if value is not None})
    return {"model_cfg": config, "preprocess_cfg": asdict(known)}


def _is_known(model: str) -> bool:
    """Return whether open_clip can build a model of a name, or of local-dir:FOLDER."""
    if not model.startswith("local-dir:"):
        return model in open_clip.list_models()
    folder = Path(model.removeprefix("local-dir:"))
    # os.path: a name that is too long is that of no file.
    if not os.path.isfile(folder / MODEL_CONFIG_NAME):
        return False
    _check_export_folder(folder)
    return True


def _check_export_folder(folder: Path) -> None:
    """Refuse an `open_clip_config.json` that is damaged or that open_clip should not be given."""
    path = folder / MODEL_CONFIG_NAME
    _check_export_config(read_json_object(path, what=str(path)), what=str(path))


def _check_export_config(config: Any, *, what: str) -> None:
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise ValueError(f"{what} has no model_cfg")
    check_preprocessing(config.get("preprocess_cfg", {}), what=what)
    check_buildable(config["model_cfg"], name=what)


def _from_config(config: Any, *, what: str) -> _Architecture:
    """Register the content of an `open_clip_config.json` under a name of its own.

    By name, not by folder: open_clip would look for a Hugging Face tokenizer in the folder.
    """
    _check_export_config(config, what=what)
    text = json.dumps(config["model_cfg"], sort_keys=True)
    stem = f"recorded-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{stem}.json")
        path.write_text(text, encoding="utf-8")
        register_model_config(path)
    preprocess = config.get("preprocess_cfg", {})
    names = (*IMAGE_SETTINGS, "fill_color")
    return stem, {f"image_{name}": preprocess.get(name) for name in names}


def _from_params(path: Path) -> _Architecture:
    params: dict[str, Any] = {}
    data = read_file(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
    for line in data.decode("utf-8", "replace").splitlines():
        name, _, text = line.partition(": ")
        params[name] = literal(text)
    config = params.get("model_config")
    if config and not isinstance(config, str):
        raise ValueError(f"{path}: model_config takes the name of a file, got {config!r}")
    # os.path: a name that is too long is that of no file.
    if config and os.path.isfile(config):
        register_model_config(Path(config))
    model = str(params.get("model"))
    if not _is_known(model):
        raise ValueError(f"{path} names a model {model!r} unknown here; give its --model-config")
    options = {name: params[name] for name in _BUILD_FLAGS if params.get(name)}
    # The trainer takes the images' settings of published weights that it starts from.
    published = open_clip.get_pretrained_cfg(model, str(params.get("pretrained")))
    for key in IMAGE_SETTINGS:
        if published.get(key):
            options.setdefault(f"image_{key}", published[key])
    match options.get("force_image_size"):
        case [side]:
            options["force_image_size"] = side
    check_build_options(options, what=str(path))
    return model, options


def check_finite(model: nn.Module, *, name: str) -> None:
    """Refuse a model that holds a NaN or an infinity.

    A model of NaN features is not stopped by the metrics: it gets numbers that look plausible.

    Args:
        model: The model to be scored.
        name: What to call it in the message.

    Raises:
        ValueError: If a parameter or buffer holds a value that is not finite.
    """
    if (trouble := find_non_finite({"state_dict": model.state_dict()})) is not None:
        raise ValueError(
            f"the weights of {name} are not finite: {trouble.removeprefix('state_dict/')}"
        )


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the weights, the same whatever file they came from.

    Args:
        model: The model to be scored.

    Returns:
        SHA-256, 64 hexadecimal digits; see `clip_pgs.checkpoint_reading.weights_digest`.
    """
    return checkpoint_reading.weights_digest(model.state_dict())
