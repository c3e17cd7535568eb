"""What a resumed run is told anew holds: each option of the recipe, and what is no recipe."""

import json
import shutil

import pytest
import torch

from clip_pgs.training.build import build_optimizer
from clip_pgs.training.checkpoint import restore_optimizer
from clip_pgs.training.options import (
    IDENTITY,
    RECIPE,
    TrainOptions,
    names_of,
    parse_options,
)
from clip_pgs.training.trainer import train
from support.resuming import differences, last_checkpoint
from support.runs import COCA, MODEL, flags, run, write_csv, write_model

TEXT = {**MODEL["text_cfg"], "width": 8, "heads": 1}
VISION = {**MODEL["vision_cfg"], "layers": 1}
MODELS = {
    "vit": {"embed_dim": 8, "text_cfg": TEXT, "vision_cfg": VISION},
    "resnet": {
        "embed_dim": 8,
        "text_cfg": TEXT,
        "vision_cfg": {"image_size": 32, "layers": [1] * 4, "width": 8},
    },
    "coca": COCA,
}
COOLDOWN = {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1}
TUNED = {"unmasked_epochs": 2, "epochs": 1, "masking": "random"}

# How the run began, and what it is told when it goes on.
CHANGES = {
    "lr": ({}, {"lr": 0.1}),
    "wd": ({}, {"wd": 50}),
    "beta1": ({}, {"beta1": 0.1}),
    "beta2": ({}, {"beta2": 0.1}),
    "eps": ({}, {"eps": 1.0}),
    "momentum": ({"opt": "timm/sgdw", "momentum": 0.9}, {"momentum": 0.1}),
    "skip_scheduler": ({}, {"skip_scheduler": True}),
    "lr, without a schedule": ({"skip_scheduler": True}, {"lr": 0.1}),
    "wd, in unmasked tuning": (TUNED, {"wd": 50}),
    "warmup": ({}, {"warmup": 9}),
    "lr_scheduler": ({}, {"lr_scheduler": "const"}),
    "epochs_cooldown": (COOLDOWN, {"epochs_cooldown": 2}),
    "lr_cooldown_end": (COOLDOWN, {"lr_cooldown_end": 5e-4}),
    "lr_cooldown_power": (COOLDOWN, {"lr_cooldown_power": 3}),
    "grad_clip_norm": ({}, {"grad_clip_norm": 1e-3}),
    "epochs": ({}, {"epochs": 3}),
    "batch_size": ({}, {"batch_size": 2}),
    "accum_freq": ({}, {"accum_freq": 2}),
    "precision": ({}, {"precision": "amp_bf16"}),
    "image_mean": ({}, {"image_mean": [0.1, 0.2, 0.3]}),
    "image_std": ({}, {"image_std": [0.5, 0.6, 0.7]}),
    "aug_cfg": ({}, {"aug_cfg": "scale=(0.1,0.2)"}),
    "unmasked_epochs": (TUNED, {"unmasked_epochs": 3}),
    "unmasked_lr": (TUNED, {"unmasked_lr": 1e-3}),
    "unmasked_warmup": (TUNED, {"unmasked_warmup": 3}),
    "unmasked_batch_size": (TUNED, {"unmasked_batch_size": 2}),
    "unmasked_accum_freq": (TUNED, {"unmasked_accum_freq": 2}),
    "lock_image_freeze_bn_stats": (
        {"model": "resnet", "lock_image": True},
        {"lock_image_freeze_bn_stats": True},
    ),
    "coca_caption_loss_weight": ({"model": "coca"}, {"coca_caption_loss_weight": 9}),
    "coca_contrastive_loss_weight": ({"model": "coca"}, {"coca_contrastive_loss_weight": 9}),
}
FREEZES_NORM = {"lock_text": True, "lock_text_freeze_layer_norm": True}
# Another set of trained parameters does not fit the optimizer's.
REFUSED = {
    "lock_image": ({}, {"lock_image": True}),
    "lock_image_unlocked_groups": ({"lock_image": True}, {"lock_image_unlocked_groups": 1}),
    "lock_text": ({}, FREEZES_NORM),
    "lock_text_unlocked_layers": (FREEZES_NORM, {"lock_text_unlocked_layers": 1}),
}
# Evaluations and the export alone see the first two; one process has no use for the others. A
# text tower of OpenCLIP's must have the last.
ELSEWHERE = {
    "image_interpolation",
    "image_resize_mode",
    "local_loss",
    "gather_with_grad",
    "loss_dist_impl",
    "use_bn_sync",
    "lock_text_freeze_layer_norm",
}
# What may differ between the launches of a run: where things are, how fast and how it is told.
NEUTRAL = """
config check_only trial model_config mask_ratio mask_ratio_min masking_option pack_tokens fsdp
loss_chunk text_masking_option eval_suite eval_datasets eval_data_root eval_every
eval_inference_masking eval_inference_mask_ratio save_every_steps save_every_minutes
keep_checkpoints accept_changes max_bad_steps max_bad_share data_timeout hang_timeout
target_mask_ratio min_mask_ratio use_ed use_otn train_data val_data val_num_samples
csv_separator imagenet_val imagenet_v2 workers cache_dir grad_checkpointing torchcompile device
dist_url dist_backend no_set_device_rank ddp_static_graph logs log_local name debug
log_every_n_steps report_to wandb_notes wandb_project_name save_frequency save_most_recent
delete_previous_checkpoint zeroshot_frequency val_frequency resume given resume_instead
distributed rank local_rank world_size upstream
"""


