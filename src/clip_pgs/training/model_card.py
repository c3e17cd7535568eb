"""The README of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

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

## Training

{training}

## Cost

{cost}

## Measurements

{metrics}
"""


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
