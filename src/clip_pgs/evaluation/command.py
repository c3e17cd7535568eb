"""Evaluate CLIP models in suites, and say which data sets are there.

clip-pgs test sets --help     which data sets are there, and how to get the others
clip-pgs test report --help   a report on results, beside the published numbers

exit codes: 0 all data sets done, 1 some missing or failed, 2 bad input, 85 told to leave by a
signal (SIGTERM), 130 Ctrl-C

data sets are folders in clip_benchmark's webdataset layout. A line NAME of a list, without its
`wds/`, is the folder NAME, or NAME with `-` for `/`, or the same after `wds_`, below --data-root;
`sugar_crepe/SPLIT` is SPLIT.json and val2017/ in the folder sugar_crepe. A line `SUITE: NAME` is
for that suite alone; --suite all gives linear-probe and robustness no other lines of your list.

what is done is kept and not redone: the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clip_pgs.common import (
    AskedToLeaveError,
    Pairs,
    SentenceParser,
    early_end,
    explained,
    is_first_process,
    one_sentence,
    output_path,
    refusal_code,
    refuse,
)
from clip_pgs.evaluation.datasets import (
    PRESENT,
    EvalSet,
    Presence,
    check_presence,
    is_caption_pairs,
    is_remote,
)
from clip_pgs.evaluation.report.command import HTML_NAME, write_report
from clip_pgs.evaluation.report.gather import tell_left_out
from clip_pgs.evaluation.report.results_table import format_table
from clip_pgs.evaluation.results import (
    CSV_NAME,
    DONE,
    MISSING,
    RESULTS_NAME,
    Result,
    folder_of_model,
    read_results,
    result_files,
    telling_once,
)
from clip_pgs.evaluation.suites import load_suite, suites
from clip_pgs.files import EVAL_NAME, EXPORT_NAME, check_writable, folder_lock, linked_folders
from clip_pgs.tables import Table, plain, scaled

# Here: torch takes seconds, and help, lists and most refusals have no need of it.
if TYPE_CHECKING:
    from clip_pgs.evaluation.models import LoadedModel
    from clip_pgs.evaluation.runner import Ranks

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

EXIT_DONE, EXIT_INCOMPLETE = 0, 1
REPORT_NAME = "report"
_INFERENCE_FLAGS = ("mask_ratio", "merge", "merge_counts")

_HINTS = {
    "demo": "make the demo data with `clip-pgs data world data/demo`",
    "paper": "`clip-pgs test sets --datasets paper` tells how to get each",
}
_PAIRS_URL = "https://raw.githubusercontent.com/RAIVNLab/sugar-crepe/main/data"
_IMAGES_URL = "http://images.cocodataset.org/zips/val2017.zip"


@telling_once()
def run(argv: Sequence[str]) -> int:
    """Evaluate models as the command line says.

    Args:
        argv: Arguments.

    Returns:
        The exit code, see `__main__`. With `--exit-code-file` it is written there, and 0 returned;
        where a signal ended it, the sentence stands below it, and the code is returned, too, so
        that what started several processes ends the others.
    """
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clip_pgs").setLevel(logging.INFO)
    try:
        exit_code = _evaluate_all(args)
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        sentence, exit_code = early_end(error)
        sentence = f"{sentence}; the same command continues\n"
        if args.exit_code_file is not None:
            Path(args.exit_code_file).write_text(f"{exit_code}\n{sentence}", encoding="utf-8")
        elif is_first_process():
            sys.stderr.write(sentence)
        return exit_code
    if args.exit_code_file is None:
        return exit_code
    if is_first_process():
        Path(args.exit_code_file).write_text(f"{exit_code}\n", encoding="utf-8")
    return 0


def run_sets(argv: Sequence[str]) -> int:
    """Print a table of data sets, and the commands that bring those that are not there.

    Args:
        argv: Arguments.

    Returns:
        0 if all are present, 1 if some are incomplete or missing, 2 on bad input.
    """
    args = make_sets_parser().parse_args(argv)
    try:
        eval_sets = load_suite(args.suite, datasets=args.datasets, data_root=args.data_root)
    except (ValueError, OSError) as error:
        return _complain(error)
    found = [(eval_set, check_presence(eval_set)) for eval_set in eval_sets]
    sys.stdout.write(_presence_table(found))
    absent = [eval_set for eval_set, presence in found if presence.state != PRESENT]
    commands = dict.fromkeys(
        command for eval_set in absent for command in _commands_to_get(eval_set, args.datasets)
    )
    if commands:
        sys.stdout.write("\nTo get what is not there:\n")
        sys.stdout.writelines(f"  {command}\n" for command in commands)
    return EXIT_INCOMPLETE if absent else EXIT_DONE


def make_sets_parser() -> argparse.ArgumentParser:
    """Return the parser of `sets`."""
    parser = SentenceParser(
        prog="clip-pgs test sets",
        description="Tell which data sets are present, incomplete or missing.",
        epilog="exit codes: 0 all present, 1 some incomplete or missing, 2 bad input",
        allow_abbrev=False,
    )
    _add_data_flags(parser)
    return parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    summaries = [f"{suite.name:23}  {suite.summary}" for suite in suites()]
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = SentenceParser(
        prog="clip-pgs test",
        description=description,
        epilog="\n".join(["suites:", *summaries, "", epilog]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="RUN_OR_CHECKPOINT",
        help="a run folder, an export, a checkpoint file, hf-hub:OWNER/NAME or an open_clip model",
    )
    add("--model", metavar="NAME", help="architecture of a checkpoint, also local-dir:FOLDER")
    add("--model-config", metavar="FILE", help="the same, as an OpenCLIP model config (JSON)")
    add("--pretrained", metavar="TAG", help="published weights of an open_clip model")
    _add_data_flags(parser)
    add(
        "--inference-masking",
        metavar="NAME",
        help="encode images through a masking, named as in training, or run for the one that the "
        "model was trained with (default: whole images); results stand beside the unmasked ones",
    )
    add("--inference-mask-ratio", type=float, metavar="F", help="its share of dropped patches")
    add(
        "--inference-merge",
        metavar="GROUPS",
        help="merge what it drops, as --merge does in training (default: nothing, for the masking "
        "run what the run merged)",
    )
    add(
        "--inference-merge-counts",
        action=argparse.BooleanOptionalAction,
        help="the same of --merge-counts",
    )
    add(
        "--inference-masking-option",
        nargs="+",
        action=Pairs,
        default={},
        metavar="KEY=VALUE",
        help="any other option of it; can be repeated",
    )
    help_text = "default: RUN/eval for a run, else ./eval_results/MODEL"
    add("--output", type=output_path, metavar="DIR", help=help_text)
    add("--force", action="store_true", help="redo what is done")
    add(
        "--no-report",
        dest="report",
        action="store_false",
        help="leave out the report, which goes to the output's report/ (several models: to "
        "eval_results/report)",
    )
    add("--batch-size", type=int, default=64, help="images per step (default: 64)")
    add("--workers", type=int, help="processes that read images (default: up to 4)")
    add("--device", help="default: cuda if there is one, else cpu")
    # torchrun makes 1 of every exit code but 0.
    add("--exit-code-file", help=argparse.SUPPRESS)
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(suite.name for suite in suites())
    parser.add_argument("--suite", default="all", help=f"{names} or all (default: all)")
    parser.add_argument(
        "--datasets",
        default="demo",
        metavar="demo|paper|FILE",
        help="a list of configs/eval, or your own: a data set per line (default: demo)",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="where the data sets are: a folder, a template with {dataset_cleaned}, or hub "
        "(default: data/demo/eval for demo, data/eval for paper, else the working directory)",
    )


def _evaluate_all(args: argparse.Namespace) -> int:
    try:
        eval_sets = check_call(args)
    # OSError: a path that cannot be looked up.
    except (ValueError, OSError) as error:
        return _complain(error)
    from clip_pgs.evaluation.runner import join_ranks

    with ExitStack() as stack:
        try:
            ranks = stack.enter_context(join_ranks())
            device, outputs = _together(
                ranks,
                lambda: (
                    choose_device(
                        args.device, world_size=ranks.world_size, local_rank=ranks.local_rank
                    ),
                    _output_folders(args),
                ),
            )
        except (ValueError, OSError) as error:
            return _complain(error)

        exit_code = EXIT_DONE
        scored: list[tuple[Path, list[Result]]] = []
        for source, output in outputs.items():
            try:
                with _holding(output, ranks):
                    results = _evaluate_source(source, eval_sets, output, device, ranks, args)
            except (ValueError, OSError) as error:
                exit_code = _complain(error)
                continue
            scored.append((output, results))
            if any(result.status != DONE for result in results):
                exit_code = max(exit_code, EXIT_INCOMPLETE)
            is_missing = any(result.status == MISSING for result in results)
            if is_missing and args.data_root is None and args.datasets in _HINTS:
                logger.info("Some data sets are missing: %s", _HINTS[args.datasets])
        if args.report and ranks.is_main:
            try:
                _write_report(scored, args)
            except OSError as error:
                exit_code = max(exit_code, refuse(error))
        return exit_code


def check_call(args: argparse.Namespace) -> list[EvalSet]:
    """Check everything in a call but its sources, device and output.

    Args:
        args: From `make_parser`.

    Returns:
        The data sets.

    Raises:
        ValueError: If there is no such suite, list or folder, a number is out of range, or an
            option of the masking is given twice or without one.
        OSError: If a path cannot be looked up.
    """
    eval_sets = load_suite(args.suite, datasets=args.datasets, data_root=args.data_root)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {args.batch_size}")
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers must be >= 0, got {args.workers}")
    inference_choice(args)
    return eval_sets


def choose_device(name: str | None, *, world_size: int = 1, local_rank: int = 0) -> str:
    """Return the device of this process.

    Args:
        name: What the user asks for; None takes a GPU if there is one. Of several processes on a
            machine each takes a GPU of its own, which may be the only one that it sees.
        world_size: Processes of the call.
        local_rank: This one's number on its machine.

    Raises:
        ValueError: If the device that was asked for cannot be used here, or is one GPU for several
            processes.
    """
    import torch
    from torch.distributed import is_torchelastic_launched

    from clip_pgs.integrations.open_clip.model_config import usable_device

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(name)
    if world_size == 1 or device.type != "cuda":
        return name
    if device.index is not None:
        raise ValueError(
            f"--device {name} is one GPU for {world_size} processes; --device cuda gives each its "
            "own"
        )
    count = torch.cuda.device_count()
    # Slurm shows each task its own GPU, as cuda:0; processes of torchrun all see the same.
    is_bound = "CUDA_VISIBLE_DEVICES" in os.environ and not is_torchelastic_launched()
    if count == 1 and is_bound:
        return "cuda:0"
    if local_rank >= count:
        raise ValueError(
            f"each process takes a GPU of its own, and there are {count} for process {local_rank}, "
            "counted from 0; start as many processes as GPUs, or take --device cpu"
        )
    return f"cuda:{local_rank}"


def _together(ranks: Ranks, make: Callable[[], _T]) -> _T:
    """Return what each process makes; where one of them cannot, none goes on alone.

    Raises:
        ValueError: If another one cannot, with its reason.
        Exception: What this one's raised.
    """
    made: list[_T] = []
    own: Exception | None = None
    try:
        made.append(make())
    except (ValueError, OSError) as error:
        own = error
    reasons = ranks.gather(None if own is None else one_sentence(own))
    if own is not None:
        raise own
    for reason in reasons:
        if reason is not None:
            raise ValueError(reason)
    return made[0]


def inference_choice(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """Return the masking that a call's images are encoded through, and its options.

    Args:
        args: From `make_parser`.

    Raises:
        ValueError: If an option is given twice, or without a masking.
    """
    flags = {name: getattr(args, f"inference_{name}") for name in _INFERENCE_FLAGS}
    options = {name: value for name, value in flags.items() if value is not None}
    for name in options.keys() & args.inference_masking_option.keys():
        raise ValueError(f"{name} is given as a flag and as --inference-masking-option; keep one")
    options |= args.inference_masking_option
    if options and args.inference_masking is None:
        raise ValueError(f"{', '.join(options)} at inference needs --inference-masking NAME")
    return args.inference_masking, options


def _model_choice(args: argparse.Namespace) -> dict[str, Any]:
    masking, options = inference_choice(args)
    choice = {name: getattr(args, name) for name in ("model", "model_config", "pretrained")}
    return {**choice, "inference_masking": masking, "inference_options": options}


def _output_folders(args: argparse.Namespace) -> dict[str, Path]:
    """Return where the results of each source go, after checking that the source is one."""
    from clip_pgs.evaluation.models import KIND_OF, check_source

    folders: dict[str, Path] = {}
    kinds = set()
    for source in args.sources:
        kinds.add(check_source(source, **_model_choice(args)))
        own = folder_of_model(source, pretrained=args.pretrained)
        if args.output is not None:
            folder = Path(args.output, own.name) if len(args.sources) > 1 else Path(args.output)
        elif Path(source, EXPORT_NAME).is_dir():
            folder = Path(source, EVAL_NAME)
            if folder.is_symlink():
                raise ValueError(f"{folder} is a link; say by --output where the results are to go")
        else:
            folder = own
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"the output {folder} is not a folder")
        if links := linked_folders(folder):
            raise ValueError(
                f"{links[0]} is a link to a folder, in which results or a report would replace "
                "files; remove it"
            )
        check_writable(folder / CSV_NAME)
        if folder in folders.values():
            raise ValueError(
                f"two models would write to {folder}; evaluate them apart, each with its --output"
            )
        folders[source] = folder
    for name, kind in KIND_OF.items():
        value = getattr(args, name)
        if value is not None and kind not in kinds:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {value} is for a source that is a {kind}, and none is one")
    return folders


def _evaluate_source(
    source: str,
    eval_sets: list[EvalSet],
    output: Path,
    device: str,
    ranks: Ranks,
    args: argparse.Namespace,
) -> list[Result]:
    from clip_pgs.evaluation.models import load_model
    from clip_pgs.evaluation.runner import ERRORS_NAME, evaluate

    def load() -> LoadedModel:
        # A GPU that is full, above all; the models that come after it may be smaller.
        with explained(f"{source} cannot be opened on {device}", RuntimeError):
            loaded = load_model(source, device=device, **_model_choice(args))
        if not args.force and output != Path(source, EVAL_NAME):
            _keep_others(output, loaded)
        return loaded

    loaded = _together(ranks, load)
    if ranks.is_main:
        where = device if ranks.world_size == 1 else f"{ranks.world_size} processes"
        logger.info("Evaluating %s on %s", loaded.source, where)
    results = evaluate(
        loaded,
        eval_sets,
        output=output,
        batch_size=args.batch_size,
        workers=args.workers,
        force=args.force,
        ranks=ranks,
    )
    if ranks.is_main:
        source = plain(f"{loaded.name} ({loaded.source}){_cost(results)}")
        sys.stdout.write(f"\n{source}\n\n{format_table(results)}\n")
        # Not where no set is there.
        if (output / CSV_NAME).is_file():
            sys.stdout.write(f"In percent; files are in {output}, the table as {CSV_NAME}\n")
        is_failed = any(result.status not in (DONE, MISSING) for result in results)
        # Not where the disk had no room for it.
        if is_failed and (output / ERRORS_NAME).is_file():
            sys.stdout.write(f"What failed is told in full in {output / ERRORS_NAME}\n")
        sys.stdout.flush()
    return results


@contextmanager
def _holding(output: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other calls out of a folder, which goes at the end if nothing was written to it."""
    with ExitStack() as stack:
        if ranks.is_main:
            for folder in (*reversed(output.parents), output):
                if not folder.exists():
                    stack.callback(_remove_if_empty, folder)
            # What the disk refuses is told of the first result.
            with suppress(OSError):
                output.mkdir(parents=True, exist_ok=True)
            busy = "waiting for another process, which evaluates into %s"
            stack.enter_context(folder_lock(output, on_busy=lambda: logger.warning(busy, output)))
        # The others begin when it is held.
        ranks.gather(None)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _keep_others(output: Path, loaded: LoadedModel) -> None:
    """Refuse a folder with results of a model from another place; a run's own are its newest."""
    from clip_pgs.evaluation.models import full_path, weights_digest

    done = [result for result in read_results(output) if result.status == DONE]
    # Earlier versions wrote a path as it was typed.
    others = [r for r in done if loaded.source not in (r.pretrained, full_path(r.pretrained))]
    if not others:
        return
    digest = weights_digest(loaded.model)
    for result in others:
        if result.weights_digest != digest:
            raise ValueError(
                f"{output} holds results of {result.pretrained}; name another folder with "
                f"--output for those of {loaded.source}, or replace them with --force"
            )


