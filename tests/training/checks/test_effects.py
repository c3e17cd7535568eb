import json

import pytest
import torch

from clip_pgs.training.build import build_optimizer
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import parse_options
from support.options import SYNTHETIC, VALID, write_model_config, write_shards
from support.refusals import warnings_of
from support.runs import COCA, write_model


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
        (["--loss-dist-impl", "reduce"], "--loss-dist-impl has no effect without the loss"),
        (["--local-loss", "--siglip"], "--local-loss has no effect with --siglip"),
        (["--wandb-notes", "x"], "--wandb-notes has no effect without --report-to wandb"),
        (["--pretrained-image"], "--pretrained-image has no effect on ViT-B-16"),
        (["--save-frequency", "2", "--logs", "none"], "--save-frequency has no effect with --logs"),
        (["--warmup", "10000"], "--warmup 10000 is longer than the run of 480 steps"),
        (
            ["--unmasked-epochs", "1", "--unmasked-warmup", "16"],
            "--unmasked-warmup 16 is longer than unmasked tuning of 15 steps",
        ),
        (["--unmasked-lr", "1e-4"], "--unmasked-lr has no effect without --unmasked-epochs"),
        (["--train-data", "train.tar"], "--train-data is not read with --dataset-type synthetic"),
        (["--val-data", "pairs.csv"], "--val-data is not read with --dataset-type synthetic"),
        (["--mask-schedule-steps", "3"], "--mask-schedule-steps has no effect with --mask-sched"),
    ],
)
def test_a_setting_with_no_effect_warns(argv, sentence):
    (warning,) = warnings_of(*VALID, *argv)
    assert warning.startswith(sentence) or warning.endswith(sentence)


@pytest.mark.parametrize(
    ("opt", "named"),
    [
        ("timm/adam", ["--momentum"]),
        ("timm/Lookahead_Adam", ["--momentum"]),
        ("timm/sgd", ["--beta1", "--beta2", "--eps"]),
        ("timm/lion", ["--momentum", "--eps"]),
        ("timm/rmsprop", ["--beta1", "--beta2"]),
    ],
)
def test_settings_that_an_optimizer_drops_warn(opt, named):
    given = ["--momentum=0.75", "--beta1=0.3", "--beta2=0.4", "--eps=0.125"]
    options = parse_options([*VALID, "--opt", opt, "--lr", "1", *given])
    sentences = option_warnings(options)
    assert [sentence.split(" has no effect with --opt")[0] for sentence in sentences] == named
    # As it is made of them.
    made = build_optimizer(options, torch.nn.Linear(2, 2)).state_dict()["param_groups"][0]
    taken = {"--momentum": 0.75, "--beta1": 0.3, "--beta2": 0.4, "--eps": 0.125}
    values = {*made.get("betas", ()), *(v for v in made.values() if isinstance(v, float))}
    assert [flag for flag, value in taken.items() if value not in values] == named


def test_loggers_may_be_joined_by_a_comma_and_a_space():
    argv = [*VALID, "--wandb-notes", "x", "--report-to"]
    for targets in ("tensorboard, wandb", "wandb ,tensorboard", "all"):
        assert option_warnings(parse_options([*argv, targets])) == []


def test_a_warmup_of_unmasked_tuning_has_an_effect_beside_skip_scheduler():
    tuning = ["--unmasked-epochs", "1", "--unmasked-warmup"]
    sentences = warnings_of(*VALID, "--skip-scheduler", *tuning, "16")
    assert any(sentence.startswith("--unmasked-warmup 16 is longer") for sentence in sentences)
    assert not any(
        "unmasked" in each for each in warnings_of(*VALID, "--skip-scheduler", *tuning, "9")
    )


def masking(name, *options, ratios=()):
    words = [word for option in options for word in ("--masking-option", option)]
    return ["--masking", name, "--mask-ratio", "0.5", *ratios, *words]


SCHEDULE = ("--mask-schedule", "linear", "--mask-ratio-end", "0.8")
ADAPTIVE = ("--mask-ratio-min", "0.3")
EDGES = ("edge_weight=1", "edge_protection=0", "edge_detector=canny")
TRANSPORT = ("temperature=3", "num_iters=20", "solver=pot")


