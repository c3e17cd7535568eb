"""Train and evaluate arms times seeds, and compare them with paired statistics.

It trains and evaluates what is missing, goes on after any interruption, and writes tables and
plots into logs/study/NAME.

exit codes: 0 all that was to run is there, 1 something failed, 2 bad input or the study is running
already, 85 told to leave, 130 Ctrl-C; with --report-only 0 the tables are written, also where they
lack runs, which are named
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clip_pgs.common import (
    INTERRUPTED,
    SentenceParser,
    find_config,
    number_in,
    one_sentence,
    output_path,
    refuse,
    run_program,
    silenced,
)
from clip_pgs.files import folder_lock

if TYPE_CHECKING:
    from clip_pgs.study.plan import Study
    from clip_pgs.training.stop import StopSignals


_LOGS = Path("logs/study")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code, see above.
    """
    args = make_parser().parse_args(argv)
    try:
        from clip_pgs.training.stop import StopRequest, StopSignals, leave
    except ModuleNotFoundError as error:
        return refuse(f"a study needs {error.name}: pip install 'clip-pgs[train,eval]'")
    signals = StopSignals()
    # What options and data sets are warned about stands in each run's own log, a warm-up apart.
    with signals.caught(), silenced(logging.WARNING), ExitStack() as held:
        try:
            return _run(args, signals, held)
        except StopRequest:
            is_interrupt = signals.code == INTERRUPTED
            sys.stderr.write("interrupted\n" if is_interrupt else f"stopped by {signals.name}\n")
            return signals.code
        except KeyboardInterrupt:
            leave(INTERRUPTED)
        except (ValueError, OSError) as error:
            return refuse(error)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = SentenceParser(
        prog="clip-pgs study",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", metavar="STUDY.yaml", help="arms, seeds, evaluations and metrics")
    add("--jobs", type=number_in(int, 1, 1024), default=1, metavar="N", help="runs at a time (1)")
    add("--arms", nargs="+", metavar="ARM", help="run these alone")
    add("--seeds", nargs="+", type=int, metavar="N", help="run these alone")
    add("--report-only", action="store_true", help="run nothing; write the tables anew")
    add("--check-only", action="store_true", help="check everything and leave")
    add(
        "--accept-changes",
        action="store_true",
        help="keep runs whose options, data or code are not the study's; the tables note it",
    )
    add("--logs", type=output_path, default=_LOGS, metavar="DIR", help="(logs/study)")
    return parser


def _run(args: argparse.Namespace, signals: StopSignals, held: ExitStack) -> int:
    """Do what is asked for; the study's folder is held until `held` ends."""
    with signals.interruptible():
        from clip_pgs.study.plan import check_study, read_study
        from clip_pgs.study.record import read_code
        from clip_pgs.study.results import keep_protocol
        from clip_pgs.study.runner import Pair, Runner, num_processes, refuse_other_runs
        from clip_pgs.tables import counted
        from clip_pgs.training.option_warnings import warmup_warnings

        study = read_study(Path(find_config(args.study, "study")), root=args.logs)
        arms = _chosen("--arms", args.arms, list(study.arms))
        seeds = _chosen("--seeds", args.seeds, list(study.seeds))
        if args.jobs > 1 and num_processes() > 1 and not args.report_only:
            raise ValueError(
                f"--jobs must be 1 where a run takes {num_processes()} processes, got {args.jobs}"
            )
        if args.report_only and not args.check_only:
            if not any(study.run(arm, seed).is_dir() for arm in study.arms for seed in study.seeds):
                raise ValueError(f"there is nothing to report: {study.folder} holds no run")
            return _report(study, args)
        options = check_study(study)
        for arm in arms:
            for sentence in warmup_warnings(options[arm]):
                sys.stderr.write(f"WARNING: arm {arm}: {sentence}\n")
        # Seed by seed, so that pairs fill first.
        pairs = [Pair(arm, seed) for seed in seeds for arm in arms]
        code = read_code()
        if not args.check_only:
            study.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(folder_lock(study.folder, on_busy=lambda: _refuse_second(study)))
        changed = refuse_other_runs(study, options, pairs, code)
        if changed and not args.accept_changes:
            pair, changes = next(iter(changed.items()))
            more = f" (and {counted(len(changed) - 1, 'other')})" if len(changed) > 1 else ""
            raise ValueError(
                f"{study.run(pair.arm, pair.seed)}{more} was made with other options, data or "
                f"code than the study's: {', '.join(changes)}; remove it, name another study, or "
                "keep it with --accept-changes"
            )
        if args.check_only:
            sys.stdout.write(f"the study is valid: {counted(len(pairs), 'run')}\n")
            return 0
        keep_protocol(study)
        # It reads the evaluations' data, which may take long.
        runner = Runner(
            study,
            options,
            pairs,
            code,
            jobs=args.jobs,
            changed=changed,
            accepts_changes=args.accept_changes,
            signals=signals,
        )
    exit_code = runner.run()
    _report(study, args)
    return exit_code


def _refuse_second(study: Study) -> NoReturn:
    raise ValueError(f"the study in {study.folder} is running already; wait for it, or stop it")


def _report(study: Study, args: argparse.Namespace) -> int:
    """Write tables, plots and the page of what is there."""
    from clip_pgs.evaluation.report.command import FIGURES_NAME
    from clip_pgs.study.results import write_results

    place = [] if args.logs == _LOGS else ["--logs", str(args.logs)]
    command = shlex.join(["clip-pgs", "study", args.study, *place])
    figures = study.folder / FIGURES_NAME
    figures.mkdir(parents=True, exist_ok=True)
    # One at a time: --report-only may meet the end of the study, whose folder it does not hold.
    with folder_lock(figures, on_busy=lambda: None):
        page, lack = write_results(study, command=command)
    if lack:
        sys.stderr.write(f"WARNING: {one_sentence(lack)}\n")
    sys.stdout.write(f"{page}\n")
    return 0


def _chosen(flag: str, named: list | None, known: list) -> list:
    for name in named or []:
        if name not in known:
            raise ValueError(f"{flag} takes of {', '.join(map(str, known))}, got {name}")
    return [name for name in known if named is None or name in named]


if __name__ == "__main__":
    sys.exit(run_program(main))
