"""A trained model as plain files that OpenCLIP opens by itself, and on the Hugging Face Hub.

`RUN/export` is the run's latest checkpoint; `clip_pgs.training.export_command` writes it again.
`open_clip.create_model_and_transforms("local-dir:RUN/export")` and
`open_clip.get_tokenizer("local-dir:RUN/export")` open it without this package.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import open_clip
import safetensors.torch
import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg

from clip_pgs.checkpoint_reading import (
    RUN_FILE,
    find_non_finite,
    load_checkpoint,
    named_latest,
    newest_checkpoint,
)
from clip_pgs.common import MODEL_SCHEMAS, explained, history_of, one_sentence
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EVAL_NAME,
    EXPORT_NAME,
    MAX_RUN_FILE_BYTES,
    MODEL_CONFIG_NAME,
    WEIGHTS_NAME,
    atomic_folder,
    read_file,
    sync,
    write_json,
    write_text,
)
from clip_pgs.integrations import is_mae_config
from clip_pgs.integrations.open_clip.compat import no_foreign_code
from clip_pgs.integrations.open_clip.model_config import IMAGE_SETTINGS, MISFITS
from clip_pgs.tables import counted, markdown_text, percent
from clip_pgs.training.build import autoencoder_record, logit_options
from clip_pgs.training.checkpoint import damaged_entry
from clip_pgs.training.options import TrainOptions

CARD_NAME = "README.md"
_TEMPLATE_NAME = "model_card.md.jinja"

# What stands in a card for "this folder", until it is uploaded.
_FOLDER = "PATH_TO_THIS_FOLDER"
_PLACE = f"local-dir:{_FOLDER}"
# Measurements that are shares: OpenCLIP's, and those of an evaluation, SUITE/DATASET/METRIC.
_SHARES = re.compile(r".+(_R@\d+|-top\d)|[^/]+/[^/]+/[^/]+")

# What the metadata of a card state of its license.
_LICENSE_FIELDS = ("license", "license_name", "license_link")
# The Hub's names of clip_benchmark's tasks, where they differ by more than dashes.
_TASKS = {
    "zeroshot_classification": "zero-shot-image-classification",
    "zeroshot_retrieval": "zero-shot-retrieval",
    "linear_probe": "image-classification",
}

_logger = logging.getLogger(__name__)


def open_clip_config(options: TrainOptions, model: Any = None) -> dict[str, Any]:
    """Return the config that rebuilds a model as the options build it, as plain types.

    That of a masked autoencoder has transformers' config in place of OpenCLIP's.

    Args:
        options: The run's options.
        model: The plain model. Without it, how published weights see images is left out.
    """
    if options.mae is not None:
        return autoencoder_record(options)
    config = copy.deepcopy(open_clip.get_model_config(options.model))
    config.update(logit_options(options))
    if options.force_quick_gelu:
        config["quick_gelu"] = True
    if options.force_custom_text:
        config["custom_text"] = True
    if options.force_context_length is not None:
        config["text_cfg"]["context_length"] = options.force_context_length
    if options.force_image_size is not None:
        size = options.force_image_size
        config["vision_cfg"]["image_size"] = size[0] if len(size) == 1 else list(size)
    # Weights come from our file; base weights would be downloaded for nothing.
    for tower, key in (("vision_cfg", "timm_model"), ("text_cfg", "hf_model")):
        if f"{key}_name" in config[tower]:
            config[tower][f"{key}_pretrained"] = False
    if model is not None:
        used = model.visual.preprocess_cfg
    else:
        brings_own = options.model.startswith(MODEL_SCHEMAS) or open_clip.get_pretrained_cfg(
            options.model, options.pretrained
        )
        used = {} if brings_own else asdict(PreprocessCfg())
        given = {key: getattr(options, f"image_{key}") for key in IMAGE_SETTINGS}
        used |= {key: value for key, value in given.items() if value is not None}
    preprocess = {key: used[key] for key in IMAGE_SETTINGS if key in used}
    return json.loads(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def write_export(
    checkpoint: dict[str, Any],
    folder: Path,
    *,
    found: str | None,
    license_name: str | None = None,
) -> Path:
    """Write a checkpoint's model as OpenCLIP's files, whole or not at all.

    Args:
        checkpoint: From `pack_checkpoint` or `load_checkpoint`, with this trainer's record.
        folder: Written beside itself first. Of one that is there, files of these names are
            replaced, and others stay.
        found: What the masking found in training, from `found_in_training`.
        license_name: Of the weights, as the Hub calls it; None states that of the card there.

    Returns:
        The folder.

    Raises:
        ValueError: If the checkpoint has no record, or not a whole one, its tokenizer cannot be
            read, or a weight is NaN or infinite.
        OSError: If it cannot be written, or no folder has its name; what is there is still there.
    """
    record = checkpoint.get("clip_pgs")
    if record is None:
        raise ValueError("the checkpoint was not written by clip_pgs.training; it has no record")
    trouble = find_non_finite({"state_dict": checkpoint["state_dict"]})
    trouble = trouble or damaged_entry(checkpoint, is_exported=True)
    if trouble is not None:
        raise ValueError(f"the model is not exported: {trouble}")
    stated = {"license": license_name} if license_name else _stated_license(folder / CARD_NAME)
    with atomic_folder(folder) as unfinished:
        name = str(checkpoint.get("name", ""))
        with explained("its clip_pgs record cannot be described", *MISFITS, jinja2.TemplateError):
            card = write_model_card(name, record, found=found, license_fields=stated)
        _write_files(checkpoint, record, card, unfinished)
        if folder.exists():
            names = {path.name for path in unfinished.iterdir()}
            # Others are not ours to remove.
            shutil.copytree(
                folder,
                unfinished,
                symlinks=True,
                dirs_exist_ok=True,
                ignore=lambda place, found: names if place == str(folder) else (),
            )
    return folder


def _write_files(
    checkpoint: dict[str, Any], record: dict[str, Any], card: str, folder: Path
) -> None:
    write_text(folder / CARD_NAME, card)
    # A copy of its own for each name: safetensors refuses tied weights.
    weights = {name: t.detach().cpu().clone() for name, t in checkpoint["state_dict"].items()}
    weights_name, metadata = WEIGHTS_NAME, None
    configs = {MODEL_CONFIG_NAME: record["open_clip_config"]}
    if _is_autoencoder(record):
        from clip_pgs.integrations.open_clip.mae import MAE_WEIGHTS_NAME, hub_configs, hub_weights

        weights_name, metadata = MAE_WEIGHTS_NAME, {"format": "pt"}
        configs, weights = hub_configs(record["open_clip_config"]), hub_weights(weights)
    with explained("its clip_pgs record has no model config as JSON has it", *MISFITS):
        for name, config in configs.items():
            write_json(folder / name, config)
    with explained(weights_name, safetensors.SafetensorError, as_kind=OSError):
        safetensors.torch.save_file(weights, folder / weights_name, metadata=metadata)
    # safetensors makes its file readable for its owner alone.
    (folder / weights_name).chmod((folder / CARD_NAME).stat().st_mode)
    if record["tokenizer"] is not None:
        what = f"the tokenizer {record['tokenizer']!r} of the record cannot be read"
        with explained(what, *MISFITS, OSError), no_foreign_code():
            tokenizer = HFTokenizer(record["tokenizer"])
        tokenizer.save_pretrained(folder)
    for path in (*folder.iterdir(), folder):
        sync(path)


def _stated_license(card: Path) -> dict[str, Any]:
    """Return what the metadata of an earlier export's card state of the license."""
    metadata: Any = None
    # Somebody may have written it anew.
    if card.is_file():
        try:
            # The library reads a file of any size.
            read_file(card, what="it", max_bytes=MAX_RUN_FILE_BYTES)
            metadata = metadata_load(card)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = f"the metadata of {card} cannot be read: {one_sentence(error)}"
            _logger.warning("%s; a license that they state is not kept", reason)
    found = {name: (metadata or {}).get(name) for name in _LICENSE_FIELDS}
    stated = {name: value for name, value in found.items() if value is not None}
    for name, value in list(stated.items()):
        if value and all(map(_is_name, value if isinstance(value, list) else [value])):
            continue
        del stated[name]
        said = "%s states the %s %s, which is not kept: it must be a name or a list of names"
        _logger.warning(said, card, name, one_sentence(repr(value)))
    return stated


