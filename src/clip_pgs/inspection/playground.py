"""What the page of `clip-pgs inspect app` shows, without the page: pictures, numbers and lines."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clip_pgs.common import explained, one_sentence
from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import make_scene
from clip_pgs.figure import Column, draw_figure
from clip_pgs.inspection.masks import mask_columns
from clip_pgs.inspection.model_input import (
    StrategySpec,
    View,
    fit_strategy,
    load_model,
    read_config,
    read_image,
    read_model_input,
    seeded_noise,
)
from clip_pgs.integrations.open_clip import apply_masking, force_selection
from clip_pgs.integrations.open_clip.flops import count_image_flops
from clip_pgs.integrations.open_clip.model_config import build_image_tower
from clip_pgs.masking import MaskingStrategy, PatchSelection, create_masking, masking_options
from clip_pgs.masking.merge import Merge
from clip_pgs.masking.pgs import PGSMasking
from clip_pgs.masking.strategy import options_at
from clip_pgs.tables import Table, html_text, scaled

# Scenes of the demo world: their keys, and how many things are in each.
SCENES = (("14", 1), ("34", 2), ("35", 2), ("24", 2), ("48", 3), ("54", 3))


def scene(number: int) -> Image.Image:
    """Return a scene of `SCENES` by its number."""
    key, num_things = SCENES[number]
    return Image.fromarray(draw_scene(make_scene(f"page {key}", num_things=num_things)).pixels)


class Shown(NamedTuple):
    """What stands on the page.

    Args:
        masks: What each strategy keeps, or one sentence that says why there is nothing. HTML.
        stages: How PGS gets there, "" for another strategy. HTML.
        tokens: Tokens and operations of each. Markdown.
        lines: Python that gives the first strategy's selection.
    """

    masks: str
    stages: str = ""
    tokens: str = ""
    lines: str = ""


class Playground:
    """What is asked of the page, as plain functions.

    Args:
        source: A run folder, a checkpoint, a model config or a model that open_clip knows. None
            looks at pixels alone, 224 px in patches of 16, and counts the operations of ViT-B/16.

    Raises:
        ValueError: If there is no such model, or its image tower cannot be masked.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = source
        self.view = View() if source is None else View(read_model_input(source))
        if source is not None and Path(source).exists() and not source.endswith(".json"):
            self.view.model = load_model(source)
            tower = copy.deepcopy(self.view.model).to("meta")
        else:
            known = source or "ViT-B-16"
            config = read_config(known)
            tower = build_image_tower(config.get("model_cfg", config), source=known)
        self._plain_flops = count_image_flops(tower.eval())
        with explained(f"inspect app cannot show {source}"):
            self._tower = apply_masking(tower, "random", when="always")

    def show(
        self,
        picture: str | int,
        name: str,
        options: Mapping[str, Any],
        beside: Sequence[str],
        mask_ratio: float,
        merge: str,
        progress: float,
        seed: float,
    ) -> Shown:
        """Answer what is set on the page, or say in one sentence why that cannot be.

        Args:
            picture: An image file, or the number of a scene of `SCENES`.
            name: The strategy.
            options: Those of its options that are not at their defaults.
            beside: Strategies to show beside it, each with its defaults.
            mask_ratio: Share of patches dropped, in [0, 1).
            merge: Of what the strategy drops; see `Merge.parse`.
            progress: Completed share of the masked training steps, in [0, 1].
            seed: Of the random draw, a whole number.
        """
        view = replace(self.view, progress=progress)
        try:
            given = options_at(name, options, mask_ratio)
            shown = {name: create_masking(name, **given)}
            for other in beside:
                title = f"{name}, by default" if other == name else other
                shown[title] = StrategySpec(title, other).build(mask_ratio=mask_ratio)
            merging = Merge.parse(merge)
            if merging is not None:
                merging.check(shown[name], view.model_input.grid_size)
            image = scene(picture) if isinstance(picture, int) else read_image(picture)
            caption = f"scene {picture}" if isinstance(picture, int) else Path(picture).name

            def columns(names: Sequence[str], *, stages: bool = False) -> list[Column]:
                chosen = {title: shown[title] for title in names}
                seen: dict[str, Any] = {"names": [caption], "seed": int(seed), "stages": stages}
                return mask_columns([image], chosen, view, **seen)[0]

            is_pgs = isinstance(shown[name], PGSMasking)
            stages = columns([name], stages=True)[1:-1] if is_pgs else []
            masks = columns(list(shown))
            pixels = view.model_input.normalize([view.model_input.crop(image)])
            rows = [
                self._row(title, one, view, pixels, int(seed), merging if title == name else None)
                for title, one in shown.items()
            ]
        except (ValueError, OSError, MemoryError) as error:
            sentence = one_sentence(error)
            if isinstance(picture, str):
                # An upload lies in a folder that means nothing to its owner.
                sentence = sentence.replace(picture, Path(picture).name)
            return Shown(f'<p class="refusal" role="alert">{html_text(sentence)}</p>')
        tower = "ViT-B-16" if self.source is None else Path(self.source).name
        note = f"Operations of {tower} for this image; choosing the patches is not counted."
        header = ("masking", "tokens kept", "operations", "saved")
        return Shown(
            _panels(masks),
            f"<h3>How pgs gets there</h3>{_panels(stages)}" if is_pgs else "",
            Table.of(header, rows, notes=[note]).markdown(),
            self._lines(picture, given, name, shown[name], view, merge, seed),
        )

    def image_flops(self, num_tokens: int) -> float | None:
        """Count the operations of encoding an image of so many tokens, beside the class token."""
        # Which patches they are is of no account, nor what they hold.
        index = torch.zeros((1, num_tokens), dtype=torch.int64, device="meta")
        with force_selection(self._tower, PatchSelection(index)):
            return count_image_flops(self._tower)

    def _row(
        self,
        title: str,
        strategy: MaskingStrategy,
        view: View,
        pixels: Tensor,
        seed: int,
        merge: Merge | None,
    ) -> tuple[Any, ...]:
        """Return a strategy's tokens and operations."""
        inputs = view.inputs(pixels, strategy)
        inputs.noise = seeded_noise(1, inputs.num_patches, seed=seed)
        inputs.wants_candidate_weights = merge is not None and merge.by_candidate
        with torch.no_grad():
            selection = fit_strategy(strategy, [inputs], progress=view.progress)(inputs)
        num_kept, num_merged = int(selection.kept_counts()), 0
        tokens, flops = f"{num_kept} of {inputs.num_patches}", self._plain_flops
        if merge is not None:
            weights = merge.weights(selection, view.model_input.grid_size)
            num_merged = int((weights.sum(dim=2) > 0).sum())
            tokens += f", {num_merged} merged"
        if num_kept < inputs.num_patches:
            flops = self.image_flops(num_kept + num_merged)
        saved = f"{1 - flops / self._plain_flops:.0%}" if flops and self._plain_flops else ""
        return title, tokens, scaled(flops, "FLOP"), saved

    def _lines(
        self,
        picture: str | int,
        options: Mapping[str, Any],
        name: str,
        strategy: MaskingStrategy,
        view: View,
        merge: str,
        seed: float,
    ) -> str:
        """Return the lines that give the selection of a strategy, and those that train with it."""
        defaults = masking_options(name)
        changed = [
            f", {key}={value!r}"
            for key, value in options.items()
            if key == "mask_ratio" or value != defaults[key]
        ]
        create = f'"{name}"{"".join(changed)}'
        module, image = "model_input", f"read_image({picture!r})"
        if isinstance(picture, int):
            module, image = "playground", f"scene({picture})"
        given = [] if self.source is None else [f"read_model_input({self.source!r})"]
        given += [f"load_model({self.source!r})"] if view.needs_model(strategy) else []
        given += [f"progress={view.progress}"] if view.progress else []
        imported = {"View", "fit_strategy", "seeded_noise"}
        imported |= {text.partition("(")[0] for text in given if "(" in text}
        imported |= {"read_image"} if module == "model_input" else set()
        num_patches = view.model_input.grid_size[0] * view.model_input.grid_size[1]
        merged = "" if merge == "none" else f', merge="{merge}"'
        return "\n".join(
            [
                "import clip_pgs",
                f"from clip_pgs.inspection.model_input import {', '.join(sorted(imported))}",
                *(["from clip_pgs.inspection.playground import scene"] * (module == "playground")),
                "",
                f"strategy = clip_pgs.create_masking({create})",
                f"view = View({', '.join(given)})",
                f"pixels = view.model_input.normalize([view.model_input.crop({image})])",
                "inputs = view.inputs(pixels, strategy)",
                f"inputs.noise = seeded_noise(1, {num_patches}, seed={int(seed)})",
                f"strategy = fit_strategy(strategy, [inputs], progress={view.progress})",
                "selection = strategy(inputs)  # .index: the patches that stay, in raster order",
                "",
                f"# to train: apply_masking(model, {create}{merged})",
            ]
        )


def _panels(columns: Sequence[Column]) -> str:
    """Return columns of a figure as pictures that wrap where the page is narrow."""
    pictures = []
    for column in columns:
        content = io.BytesIO()
        draw_figure([column]).save(content, "PNG")
        data = base64.b64encode(content.getvalue()).decode()
        name = html_text(f"{column.title}: {column.panels[0][1]}")
        pictures.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    return f'<div class="panels">{"".join(pictures)}</div>'
