"""Command line: `clip-pgs inspect COMMAND`, such as `masks`, `kept` or `cost`.

What a command needs is imported when it runs: torch takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from clip_pgs.common import SentenceParser, number_in, output_path, refuse, run_program
from clip_pgs.registry import registered_names

_count, _share = number_in(int, 1, 10**6), number_in(float, 0, 1)
_pixels = number_in(int, 1, 2**14)
_seed = number_in(int, -(2**63), 2**63 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0, or after one sentence on stderr 2 on bad input, 1 on a full disk.
    """
    args = make_parser().parse_args(argv)
    module, _, function = args.run.partition(":")
    try:
        _check_names(getattr(args, "maskings", ()))
        getattr(importlib.import_module(f"clip_pgs.inspection.{module}"), function)(args)
    # OSError: a path that cannot be looked up.
    except (ValueError, OSError) as error:
        return refuse(error)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        return refuse("inspect app needs gradio: pip install 'clip-pgs[app]'")
    # torch's allocators raise either; what else is wrong inside is no bad input.
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return refuse(f"not enough memory for images or batches of this size: {error}")
    return 0


def _check_names(maskings: Sequence[str]) -> None:
    """Refuse strategies of ours that there are not, before torch is imported."""
    known = registered_names("masking")
    for masking in maskings:
        name, *rest = masking.split(":")
        # As in module:Class, which imports it.
        is_foreign = bool(rest) and "=" not in rest[0]
        if not is_foreign and name not in known:
            raise ValueError(f"unknown masking {name!r}; choose from {', '.join(known)}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = SentenceParser(
        prog="clip-pgs inspect",
        description="Look at what masking strategies do, and measure what they cost.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in (_add_masks, _add_app, _add_kept, _add_cost, _add_scaling, _add_data):
        add_command(commands)
    return parser


def _add_masks(commands: Any) -> None:
    parser = _command(
        commands,
        "masks:run_masks",
        "draw what each strategy keeps of some images",
        "Masked patches are gray, and the measured mask ratio stands below. cluster is fitted to "
        "these images.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("-o", "--output", type=output_path, required=True, metavar="OUT.png")
    _add_maskings(parser, "random", "pgs")
    add("--mask-ratio", type=float, metavar="F", help="share of patches dropped, in [0, 1)")
    add("--mask-ratio-min", type=float, metavar="F", help="lower bound of an adaptive count")
    add("--stages", action="store_true", help="draw the steps of pgs before its column")
    add("--seed", type=_seed, default=0, metavar="N", help="of the random draw (default: 0)")
    _add_view(parser)


def _add_app(commands: Any) -> None:
    parser = _command(
        commands,
        "app:run_app",
        "open a page to play with maskings",
        "A page for the browser, on this machine alone: drop a picture, choose a strategy and its "
        "options, and see what it keeps, how pgs gets there, and the lines that give the mask.",
    )
    text = "run folder, checkpoint, model config or model that open_clip knows (default: pixels)"
    parser.add_argument("--model", metavar="RUN_OR_CONFIG", help=text)
    text = "where it listens (default: the first that is free from 7860)"
    parser.add_argument("--port", type=number_in(int, 1, 65535), metavar="N", help=text)


def _add_kept(commands: Any) -> None:
    parser = _command(
        commands,
        "kept:run_kept",
        "measure how much of the foreground each strategy keeps",
        "The share of foreground patches, mean over images and seeds, and standard deviation over "
        "seeds. A patch is foreground above half of its area. cluster is fitted to these images "
        "at each ratio.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    mask_help = (
        "folder with a mask NAME.png for each NAME.jpg; any value but 0 is foreground, and alpha "
        "does not count"
    )
    add("--foreground", required=True, metavar="MASKS", help=mask_help)
    _add_maskings(parser, "random", "gaussian", "cluster", "pgs")
    add(
        "--mask-ratios",
        "--mask-ratio",
        nargs="+",
        type=float,
        default=[0.3, 0.5, 0.75],
        metavar="F",
        help="shares of patches dropped, in [0, 1) (default: 0.3 0.5 0.75)",
    )
    seeds = number_in(int, 1, 10_000)
    add("--seeds", type=seeds, default=20, metavar="N", help="random draws (default: 20)")
    _add_output(parser, "kept.json", "kept.csv", "kept.png")
    _add_view(parser)


def _add_cost(commands: Any) -> None:
    parser = _command(
        commands,
        "cost.step:run_cost",
        "measure what a training step costs with each strategy",
        "Training steps on random data: plain CLIP as OpenCLIP runs it, with the whole context of "
        "text tokens, and each strategy with trimmed captions. In every round each takes one "
        "step, and ratios are medians over rounds.",
    )
    _add_benchmark(parser)
    add = parser.add_argument
    add("--batch-size", type=_count, metavar="B", help="default: 16 on a CPU, 256 on a GPU")
    add("--steps", type=_count, metavar="N", help="rounds (default: 5 on a CPU, 20 on a GPU)")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights and data (default: 0)")
    _add_maskings(parser, "none", "random", "pgs", "pgs:mask_ratio_min=0.3")
    add("--mask-ratio", type=float, metavar="F", help="in [0, 1) (default: 0.5)")
    _add_progress(parser, ", which strategies are told; above 0 some look at embeddings as well")
    kinds = ("flickr8k", "web")
    captions_help = "whose lengths they have (default: flickr8k)"
    add("--captions", choices=kinds, default="flickr8k", help=captions_help)
    trim_help = "give every model the whole context of tokens"
    add("--no-trimming", dest="trims", action="store_false", help=trim_help)
    pack_help = "run maskings that keep different counts as one sequence (default: as training)"
    add("--pack-tokens", action=argparse.BooleanOptionalAction, help=pack_help)
    compile_help = "run the models through torch.compile"
    add("--compile", dest="compiles", action="store_true", help=compile_help)
    _add_output(parser, "cost.json", "cost.png")


def _add_scaling(commands: Any) -> None:
    parser = _command(
        commands,
        "cost.scaling:run_scaling",
        "measure how the time of a PGS selection, and of a step of many processes, grows",
        "Selections by pgs at 16 x 16 pixels per patch while patches, candidates or images grow. "
        "An exponent of 1 is linear growth. With --processes, also data-parallel training steps "
        "of 1, 2, 4 and so on processes on this machine, each with a batch of its own and, on "
        "GPUs, a GPU of its own.",
    )
    _add_benchmark(parser)
    add = parser.add_argument
    batch_help = "images of a selection, and samples per process of a step (default: 16)"
    add("--batch-size", type=_count, default=16, metavar="B", help=batch_help)
    add("--steps", type=_count, default=9, metavar="N", help="rounds that count (default: 9)")
    _add_progress(parser, "; above 0 embeddings are compared too")
    world_help = "time steps of up to so many; model, image size and precision are theirs"
    add("--processes", type=number_in(int, 1, 1024), metavar="P", help=world_help)
    add("--masking", metavar="NAME", help="of a step (default: pgs)")
    _add_output(parser, "scaling.json")


def _add_data(commands: Any) -> None:
    parser = _command(
        commands,
        "cost.data:run_data",
        "measure how fast JPEG files become training crops, and whether steps wait for them",
        "JPEG files decoded and cropped with one core, as training does and as OpenCLIP's trainer "
        "does, in turns. With --workers, also through training's loader, and with "
        "--step-seconds, beside training steps of that length; a step is a pause, which leaves "
        "the cores to the workers, as a GPU's step does.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="JPEG files, folders of them, or tar shards")
    add("--image-size", type=_pixels, default=224, metavar="PIXELS", help="default: 224")
    side_help = "leave out images whose longer side is shorter (default: 0)"
    add("--min-side", type=number_in(int, 0, 2**16), default=0, metavar="PIXELS", help=side_help)
    add("--limit", type=_count, default=512, metavar="N", help="images at most (default: 512)")
    add("--steps", type=_count, default=7, metavar="N", help="rounds that count (default: 7)")
    add("--workers", type=number_in(int, 1, 1024), metavar="W", help="loading processes")
    add("--batch-size", type=_count, metavar="B", help="of the loader (default: 64)")
    add("--batches", type=_count, metavar="N", help="that count (default: 24)")
    seconds = number_in(float, 1e-6, 3600)
    add("--step-seconds", type=seconds, metavar="S", help="length of a step that wants a batch")
    _add_output(parser, "data.json")


def _command(commands: Any, run: str, summary: str, description: str) -> argparse.ArgumentParser:
    """Add a command that "module:run_NAME" of this package runs."""
    parser: argparse.ArgumentParser = commands.add_parser(
        run.partition(":run_")[2],
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {description}",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_maskings(parser: argparse.ArgumentParser, *default: str) -> None:
    text = (
        f"of {', '.join(registered_names('masking'))}, or package.module:Class; options follow a "
        f"colon, as in pgs:edges=false,temperature=0.2 (default: {' '.join(default)})"
    )
    names = list(default)
    parser.add_argument(
        "--maskings", "--masking", nargs="+", default=names, metavar="NAME", help=text
    )


def _add_output(parser: argparse.ArgumentParser, *names: str) -> None:
    text = f"folder for {', '.join(names)}; made if it does not exist"
    parser.add_argument("-o", "--output", type=output_path, metavar="FOLDER", help=text)


def _add_progress(parser: argparse.ArgumentParser, text: str) -> None:
    text = f"share of training, in [0, 1]{text} (default: 0)"
    parser.add_argument("--progress", type=_share, default=0.0, metavar="T", help=text)


def _add_view(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model sees images."""
    add = parser.add_argument
    text = (
        "take image size, patch size and normalization from a run folder, a checkpoint file, a "
        "model config (JSON) or a model that open_clip knows"
    )
    add("--model", metavar="RUN_OR_CONFIG", help=text)
    add("--image-size", type=int, metavar="PIXELS", help="default: the model's, or 224")
    add("--patch-size", type=int, metavar="PIXELS", help="default: the model's, or 16")
    text = "; above 0, strategies that compare patches compare the embeddings of --model RUN too"
    _add_progress(parser, text)


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs where."""
    add = parser.add_argument
    text = "a model that open_clip knows, or a config (JSON); default: ViT-S-16, on a GPU ViT-B-16"
    add("--model", metavar="NAME", help=text)
    add("--image-size", type=_pixels, metavar="PIXELS", help="default: the model's")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    text = "default: fp32 on a CPU, amp_bf16 on a GPU"
    add("--precision", choices=("fp32", "amp_bf16"), help=text)


if __name__ == "__main__":
    sys.exit(run_program(main))