def _cost(results: Sequence[Result]) -> str:
    """Say how images were encoded, and what that takes, as the end of a title."""
    masking, flops = results[0].inference_masking, results[0].flops_per_image
    parts = [f"through {masking}"] if masking else []
    parts += [f"{scaled(flops, 'FLOP')} per image"] if flops else []
    return "".join(f", {part}" for part in parts)


def _write_report(scored: Sequence[tuple[Path, list[Result]]], args: argparse.Namespace) -> None:
    """Report on all that is known of these models by now, also from earlier calls."""
    if not any(result.status == DONE for _, results in scored for result in results):
        return
    sources = []
    for output, results in scored:
        digest, found = results[0].weights_digest, result_files(output)
        # File by file, as results of older weights may lie beside them.
        sources += [path for path, result in found if result.weights_digest == digest]
        tell_left_out(output, [result for _, result in found], digest)
    if args.output is not None:
        folder = Path(args.output, REPORT_NAME)
    else:
        folder = (scored[0][0] if len(scored) == 1 else Path(RESULTS_NAME)) / REPORT_NAME
    try:
        written = write_report(sources, folder)
    except (ValueError, ModuleNotFoundError) as error:
        logger.warning("there is no report: %s", error)
        return
    sys.stdout.write(f"The report is {written / HTML_NAME}\n")


