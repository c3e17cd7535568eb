import sys

import pytest

from support.options import SYNTHETIC, VALID, write_model_config
from support.refusals import PGS, accept, refusal, warnings_of
from support.runs import COCA, MODEL, write_model


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
        ("--lr", "nan", "a finite number > 0"),
        ("--lr", "inf", "a finite number > 0"),
        ("--lr", "1e300", "at most 2**53"),
        ("--coca-caption-loss-weight", "inf", "a finite number >= 0"),
        ("--wd", "-0.1", ">= 0"),
        ("--beta1", "1", "in [0, 1)"),
        ("--eps", "0", "> 0"),
        ("--grad-clip-norm", "0", "> 0"),
        ("--log-every-n-steps", "0", ">= 1"),
        ("--seed", "-1", "in [0, 2**32)"),
        ("--seed", "9" * 20, "in [0, 2**32)"),
        ("--seed", "9" * 400, "in [0, 2**32)"),
        ("--train-num-samples", "0", ">= 1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(flag, value, rule):
    message = refusal(*VALID, f"{flag}={value}")
    assert message.startswith(f"{flag} must be {rule}, got ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--image-mean", "0", "1"], "--image-mean takes 3 finite numbers"),
        (["--image-std", "0", "1", "1"], "--image-std must be > 0"),
        (["--force-image-size", "1", "2", "3"], "--force-image-size takes 1 or 2"),
        (["--opt", "sgd"], "--opt must be adamw or timm/NAME, got 'sgd'"),
        (["--opt", "timm/adamm", "--lr", "1"], "--opt timm/adamm"),
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
        (["--device", "warp"], "--device warp is not available"),
        (["--device", "meta"], "--device meta is not available"),
        (["--epochs", "9" * 30], "--epochs must be at most 2**53"),
        (["--workers", "2000"], "--workers must be in [0, 1024], got 2000"),
        (["--aug-cfg", "scale=wide"], "OpenCLIP cannot augment with --aug-cfg {'scale': 'wide'}"),
        (["--batch-size", "9" * 12], "the pixels of a batch of 999999999999 images of 224 x 224"),
        (["--force-image-size", "1000000"], "the weights of ViT-B-16 take"),
        (["--logs", f"{__file__}/logs", "--name", "a"], "--logs: cannot write"),
        (["--logs", __file__, "--name", "a"], "--logs: cannot write"),
        (["--logs", __file__], "--logs: cannot write"),
        (["--logs", "/proc/x"], "--logs: cannot write"),
        (["--logs", "/proc/x", "--name", "a"], "--logs: cannot write"),
        (["--logs", "/dev/null", "--name", "a"], "--logs: cannot write"),
        (["--imagenet-val", "x" * 300], "File name too long"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--resume", "nowhere.pt"], "--resume: checkpoint 'nowhere.pt' does not exist"),
        (["--resume", __file__], "cannot be read"),
        (["--lock-text"], "--lock-text needs --lock-text-freeze-layer-norm"),
        (["--resume", "latest"], "needs the --name"),
        (["--resume", "latest", "--name", "a", "--logs", "none"], "needs the run's --logs"),
        (["--name", "../a"], "--name must be one folder name"),
        (["--name", "x" * 256], "--name must be one folder name"),
        (["--name", "z\udcfc"], "--name must be one folder name"),
        (["--name", "\u00e9" * 128], "--name must be one folder name"),
        (["--dist-backend", "carrier-pigeon"], "--dist-backend must be one of"),
        (["--dist-url", "nowhere"], "--dist-url must be like"),
        (["--opt", "timm/fusedadam", "--lr", "1"], "--opt timm/fusedadam cannot be made"),
        (["--name", ".."], "--name must be one folder name"),
        (["--opt", "timm/adahessian", "--lr", "1"], "--opt timm/adahessian needs second"),
        (["--opt", "timm/lookahead_adahessian", "--lr", "1"], "needs second derivatives"),
        (["--imagenet-val", "nowhere"], "--imagenet-val 'nowhere' is not a folder"),
        (["--batch-size", "1001"], "1000 training samples: less than one optimizer step"),
        (["--batch-size", "500", "--accum-freq", "3"], "takes 1500"),
    ],
)
def test_what_cannot_work_is_refused(argv, part):
    assert part in refusal(*VALID, *argv)


@pytest.mark.parametrize(
    "flag",
    [
        *("--logs", "--resume", "--val-data", "--imagenet-val", "--imagenet-v2"),
        *("--cache-dir", "--eval-data-root"),
    ],
)
def test_an_empty_text_names_no_place(flag):
    assert refusal(*VALID, flag, "") == f"{flag} must name something, got an empty text"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x7f", "a\u202eb"])