def test_each_option_has_a_place():
    options = set(TrainOptions.__dataclass_fields__)
    assert options - {*names_of(IDENTITY), *names_of(RECIPE)} == set(NEUTRAL.split())
    tried = {name.partition(",")[0] for name in (*CHANGES, *REFUSED)}
    assert tried | ELSEWHERE == set(names_of(RECIPE))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Return a function that gives a run of one epoch of two and how it goes on; made once each."""
    made = {}
    table = write_csv(tmp_path_factory.mktemp("csv"), num_samples=8)

    def begin(*, model="vit", **options):
        key = json.dumps([model, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("begun")
            config = write_model(folder, config=MODELS[model])
            options = {"model": config, "train_data": table, "batch_size": 4, **options}
            run(folder, **options)
            whole = last_checkpoint(folder / "logs" / "run")
            for path in (folder / "logs" / "run" / "checkpoints").glob("epoch_[23].pt"):
                path.unlink()
            made[key] = folder, options, whole
        return made[key]

    return begin


def go_on(tmp_path, begun, before, changed):
    """Resume a copy of a run; return its last checkpoint, and that of the run without changes."""
    folder, options, whole = begun(**before)
    shutil.copytree(folder / "logs", tmp_path / "logs")
    # Without the checks, which take as long.
    train(parse_options(flags(tmp_path, **{**options, "resume": "latest", **changed})))
    return last_checkpoint(tmp_path / "logs" / "run"), whole


QUICK = ("wd", "lr, without a schedule")


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        pytest.param(*change, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, change in CHANGES.items()
    ],
)
def test_a_change_of_the_recipe_changes_the_run_that_goes_on(tmp_path, begun, before, changed):
    changed_run, whole = go_on(tmp_path, begun, before, changed)
    assert any(name.startswith("state_dict") for name in differences(changed_run, whole))


@pytest.mark.slow
@pytest.mark.parametrize("before", [{}, TUNED, COOLDOWN], ids=str)
def test_a_run_that_goes_on_without_a_change_is_the_same(tmp_path, begun, before):
    assert differences(*go_on(tmp_path, begun, before, {})) == []


@pytest.mark.slow
@pytest.mark.parametrize(("before", "changed"), REFUSED.values(), ids=REFUSED)
def test_other_trained_parameters_are_refused(tmp_path, begun, before, changed):
    folder, options, _ = begun(**before)
    shutil.copytree(folder / "logs", tmp_path / "logs")
    with pytest.raises(ValueError, match="--lock-image and --lock-text"):
        run(tmp_path, **{**options, "resume": "latest", **changed})


def test_another_model_under_the_same_name_is_refused_by_what_differs(tmp_path, begun):
    folder, options, _ = begun()
    shutil.copytree(folder / "logs", tmp_path / "logs")
    # The weights of two heads are those of one.
    config = {**MODELS["vit"], "text_cfg": {**TEXT, "heads": 2}}
    model = write_model(tmp_path, config=config)
    with pytest.raises(ValueError, match="--accept-changes") as refused:
        run(tmp_path, **{**options, "resume": "latest", "model": model})
    assert "{'text_cfg': {'heads': 1}} -> {'text_cfg': {'heads': 2}}" in str(refused.value)


SETTINGS = {"wd": 0.5, "beta1": 0.6, "beta2": 0.7, "momentum": 0.4, "eps": 1e-3}
OPTIMIZERS = "adamw timm/adamw timm/lamb timm/adafactor timm/mars timm/sgdc timm/lookahead_adamw"


@pytest.mark.parametrize("opt", OPTIMIZERS.split())
def test_settings_come_from_the_options_and_what_was_counted_from_the_file(opt):
    def optimizer(lr, **settings):
        argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        options = parse_options(["--model", "ViT-B-32", "--opt", opt, "--lr", str(lr), *argv])
        return build_optimizer(options, layer)

    layer = torch.nn.Linear(2, 2)
    used, fresh, expected = optimizer(0.1), optimizer(0.2, **SETTINGS), optimizer(0.2, **SETTINGS)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    used.step()
    for group in used.param_groups:
        # As a stranger's file may say.
        group |= {name: True for name, value in group.items() if value in (None, False)}
        group |= {"maximize": True, "differentiable": True, "amsgrad": True}
    counted = {"step", "lookahead_step"}
    restore_optimizer(fresh, used.state_dict())
    for group, told, file in zip(
        fresh.param_groups, expected.param_groups, used.param_groups, strict=True
    ):
        assert group.keys() - counted == told.keys() - counted
        for name in group.keys() - {"params"}:
            assert group[name] == (file if name in counted else told)[name], name
    assert len(fresh.state_dict()["state"]) == 2