def _complain(error: Exception) -> int:
    return refuse(error) if is_first_process() else refusal_code(error)


def _presence_table(found: Sequence[tuple[EvalSet, Presence]]) -> str:
    blocks = []
    for suite in dict.fromkeys(eval_set.suite for eval_set, _ in found):
        rows = [
            (eval_set.name, presence.state, presence.reason or eval_set.location)
            for eval_set, presence in found
            if eval_set.suite == suite
        ]
        num_present = sum(state == PRESENT for _, state, _ in rows)
        blocks.append(Table.of((suite, f"{num_present} of {len(rows)} present", ""), rows).text())
    return "\n".join(blocks)


def _commands_to_get(eval_set: EvalSet, datasets: str) -> list[str]:
    """Return the shell commands that bring a data set to where it was looked for."""
    if datasets == "demo":
        root = Path(eval_set.location).parents[1]
        return [f"clip-pgs data world {shlex.quote(str(root))}"]
    # Nothing is known of the sets of one's own list, nor of another server than the hub.
    if datasets != "paper" or is_remote(eval_set.location):
        return []
    folder = shlex.quote(eval_set.location)
    if is_caption_pairs(eval_set.name):
        annotations = f"{eval_set.splits[0]}.json"
        return [
            f"mkdir -p {folder}",
            f"curl -L {_IMAGES_URL} -o {folder}/val2017.zip && "
            f"unzip -q {folder}/val2017.zip -d {folder}",
            f"curl -L {_PAIRS_URL}/{annotations} -o {folder}/{annotations}",
        ]
    repository = f"clip-benchmark/wds_{eval_set.name.replace('/', '-')}"
    return [f"hf download {repository} --repo-type dataset --local-dir {folder}"]
