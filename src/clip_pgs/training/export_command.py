"""`clip-pgs export RUN [--push-to-hub OWNER/NAME]`: its options, read before torch is imported."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_pgs.common import FAILED, SentenceParser, explained, one_sentence, refuse, run_program
from clip_pgs.files import CHECKPOINTS_NAME

_logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = SentenceParser(
        prog="clip-pgs export",
        description="Write RUN/export: a run's latest checkpoint for OpenCLIP, and its card.",
    )
    parser.add_argument("run", type=Path, help="a run folder, such as logs/demo")
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="score the weights first, as clip-pgs test RUN --suite NAME does, or with all",
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the export as well")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="of the weights, as the Hub calls it, such as mit or cc-by-nc-4.0 (default: what "
        "the card in RUN/export states, if anything)",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    # open_clip tells at length how it opens what it is given.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("clip_pgs").setLevel(logging.INFO)
    repository = arguments.push_to_hub
    try:
        if repository is not None:
            _check_repository(repository)
        elif arguments.private:
            raise ValueError("--private makes a repository private, and needs --push-to-hub")
        if arguments.license is not None and not re.fullmatch(
            r"\w[\w.+-]{0,99}", arguments.license
        ):
            raise ValueError(
                "--license takes a name as the Hub has them, such as cc-by-4.0, got "
                f"{arguments.license!r}"
            )
        if not (arguments.run / CHECKPOINTS_NAME).is_dir():
            raise ValueError(f"{str(arguments.run)!r} has no checkpoint to export")
        from clip_pgs.evaluation.results import telling_once
        from clip_pgs.training.export import export_run, push_to_hub

        with telling_once():
            folder = export_run(arguments.run, license_name=arguments.license)
            if arguments.suite is not None:
                from clip_pgs.launch import evaluate

                # In this process: importing torch and OpenCLIP again would take seconds.
                code = evaluate([str(arguments.run), "--suite", arguments.suite])
                if code:
                    return code
                # Now the card has scores.
                folder = export_run(arguments.run, license_name=arguments.license)
    except (ValueError, NotADirectoryError, PermissionError) as error:
        return refuse(error)
    except OSError as error:
        sys.stderr.write(f"error: the export cannot be written: {one_sentence(error)}\n")
        return FAILED
    _logger.info("export: %s", folder)
    if repository:
        try:
            address = push_to_hub(folder, repository, private=arguments.private)
        # Of the network, the Hub's client, or the Hub.
        except Exception as error:
            reason = f"the upload failed: {one_sentence(error)}; the export is in {folder}"
            sys.stderr.write(f"error: {reason}\n")
            return FAILED
        _logger.info("uploaded: %s", address)
    return 0


def _check_repository(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with explained(f"--push-to-hub takes OWNER/NAME, got {repo_id!r}", HFValidationError):
        validate_repo_id(repo_id)


if __name__ == "__main__":
    sys.exit(run_program(main))
