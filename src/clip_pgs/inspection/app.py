"""A page on this machine to play with maskings: `clip-pgs inspect app`.

It asks no other machine for anything, and sends nothing anywhere.
"""

# ruff: noqa: E402  (gradio is told its folder before it is imported)

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

# Gradio's own folder is one for all users of a machine, of whom the first alone can write it, and
# what is uploaded stays there; this one goes with the process.
_uploads = tempfile.TemporaryDirectory(prefix="clip-pgs-")
os.environ["GRADIO_TEMP_DIR"] = _uploads.name

import gradio as gr

from clip_pgs.common import literal
from clip_pgs.inspection.playground import SCENES, Playground, scene
from clip_pgs.masking import describe_masking, list_maskings
from clip_pgs.masking.strategy import MaskingOption

_STYLE = """
.panels { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-start }
.panels img { flex: 0 1 calc(25% - 6px); min-width: min(160px, calc(50% - 4px)); margin: 0 }
#stages img { flex-basis: calc(50% - 4px); min-width: min(320px, 100%) }
#tokens { overflow-x: auto }
#tokens td, #tokens th { white-space: nowrap; padding: 4px 6px; font-size: 14px }
#scenes .grid-wrap { overflow: hidden; min-height: 0; max-height: none }
#scenes .grid-container { grid-template-columns: repeat(6, 1fr); grid-auto-rows: auto; gap: 4px }
#scenes .thumbnail-lg { min-width: 0; aspect-ratio: 1 }
.refusal { padding: 12px 16px; border-left: 4px solid #c0392b; overflow-wrap: anywhere }
footer { display: none !important }
"""


def run_app(args: argparse.Namespace) -> None:
    """Serve the page on this machine alone, until Ctrl-C.

    Raises:
        ValueError: If there is no such model, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build_page(Playground(args.model))
    fonts: Any = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=args.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size="100mb",
            ssr_mode=False,
            theme=gr.themes.Default(**fonts),
            css=_STYLE,
        )
    except OSError:
        port = "from 7860 to 7959" if args.port is None else args.port
        raise ValueError(f"--port must be free on this machine, got {port}") from None
    sys.stdout.write(f"{url} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    page.block_thread()


def build_page(playground: Playground) -> gr.Blocks:
    """Lay out the page over a playground."""
    names = list_maskings()
    with gr.Blocks(
        title="clip-pgs", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        # A file, or the number of a scene; options that are not at their defaults.
        picture, options = gr.State(0), gr.State({})
        gr.Markdown("## What a masking keeps\nPictures stay on this machine.")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                scenes = gr.Gallery(
                    list(map(scene, range(len(SCENES)))),
                    show_label=False,
                    columns=6,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="scenes",
                )
                upload = gr.File(label="or a picture of yours", height=150, elem_id="upload")
                name = gr.Dropdown(names, value="pgs", label="Masking")
                ratio = gr.Slider(0, 0.95, 0.5, step=0.01, label="Mask ratio", elem_id="ratio")
                beside = gr.CheckboxGroup(names, value=["random", "cluster"], label="Beside it")
                with gr.Accordion("Merge, progress, seed", open=False):
                    merge = gr.Dropdown(
                        ["none", "2x2", "4x4", "candidates", "2x2+candidates"],
                        label="Merge what is dropped",
                        info="One more token per cell of a grid (rows x columns), or candidate.",
                        allow_custom_value=True,
                    )
                    text = "Above 0, patch embeddings are compared, too; it takes --model RUN."
                    progress = gr.Slider(
                        0, 1, 0, step=0.05, label="Progress of training", info=text
                    )
                    seed = gr.Slider(0, 99, 0, step=1, label="Seed of the random draw")
                with gr.Accordion("Options of the masking", open=False):

                    @gr.render(name, triggers=[page.load, name.change])
                    def draw_fields(name: str) -> None:
                        for option in describe_masking(name).options:
                            if option.name != "mask_ratio":
                                field = _field(option)
                                field.change(_setter(option), [options, field], options)

            with gr.Column(scale=2, min_width=320):
                masks = gr.HTML(elem_id="masks")
                tokens = gr.Markdown(elem_id="tokens")
                stages = gr.HTML(elem_id="stages")
                lines = gr.Code(
                    language="python",
                    label="The lines that give it",
                    wrap_lines=True,
                    elem_id="lines",
                )
        settings: list[Any] = [picture, name, options, beside, ratio, merge, progress, seed]
        gr.on(
            [page.load, *(setting.change for setting in settings)],
            playground.show,
            settings,
            [masks, stages, tokens, lines],
            show_progress="hidden",
            trigger_mode="always_last",
        )
        name.change(dict, None, options)
        upload.upload(lambda path: path, upload, picture)
        upload.clear(lambda: 0, None, picture)
        scenes.select(_chosen, None, [picture, upload])
    return page


def _chosen(event: gr.SelectData) -> tuple[int, None]:
    # Whoever sends it may send the name of a file in its place.
    if event.index not in range(len(SCENES)):
        raise gr.Error("there is no such scene")
    return int(event.index), None


def _field(option: MaskingOption) -> Any:
    """Return what sets an option on the page; its docstring's quoted words are its choices."""
    said: dict[str, Any] = {"label": option.name, "info": f"{option.help}.", "interactive": True}
    if option.default is None:
        # An empty field of numbers shows 0.
        return gr.Textbox("", **said)
    if isinstance(option.default, bool):
        return gr.Checkbox(option.default, **said)
    if isinstance(option.default, str):
        words = re.findall(r'"([\w-]+)"', option.help)
        return gr.Dropdown(words, value=option.default, **said)
    return gr.Number(option.default, precision=0 if option.hint is int else None, **said)


def _setter(option: MaskingOption) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """Return what sets an option among others, or takes it away where it is at its default."""

    def change(options: Mapping[str, Any], value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            # An empty text is the default; others are read as on the command line.
            value = literal(value) if value.strip() else option.default
        rest = {key: own for key, own in options.items() if key != option.name}
        return rest if value == option.default else {**rest, option.name: value}

    return change
