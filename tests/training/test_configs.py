import json
import re
from pathlib import Path

import braceexpand
import pytest
import torch

from clip_pgs.data.__main__ import main as prepare
from clip_pgs.data.world.writing import write_world
from clip_pgs.registry import registered_names
from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import parse_options
from clip_pgs.training.trainer import train

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
DEMOS = [path for path in CONFIGS if path.stem.startswith("demo")]
RECIPE = {
    "batch_size": 512,
    "epochs": 32,
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.98,
    "wd": 0.2,
    "warmup": 10000,
    "train_num_samples": 10_968_539,
    "local_loss": True,
    "gather_with_grad": True,
    "precision": "amp_bf16",
    "aug_cfg": {"scale": [0.9, 1.0]},
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Stand in a folder that has the configs and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_data(args):
    """Create empty shards, and word counts of a few words, where a config expects its data."""
    for pattern in filter(None, (args.train_data, args.val_data)):
        shards = [Path(shard) for shard in braceexpand.braceexpand(pattern)]
        shards[0].parent.mkdir(parents=True, exist_ok=True)
        for shard in shards:
            shard.touch()
        sizes = {shard.name: 5000 for shard in shards}
        (shards[0].parent / "sizes.json").write_text(json.dumps(sizes))
    if "frequencies" in args.text_masking_options:
        table = Path("captions.csv")
        table.write_text("filepath,title\n" + "a.jpg,a dog\n" * 9)
        assert prepare(["words", str(table), "-o", args.text_masking_options["frequencies"]]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_valid_run(checkout, path):
    args = parse_options(["--config", str(path)])
    make_data(args)
    check_options(args)
    assert option_warnings(args) == []
    assert args.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_states_command_hardware_hours_and_expectation(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = rf"configs/train/{path.name}|clip-pgs (train|mae) {path.stem}\b"
    for word in (command, "Hardware:", "Hours:", "Expected:"):
        assert any(re.search(word, line) for line in comment), word


def test_every_strategy_has_a_config_on_the_demo_world():
    ours = {*registered_names("masking")}
    assert {parse_options(["--config", str(path)]).masking for path in DEMOS} == ours


@pytest.mark.parametrize(
    ("name", "model", "masking", "options"),
    [
        ("vit_b16_pgs05_cc12m", "ViT-B-16", "pgs", {"mask_ratio": 0.5}),
        ("vit_b16_pgs03_cc12m", "ViT-B-16", "pgs", {"mask_ratio": 0.5, "mask_ratio_min": 0.3}),
        (
            "vit_b16_pgs_released03_cc12m",
            "ViT-B-16",
            "pgs-released",
            {"mask_ratio": 0.5, "mask_ratio_min": 0.3},
        ),
        ("vit_b16_random05_cc12m", "ViT-B-16", "random", {"mask_ratio": 0.5}),
        ("vit_b16_random075_cc12m", "ViT-B-16", "random", {"mask_ratio": 0.75}),
        ("vit_b16_pgs075_merge22_cc12m", "ViT-B-16", "pgs", {"mask_ratio": 0.75}),
        (
            "vit_b16_pgs05_mixed_cc12m",
            "ViT-B-16",
            "pgs",
            {"mask_ratio": 0.5, "random_images": 0.5},
        ),
        (
            "vit_b16_pgs_growing_cc12m",
            "ViT-B-16",
            "pgs",
            {"mask_ratio": 0.66, "random_share": 0.0, "random_share_end": 1.0},
        ),
        ("vit_b16_attentive05_cc12m", "ViT-B-16", "attentive", {"mask_ratio": 0.5}),
        (
            "vit_b16_cluster_cc12m",
            "ViT-B-16",
            "cluster",
            {"mask_ratio": 0.5, "mask_ratio_min": 0.3},
        ),
        ("vit_b16_clip_cc12m", "ViT-B-16", "none", {}),
        ("vit_s16_pgs05_cc12m", "ViT-S-16", "pgs", {"mask_ratio": 0.5}),
        ("vit_b32_pgs05_cc12m", "ViT-B-32", "pgs", {"mask_ratio": 0.5}),
        ("vit_l14_pgs05_cc12m", "ViT-L-14", "pgs", {"mask_ratio": 0.5}),
    ],
)
def test_runs_on_cc12m_follow_the_papers_recipe(name, model, masking, options):
    args = parse_options(["--config", str(ROOT / "configs" / "train" / f"{name}.yaml")])
    assert (args.model, args.masking, args.masking_options) == (model, masking, options)
    assert {key: getattr(args, key) for key in RECIPE} == RECIPE
    assert len(list(braceexpand.braceexpand(args.train_data))) == 2176
    assert (args.text_masking, args.unmasked_epochs) == ("none", 0)


@pytest.mark.parametrize("name", ["vit_b16_clipf_cc12m", "vit_b16_pgs_frequency_cc12m"])
def test_clipf_and_its_neighbour_follow_clipfs_recipe(name):
    args = parse_options(["--config", str(ROOT / "configs" / "train" / f"{name}.yaml")])
    assert (args.masking_options, args.text_masking, args.text_tokens) == (
        {"mask_ratio": 0.75},
        "frequency",
        8,
    )
    assert (8 * args.batch_size, args.epochs, args.lr, args.wd) == (3584, 30, 1e-3, 0.2)
    assert (8 * args.unmasked_batch_size, args.unmasked_epochs, args.unmasked_lr) == (640, 1, 1e-5)
    assert args.force_context_length == 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A demo world of 64 pairs, with the counts of its words."""
    folder = tmp_path_factory.mktemp("world") / "demo"
    write_world(folder, num_train=64, num_val=8, num_per_class=1)
    shards = str(folder / "train" / "00000.tar")
    assert prepare(["words", shards, "-o", str(folder / "words.json"), "--min-count", "1"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_every_demo_config_trains_to_its_end(checkout, world, path):
    (checkout / "data").mkdir()
    (checkout / "data" / "demo").symlink_to(world)
    argv = ["--config", str(path), "--train-data", "data/demo/train/00000.tar", "--device", "cpu"]
    argv += ["--epochs", "1", "--batch-size", "32", "--warmup", "1", "--val-frequency", "0"]
    args = parse_options([*argv, "--report-to", ""])
    check_options(args)
    folder = train(args)
    weights = torch.load(folder / "checkpoints" / "epoch_latest.pt", weights_only=True)
    assert weights["epoch"] == 1 + args.unmasked_epochs
    assert all(value.isfinite().all() for value in weights["state_dict"].values())
    assert (folder / "export" / "open_clip_model.safetensors").is_file()
