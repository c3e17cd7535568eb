"""Code beside a tokenizer or text tower is never run, and nobody is asked whether it may be."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_pgs.evaluation.models import load_model
from clip_pgs.integrations.open_clip.compat import no_foreign_code
from clip_pgs.training.__main__ import main as train
from clip_pgs.training.export_command import main as export
from support.runs import MODEL, flags, write_model

CODE = """
open({place!r}, "w").write("harmed")
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
class OddTokenizer(PreTrainedTokenizer): pass
class OddConfig(PreTrainedConfig): model_type = "odd"
class OddModel(PreTrainedModel): config_class = OddConfig
"""
TOWER = {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"}
TOKENIZER = {"AutoTokenizer": ["odd.OddTokenizer", None]}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder whose tokenizer and text tower are code; whoever is asked says yes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "odd.py").write_text(CODE.format(place=str(tmp_path / "harmed")))
    (folder / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": TOWER}))
    tokenizer = {"tokenizer_class": "OddTokenizer", "auto_map": TOKENIZER}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    yield folder
    assert not (tmp_path / "harmed").exists()


def config_of(text):
    return {**MODEL, "text_cfg": {**MODEL["text_cfg"], **text}}


def texts(folder):
    tower = {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return {
        "tokenizer": {"hf_tokenizer_name": str(folder)},
        "text tower": {**tower, "hf_tokenizer_name": None, "hf_proj_type": "mlp"},
    }


KINDS = ("tokenizer", "text tower")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_config_of_training(tmp_path, evil, capsys, kind):
    model = write_model(tmp_path, name=f"evil_{kind[:4]}", config=config_of(texts(evil)[kind]))
    data = {"dataset_type": "synthetic", "train_num_samples": 16}
    assert train(flags(tmp_path, model=model, **data)) == 2
    assert "code, which is never run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_or_an_export_of_evaluation(tmp_path, evil, kind):
    config = {"model_cfg": config_of(texts(evil)[kind])}
    path = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "clip_pgs": {"open_clip_config": config}}, path)
    with pytest.raises(ValueError, match="code, which is never run"):
        load_model(path)
    (evil / "open_clip_config.json").write_text(json.dumps(config))
    torch.save({"a": torch.ones(1)}, evil / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"open_clip cannot open|code, which is never run"):
        load_model(evil)


def test_the_record_of_an_exported_run(tmp_path, evil, finished_run, capsys):
    content = torch.load(finished_run / "checkpoints" / "epoch_2.pt", weights_only=True)
    content["clip_pgs"]["tokenizer"] = str(evil)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "epoch_2.pt")
    assert export([str(tmp_path / "run")]) == 2
    assert "code, which is never run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "export").exists()


def test_code_that_a_config_trusts(evil):
    from transformers import AutoTokenizer

    with no_foreign_code(), pytest.raises(ValueError, match="code, which is never run"):
        AutoTokenizer.from_pretrained(str(evil), trust_remote_code=True)


TRAPS = ("wandb", "pyarrow", "defusedxml", "apex", "horovod", "brotli", "h2", "olefile")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A working directory with files under the names of modules that libraries try to import."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in (*TRAPS, "torch", "numpy", "yaml", "tqdm"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'a').write('x')")
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path / "harmed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "by_module"),
    [("data check", False), ("train demo --check-only --train-data", True)],
)
def test_files_of_the_working_directory_stand_for_no_module(trap, world, command, by_module):
    # As the installed command starts: without a folder of its own on the path.
    script = "import sys; sys.path.pop(0); from clip_pgs.cli import main; sys.exit(main())"
    start = ["-m", "clip_pgs.cli"] if by_module else ["-c", script]
    argv = [sys.executable, *start, *command.split(), world.train_data]
    if "train" in command:
        argv += ["--val-data", world.val_data, "--warmup", "1", "--batch-size", "8"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_masking_beside_oneself_is_found_all_the_same(trap, world):
    page = (Path(__file__).parents[2] / "docs/own_strategy.md").read_text(encoding="utf-8")
    (trap / "bright.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    for name in TRAPS:
        (trap / f"{name}.py").unlink()
    argv = ["train", "--model", "ViT-B-32", "--masking", "bright:BrightMasking", "--check-only"]
    data = ["--dataset-type", "synthetic", "--train-num-samples", "64", "--warmup", "1"]
    start = [sys.executable, "-m", "clip_pgs.cli", *argv, *data]
    done = subprocess.run(start, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
