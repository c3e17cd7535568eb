"""A trained model as plain files that OpenCLIP opens by itself, and on the Hugging Face Hub.

`python -m clip_pgs.training.export RUN [--push-to-hub OWNER/NAME]` writes `RUN/export` from the
run's latest checkpoint. `open_clip.create_model_and_transforms("local-dir:RUN/export")` and
`open_clip.get_tokenizer("local-dir:RUN/export")` open it without this package.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
from open_clip.tokenizer import HFTokenizer

from clip_pgs.checkpoint_io import newest_checkpoint
from clip_pgs.common import (
    CHECKPOINTS_NAME,
    EXPORT_NAME,
    MODEL_CONFIG_NAME,
    WEIGHTS_NAME,
    SentenceParser,
    atomic_folder,
    refuse,
    sync,
    write_text,
)
from clip_pgs.training.build import logit_options
from clip_pgs.training.checkpoint import find_non_finite, load_checkpoint
from clip_pgs.training.options import TrainOptions

CARD_NAME = "README.md"

_TEMPLATE = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- {masking}
---
# {name}

A {model} model for [OpenCLIP](https://github.com/mlfoundations/open_clip), trained by clip-pgs
{version} {how}.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH_TO_THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:PATH_TO_THIS_FOLDER")
```
{inference}
## Training

{training}

## Cost

{cost}

## Measurements

{metrics}
"""

_logger = logging.getLogger(__name__)


