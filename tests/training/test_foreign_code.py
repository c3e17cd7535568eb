"""Code beside a tokenizer or text tower is never run, and nobody is asked whether it may be."""

import io
import json

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
