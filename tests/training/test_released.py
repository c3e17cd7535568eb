"""The command line of CLIP-PGS's released code."""

import pytest

from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import parse_options
from support.options import VALID
from support.runs import run

RELEASED = [
    "--force-patch-dropout",
    "0.05",
    "--target-mask-ratio",
    "0.5",
    "--min-mask-ratio",
    "0.3",
]
SWITCHES = ["--use-ed", "--use-otn"]


def refusal(*argv):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_options([*VALID, *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_means_pgs_released_with_its_options():
    args = parse_options([*VALID, *RELEASED, *SWITCHES, "--epochs", "16"])
    check_options(args)
    assert args.masking == "pgs-released"
    assert args.masking_options == {
        "mask_ratio": 0.5,
        "mask_ratio_min": 0.3,
        "candidate_ratio": 0.05,
        "edges": True,
        "transport": True,
        "num_epochs": 16,
    }
    assert args.force_patch_dropout is None


def test_one_sentence_says_what_it_was_taken_for():
    (sentence,) = option_warnings(parse_options([*VALID, *RELEASED, *SWITCHES]))
    assert "--masking pgs-released" in sentence
    for part in ("mask_ratio_min=0.3", "candidate_ratio=0.05", "edges=True", "--use-otn"):
        assert part in sentence


def test_a_switch_that_is_missing_turns_its_step_off():
    options = parse_options([*VALID, *RELEASED, "--use-otn"]).masking_options
    assert (options["edges"], options["transport"]) == (False, True)


def test_the_name_may_stand_beside_it():
    args = parse_options([*VALID, *RELEASED, "--masking", "pgs-released"])
    assert args.masking_options["candidate_ratio"] == 0.05


def test_options_of_the_strategy_join_it():
    options = parse_options([*VALID, *RELEASED, "--masking-option", "attention_bias=true"])
    assert options.masking_options["attention_bias"] is True


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--masking", "pgs"], "which is --masking pgs-released; got --masking pgs"),
        (["--masking", "none"], "got --masking none"),
        (["--mask-ratio", "0.5"], "--mask-ratio goes with --masking NAME"),
        (["--masking-option", "edges=true"], "edges is given as a flag and as --masking-option"),
    ],
)
def test_wrong_mixtures_are_refused(argv, part):
    assert part in refusal(*RELEASED, *argv)


@pytest.mark.parametrize("start", [0, 2, 4])
def test_a_missing_number_is_refused(start):
    argv = [*RELEASED[:start], *RELEASED[start + 2 :], "--use-ed"]
    assert "needs all of --force-patch-dropout, --target-mask-ratio" in refusal(*argv)


def test_without_its_other_flags_patch_dropout_is_open_clips():
    args = parse_options([*VALID, "--force-patch-dropout", "0.05"])
    assert (args.force_patch_dropout, args.masking) == (0.05, "none")


def test_a_run_of_it_trains(tmp_path, world):
    folder = run(
        tmp_path,
        train_data=world.train_data,
        epochs=1,
        force_patch_dropout=0.2,
        target_mask_ratio=0.5,
        min_mask_ratio=0.5,
        use_ed=True,
        use_otn=True,
    )
    assert "which is --masking pgs-released here" in (folder / "out.log").read_text()
    assert (folder / "export" / "README.md").read_text().count("`pgs-released`") == 1
