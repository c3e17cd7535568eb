import pytest
import torch

from clip_pgs.integrations.apply import tower_masking
from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import IDENTITY, RECIPE, names_of, parse_options
from support.options import SYNTHETIC, VALID, write_model_config

ADAPTIVE = ("--masking", "pgs", "--mask-ratio-min", "0.3")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), None),
        (("--pack-tokens",), True),
        (("--no-pack-tokens",), False),
        (("--pack-tokens", "--no-pack-tokens"), False),
    ],
)
def test_the_flag_reaches_the_model(tmp_path, flags, expected):
    config = write_model_config(tmp_path / "vit_packed.json")
    args = parse_options(["--model-config", config, *SYNTHETIC, *ADAPTIVE, *flags])
    args.distributed = False
    model = build_model(args, torch.device("cpu")).model
    assert tower_masking(model).pack_tokens is expected


def test_the_command_line_wins_over_a_config(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: ViT-B-16\npack_tokens: true\n")
    assert parse_options(["--config", str(config)]).pack_tokens is True
    assert parse_options(["--config", str(config), "--no-pack-tokens"]).pack_tokens is False


def test_false_in_a_config_is_the_negation(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: ViT-B-16\npack_tokens: false\n")
    assert parse_options(["--config", str(config)]).pack_tokens is False
    assert parse_options(["--config", str(config), "--pack-tokens"]).pack_tokens is True


def test_a_resumed_run_may_change_it():
    assert "pack_tokens" not in (*names_of(IDENTITY), *names_of(RECIPE))


def warnings_of(*flags):
    args = parse_options([*VALID, *flags])
    check_options(args)
    return [warning for warning in option_warnings(args) if "pack" in warning]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--masking", "none"), "with --masking none"),
        (("--masking", "random"), "with --masking random that keeps as many patches of every"),
        (("--masking", "pgs"), "with --masking pgs that keeps as many patches of every image"),
        ((*ADAPTIVE, "--torchcompile", "--device", "cpu"), "with --torchcompile on a CPU"),
    ],
)
def test_where_it_has_no_effect_it_warns(flags, reason):
    (warning,) = warnings_of("--pack-tokens", *flags)
    assert warning.startswith(f"--pack-tokens has no effect {reason}")


@pytest.mark.parametrize(
    "masking",
    [
        ADAPTIVE,
        ("--masking", "cluster"),
        ("--masking", "cluster", "--mask-ratio", "0.5", "--mask-ratio-min", "0.5"),
    ],
)
def test_where_it_has_one_nothing_warns(masking):
    assert warnings_of("--pack-tokens", "--device", "cpu", *masking) == []
