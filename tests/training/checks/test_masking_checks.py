import pytest

from clip_pgs.training.options import parse_options
from support.options import SYNTHETIC, VALID, write_model_config
from support.refusals import PGS, accept, refusal, warnings_of


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--mask-ratio", "1"], "mask_ratio must be in [0, 1), got 1.0"),
        (["--mask-ratio", "-0.1"], "mask_ratio must be in [0, 1), got -0.1"),
        (["--mask-ratio", "0.3", "--mask-ratio-min", "0.5"], "mask_ratio_min must not exceed"),
        (["--masking-option", "colour=1"], "has no option 'colour'"),
        (["--masking-option", "edges=maybe"], "edges takes true or false, got 'maybe'"),
        (["--masking-option", "temperature=hot"], "temperature takes a finite number, got 'hot'"),
        (["--masking-option", "num_iters=1.5"], "num_iters takes a whole number, got 1.5"),
        (["--masking-option", "threshold=low"], "threshold takes a finite number, got 'low'"),
        (["--force-patch-dropout", "0.5"], "patch dropout of 0.5"),
        (["--mask-ratio-end", "0.5"], "--mask-ratio-end needs --mask-schedule linear or cosine"),
        (["--mask-schedule", "linear"], "--mask-schedule linear needs --mask-ratio-end"),
    ],
)
def test_what_the_masking_cannot_do_is_refused(argv, part):
    assert part in refusal(*VALID, *PGS, *argv)


@pytest.mark.parametrize(
    ("model", "tower"),
    [
        ("swin_base_patch4_window7_224", "SwinTransformer"),
        pytest.param("MobileCLIP-S1", "FastVit", marks=pytest.mark.slow),
    ],
)
def test_towers_that_cannot_be_masked_are_named_with_what_is_supported(model, tower):
    message = refusal("--model", model, *SYNTHETIC, *PGS)
    assert message.startswith(f"--masking pgs on {model}: ")
    assert tower in message
    assert "VisionTransformer" in message
    accept("--model", model, *SYNTHETIC)


@pytest.mark.parametrize("model", ["vit_medium_patch16_gap_256", "RN50", "convnext_base"])
def test_a_tower_that_is_no_usual_vit_can_be_masked(model):
    accept("--model", model, *SYNTHETIC, *PGS)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--train-image-size", "100"], "--masking pgs --train-image-size 100 on ViT-B-32: image"),
        (["--train-image-size", "256"], "at most 224 x 224, got 256 x 256"),
        (
            ["--train-image-size", "64", "--force-patch-dropout", "0.5"],
            "--train-image-size 64 cannot work beside OpenCLIP's patch dropout of 0.5",
        ),
        (["--train-image-size", "0"], "--train-image-size must be >= 1"),
        (["--train-image-size", "64", "--masking", "attentive"], "the tower's own size alone"),
    ],
)
def test_a_size_that_training_images_cannot_have_is_refused(argv, part):
    assert part in refusal("--model", "ViT-B-32", *SYNTHETIC, *PGS, *argv)


def test_a_masking_that_nobody_named_is_not_blamed():
    sizes = ["--train-image-size", "64", "--force-patch-dropout", "0.5"]
    assert refusal("--model", "ViT-B-32", *SYNTHETIC, *sizes).startswith(
        "--train-image-size 64 can"
    )


