import json

import pytest
from PIL import Image

from clip_pgs.inspection.__main__ import main

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cost_test_model.json"
    path.write_text(json.dumps(CONFIG))
    return path


def run(config, *flags):
    flags = ("--batch-size", "4", "--steps", "2", "--device", "cpu", *flags)
    return main(["cost", "--model", str(config), *flags])


def test_it_prints_a_line_per_model_and_writes_what_it_measured(config, tmp_path, capsys):
    output = tmp_path / "a folder"
    assert run(config, "--maskings", "none", "random", "pgs", "-o", str(output)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{config} at 32 x 32, batch 4, fp32, cpu, " + lines[0].split(", ")[-1]
    assert [line.split("  ")[0] for line in lines[3:7]] == ["plain CLIP", "none", "random", "pgs"]

    content = json.loads((output / "cost.json").read_text())
    assert content["rounds"] == 2
    assert content["batch_size"] == 4
    rows = {row["title"]: row for row in content["results"]}
    assert rows["plain CLIP"]["text_tokens"] == 16
    assert rows["plain CLIP"]["time_over_first"] == 1
    assert rows["pgs"]["flops_over_first"] < rows["none"]["flops_over_first"]
    assert rows["pgs"]["selection"] > 0
    assert rows["pgs"]["peak_gib"] is None
    with Image.open(output / "cost.png") as picture:
        assert picture.width > 500


def test_captions_of_the_web_and_bfloat16_run(config, capsys):
    flags = ("--captions", "web", "--precision", "amp_bf16", "--progress", "0.5")
    assert run(config, *flags, "--maskings", "pgs:mask_ratio_min=0.3") == 0
    assert "amp_bf16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "0"], "error: --steps must be at least 1, got 0"),
        (["--batch-size", "0"], "error: --batch-size must be at least 1, got 0"),
        (["--progress", "2"], "error: --progress must be in [0, 1], got 2.0"),
        (["--maskings", "pgx"], "error: unknown masking 'pgx'"),
        (["--mask-ratio", "1"], "error: mask_ratio must be in [0, 1), got 1.0"),
        (["--model", "no such"], "error: 'no such' is neither a model config nor a model "),
        (["--model", "no.json"], "error: there is no model config no.json"),
        (["--model", "coca_ViT-B-32"], "error: the benchmark runs pairs of towers, and "),
    ],
)
def test_bad_input_ends_with_code_2_and_one_sentence(config, capsys, flags, sentence):
    assert run(config, *flags) == 2
    stderr = capsys.readouterr().err
    assert sentence in stderr
    assert "Traceback" not in stderr
