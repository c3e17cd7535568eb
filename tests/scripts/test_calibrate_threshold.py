import csv
import json
import runpy
import sys

import open_clip
import pytest
import torch
from PIL import Image

from clip_pgs.integrations.open_clip import (
    apply_masking,
    last_selection,
    set_masking_noise,
    set_masking_progress,
)
from support.models import TEXT
from support.scripts import ROOT


@pytest.fixture
def model(tmp_path):
    """The name of an OpenCLIP model of 6 x 6 patches of 8 pixels."""
    vision = {"image_size": 48, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    path = tmp_path / "tiny-six.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}))
    open_clip.add_model_config(path)
    return "tiny-six"


def calibrate(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["calibrate_threshold.py", *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / "calibrate_threshold.py"), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    output, error = capsys.readouterr()
    return code, list(csv.DictReader(output.splitlines())), error


def test_ratios_are_those_that_the_masked_model_itself_reaches(
    monkeypatch, capsys, tmp_path, model
):
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        cells = torch.randint(0, 255, (12 + 4 * i, 12, 3), generator=generator).byte()
        Image.fromarray(cells.numpy()).resize((64, 80)).save(tmp_path / f"{i}.png")
    arguments = [f"mine={tmp_path}/*.png", "--model", model, "--progress", 1.0]
    code, rows, _ = calibrate(monkeypatch, capsys, *arguments, "--thresholds", 0.2, 0.6)
    assert code == 0
    assert [row["patches"] for row in rows] == ["36", "36"]

    torch.manual_seed(0)
    plain, _, transform = open_clip.create_model_and_transforms(model)
    images = torch.stack([transform(Image.open(tmp_path / f"{i}.png")) for i in range(4)])
    for row in rows:
        options = {"mask_ratio_min": 0.3, "threshold": float(row["threshold"])}
        masked = apply_masking(plain, "pgs", when="always", **options).eval()
        set_masking_progress(masked, 1.0)
        set_masking_noise(masked, torch.rand(4, 36, generator=torch.Generator().manual_seed(0)))
        masked.visual(images)
        ratio = 1 - last_selection(masked).kept_counts().float().mean() / 36
        assert float(row["mean"]) == pytest.approx(ratio.item(), abs=6e-4)


def test_models_and_images_that_are_not_there_are_named(monkeypatch, capsys, tmp_path, model):
    for arguments, sentence in [
        (["mine=*.png", "--model", "ViT-Z"], "no run or checkpoint at ViT-Z"),
        (["mine=*.png", "--model", "MobileCLIP-S1"], "image tower is timm's FastVit"),
        ([f"mine={tmp_path}/*.png", "--model", model], "no image at"),
    ]:
        code, rows, error = calibrate(monkeypatch, capsys, *arguments)
        assert (code, rows) == (2, [])
        assert sentence in error


def test_a_picture_that_cannot_be_read_is_named(monkeypatch, capsys, tmp_path, model):
    (tmp_path / "broken.png").write_bytes(b"")
    code, _, error = calibrate(monkeypatch, capsys, f"mine={tmp_path}/*.png", "--model", model)
    assert code == 2
    assert f"{tmp_path / 'broken.png'}: no JPEG" in error