def _is_name(value: Any) -> bool:
    # YAML reads some names as numbers or dates.
    return value not in ("", None) and not isinstance(value, bool | list | dict)


def _is_autoencoder(record: Mapping[str, Any]) -> bool:
    return is_mae_config(record["open_clip_config"]["model_cfg"])


def tokenizer_source(options: TrainOptions) -> str | None:
    """Return which Hugging Face tokenizer a model uses; None for OpenCLIP's own, or none."""
    if options.mae is not None:
        return None
    name = open_clip.get_model_config(options.model)["text_cfg"].get("hf_tokenizer_name")
    if name and options.model.startswith("local-dir:"):
        return options.model.removeprefix("local-dir:")
    return name or None


def write_model_card(
    name: str,
    record: Mapping[str, Any],
    *,
    found: str | None = None,
    license_fields: Mapping[str, Any] | None = None,
    scores: Sequence[EvalResult] = (),
) -> str:
    """Describe a model in Markdown, with metadata for the Hub.

    Args:
        name: The run's name.
        record: What the run stored under "clip_pgs" in its checkpoint.
        found: What the masking found in training, from `found_in_training`.
        license_fields: What the metadata state of the license of the weights, by the Hub's names
            for it: `license`, and beside "other" `license_name` and `license_link`.
        scores: What the model reached.
    """
    cost, is_mae, stated = record["cost"], _is_autoencoder(record), license_fields or {}
    metadata = ModelCardData(
        library_name="transformers" if is_mae else "open_clip",
        pipeline_tag="image-feature-extraction" if is_mae else "zero-shot-image-classification",
        **stated,
        tags=["vit_mae" if is_mae else "clip", f"masking-{record['masking']}"],
        model_name=name if scores else None,
        eval_results=list(scores) or None,
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    template = environment.from_string(Path(__file__).with_name(_TEMPLATE_NAME).read_text("utf-8"))
    unmeasured = cost.get("unmeasured_steps", 0)
    left_out = f", without the first {counted(unmeasured, 'step')}" if unmeasured else ""
    masking_options = record["masking_options"]
    if is_mae:
        # Where no option gives it, the model's config does.
        ratio = record["open_clip_config"]["model_cfg"].get("mask_ratio")
        masking_options = {"mask_ratio": ratio, **masking_options}
    options = {f"masking option `{key}`": v for key, v in masking_options.items()}
    return template.render(
        name=name,
        metadata=metadata.to_yaml(),
        record=record,
        recipe=record["recipe"],
        is_mae=is_mae,
        folder=_FOLDER,
        command=_test_command(record),
        found=found,
        scores=scores,
        history=history_of(record),
        training={"masking": record["masking"], **options, **record["data"], **record["recipe"]},
        cost={
            "hardware": f"{record['world_size']} x {record['device']}",
            "samples seen": f"{cost['samples']:,}",
            "optimizer steps": f"{cost['steps']:,}",
            "floating-point operations": f"{cost['flops']:.3g}{left_out}",
            "of them to choose patches": _share(cost.get("selection_flops", 0), cost["flops"]),
            "wall time": f"{timedelta(seconds=round(cost['seconds']))}{left_out}",
        },
        metrics={
            key: f"{percent(value)} %" if _SHARES.fullmatch(key) else value
            for key, value in record["metrics"].items()
        },
        license=[
            str(name)
            for value in stated.values()
            for name in (value if isinstance(value, list) else [value])
        ],
    )


def _test_command(record: Mapping[str, Any]) -> str:
    """Return what evaluates a model as it was trained to see images; "" for whole images."""
    recipe, options = record["recipe"], dict(record["masking_options"])
    if _is_autoencoder(record) or record["masking"] == "none" or recipe.get("unmasked_epochs"):
        return ""
    if recipe.get("mask_schedule", "constant") != "constant":
        options |= {"mask_ratio": recipe["mask_ratio_end"]}
    ratio = options.pop("mask_ratio", None)
    command = [f"clip-pgs test {_PLACE} --inference-masking", record["masking"]]
    command += [] if ratio is None else [f"--inference-mask-ratio {ratio}"]
    if recipe.get("merge", "none") != "none":
        command.append(f"--inference-merge {recipe['merge']}")
        command += ["--inference-merge-counts"] if recipe.get("merge_counts") else []
    if options:
        pairs = (shlex.quote(f"{name}={value}") for name, value in options.items())
        command.append(f"--inference-masking-option {' '.join(pairs)}")
    return " ".join(command)


def found_in_training(checkpoint: Mapping[str, Any]) -> str | None:
    """Return what the masking of a checkpoint found that no export holds.

    Args:
        checkpoint: From `pack_checkpoint` or `load_checkpoint`.

    Returns:
        "teacher" or "thresholds"; None where it found nothing.
    """
    state = checkpoint.get("masking_state")
    # A file of strangers holds anything.
    parts = state if isinstance(state, Mapping) else {}
    if not _is_empty(parts.get("teacher")):
        return "teacher"
    numbers = parts.get("strategy")
    # A strategy that was given its threshold has lists, and nothing in them.
    is_empty = not isinstance(numbers, Mapping) or all(map(_is_empty, numbers.values()))
    return None if is_empty else "thresholds"


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (Mapping, list, tuple)) and not value)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if part else ""


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return markdown_text(text)


