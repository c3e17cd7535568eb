import json
from pathlib import Path

import braceexpand
import pytest

from clip_pgs.training.checks import check_options, option_warnings
from clip_pgs.training.options import parse_options

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
PAPER_RECIPE = {
    "epochs": 32,
    "batch_size": 512,
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
    """Create empty shards where a config expects its data."""
    for pattern in filter(None, (args.train_data, args.val_data)):
        shards = [Path(shard) for shard in braceexpand.braceexpand(pattern)]
        shards[0].parent.mkdir(parents=True, exist_ok=True)
        for shard in shards:
            shard.touch()
        sizes = {shard.name: 5000 for shard in shards}
        (shards[0].parent / "sizes.json").write_text(json.dumps(sizes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_valid_run(checkout, path):
    args = parse_options(["--config", str(path)])
    make_data(args)
    check_options(args)
    assert option_warnings(args) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_states_command_hardware_hours_and_expectation(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in (f"configs/train/{path.name}", "Hardware:", "Hours:", "Expected:"):
        assert any(word in line for line in comment), word


@pytest.mark.parametrize(
    ("name", "model", "masking", "options"),
    [
        ("vit_b16_pgs05_cc12m", "ViT-B-16", "pgs", {"mask_ratio": 0.5}),
        ("vit_b16_pgs03_cc12m", "ViT-B-16", "pgs", {"mask_ratio": 0.5, "mask_ratio_min": 0.3}),
        ("vit_b16_random05_cc12m", "ViT-B-16", "random", {"mask_ratio": 0.5}),
        ("vit_b16_random075_cc12m", "ViT-B-16", "random", {"mask_ratio": 0.75}),
        ("vit_b16_clip_cc12m", "ViT-B-16", "none", {}),
        ("vit_s16_pgs05_cc12m", "ViT-S-16", "pgs", {"mask_ratio": 0.5}),
        ("vit_b32_pgs05_cc12m", "ViT-B-32", "pgs", {"mask_ratio": 0.5}),
        ("vit_l14_pgs05_cc12m", "ViT-L-14", "pgs", {"mask_ratio": 0.5}),
    ],
)
def test_runs_on_cc12m_follow_the_papers_recipe(name, model, masking, options):
    args = parse_options(["--config", str(ROOT / "configs" / "train" / f"{name}.yaml")])
    assert (args.model, args.masking, args.masking_options) == (model, masking, options)
    assert {key: getattr(args, key) for key in PAPER_RECIPE} == PAPER_RECIPE
    assert len(list(braceexpand.braceexpand(args.train_data))) == 2176
