"""What `--check-only` and `--trial` say of a run, beside what the run then takes."""

import json
import re

import open_clip
import pytest
import torch

from clip_pgs.training.__main__ import main
from support.runs import MODEL, flags, run, write_csv, write_model

BERT = {
    "model_type": "bert",
    "vocab_size": 49408,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def said(folder, capsys, *more, **options):
    """Return the table that a command prints, by the names of its rows."""
    argv = [*flags(folder, **options), *more]
    before = sorted(folder.rglob("*"))
    assert main(argv) == 0
    assert sorted(folder.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the options are valid")
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines[2:] if "  " in line)


def number(text):
    value, prefix = re.match(r"([\d.]+) ?([kMGT]?)", text).groups()
    return float(value) * UNITS[prefix]


@pytest.mark.slow
def test_what_is_said_is_what_the_run_takes(tmp_path, world, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    options = {"train_data": world.train_data, "masking": "pgs", "mask_ratio": 0.5, "epochs": 2}
    checked = said(tmp_path, capsys, "--check-only", **options)
    tried = said(tmp_path, capsys, "--trial", **options)
    folder = run(tmp_path, **options)
    (file,) = folder.glob("checkpoints/epoch_2.pt")
    checkpoint = torch.load(file, weights_only=True)
    cost = checkpoint["clip_pgs"]["cost"]
    # All but the buffer of the text tower's attention mask are parameters.
    weights = sum(weight.numel() for weight in checkpoint["state_dict"].values())
    for table in (checked, tried):
        assert number(table["parameters"]) == pytest.approx(weights, rel=0.01)
        assert number(table["checkpoints"].split(" of ")[1]) == pytest.approx(
            file.stat().st_size, rel=0.05
        )
        assert table["checkpoints"].startswith("2 files")
    assert checked["tokens kept"] == "8 of 16 patches"
    assert number(checked["operations"].split(", ")[1]) >= cost["flops"] * 0.99
    assert number(tried["operations"]) == pytest.approx(cost["flops"], rel=0.1)
    assert f"{cost['steps']}, " in tried["masked steps"]


def in_all(table):
    """Return the operations of the whole run that a table tells."""
    return number(re.search(r"([\d.]+ ?[kMGT]?)FLOP in ", table["operations"])[1])


FALLING = {"masking": "pgs", "mask_schedule": "linear", "mask_ratio": 0.75, "mask_ratio_end": 0.25}
RISING = {**FALLING, "mask_ratio": 0.25, "mask_ratio_end": 0.75}
TUNED = {"unmasked_epochs": 1, "unmasked_warmup": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tokens", "tried_tokens"),
    [
        ({"masking": "pgs"}, "8 of 16 patches", "8.0 of 16 patches"),
        # A phase of four steps: two, one and one at these ratios.
        (
            {**FALLING, "mask_schedule_steps": 3},
            "4 to 12 of 16 patches",
            "4.0 to 12.0 of 16 patches",
        ),
        (
            {**RISING, "mask_schedule_steps": 3},
            "12 to 4 of 16 patches",
            "12.0 to 4.0 of 16 patches",
        ),
        (
            {"masking": "pgs", **TUNED},
            "8 of 16 patches, all 16 when unmasked",
            "8.0 of 16 patches",
        ),
        (
            {**FALLING, **TUNED, "mask_schedule": "cosine", "mask_schedule_steps": 4},
            "4 to 12 of 16 patches, all 16 when unmasked",
            "4.0 to 12.0 of 16 patches",
        ),
        (
            {**RISING, "epochs": 2, "mask_schedule": "cosine", "mask_schedule_steps": 8},
            "12 to 4 of 16 patches",
            "12.0 to 4.0 of 16 patches",
        ),
        (
            {"train_image_size": 16, **TUNED},
            "4 of 4 patches, all 16 when unmasked",
            "4.0 of 4 patches",
        ),
        ({"text_masking": "truncate", "text_tokens": 4, **TUNED}, "all patches", None),
        ({**TUNED, "unmasked_batch_size": 4, "unmasked_accum_freq": 2}, "all patches", None),
    ],
    ids=[
        "constant",
        "falling",
        "rising",
        "unmasked",
        "both",
        "many-levels",
        "small-images",
        "short-captions",
        "accumulated",
    ],
)
def test_the_total_holds_every_mask_ratio_and_phase(
    tmp_path, world, capsys, monkeypatch, options, tokens, tried_tokens
):
    monkeypatch.delenv("RANK", raising=False)
    options = {"train_data": world.train_data, "epochs": 1, "mask_ratio": 0.5, **options}
    if "masking" not in options:
        del options["mask_ratio"]
    checked = said(tmp_path, capsys, "--check-only", train_num_samples=32, **options)
    tried = said(tmp_path, capsys, "--trial", **options)
    folder = run(tmp_path, **options)
    epochs = options["epochs"] + options.get("unmasked_epochs", 0)
    (file,) = folder.glob(f"checkpoints/epoch_{epochs}.pt")
    flops = torch.load(file, weights_only=True)["clip_pgs"]["cost"]["flops"]
    # An upper bound, since captions may be short, and not a loose one.
    assert flops * 0.995 <= in_all(checked) <= flops * 1.2
    assert in_all(tried) == pytest.approx(flops, rel=0.02)
    assert checked["tokens kept"] == tokens
    assert tried.get("tokens kept") == tried_tokens


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_a_run_that_only_evaluates_is_checked_and_has_no_steps_to_try(
    tmp_path, world, capsys, kind
):
    data = world.val_data if kind == "shards" else write_csv(tmp_path / "data")
    options = {"val_data": data, "masking": "random"}
    table = said(tmp_path, capsys, "--check-only", **options)
    assert table.keys() == {"this evaluation", "parameters", "memory"}
    assert main([*flags(tmp_path, **options), "--trial"]) == 2
    assert (
        "--trial takes steps of training, and there is no --train-data" in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["attention in half", "text tower of Hugging Face"])
def test_what_cannot_be_counted_without_values_is_no_reason_to_refuse(
    tmp_path, world, capsys, kind
):
    options = {"masking": "attentive", "precision": "pure_bf16"}
    if kind != "attention in half":
        hub = tmp_path / "hub"
        hub.mkdir()
        (hub / "config.json").write_text(json.dumps(BERT))
        text = {"hf_model_name": str(hub), "hf_tokenizer_name": None, "context_length": 12}
        text |= {"hf_model_pretrained": False, "hf_proj_type": "mlp"}
        path = write_model(tmp_path, name="bert_counted", config={**MODEL, "text_cfg": text})
        open_clip.add_model_config(path)
        weights = tmp_path / "weights.pt"
        torch.save(open_clip.create_model(path.stem, pretrained_text=False).state_dict(), weights)
        options = {"model": path, "pretrained": weights}
    table = said(tmp_path, capsys, "--check-only", train_data=world.train_data, **options)
    assert table["operations"].startswith("not counted, as without data there is ")
    assert table.keys() >= {"parameters", "checkpoints", "memory"}


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"masking": "pgs", "mask_ratio_min": 0.3}, "at most 12 of 16 patches"),
        ({"masking": "random", "merge": "2x2"}, "8 of 16 patches"),
        ({"precision": "pure_bf16"}, "all patches"),
        *(
            pytest.param(options, tokens, marks=pytest.mark.slow)
            for options, tokens in (
                ({"masking": "attentive"}, "8 of 16 patches"),
                ({"masking": "cluster"}, "at most 12 of 16 patches"),
                ({}, "all patches"),
                *(
                    ({"masking": "pgs", "precision": name}, "8 of 16 patches")
                    for name in ("pure_bf16", "bf16", "fp16", "pure_fp16", "amp")
                ),
            )
        ),
    ],
)
def test_each_kind_of_masking_is_counted_without_data(tmp_path, world, capsys, options, tokens):
    table = said(tmp_path, capsys, "--check-only", train_data=world.train_data, **options)
    assert table["tokens kept"] == tokens
    assert number(table["operations"]) > 0