def export_run(run_folder: Path, *, license_name: str | None = None) -> Path:
    """Export a run's latest checkpoint into its `export` folder, with the scores of its weights.

    Args:
        run_folder: The run's; its `eval` has the scores, where there are any.
        license_name: Of the weights, as the Hub calls it; None states that of the card there.

    Raises:
        ValueError: If the run has no checkpoint of this trainer that is whole, or if the one that
            `latest` names is gone or damaged and there is an export, which could be its.
        OSError: If it cannot be written, see `write_export`.
    """
    damaged: dict[Path, ValueError] = {}
    path = newest_checkpoint(run_folder / CHECKPOINTS_NAME, on_damage=damaged.__setitem__)
    if path is None and damaged:
        raise ValueError(f"no checkpoint is whole: {'; '.join(map(str, damaged.values()))}")
    if path is None:
        raise ValueError(f"{str(run_folder)!r} has no checkpoint to export")
    for error in damaged.values():
        _logger.warning("%s; it is passed over", error)
    folder = run_folder / EXPORT_NAME
    latest = named_latest(run_folder / CHECKPOINTS_NAME)
    if latest is not None and RUN_FILE.fullmatch(latest.name) and folder.exists():
        trouble = "damaged" if latest in damaged else "" if latest.is_file() else "gone"
        if trouble:
            raise ValueError(
                f"{latest} is {trouble}, and {folder} may be its export; put a copy back, or "
                f"remove {folder} to export {path.name}"
            )
    checkpoint = load_checkpoint(path)
    with explained(str(path)):
        found = found_in_training(checkpoint)
        write_export(checkpoint, folder, found=found, license_name=license_name)
    if scores := _scores(run_folder / EVAL_NAME, folder):
        card = write_model_card(
            str(checkpoint.get("name", "")),
            checkpoint["clip_pgs"],
            found=found,
            # That of the card which was written just now.
            license_fields=_stated_license(folder / CARD_NAME),
            scores=scores,
        )
        write_text(folder / CARD_NAME, card)
    return folder


