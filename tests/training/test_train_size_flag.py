"""`--train-image-size`: small images where a run masks, whole ones of the model's size after."""

import json

import open_clip
import pytest
import torch

from clip_pgs.evaluation.models import load_model
from clip_pgs.integrations.open_clip import num_patches
from clip_pgs.training.__main__ import main
from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import IDENTITY, names_of, parse_options
from clip_pgs.training.phases import plan_phases
from support.runs import MODEL, flags, run, write_model
from support.trainers import open_trainer

RESNET = {**MODEL, "vision_cfg": {"image_size": 64, "layers": [1] * 4, "width": 8}}


def sizes_of_phases(folder, **options):
    args = parse_options(flags(folder, unmasked_epochs=1, **options))
    check_options(args)
    args.rank, args.local_rank, args.world_size, args.distributed = 0, 0, 1, False
    parts = build_model(args, torch.device("cpu"))
    phases = plan_phases(args, parts)
    for phase in phases:
        phase.stream.start_at(phase.first_epoch, 0)
    return [tuple(next(iter(phase.stream))[0].shape[-2:]) for phase in phases]


@pytest.mark.parametrize("masking", ["none", "pgs"])
def test_masked_epochs_see_small_images_and_unmasked_ones_the_models(tmp_path, world, masking):
    options = {"train_data": world.train_data, "train_image_size": 16, "masking": masking}
    assert sizes_of_phases(tmp_path, **options) == [(16, 16), (32, 32)]


def test_a_step_costs_less_and_masks_are_drawn_on_the_small_grid(tmp_path, world):
    flops = []
    for size in (None, 16):
        options = {"train_data": world.train_data, "masking": "random", "mask_ratio": 0.5}
        trainer = open_trainer(tmp_path, train_image_size=size, **options)
        trainer.start_epoch(0)
        batches, _ = trainer.next_batches()
        result = trainer.train_step(batches)
        count = 16 if size is None else 4
        assert trainer.masks.num_patches == num_patches(trainer.model) == count
        assert result.kept_counts[0].tolist() == [count // 2] * 8
        flops.append(trainer.count_flops(*batches[0]).total)
    assert flops[1] < 0.8 * flops[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"masking": "none", "train_image_size": 32, "unmasked_epochs": 1},
        {"masking": "saliency-crop", "train_image_size": 32},
        {"masking": "pgs", "mask_ratio_min": 0.3, "accum_freq": 2, "batch_size": 4},
        {"masking": "random", "lock_image": True, "lock_image_freeze_bn_stats": True},
    ],
    ids=["small", "crop of small", "hidden", "frozen"],
)
def test_a_resnet_trains_and_what_it_exports_is_a_plain_one(tmp_path, world, options):
    model = write_model(tmp_path, name="tiny_resnet", config=RESNET)
    options = {"train_data": world.train_data, "epochs": 1, **options}
    folder = run(tmp_path, model=model, **options)
    config = json.loads((folder / "export" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 64
    loaded = open_clip.create_model(f"local-dir:{folder / 'export'}").eval()
    assert torch.isfinite(loaded.encode_image(torch.zeros(1, 3, 64, 64))).all()
    checkpoint = load_model(max((folder / "checkpoints").glob("epoch_*.pt"))).model
    assert torch.equal(checkpoint.visual.bn1.running_mean, loaded.visual.bn1.running_mean)


@pytest.mark.parametrize(
    ("masking", "is_said"), [("random", True), ("saliency-crop", False), ("none", False)]
)
def test_the_log_says_where_masking_saves_no_flops(tmp_path, caplog, masking, is_said):
    model = write_model(tmp_path, name="tiny_logged_resnet", config=RESNET)
    options = {"dataset_type": "synthetic", "train_num_samples": 16, "train_image_size": 32}
    args = parse_options(flags(tmp_path, model=model, masking=masking, **options))
    build_model(args, torch.device("cpu"))
    assert ("saves no FLOPs" in caplog.text) == is_said


OWN = """
from clip_pgs.masking.strategy import register_masking
from clip_pgs.masking.baselines import NoMasking


@register_masking("all-kept", keeps="all", paper="none", random=False)
class KeepsAll(NoMasking):
    '''Keep every patch.'''
"""


@pytest.mark.parametrize(
    "options",
    [
        {"train_image_size": 32},
        {"masking": "none", "train_image_size": 32},
        {"masking": "all_kept:KeepsAll"},
    ],
    ids=["size alone", "none", "of one's own"],
)
def test_what_changes_nothing_trains_as_a_plain_run(tmp_path, world, capsys, monkeypatch, options):
    (tmp_path / "all_kept.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    plain = {"train_data": world.train_data, "epochs": 1}
    options = {**plain, "unmasked_epochs": 1, **options}
    assert main([*flags(tmp_path, **options), "--check-only"]) == 0
    assert "all patches" in capsys.readouterr().out
    folder = run(tmp_path, **options)
    expected, got = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (run(tmp_path, name="plain", **plain), folder)
    )
    assert [line["loss"] for line in got[:4]] == [line["loss"] for line in expected]
    assert got[3]["flops"] == expected[3]["flops"]
    assert not (folder / "masks").exists()


def test_the_size_of_the_model_is_said_to_change_nothing(tmp_path, world):
    options = {"train_data": world.train_data, "masking": "pgs"}
    for size, said in ((32, ["--train-image-size"]), (16, [])):
        args = parse_options(flags(tmp_path, train_image_size=size, **options))
        check_options(args)
        assert [sentence.split()[0] for sentence in option_warnings(args)] == said


def test_it_belongs_to_what_a_run_is():
    assert "train_image_size" in names_of(IDENTITY)