@pytest.mark.parametrize(
    ("argv", "idle"),
    [
        (masking("pgs", "threshold=0.3"), "threshold with a fixed count"),
        (masking("pgs", "threshold=0.3", ratios=ADAPTIVE), ""),
        (masking("pgs", "edges=false", EDGES[0]), "edge_weight with edges=false"),
        (masking("pgs", "edges=false", EDGES[1]), "edge_protection with edges=false"),
        (masking("pgs", "edges=false", EDGES[2]), "edge_detector with edges=false"),
        (masking("pgs", *EDGES), ""),
        (masking("pgs", "transport=false", TRANSPORT[0]), "temperature with transport=false"),
        (masking("pgs", "transport=false", TRANSPORT[1]), "num_iters with transport=false"),
        (masking("pgs", "transport=false", TRANSPORT[2]), "solver with transport=false"),
        (masking("pgs", *TRANSPORT), ""),
        (masking("pgs", "random_images=1", "random_share=0.5"), "random_share with random_images"),
        (masking("pgs", "random_images=0.5", "random_share=0.5"), ""),
        (masking("cluster", "threshold=0.3"), "--mask-ratio but on mask_ratio_min"),
        (masking("cluster", ratios=SCHEDULE), ""),
        (masking("pgs-released", "threshold=0.3"), "--mask-ratio but on mask_ratio_min"),
        (masking("pgs-released", "edges=false", ratios=ADAPTIVE), ""),
        (["--masking", "cluster", "--masking-option", "threshold=0.3"], ""),
        (
            ["--masking", "cluster", "--masking-option", "threshold=0.3", *SCHEDULE],
            "--mask-ratio-end but on mask_ratio_min",
        ),
    ],
)
def test_options_of_a_masking_that_others_leave_idle_are_told(argv, idle):
    told = " ".join(warnings_of(*VALID, *argv))
    assert told.replace("--masking-option ", "").replace(" has no effect", "").startswith(idle)
    assert bool(told) == bool(idle)


@pytest.mark.parametrize(
    "argv",
    [
        ["--local-loss", "--gather-with-grad", "--ddp-static-graph", "--dist-backend", "gloo"],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", "--lr-cooldown-power", "2"],
        ["--opt", "timm/sgd", "--lr", "0.1", "--momentum", "0.9"],
        ["--opt", "timm/lookahead_adam", "--lr", "1", "--beta1=0.5", "--beta2=0.5", "--eps=1"],
        ["--lock-image", "--lock-image-unlocked-groups", "1"],
        # The last step has the full rate.
        ["--warmup", "480"],
    ],
)
def test_settings_with_an_effect_do_not_warn(argv):
    assert warnings_of(*VALID, *argv) == []


@pytest.mark.parametrize(
    ("argv", "is_told"),
    [([], True), (["--name", "run"], False), (["--logs", "none"], False)],
)
def test_a_job_of_slurm_that_will_not_find_its_run_again_is_told(argv, is_told, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    told = warnings_of(*VALID, *argv)
    assert told == is_told * ["without --name this run begins anew when Slurm starts its job again"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--val-data", "{shards}", "--val-num-samples", "5"], ["--val-num-samples"]),
        (["--val-data", "{table}", "--val-num-samples", "5"], ["--val-num-samples"]),
        (["--val-data", "pipe:cat {shards}", "--val-num-samples", "5"], []),
        (["--val-data", "{shards}", "--val-frequency", "0"], ["--val-data"]),
        (["--val-data", "{shards}", "--val-frequency", "2"], []),
        (["--val-data", "{shards}", "--zeroshot-frequency", "2"], ["--zeroshot-frequency"]),
        (["--imagenet-val", "images", "--zeroshot-frequency", "2"], []),
        (["--imagenet-val", "images", "--zeroshot-frequency", "0"], ["--imagenet-val"]),
        (["--imagenet-v2", "images", "--zeroshot-frequency", "0"], ["--imagenet-v2"]),
        (["--val-data", "{table}", "--train-num-samples", "64"], []),
        (["--eval-every", "2"], ["--eval-every"]),
        (["--eval-datasets", "paper"], ["--eval-datasets"]),
        (["--eval-data-root", "."], ["--eval-data-root"]),
        (["--eval-inference-masking", "run"], ["--eval-inference-masking"]),
        (["--eval-inference-mask-ratio", "0.5"], ["--eval-inference-mask-ratio"]),
    ],
)
def test_every_option_of_validation_has_an_effect_or_a_warning(tmp_path, argv, named):
    shards = write_shards(tmp_path / "shards")
    table = tmp_path / "pairs.tsv"
    table.write_text("filepath\ttitle\na.jpg\tone\n")
    argv = [word.replace("{shards}", shards).replace("{table}", str(table)) for word in argv]
    train = ["--model", "ViT-B-16", "--train-data", shards, "--warmup", "2"]
    sentences = option_warnings(parse_options([*train, *argv]))
    assert [sentence.split(" has no effect")[0] for sentence in sentences] == named


def test_a_loss_of_ones_own_leaves_siglip_without_effect(tmp_path):
    model = write_model(tmp_path, name="captioner", config=COCA)
    argv = ["--model-config", str(model), *SYNTHETIC, "--siglip", "--local-loss"]
    (sentence,) = warnings_of(*argv)
    assert sentence == "--siglip has no effect on captioner, which has a loss of its own"
    (sentence,) = warnings_of("--model", "ViT-B-16", *SYNTHETIC, "--siglip", "--local-loss")
    assert sentence == "--local-loss has no effect with --siglip"


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