def test_a_name_that_a_terminal_would_obey_is_refused_and_shown_escaped(name):
    assert refusal(*VALID, "--name", name).endswith(f"of at most 255 bytes, got {name!r}")


def test_a_name_in_any_language_is_taken():
    accept(*VALID, "--name", "l\u00e4uft \u8d70")


@pytest.mark.parametrize(
    ("bias", "weights", "named"),
    [
        (None, ("0", "0"), "--coca-caption-loss-weight and --coca-contrastive-loss-weight"),
        (-10.0, ("1", "1"), "init_logit_bias"),
        (None, ("0", "1"), None),
        (None, ("1", "0"), None),
    ],
)
def test_a_loss_of_coca_that_could_not_train_is_refused(tmp_path, bias, weights, named):
    config = COCA if bias is None else {**COCA, "init_logit_bias": bias}
    argv = ["--model-config", str(write_model(tmp_path, name="captioner", config=config))]
    flags = ("--coca-caption-loss-weight", "--coca-contrastive-loss-weight")
    argv += [*SYNTHETIC, *(word for pair in zip(flags, weights, strict=True) for word in pair)]
    if named is None:
        accept(*argv)
    else:
        assert named in refusal(*argv)


def test_single_images_of_which_batch_norm_sees_one_number_are_refused(tmp_path):
    vision = {"image_size": 64, "layers": [1] * 4, "width": 8}
    model = write_model(tmp_path, name="normed", config={**MODEL, "vision_cfg": vision})
    argv = ["--model-config", str(model), *SYNTHETIC, "--accum-freq", "2", "--batch-size"]
    for more in (["--force-image-size", "32"], ["--train-image-size", "32"]):
        assert "--batch-size must be >= 2" in refusal(*argv, "1", *more)
        accept(*argv, "2", *more)
    accept(*argv, "1")
    accept("--model-config", str(write_model(tmp_path)), *argv[2:], "1")


POOLED = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("captioner", COCA),
        ("pooled", {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], **POOLED}}),
        ("scaled", {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "ls_init_value": 1e-4}}),
        ("resnet", {**MODEL, "vision_cfg": {"image_size": 64, "layers": [1] * 4, "width": 8}}),
        ("plain", MODEL),
    ],
)
def test_half_precision_that_a_model_cannot_compute_in_is_refused(
    tmp_path, name, config, precision
):
    model = write_model(tmp_path, name=f"{name}_{precision}", config=config)
    argv = ["--model-config", str(model), *SYNTHETIC, "--precision"]
    if name in ("plain", "resnet"):
        accept(*argv, precision)
    else:
        message = refusal(*argv, precision)
        assert f"--precision {precision}" in message
        assert f"pure_{precision}" in message
        accept(*argv, f"pure_{precision}")


def test_a_url_is_not_resumed_and_shown_as_it_is():
    assert "no URL, got 'https://host/y.pt'" in refusal(*VALID, "--resume", "https://host/y.pt")


@pytest.mark.parametrize("length", ["1", "2"])
def test_captions_without_room_for_a_word_are_refused(length):
    message = refusal(*VALID, "--force-context-length", length)
    assert message.startswith("--force-context-length must be >= 3, for a start token, a word")
    assert message.endswith(f"got {length}")


@pytest.mark.parametrize(
    "crop",
    ["scale=(0,0)", "scale=(5,9)", "scale=(-1,1)", "scale=(0.9,0.1)", "ratio=(0,0)", "ratio=(2,1)"],
)
def test_crops_that_no_image_has_are_refused(crop):
    message = refusal(*VALID, "--aug-cfg", crop)
    assert message.startswith("OpenCLIP cannot augment with --aug-cfg {")
    assert crop.partition("=")[0] in message


def test_crops_of_any_size_are_taken():
    accept(*VALID, "--aug-cfg", "scale=(0,1)", "ratio=(0.5,2)")


def test_the_default_device_may_be_absent():
    assert accept(*VALID).device == "cuda"
    accept(*VALID, "--device", "cpu")


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package wandb" in refusal(*VALID, "--report-to", "wandb,tensorboard")


def test_a_folder_that_a_logger_made_is_no_logger(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert "needs the package wandb" in refusal(*VALID, "--report-to", "wandb")


@pytest.mark.parametrize("masking", [(), ("--masking", "random")])
def test_synced_batch_norm_is_refused_where_it_cannot_run(tmp_path, monkeypatch, masking):
    vision = {"layers": [1] * 4, "width": 8, "head_width": 8}
    resnet = write_model_config(tmp_path / "synced.json", **vision)
    argv = ("--model-config", resnet, *SYNTHETIC, "--device", "cpu", "--use-bn-sync", *masking)
    accept(*argv)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--use-bn-sync" in refusal(*argv)
    # A ViT has none to sync.
    accept(*VALID, "--device", "cpu", "--use-bn-sync")
