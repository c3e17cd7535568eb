"""The demo's own config, on a world small enough for a test: train, evaluate, open, draw."""

import shutil
from pathlib import Path

import open_clip
import pytest
import torch

from clip_pgs.data.world.writing import write_world
from clip_pgs.demo import main as fresh
from clip_pgs.inspection.__main__ import main as inspect
from clip_pgs.training.__main__ import main as train
from clip_pgs.training.export_command import main as export

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_world(folder / "data/demo", num_train=128, num_val=16, num_per_class=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        code = train(
            [
                *("--config", "configs/train/demo.yaml", "--logs", str(folder / "logs")),
                *("--train-data", str(folder / "data/demo/train/00000.tar")),
                *("--val-data", str(folder / "data/demo/val/00000.tar")),
                *("--epochs", "1", "--batch-size", "32", "--warmup", "2"),
            ]
        )
    assert code == 0
    return folder


def test_the_run_folder_holds_everything(demo):
    run = demo / "logs" / "demo"
    for name in ("out.log", "params.txt", "env.json", "metrics.jsonl", "masks/epoch_1.png"):
        assert (run / name).is_file(), name
    checkpoint = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert list((run / "tensorboard").glob("events*"))


def test_plain_open_clip_opens_the_export(demo):
    name = f"local-dir:{demo / 'logs' / 'demo' / 'export'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(["a red star"])
    assert tokens.shape == (1, 32)
    assert model.eval().encode_text(tokens).shape == (1, 128)
    assert transform.transforms[0].size == 64


def test_the_demo_sets_are_scored_and_the_card_says_so(demo, capsys, monkeypatch):
    monkeypatch.chdir(demo)
    # What is exported now is what is scored.
    shutil.rmtree("logs/demo/export")
    code = export(["logs/demo", "--suite", "all"])
    table = capsys.readouterr().out
    assert code == 0, table
    run = Path("logs/demo")
    scored = (run / "export/README.md").read_bytes()
    for name in ("shape", "color", "retrieval"):
        assert name in table
        assert f"| {name} |".encode() in scored
    assert (run / "eval" / "results.csv").is_file()
    assert export(["logs/demo"]) == 0
    assert (run / "export/README.md").read_bytes() == scored


def test_a_fresh_demo_can_be_checked_for_beside_a_finished_one(demo, monkeypatch, capfd):
    monkeypatch.chdir(demo)
    shard = ["--train-data", "data/demo/train/00000.tar", "--val-data", "data/demo/val/00000.tar"]
    options = ["--epochs", "1", "--batch-size", "32", "--warmup", "2"]
    assert fresh(["--fresh", "--check-only", *shard, *options]) == 0
    assert "the options are valid" in capfd.readouterr().out
    assert [path.name for path in Path("logs").iterdir()] == ["demo"]


def test_the_six_scenes_are_drawn(demo):
    scenes = sorted(map(str, (demo / "data/demo/scenes").glob("*.png")))
    picture = demo / "keeps.png"
    options = ["--model", str(demo / "logs" / "demo"), "--masking", "pgs", "-o", str(picture)]
    assert inspect(["masks", *scenes, *options]) == 0
    assert len(scenes) == 6
    assert picture.is_file()
