import json

import pytest
import torch

from clip_pgs.training.checks import check_options, option_warnings
from clip_pgs.training.options import parse_options
from support.options import SYNTHETIC, VALID, write_model_config, write_shards

PGS = ("--masking", "pgs")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """Nothing beside the test's own files is found, and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def refusal(*argv):
    args = parse_options(argv)
    with pytest.raises(ValueError, match=r".") as caught:
        check_options(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def accept(*argv):
    args = parse_options(argv)
    check_options(args)
    return args


def warnings_of(*argv):
    return option_warnings(accept(*argv))


def test_a_valid_run_passes_without_a_warning_and_creates_nothing(tmp_path):
    argv = [*VALID, *PGS, "--mask-ratio", "0.5", "--name", "demo", "--accum-freq", "2", "--siglip"]
    assert warnings_of(*argv) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--batch-size", "0", ">= 1"),
        ("--epochs", "0", ">= 1"),
        ("--unmasked-epochs", "-1", ">= 0"),
        ("--unmasked-lr", "0", "> 0"),
        ("--unmasked-warmup", "-1", ">= 0"),
        ("--unmasked-batch-size", "0", ">= 1"),
        ("--unmasked-accum-freq", "0", ">= 1"),
        ("--mask-schedule-steps", "1", ">= 2"),
        ("--mask-ratio-end", "1", "in [0, 1)"),
        ("--accum-freq", "0", ">= 1"),
        ("--workers", "-1", "in [0, 1024]"),
        ("--warmup", "-1", ">= 0"),
        ("--lr", "0", "> 0"),
        ("--lr", "nan", "> 0"),
        ("--lr", "inf", "> 0"),
        ("--wd", "-0.1", ">= 0"),
        ("--beta1", "1", "in [0, 1)"),
        ("--eps", "0", "> 0"),
        ("--grad-clip-norm", "0", "> 0"),
        ("--log-every-n-steps", "0", ">= 1"),
        ("--seed", "-1", "in [0, 2**32)"),
        ("--train-num-samples", "0", ">= 1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(flag, value, rule):
    message = refusal(*VALID, f"{flag}={value}")
    assert message.startswith(f"{flag} must be {rule}, got ")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--image-mean", "0", "1"], "--image-mean takes 3 finite numbers"),
        (["--image-std", "0", "1", "1"], "--image-std must be > 0"),
        (["--force-image-size", "1", "2", "3"], "--force-image-size takes 1 or 2"),
        (["--opt", "sgd"], "--opt must be adamw or timm/NAME, got 'sgd'"),
        (["--opt", "timm/adamm", "--lr", "1"], "'timm/adamm'"),
        (["--opt", "timm/lamb"], "set --lr"),
        (["--opt", "timm/lamb", "--lr", "1", "--beta1", "0.9"], "both --beta1 and --beta2"),
        (["--lr-scheduler", "linear"], "cosine, const, const-cooldown, got 'linear'"),
        (["--lr-scheduler", "const-cooldown"], "needs --epochs-cooldown"),
        (
            ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "9", "--epochs", "8"],
            "at most --epochs = 8, got 9",
        ),
        (["--siglip", "--loss-dist-impl", "ring"], "bidir, shift, reduce, gather, got 'ring'"),
        (["--aug-cfg", "zoom=2"], "--aug-cfg has no 'zoom'"),
        (["--pretrained", "laion9b"], "'laion9b' is neither a file nor a tag of ViT-B-16"),
        (["--report-to", "tensorbord"], "got 'tensorbord'"),
        (["--device", "warp"], "--device 'warp'"),
        (["--device", "meta"], "--device meta is not available"),
        (["--epochs", "9" * 30], "--epochs must be at most 2**53"),
        (["--workers", "2000"], "--workers must be in [0, 1024], got 2000"),
        (["--aug-cfg", "scale=wide"], "OpenCLIP cannot augment with --aug-cfg {'scale': 'wide'}"),
        (["--batch-size", "9" * 12], "the pixels of a batch of 999999999999 images of 224 x 224"),
        (["--force-image-size", "1000000"], "the weights of ViT-B-16 take"),
        (["--logs", f"{__file__}/logs", "--name", "a"], "is a file where a folder on the way to"),
        (["--imagenet-val", "x" * 300], "File name too long"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--resume", "nowhere.pt"], "--resume: checkpoint 'nowhere.pt' does not exist"),
        (["--resume", __file__], "cannot be read"),
        (["--lock-text"], "--lock-text needs --lock-text-freeze-layer-norm"),
        (["--resume", "latest"], "needs the --name"),
        (["--resume", "latest", "--name", "a", "--logs", "none"], "needs the run's --logs"),
        (["--name", "../a"], "--name must be one folder name"),
        (["--name", ".."], "--name must be one folder name"),
        (["--imagenet-val", "nowhere"], "--imagenet-val 'nowhere' is not a folder"),
        (["--batch-size", "1001"], "1000 training samples are less than one optimiser step"),
        (["--batch-size", "500", "--accum-freq", "3"], "takes 1500"),
    ],
)
def test_what_cannot_work_is_refused(argv, part):
    assert part in refusal(*VALID, *argv)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--mask-ratio", "1"], "mask_ratio must be in [0, 1), got 1.0"),
        (["--mask-ratio", "-0.1"], "mask_ratio must be in [0, 1), got -0.1"),
        (["--mask-ratio", "0.3", "--mask-ratio-min", "0.5"], "mask_ratio_min must not exceed"),
        (["--masking-option", "colour=1"], "has no option 'colour'"),
        (["--masking-option", "edges=maybe"], "edges takes true or false, got 'maybe'"),
        (["--masking-option", "temperature=hot"], "temperature takes a number, got 'hot'"),
        (["--masking-option", "num_iters=1.5"], "num_iters takes a whole number, got 1.5"),
        (["--masking-option", "threshold=low"], "threshold takes a number, got 'low'"),
        (["--force-patch-dropout", "0.5"], "patch dropout of 0.5"),
        (["--mask-ratio-end", "0.5"], "--mask-ratio-end needs --mask-schedule linear or cosine"),
        (["--mask-schedule", "linear"], "--mask-schedule linear needs --mask-ratio-end"),
    ],
)
def test_what_the_masking_cannot_do_is_refused(argv, part):
    assert part in refusal(*VALID, *PGS, *argv)


@pytest.mark.parametrize(("model", "tower"), [("RN50", "ResNet"), ("convnext_base", "ConvNeXt")])
def test_towers_that_cannot_be_masked_are_named_with_what_is_supported(model, tower):
    message = refusal("--model", model, *SYNTHETIC, *PGS)
    assert message.startswith(f"--masking pgs on {model}: ")
    assert tower in message
    assert "VisionTransformer" in message
    accept("--model", model, *SYNTHETIC)


def test_a_timm_tower_can_be_masked():
    accept("--model", "ViT-B-16-SigLIP", *SYNTHETIC, *PGS)


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
        (["--text-tokens", "78"], "--text-tokens must be at most the model's context length, 77"),
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


def test_a_local_model_without_a_config_is_refused():
    assert "local-dir:nowhere" in refusal("--model", "local-dir:nowhere", *SYNTHETIC)


def test_no_data_at_all_is_refused():
    assert "there is no data" in refusal("--model", "ViT-B-16")


def test_evaluation_without_training_data_is_accepted(tmp_path):
    accept("--model", "ViT-B-16", "--val-data", write_shards(tmp_path / "val"))


def test_shards_with_their_sizes_need_no_number_of_samples(tmp_path):
    accept("--model", "ViT-B-16", "--train-data", write_shards(tmp_path / "train"))


def test_shards_without_sizes_are_counted(tmp_path):
    pattern = write_shards(tmp_path / "train")
    (tmp_path / "train" / "sizes.json").unlink()
    argv = ["--model", "ViT-B-16", "--train-data", pattern]
    assert "0 training samples are less than one optimiser step" in refusal(*argv)


def test_commands_need_the_number_of_samples():
    argv = ["--model", "ViT-B-16", "--train-data", "pipe:cat {0..1}.tar"]
    assert "--train-num-samples" in refusal(*argv)
    accept(*argv, "--train-num-samples", "1000")


@pytest.mark.parametrize("flag", ["--train-data", "--val-data"])
@pytest.mark.parametrize(
    "pattern", ["nowhere/{0..3}.tar", "nowhere/*.tar", "nowhere.csv", "nowhere", "train/{0..9}.tar"]
)
def test_data_that_is_not_there_is_refused(tmp_path, flag, pattern):
    argv = ["--model", "ViT-B-16", "--train-data", write_shards(tmp_path / "train"), flag, pattern]
    message = refusal(*argv)
    assert flag in message
    assert pattern in message


def test_fewer_commands_than_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = ["--model", "ViT-B-16", "--train-num-samples", "1000", "--train-data"]
    assert "2 shards cannot feed 3 processes" in refusal(*options, "pipe:cat {0..1}.tar")
    accept(*options, "pipe:cat {0..1}.tar", "--dataset-resampled")
    accept(*options, write_shards(tmp_path / "train"))


def test_processes_count_towards_one_step(monkeypatch):
    argv = [*VALID, "--batch-size", "400"]
    accept(*argv)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "takes 1200" in refusal(*argv)


def test_upsampling_factors_need_resampling_and_one_factor_per_source(tmp_path):
    pattern = "::".join(write_shards(tmp_path / name) for name in ("a", "b"))
    argv = ["--model", "ViT-B-16", "--train-data", pattern, "--train-data-upsampling-factors"]
    assert "needs --dataset-resampled" in refusal(*argv, "1::2")
    assert "3 factors for 2" in refusal(*argv, "1::2::3", "--dataset-resampled")
    accept(*argv, "1::2", "--dataset-resampled")


def test_a_table_needs_its_columns_and_rows_for_one_step(tmp_path):
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\n" + "a.png\ta cat\n" * 8)
    argv = ["--model", "ViT-B-16", "--train-data", "pairs.csv", "--batch-size"]
    accept(*argv, "8")
    assert "8 training samples" in refusal(*argv, "9")
    assert "no column 'caption'" in refusal(*argv, "8", "--csv-caption-key", "caption")


def test_imagenet_needs_a_folder_per_class(tmp_path):
    (tmp_path / "val").mkdir()
    argv = [*VALID, "--imagenet-val", "val"]
    assert "no folder per class" in refusal(*argv)
    (tmp_path / "val" / "n01440764").mkdir()
    accept(*argv)


def test_weights_are_a_file_or_a_tag_of_the_model(tmp_path):
    torch.save({"logit_scale": torch.zeros(1)}, tmp_path / "weights.pt")
    accept(*VALID, "--pretrained", "weights.pt")
    accept(*VALID, "--pretrained", "laion2b_s34b_b88k")


def test_the_default_device_may_be_absent():
    assert accept(*VALID).device == "cuda"
    accept(*VALID, "--device", "cpu")


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package wandb" in refusal(*VALID, "--report-to", "wandb,tensorboard")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--momentum", "0.9"], "--momentum has no effect with --opt adamw"),
        (["--lr-cooldown-end", "0.1"], "--lr-cooldown-end has no effect on --lr-scheduler cosine"),
        (["--epochs-cooldown", "1"], "--epochs-cooldown has no effect on --lr-scheduler cosine"),
        (["--skip-scheduler"], "--warmup has no effect with --skip-scheduler"),
        (["--csv-img-key", "a"], "--csv-img-key has no effect without csv data"),
        (["--val-frequency", "2"], "--val-frequency has no effect without --val-data"),
        (["--zeroshot-frequency", "2"], "--zeroshot-frequency has no effect without"),
        (["--lock-image-unlocked-groups", "1"], "--lock-image-unlocked-groups has no effect"),
        (["--lock-text-freeze-layer-norm"], "--lock-text-freeze-layer-norm has no effect"),
        (["--coca-caption-loss-weight", "1"], "on ViT-B-16, which is no CoCa model"),
        (["--loss-dist-impl", "reduce"], "--loss-dist-impl has no effect without --siglip"),
        (["--local-loss", "--siglip"], "--local-loss has no effect with --siglip"),
        (["--wandb-notes", "x"], "--wandb-notes has no effect without --report-to wandb"),
        (["--pretrained-image"], "--pretrained-image has no effect on ViT-B-16"),
        (["--save-frequency", "2", "--logs", "none"], "--save-frequency has no effect with --logs"),
        (["--warmup", "10000"], "--warmup 10000 is as long as the run of 480 steps"),
        (
            ["--unmasked-epochs", "1", "--unmasked-warmup", "15"],
            "--unmasked-warmup 15 is as long as unmasked tuning of 15 steps",
        ),
        (["--unmasked-lr", "1e-4"], "--unmasked-lr has no effect without --unmasked-epochs"),
        (["--mask-schedule-steps", "3"], "--mask-schedule-steps has no effect with --mask-sched"),
    ],
)
def test_a_setting_with_no_effect_warns(argv, sentence):
    (warning,) = warnings_of(*VALID, *argv)
    assert warning.startswith(sentence) or warning.endswith(sentence)


@pytest.mark.parametrize(
    "argv",
    [
        ["--local-loss", "--gather-with-grad", "--ddp-static-graph", "--dist-backend", "gloo"],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", "--lr-cooldown-power", "2"],
        ["--opt", "timm/sgd", "--lr", "0.1", "--momentum", "0.9"],
        ["--lock-image", "--lock-image-unlocked-groups", "1"],
    ],
)
def test_settings_with_an_effect_do_not_warn(argv):
    assert warnings_of(*VALID, *argv) == []


def test_a_warning_names_settings_of_a_config_too(tmp_path):
    (tmp_path / "run.yaml").write_text("momentum: 0.9\n")
    assert "--momentum" in warnings_of(*VALID, "--config", "run.yaml")[0]


def test_schemas_that_bring_weights_make_pretrained_idle(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    config = json.loads((tmp_path / write_model_config(tmp_path / "vit_any.json")).read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = f"local-dir:{folder}"
    (warning,) = warnings_of("--model", model, *SYNTHETIC, "--pretrained", "openai")
    assert warning.startswith("--pretrained has no effect")
