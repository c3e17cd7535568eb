from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import make_scene
from clip_pgs.inspection.playground import Playground
from clip_pgs.integrations.apply import tower_masking
from clip_pgs.integrations.open_clip import apply_masking
from clip_pgs.masking import describe_masking, list_maskings
from support.models import TEXT, VISION, small_clip
from support.options import MODEL_CONFIG

MASKED = (127, 127, 127)
SMALL = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture(scope="module")
def playground():
    return Playground()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.png"
    Image.fromarray(draw_scene(make_scene("a photo", num_things=2)).pixels).save(path)
    return path


def look(playground, picture=0, name="pgs", **changed):
    settings = {
        "options": {},
        "beside": [],
        "mask_ratio": 0.5,
        "merge": "none",
        "progress": 0,
        "seed": 0,
    }
    return playground.show(picture, name, **{**settings, **changed})


def pictures(html):
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', html)
    return {alt: Image.open(io.BytesIO(base64.b64decode(data))) for alt, data in found}


def kept_patches(picture, *, side=16, panel=224):
    """Return where a panel is not gray all over, in raster order."""
    left, pixels = (picture.width - panel) // 2, np.asarray(picture.convert("RGB"))
    top = next(
        row for row in range(20, 60) if tuple(pixels[row, left - 1]) != tuple(pixels[row, left])
    )
    grid = pixels[top : top + panel, left : left + panel].reshape(panel // side, side, -1, side, 3)
    is_masked = (grid == MASKED).all(axis=(1, 3, 4))
    return np.flatnonzero(~is_masked).tolist()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("pgs", {}),
        ("pgs", {"mask_ratio": 0.7, "options": {"edges": False, "mask_ratio_min": 0.2}}),
        ("random", {"seed": 7}),
        ("cluster", {"mask_ratio": 0.25}),
        ("gaussian", {"options": {"rule": "weights", "sigma": 0.4}}),
    ],
)
@pytest.mark.parametrize("is_file", [False, True])
def test_the_lines_give_the_mask_in_the_picture(playground, photo, name, changed, is_file):
    masks, _, table, lines = look(playground, str(photo) if is_file else 3, name, **changed)
    found = {}
    exec(lines, found)
    selection = found["selection"]
    kept = selection.index[0, : int(selection.kept_counts())].tolist()
    (drawn,) = [picture for alt, picture in pictures(masks).items() if alt.startswith(name)]
    assert kept_patches(drawn) == kept
    assert f"| {name} | {len(kept)} of 196 |" in table


def test_the_lines_train_with_what_is_set(playground):
    *_, lines = look(playground, options={"edges": False}, merge="2x2")
    call = re.search(r"# to train: (.*)", lines)[1]
    model = small_clip()
    eval(call, {"apply_masking": apply_masking, "model": model})
    masking = tower_masking(model)
    assert masking.strategy.options.edges is False
    assert masking.merge.cells == (2, 2)


@pytest.mark.slow
def test_every_strategy_that_needs_no_model_is_shown_beside_the_first(playground):
    names = [n for n in list_maskings() if "attention" not in describe_masking(n).requires]
    masks, _, table, _ = look(playground, beside=names)
    titles = [alt.partition(":")[0] for alt in pictures(masks)]
    assert titles == ["original", "pgs", *("pgs, by default" if n == "pgs" else n for n in names)]
    assert table.count("of 196") == 1 + len(names)


def test_the_steps_are_those_of_pgs_alone(playground):
    _, steps, *_ = look(playground)
    assert [alt.split()[1] for alt in pictures(steps)] == [
        "edges:",
        "candidates:",
        "plan:",
        "score:",
    ]
    _, steps, *_ = look(playground, options={"edges": False, "transport": False})
    assert [alt.split()[1] for alt in pictures(steps)] == ["candidates:", "nearest:", "score:"]
    assert look(playground, name="random")[1] == ""


def vit_b16_flops(num_tokens):
    """Return the operations of a ViT-B/16 by the book: its last block is for the class token."""
    tokens, width = num_tokens + 1, 768
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    last = 4 * tokens * width**2 + 20 * width**2 + 4 * tokens * width
    return 2 * 196 * 768 * width + 11 * block + last + 2 * width * 512, 12 * block


def test_operations_are_those_of_a_vit_b16(playground):
    for num_tokens in (1, 49, 98, 195):
        assert playground.image_flops(num_tokens) == pytest.approx(
            vit_b16_flops(num_tokens)[0], rel=0.01
        )
    _, _, table, _ = look(playground, name="none", beside=["random"])
    # 17.56 G multiply-adds, as torchvision's page has it.
    assert "| none | 196 of 196 | 35.1 GFLOP | 0% |" in table
    assert "| random | 98 of 196 | 16.2 GFLOP | 54% |" in table


def test_merged_tokens_count(playground):
    _, _, merged, _ = look(playground, merge="2x2", beside=["random"])
    assert "| pgs | 98 of 196, 4 merged | 16.9 GFLOP |" in merged
    assert "| random | 98 of 196 | 16.2 GFLOP |" in merged
    assert "98 of 196, 10 merged" in look(playground, merge="candidates")[2]


def test_another_seed_draws_another_mask(playground):
    assert look(playground) == look(playground) != look(playground, seed=1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"merge": "3by3"}, "3by3"),
        ({"merge": "99x1"}, "99x1"),
        ({"name": "none", "merge": "2x2"}, "merge"),
        ({"name": "random", "merge": "candidates"}, "candidates"),
        ({"options": {"temperature": 0}}, "temperature"),
        ({"options": {"solver": "<b>"}}, "&lt;b&gt;"),
        ({"mask_ratio": 1}, "mask_ratio"),
        ({"progress": 0.5}, "--model RUN"),
        ({"name": "attentive"}, "--model RUN"),
    ],
)
def test_what_cannot_be_is_one_sentence_on_the_page(playground, settings, word):
    sentence, *rest = look(playground, **settings)
    assert re.fullmatch(r'<p class="refusal" role="alert">[^<>\n]*</p>', sentence)
    assert word in sentence
    assert rest == ["", "", ""]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.png", b"no picture"),
        ("empty.jpg", b""),
        ("<img src=x>.png", b"no picture"),
        ("evil.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        ("gone.png", None),
    ],
)
def test_a_bad_file_is_named_without_its_folder(playground, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    sentence, *rest = look(playground, str(tmp_path / name))
    assert name.replace("<", "&lt;").replace(">", "&gt;") in sentence
    assert str(tmp_path) not in sentence
    assert "<img" not in sentence
    assert rest == ["", "", ""]


def test_a_model_gives_sizes_operations_and_embeddings(tmp_path, photo):
    config, weights = tmp_path / "small.json", tmp_path / "run" / "export"
    config.write_text(json.dumps(MODEL_CONFIG))
    without = Playground(str(config))
    assert without.view.model is None
    assert "Operations of small.json" in look(without)[2]

    weights.mkdir(parents=True)
    model = small_clip()
    (weights / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}})
    )
    save_file(model.state_dict(), weights / "open_clip_model.safetensors")
    playground = Playground(str(tmp_path / "run"))
    for name in ("pgs", "attentive"):
        masks, _, table, lines = look(playground, str(photo), name, progress=1.0)
        found = {}
        exec(lines, found)
        (drawn,) = [one for alt, one in pictures(masks).items() if alt.startswith(name)]
        assert kept_patches(drawn, side=64, panel=256) == found["selection"].index[0].tolist()
        assert f"| {name} | 8 of 16 |" in table