OWN = """
import numpy as np
import torch
from clip_pgs import MaskingStrategy, PatchSelection
from clip_pgs.masking.strategy import register_masking

class Own(MaskingStrategy):
    def forward(self, inputs, *, generator=None):
        kept = inputs.num_patches // 2
        scores = inputs.pixels.mean(dim=1).flatten(1)[:, : inputs.num_patches]
        return PatchSelection(self.order(scores)[:, :kept])

@register_masking("own-host", paper="", random=False)
class Host(Own):
    def order(self, scores):
        return scores.argsort(dim=1) + int(scores.sum().item() > 1e9)

@register_masking("own-cpu", paper="", random=False)
class Cpu(Own):
    def order(self, scores):
        return (scores + torch.arange(scores.shape[1], device="cpu")).argsort(dim=1)

@register_masking("own-buffer", paper="", random=False)
class Buffer(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.ones(16), persistent=False)

    def order(self, scores):
        return (scores + self.bias).argsort(dim=1)

@register_masking("own-numpy", paper="", random=False)
class Numpy(Own):
    def order(self, scores):
        return torch.from_numpy(np.argsort(scores.numpy()))
"""


@pytest.mark.parametrize("name", ["Host", "Cpu", "Buffer", "Numpy"])
def test_a_strategy_of_ones_own_that_needs_data_leaves_operations_uncounted(
    tmp_path, world, capsys, monkeypatch, name
):
    (tmp_path / "needing_lab.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    masking = f"needing_lab:{name}"
    options = {"train_data": world.train_data, "masking": masking}
    table = said(tmp_path, capsys, "--check-only", **options)
    assert table["operations"].startswith("not counted, as without data there is ")
    assert table.keys() >= {"parameters", "checkpoints", "memory"}