def _scores(eval_folder: Path, export_folder: Path) -> list[EvalResult]:
    """Return what the suites found of just the weights of an export: the main metrics."""
    # A command may look at both, training never looks at evaluation.
    from clip_pgs.evaluation.models import load_model, weights_digest
    from clip_pgs.evaluation.report.scores import suite_of
    from clip_pgs.evaluation.results import DONE, read_results

    results = [result for result in read_results(eval_folder) if result.status == DONE]
    if not results:
        return []
    digest = weights_digest(load_model(export_folder).model)
    found = []
    for result in results:
        if result.weights_digest != digest:
            continue
        suite = suite_of(result.suite)
        for metric in suite.main_metrics or result.metrics:
            value = result.metrics.get(metric)
            if value is not None:
                label = f"{suite.title}, {suite.metrics.get(metric, metric)}"
                through = result.inference_masking
                found.append(
                    EvalResult(
                        task_type=_TASKS.get(result.task, result.task.replace("_", "-")),
                        dataset_type=result.dataset,
                        dataset_name=result.dataset,
                        metric_type=metric,
                        metric_value=float(percent(value)),
                        metric_name=f"{label}, through {through}" if through else label,
                    )
                )
    return found


def push_to_hub(export_folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an export to the Hugging Face Hub, making the repository where there is none.

    Args:
        export_folder: From `export_run`.
        repo_id: OWNER/NAME.
        private: Make a new repository a private one.

    Returns:
        The repository's address.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    config_path = export_folder / MODEL_CONFIG_NAME
    # A masked autoencoder has none, nor a tokenizer.
    config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    if config.get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name"):
        # The tokenizer's files travel with the model.
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo_id
        write_json(config_path, config)
    card_path = export_folder / CARD_NAME
    card = card_path.read_text("utf-8").replace(_PLACE, f"hf-hub:{repo_id}")
    write_text(card_path, card.replace(_FOLDER, repo_id))
    api.upload_folder(
        repo_id=repo_id, folder_path=export_folder, commit_message="Upload a CLIP-PGS model"
    )
    return str(address)
