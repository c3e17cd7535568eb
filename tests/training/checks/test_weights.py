"""Weights and checkpoints that do not fit are found out before anything is created."""

import contextlib
import copy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from clip_pgs.training.__main__ import main
from clip_pgs.training.build import build_optimizer
from clip_pgs.training.checkpoint import _WINDOW, optimizer_misfit
from clip_pgs.training.options import parse_options
from support.options import SYNTHETIC, VALID, write_model_config
from support.refusals import accept, refusal


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command line of a tiny model, and such a model that stays as it is."""
    path = write_model_config(tmp_path_factory.mktemp("model") / "vit_weights.json")
    argv = ("--model-config", path, *SYNTHETIC, "--device", "cpu")
    # Makes the name known.
    parse_options(argv)
    return argv, open_clip.create_model("vit_weights")


@pytest.fixture
def model(made):
    """The command line of a tiny model, and one of such models."""
    argv, weights = made
    return argv, copy.deepcopy(weights)


def save(state_dict, path="weights.pt", **content):
    torch.save({"state_dict": dict(state_dict), **content}, path)
    return path


def renamed(model, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("path", ["weights.pt", "weights.ckpt", "weights"])
def test_weights_that_evaluation_opens_start_a_run(model, prefix, path):
    argv, weights = model
    accept(*argv, "--pretrained", save(renamed(weights, prefix), path))


def test_weights_of_a_clip_start_its_custom_text_model(model):
    argv, weights = model
    accept(*argv, "--pretrained", save(weights.state_dict()), "--force-custom-text")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda state: {f"student.{name}": t for name, t in state.items()}, "the file has student"),
        (lambda state: state.pop("visual.proj"), "the model has visual.proj"),
        (lambda state: state.update(extra=torch.zeros(1)), "the file has extra"),
        (lambda state: state.update({"ln_final.weight": torch.zeros(3)}), "shape (3,)"),
        (
            lambda state: state.update(positional_embedding=torch.zeros(77, 3)),
            "positional_embedding has shape (77, 3)",
        ),
        (lambda state: state.update(logit_bias=torch.zeros(1)), "the file has logit_bias"),
        (lambda state: {"weights": torch.zeros(2)}, "the file has weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(model, damage, part):
    argv, weights = model
    state = dict(weights.state_dict())
    changed = damage(state)
    path = save(changed if isinstance(changed, dict) else state)
    message = refusal(*argv, "--pretrained", path)
    assert path in message
    assert part in message


def test_custom_text_weights_do_not_fit_a_plain_clip(model):
    argv, _ = model
    custom = open_clip.create_model("vit_weights", force_custom_text=True)
    assert "only the" in refusal(*argv, "--pretrained", save(custom.state_dict()))


def test_such_a_refusal_is_one_sentence_and_creates_nothing(model, tmp_path, capsys):
    argv, weights = model
    save(renamed(weights, "student."))
    before = sorted(tmp_path.iterdir())
    for more in ([], ["--check-only"]):
        assert main([*argv, "--pretrained", "weights.pt", "--name", "run", *more]) == 2
        written = capsys.readouterr()
        assert written.out == ""
        assert written.err.startswith("error: ")
        assert written.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "argv",
    [
        ("--model", "ViT-B-16", "--pretrained", "laion2b_s34b_b88k"),
        ("--model", "ViT-B-32", "--pretrained", "openai"),
        ("--model", "roberta-ViT-B-32"),
        ("--model", "ViT-B-16-SigLIP"),
        ("--model", "vit_medium_patch16_gap_256", "--pretrained-image"),
    ],
)
def test_what_cannot_be_fetched_is_refused(argv, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(*argv, *SYNTHETIC, "--cache-dir", str(tmp_path / "cache"))
    assert argv[1] in message


def begun(model, **locks):
    """Return the content of a checkpoint after an epoch of training, with these towers locked."""
    if locks.get("lock_image"):
        model.lock_image_tower()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [[p for _, p in trained if p.ndim < 2], [p for _, p in trained if p.ndim >= 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    for _, parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = np.float64(0.1)
    return {"epoch": 1, "name": "theirs", "optimizer": state}


def test_a_run_goes_on_from_a_file_of_an_older_trainer(model):
    argv, weights = model
    save(renamed(weights, "module."), **begun(weights))
    accept(*argv, "--resume", "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("resumes", ["file", "folder", "latest"])
@pytest.mark.parametrize("flag", ["--lock-image", "--opt=timm/sgd"])
def test_a_run_does_not_go_on_with_an_optimizer_of_other_parameters(model, tmp_path, resumes, flag):
    argv, weights = model
    folder = tmp_path / "logs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "epoch_1.pt"
    save(weights.state_dict(), path, **begun(weights))
    resume = {"file": [str(path)], "folder": [str(folder.parent)], "latest": ["latest"]}[resumes]
    argv = [*argv, "--lr", "0.1", "--resume", *resume]
    if resumes == "latest":
        argv += ["--name", "run"]
    accept(*argv)
    message = refusal(*argv, flag)
    assert "--resume" in message
    assert "epoch_1.pt" in message


@pytest.mark.parametrize(
    ("was", "now", "is_refused"),
    [
        ("timm/adamw", "timm/adan", True),
        ("timm/adamw", "timm/adamax", True),
        (None, "timm/adan", True),
        ("timm/AdamW", "timm/adamw", False),
    ],
)
def test_a_run_does_not_go_on_with_the_state_of_another_optimizer(model, was, now, is_refused):
    argv, weights = model
    record = {} if was is None else {"clip_pgs": {"recipe": {"opt": was}}}
    # Of the groups that those of timm have, too.
    used = parse_options([*argv, "--opt", "timm/adamw", "--lr", "0.1"])
    content = {"epoch": 1, "optimizer": build_optimizer(used, weights).state_dict()}
    numbers = [n for group in content["optimizer"]["param_groups"] for n in group["params"]]
    trained = [p for group in build_optimizer(used, weights).param_groups for p in group["params"]]
    content["optimizer"]["state"] = {
        number: {"step": torch.ones(()), "exp_avg": zeros, "exp_avg_sq": zeros}
        for number, zeros in zip(numbers, map(torch.zeros_like, trained), strict=True)
    }
    path = save(weights.state_dict(), **content, **record)
    argv = [*argv, "--opt", now, "--lr", "0.1", "--resume", path]
    if is_refused:
        message = refusal(*argv)
        assert "--opt" in message
        assert "--pretrained" in message
    else:
        accept(*argv)


@pytest.mark.parametrize(
    "state",
    [
        {"teacher": {"conv1.weight": torch.zeros(3)}},
        {"strategy": {"thresholds": [0.1]}},
        {"strategy": 3},
        {"other": {}},
    ],
    ids=str,
)
@pytest.mark.parametrize("masking", ["cluster", "attentive"])
def test_a_damaged_masking_state_is_refused(model, masking, state):
    argv, weights = model
    path = save(weights.state_dict(), **begun(weights), masking_state=state)
    assert "masking_state" in refusal(*argv, "--resume", path, "--masking", masking)


def test_locking_back_is_refused_too(model):
    argv, weights = model
    save(weights.state_dict(), **begun(weights, lock_image=True))
    accept(*argv, "--resume", "weights.pt", "--lock-image")
    assert "--lock-image" in refusal(*argv, "--resume", "weights.pt")


@pytest.mark.parametrize(
    "content", [{"epoch": 1}, {"epoch": 1, "optimizer": {}}, {"position": 3, "optimizer": [1]}]
)
def test_a_begun_run_without_its_optimizer_does_not_go_on(model, content):
    argv, weights = model
    save(weights.state_dict(), **content)
    assert "optimizer" in refusal(*argv, "--resume", "weights.pt")
    accept(*argv, "--pretrained", "weights.pt")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("step is 'three'", lambda group, entry: group.update(step="three")),
        ("step is None", lambda group, entry: group.update(step=None)),
        ("step of parameter 0 is str", lambda group, entry: entry.update(step="3")),
        ("exp_avg of parameter 0", lambda group, entry: entry.update(exp_avg=None)),
        ("exp_avg_sq of parameter 0", lambda group, entry: entry.update(exp_avg_sq=torch.ones(7))),
        (
            "exp_avg of parameter 0 is torch.int64",
            lambda group, entry: entry.update(exp_avg=entry["exp_avg"].long()),
        ),
        *(
            (
                f"{name} of parameter 0 is less than 0",
                lambda group, entry, of=name: entry[of].sub_(9),
            )
            for name in ("step", "exp_avg_sq")
        ),
        ("state of parameter 0 lacks step", lambda group, entry: entry.pop("step")),
        ("state of parameter 0 lacks exp_avg_sq", lambda group, entry: entry.pop("exp_avg_sq")),
    ],
)
def test_an_optimizer_that_could_not_take_a_step_is_refused_by_name(model, part, change):
    argv, weights = model
    content = begun(weights)
    change(content["optimizer"]["param_groups"][0], content["optimizer"]["state"][0])
    assert f"its optimizer's {part}" in refusal(
        *argv, "--resume", save(weights.state_dict(), **content)
    )


@pytest.mark.parametrize("change", [{"betas": None}, {"lr": "0.1"}, {"eps": [1e-6]}, {"a": 1}])
def test_how_an_optimizer_computes_is_not_asked_of_its_file(model, change):
    argv, weights = model
    content = begun(weights)
    content["optimizer"]["param_groups"][0].update(change)
    accept(*argv, "--resume", save(weights.state_dict(), **content))


def test_an_optimizer_that_lost_what_it_had_gathered_does_not_begin_anew_in_silence(model):
    argv, weights = model
    content = begun(weights)
    content["optimizer"]["state"] = {}
    path = save(weights.state_dict(), **content)
    assert "its optimizer holds no state of any parameter" in refusal(*argv, "--resume", path)
    accept(*argv, "--pretrained", path)


def test_check_only_refuses_a_run_whose_checkpoints_are_all_damaged(model, tmp_path, capsys):
    argv, _ = model
    folder = tmp_path / "logs/run/checkpoints"
    folder.mkdir(parents=True)
    (folder / "epoch_1.pt").write_bytes(b"PK")
    assert main([*argv, "--name", "run", "--resume", "latest", "--check-only"]) == 2
    assert f"no checkpoint in {Path('logs/run/checkpoints')} is whole" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["epoch_1.pt"]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ({"epoch": 10**9}, "its epoch 1000000000 lies behind the 32 of this run (--epochs)"),
        ({"epoch": 32, "position": 1}, "its epoch 32 lies behind the 32 of this run (--epochs)"),
        ({"position": 1001}, "its position in an epoch of 1000 samples is 1001"),
        (
            {"step": 12345, "clip_pgs": {"cost": {"steps": 15}}},
            "its step is 12345, and its record counts 15",
        ),
    ],
)
def test_a_place_outside_of_the_run_is_refused(model, place, sentence):
    argv, weights = model
    path = save(weights.state_dict(), **begun(weights) | place)
    assert refusal(*argv, "--resume", path) == f"--resume: {path} cannot go on: {sentence}"


TUNED = {"epochs": 2, "unmasked_epochs": 3, "lr": 5e-4, "skip_scheduler": False}
MASKED, UNMASKED = {"epoch": 2}, {"epoch": 2, "position": 3}
MIXED = "its run has 2 masked epochs behind it and is in its unmasked epochs; "
STAYS = f"{MIXED}--epochs must stay 2, and --unmasked-epochs may grow"
BEHIND = "lies behind the {} of this run ({})"


@pytest.mark.parametrize(
    ("place", "flags", "sentence"),
    [
        (MASKED, "--epochs 3 --unmasked-epochs 1", None),
        (MASKED, "--epochs 1 --unmasked-epochs 4", "its epoch 2 " + BEHIND.format(1, "--epochs")),
        (UNMASKED, "--epochs 2 --unmasked-epochs 9", None),
        (UNMASKED, "--epochs 3 --unmasked-epochs 3", STAYS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (MASKED, "--epochs 2 --unmasked-epochs 0", None),
                (
                    {"epoch": 1, "position": 3},
                    "--epochs 1 --unmasked-epochs 4",
                    "its epoch 1 " + BEHIND.format(1, "--epochs"),
                ),
                (UNMASKED, "--epochs 2 --unmasked-epochs 1", None),
                ({"epoch": 5}, "--epochs 3 --unmasked-epochs 2", STAYS),
                ({"epoch": 5}, "--epochs 5", STAYS),
                (UNMASKED, "--epochs 1 --unmasked-epochs 4", STAYS),
                (
                    {"epoch": 4},
                    "--epochs 2 --unmasked-epochs 1",
                    "its epoch 4 " + BEHIND.format(3, "--epochs and --unmasked-epochs"),
                ),
                (
                    UNMASKED,
                    "--epochs 2 --unmasked-epochs 3 --skip-scheduler",
                    f"{MIXED}--skip-scheduler must stay False, and --unmasked-epochs may grow",
                ),
                (
                    UNMASKED,
                    "--epochs 2 --unmasked-epochs 3 --lr 0.1",
                    f"{MIXED}--lr must stay 0.0005, and --unmasked-epochs may grow",
                ),
            )
        ),
    ],
)
def test_epochs_behind_a_run_stay_as_they_were_trained(model, place, flags, sentence):
    argv, weights = model
    path = save(weights.state_dict(), **begun(weights) | place, clip_pgs={"recipe": TUNED})
    argv = [*argv, "--resume", path, *flags.split()]
    if sentence is None:
        accept(*argv)
    else:
        assert refusal(*argv) == f"--resume: {path} cannot go on: {sentence}"


@pytest.mark.parametrize("place", [{"epoch": 32}, {"position": 1000}, {"clip_pgs": {"cost": None}}])
def test_the_last_place_of_a_run_is_one_of_its_places(model, place):
    argv, weights = model
    accept(*argv, "--resume", save(weights.state_dict(), **begun(weights) | place))


@pytest.mark.parametrize("opt", ["timm/kron", "timm/novograd", "timm/adafactor"])
def test_what_an_optimizer_keeps_beside_moments_is_taken_up_again(monkeypatch, opt):
    # Kron compiles what it does to each shape.
    monkeypatch.setattr("timm.optim.kron.has_dynamo", False)
    options = parse_options([*VALID, "--opt", opt, "--lr", "1"])
    layer = torch.nn.Linear(2, 2)
    used, fresh = (build_optimizer(options, layer) for _ in range(2))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    used.step()
    assert optimizer_misfit(fresh, used.state_dict()) is None


def test_a_file_of_another_model_is_not_resumed(model):
    argv, _ = model
    save(open_clip.create_model("vit_weights", force_custom_text=True).state_dict())
    assert "weights.pt does not fit" in refusal(*argv, "--resume", "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_a_run_folder_stands_for_its_newest_checkpoint(model, tmp_path, flag):
    argv, weights = model
    folder = tmp_path / "theirs" / "checkpoints"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    assert "holds no checkpoint" in refusal(*argv, flag, "theirs")
    save(weights.state_dict(), folder / "epoch_1.pt", **begun(weights))
    accept(*argv, flag, "theirs")


def with_weight(state_dict, change):
    """Return a state dict whose class embedding is changed."""
    name = "visual.class_embedding"
    return {**state_dict, name: change(state_dict[name].clone())}


ODD_WEIGHTS = {
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "complex": lambda weight: weight.to(torch.complex64),
    "NaN": lambda weight: weight * torch.nan,
    "infinite": lambda weight: weight / 0.0,
    "integers": lambda weight: weight.long(),
    "booleans": lambda weight: weight.bool(),
    "float8": lambda weight: weight.to(torch.float8_e4m3fn),
    "a view": lambda weight: torch.zeros(1).expand(2**45),
}


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
def test_a_sparse_weight_is_called_so(model, flag):
    argv, weights = model
    path = save(with_weight(weights.state_dict(), ODD_WEIGHTS["sparse"]))
    assert "visual.class_embedding is no dense tensor" in refusal(*argv, flag, path)


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
@pytest.mark.parametrize(
    "kind",
    [
        "NaN",
        "a view",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ODD_WEIGHTS
            if kind not in ("NaN", "a view")
        ),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_name(model, flag, kind):
    argv, weights = model
    path = save(with_weight(weights.state_dict(), ODD_WEIGHTS[kind]))
    assert "visual.class_embedding" in refusal(*argv, flag, path)


def test_integers_under_the_names_of_a_plain_clip_start_no_custom_text_model(model):
    argv, weights = model
    state = {**weights.state_dict(), "ln_final.weight": torch.ones(32, dtype=torch.int64)}
    message = refusal(*argv, "--pretrained", save(state), "--force-custom-text")
    assert "ln_final.weight is int64 in the file" in message


@pytest.mark.parametrize(
    "moment", [torch.zeros(1).expand(2**45), torch.zeros(3).to(torch.float8_e5m2)]
)
def test_a_moment_that_cannot_be_looked_at_is_refused_by_name(model, moment):
    argv, weights = model
    content = begun(weights)
    content["optimizer"]["state"][0]["exp_avg"] = moment
    message = refusal(*argv, "--resume", save(weights.state_dict(), **content))
    assert "optimizer/state/0/exp_avg" in message


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
def test_the_file_that_latest_names_is_said(model, flag):
    argv, _ = model
    Path("latest").write_text("epoch_1.pt\n")
    assert "give 'epoch_1.pt'" in refusal(*argv, flag, "./latest")


@pytest.mark.parametrize(
    "content",
    [
        {"clip_pgs": "text"},
        {"clip_pgs": {"cost": [1]}},
        {"clip_pgs": {"cost": {"hours": 1}}},
        {"clip_pgs": {"cost": {"steps": "many"}}},
        {"clip_pgs": {"metrics": 3}},
        {"clip_pgs": {"metrics": {"top1": None}}},
        {"masking_state": [1]},
        {"scaler": {"scale": 2.0}},
        {"scaler": {"scale": 0.0, "_growth_tracker": 0}},
        {"scaler": {"scale": float("nan"), "_growth_tracker": 0}},
        {"scaler": {"scale": torch.ones(1), "_growth_tracker": 0}},
        {"window": [1]},
        {"window": {"steps": torch.tensor(1)}},
        {"window": dict.fromkeys(sorted(_WINDOW), torch.zeros(2))},
        {"epoch": 10**30},
    ],
    ids=str,
)
def test_a_damaged_entry_beside_the_weights_is_refused_by_name(model, content):
    argv, weights = model
    name = next(iter(content))
    assert name in refusal(*argv, "--resume", save(weights.state_dict(), **content))