def test_an_option_of_another_strategy_names_the_valid_ones():
    message = refusal(*VALID, "--masking", "random", "--masking-option", "edges=false")
    assert "masking 'random' has no option 'edges'; it takes mask_ratio" in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--mask-schedule", "linear"], "--mask-schedule needs --masking"),
        (
            ["--masking", "none", "--mask-schedule", "linear", "--mask-ratio-end", "0.5"],
            "--mask-schedule linear on --masking none: NoMasking has no mask ratio",
        ),
        (["--text-masking-option", "threshold=1"], "needs --text-masking NAME"),
        (["--text-masking", "none", "--text-tokens", "8"], "needs --text-masking NAME"),
        (["--text-tokens", "78"], "at most the model's context length, 77, got 78"),
        (["--text-tokens", "2"], "--text-tokens must be >= 3"),
        (["--text-tokens", "40", "--force-context-length", "32"], "context length, 32, got 40"),
        (["--text-masking", "block"], "--text-masking block needs a budget"),
        (["--text-masking", "frequency"], "frequencies=FILE"),
        (
            ["--text-tokens", "8", "--text-masking-option", "threshold=1"],
            "text masking 'truncate' has no option 'threshold'; it takes none at all",
        ),
        (
            ["--unmasked-epochs", "1", "--unmasked-batch-size", "1001"],
            "takes 1001 (--unmasked-batch-size 1001 x --unmasked-accum-freq 1",
        ),
    ],
)
def test_what_the_new_phases_and_maskings_cannot_do_is_refused(argv, part):
    assert part in refusal(*VALID, *argv)


def test_short_captions_without_unmasked_tuning_warn_of_untrained_positions():
    argv = [*VALID, "--text-tokens", "8"]
    (sentence,) = warnings_of(*argv)
    assert "leaves the text positions from 8 to 76 untrained" in sentence
    assert warnings_of(*argv, "--unmasked-epochs", "1") == []
    assert warnings_of(*VALID, "--text-tokens", "77") == []


def test_patch_dropout_in_a_model_config_is_refused_beside_masking(tmp_path):
    path = write_model_config(tmp_path / "vit_dropping.json", patch_dropout=0.4)
    argv = ["--model-config", path, *SYNTHETIC, *PGS]
    assert "patch dropout of 0.4" in refusal(*argv)
    accept(*argv, "--force-patch-dropout", "0")


@pytest.mark.parametrize("flag", ["--mask-ratio=0.5", "--mask-ratio=0", "--mask-ratio-min=0.3"])
def test_a_ratio_without_a_masking_is_refused(flag):
    assert "needs --masking" in refusal(*VALID, flag)


def test_a_ratio_beside_masking_none_warns():
    (sentence,) = warnings_of(*VALID, "--masking", "none", "--mask-ratio", "0.5")
    assert sentence == "--mask-ratio has no effect with --masking none"


@pytest.mark.parametrize(
    ("flag", "lines"),
    [
        ("--masking", ["mask-ratio: 0.5"]),
        ("--masking", ["mask-schedule: linear", "mask-ratio-end: 0.25", "mask-schedule-steps: 3"]),
        ("--masking", ["merge: 2x2", "merge-counts: true"]),
        ("--masking", ["masking-option: {edges: false}", "pack-tokens: false"]),
        ("--text-masking", ["text-masking: truncate", "text-tokens: 8"]),
        ("--text-masking", ["text-tokens: 8"]),
        ("--text-masking", ["text-masking: frequency", "text-masking-option: {threshold: 1}"]),
    ],
)
def test_what_a_config_says_of_a_masking_goes_with_it(tmp_path, flag, lines):
    config = tmp_path / "run.yaml"
    config.write_text("\n".join(["masking: pgs"] * (flag == "--masking") + lines))
    argv = [*VALID, "--config", str(config), flag, "none"]
    assert warnings_of(*argv) == []
    plain = parse_options([*VALID, flag, "none"])
    assert {**parse_options(argv).values(), "config": None} == plain.values()


def test_what_is_typed_of_a_masking_that_is_turned_off_is_still_told(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("masking: pgs\nmask-ratio: 0.5\n")
    argv = [*VALID, "--config", str(config), "--masking", "none"]
    assert "NoMasking" in refusal(*argv, "--mask-schedule", "linear", "--mask-ratio-end", "0.5")
    assert "needs --text-masking" in refusal(*argv, "--text-masking", "none", "--text-tokens", "8")