def open_clip_config(options: TrainOptions, model: open_clip.CLIP) -> dict[str, Any]:
    """Return the config that rebuilds a model as the options built it, as plain types.

    Args:
        options: The run's options.
        model: The plain model.
    """
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
    used = model.visual.preprocess_cfg
    preprocess = {key: used[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return json.loads(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def write_export(checkpoint: dict[str, Any], folder: Path) -> Path:
    """Write a checkpoint's model as OpenCLIP's files, whole or not at all.

    Args:
        checkpoint: From `pack_checkpoint` or `load_checkpoint`, with this trainer's record.
        folder: Written beside itself first; one that is there is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: If the checkpoint has no record, or a weight is NaN or infinite.
        OSError: If it cannot be written; an export that is there is still there.
    """
    record = checkpoint.get("clip_pgs")
    if record is None:
        raise ValueError("the checkpoint was not written by clip_pgs.training; it has no record")
    trouble = find_non_finite({"state_dict": checkpoint["state_dict"]})
    if trouble is not None:
        raise ValueError(f"the model is not exported: {trouble}")
    with atomic_folder(folder) as unfinished:
        _write_files(checkpoint, record, unfinished)
    return folder


def _write_files(checkpoint: dict[str, Any], record: dict[str, Any], folder: Path) -> None:
    config_path = folder / MODEL_CONFIG_NAME
    write_text(config_path, json.dumps(record["open_clip_config"], indent=2) + "\n")
    # A copy of its own for each name: safetensors refuses tied weights.
    weights = {name: t.detach().cpu().clone() for name, t in checkpoint["state_dict"].items()}
    try:
        safetensors.torch.save_file(weights, folder / WEIGHTS_NAME)
    except safetensors.SafetensorError as error:
        raise OSError(f"{WEIGHTS_NAME}: {error}") from error
    # safetensors makes its file readable for its owner alone.
    (folder / WEIGHTS_NAME).chmod(config_path.stat().st_mode)
    if record["tokenizer"] is not None:
        HFTokenizer(record["tokenizer"]).save_pretrained(folder)
    write_text(folder / CARD_NAME, write_model_card(checkpoint["name"], record))
    for path in (*folder.iterdir(), folder):
        sync(path)


def tokenizer_source(options: TrainOptions) -> str | None:
    """Return which Hugging Face tokenizer a model uses; None for OpenCLIP's own."""
    name = open_clip.get_model_config(options.model)["text_cfg"].get("hf_tokenizer_name")
    if name and options.model.startswith("local-dir:"):
        return options.model.removeprefix("local-dir:")
    return name or None


def write_model_card(name: str, record: Mapping[str, Any]) -> str:
    """Describe a model in Markdown.

    Args:
        name: The run's name.
        record: What the run stored under "clip_pgs" in its checkpoint.
    """
    cost = record["cost"]
    masking = record["masking"]
    return _TEMPLATE.format(
        name=name,
        masking=f"masking-{masking}",
        model=record["model"],
        version=record["version"],
        how=_course(record),
        inference=_inference(record),
        training=_table(
            {
                "masking": masking,
                **{f"masking option `{key}`": v for key, v in record["masking_options"].items()},
                **record["data"],
                **record["recipe"],
            }
        ),
        cost=_table(
            {
                "hardware": f"{record['world_size']} x {record['device']}",
                "samples seen": f"{cost['samples']:,}",
                "optimiser steps": f"{cost['steps']:,}",
                "floating-point operations": f"{cost['flops']:.3g}",
                "of them to choose patches": _share(cost.get("selection_flops", 0), cost["flops"]),
                "wall time": str(timedelta(seconds=round(cost["seconds"]))),
            }
        ),
        metrics=_table(record["metrics"]) if record["metrics"] else "None were taken.",
    )


def _course(record: Mapping[str, Any]) -> str:
    """Say what was masked, and for how long."""
    parts = [f"the masking `{record['masking']}` of the image tower's patches"]
    if record["masking"] == "none":
        parts = ["no masking of the image tower's patches"]
    text_masking = record.get("text_masking", "none")
    if text_masking != "none":
        parts.append(f"the masking `{text_masking}` of its captions")
    how = f"with {' and '.join(parts)}"
    recipe = record["recipe"]
    if recipe.get("unmasked_epochs"):
        how = (
            f"for {recipe['epochs']} epochs {how}, then for {recipe['unmasked_epochs']} "
            f"without any, at a learning rate of up to {recipe['unmasked_lr']:g}"
        )
    return how


def _inference(record: Mapping[str, Any]) -> str:
    """Say how a model encodes images as it was trained to see them; "" for whole images."""
    if record["masking"] == "none" or record["recipe"].get("unmasked_epochs"):
        return ""
    recipe, options = record["recipe"], dict(record["masking_options"])
    if recipe.get("mask_schedule", "constant") != "constant":
        options |= {"mask_ratio": recipe["mask_ratio_end"]}
    ratio = options.pop("mask_ratio", None)
    command = ["bash clip-test.sh PATH_TO_THIS_FOLDER --inference-masking", record["masking"]]
    command += [] if ratio is None else [f"--inference-mask-ratio {ratio}"]
    if recipe.get("merge", "none") != "none":
        command.append(f"--inference-merge {recipe['merge']}")
        command += ["--inference-merge-counts"] if recipe.get("merge_counts") else []
    if options:
        pairs = (shlex.quote(f"{name}={value}") for name, value in options.items())
        command.append(f"--inference-masking-option {' '.join(pairs)}")
    return (
        "\nIt sees whole images so. In training it saw them through its masking; clip-pgs encodes "
        f"them like that, which no setting of this export does by itself:\n\n```bash\n"
        f"{' '.join(command)}\n```\n"
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if part else ""


def _table(rows: Mapping[str, Any]) -> str:
    lines = [
        f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "")
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def export_run(run_folder: Path) -> Path:
    """Export a run's latest checkpoint into its `export` folder.

    Raises:
        ValueError: If the run has no checkpoint of this trainer.
    """
    path = newest_checkpoint(run_folder / CHECKPOINTS_NAME)
    if path is None:
        raise ValueError(f"{str(run_folder)!r} has no checkpoint to export")
    return write_export(load_checkpoint(path), run_folder / EXPORT_NAME)


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
    config = json.loads(config_path.read_text("utf-8"))
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        # The tokenizer's files travel with the model.
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo_id
        write_text(config_path, json.dumps(config, indent=2) + "\n")
    api.upload_folder(
        repo_id=repo_id, folder_path=export_folder, commit_message="Upload a CLIP-PGS model"
    )
    return str(address)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = SentenceParser(
        prog="python -m clip_pgs.training.export", description=export_run.__doc__
    )
    parser.add_argument("run", type=Path, help="a run folder, such as logs/demo")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the export as well")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = export_run(arguments.run)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        sys.stderr.write(f"error: the export cannot be written: {error}\n")
        return 1
    _logger.info("export: %s", folder)
    if arguments.push_to_hub:
        _logger.info(
            "uploaded: %s", push_to_hub(folder, arguments.push_to_hub, private=arguments.private)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
