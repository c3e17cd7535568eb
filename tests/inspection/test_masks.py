from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from clip_pgs import create_masking
from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import make_scene
from clip_pgs.figure import CAPTION_SIZE, GAP, MARGIN, TITLE_SIZE
from clip_pgs.inspection import ModelInput, draw_masks
from clip_pgs.inspection.model_input import parse_specs

SMALL = ModelInput(image_size=(64, 64), patch_size=(8, 8))
# 64 px are enlarged fourfold, to reach 224.
SIDE = 256
MASKED = (127, 127, 127)


def create_strategies(texts, **ratios):
    return {spec.title: spec.build(**ratios) for spec in parse_specs(texts, **ratios)}


def scene(position: int = 20) -> Image.Image:
    image = Image.new("RGB", (64, 64), "lightblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((position, 24, position + 23, 47), fill="red", outline="darkred")
    draw.ellipse((position + 6, 30, position + 16, 42), fill="yellow")
    return image


def panel(figure: Image.Image, *, row: int, column: int) -> Image.Image:
    x = MARGIN + column * (SIDE + GAP)
    y = MARGIN + TITLE_SIZE + GAP + row * (SIDE + CAPTION_SIZE + 2 * GAP)
    return figure.crop((x, y, x + SIDE, y + SIDE))


def masked_share(picture: Image.Image) -> float:
    counts = {color: count for count, color in picture.getcolors(SIDE * SIDE)}
    return counts.get(MASKED, 0) / (picture.width * picture.height)


@pytest.mark.parametrize("name", ["random", "pgs"])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.5])
def test_the_grey_share_of_a_panel_is_the_mask_ratio(name, mask_ratio):
    strategies = create_strategies([name], mask_ratio=mask_ratio)
    figure = draw_masks([scene()], strategies, model_input=SMALL)
    assert masked_share(panel(figure, row=0, column=1)) == mask_ratio


def test_a_picture_whose_resizing_would_fill_the_memory_is_refused_however_it_comes(tmp_path):
    strategies = create_strategies(["random"])
    Image.new("RGB", (1, 30_000)).save(tmp_path / "line.png")
    line = torch.zeros(3, 1, 30_000)
    for picture in (tmp_path / "line.png", str(tmp_path / "line.png"), line, to_pil_image(line)):
        with pytest.raises(ValueError, match="100"):
            draw_masks([picture], strategies, model_input=SMALL)
    large = ModelInput(image_size=(4096, 4096), patch_size=(64, 64))
    with pytest.raises(ValueError, match="600 x 6"):
        draw_masks([Image.new("RGB", (600, 6))], strategies, model_input=large)
    panorama = Image.new("RGB", (1000, 100))
    assert draw_masks([panorama], strategies, model_input=SMALL)


def test_kept_patches_look_like_the_original():
    figure = draw_masks([scene()], create_strategies(["random"]), model_input=SMALL)
    original, drawn = (np.asarray(panel(figure, row=0, column=column)) for column in (0, 1))
    changed = (original != drawn).any(axis=2)
    assert changed.any()
    assert (drawn[changed] == MASKED).all()


def test_pgs_leaves_the_object_of_a_plain_scene_visible():
    figure = draw_masks([scene()], create_strategies(["pgs"], mask_ratio=0.5), model_input=SMALL)
    the_object = panel(figure, row=0, column=1).crop((80, 96, 176, 192))
    assert masked_share(the_object) == 0.0


def test_a_row_does_not_depend_on_the_rows_below():
    strategies = create_strategies(["random", "pgs"])
    alone = draw_masks([scene()], strategies, model_input=SMALL)
    first = draw_masks([scene(), scene(4)], strategies, model_input=SMALL)
    for column in (1, 2):
        pictures = [panel(figure, row=0, column=column) for figure in (alone, first)]
        assert pictures[0].tobytes() == pictures[1].tobytes()


def test_a_seed_repeats_a_picture_and_another_changes_it():
    strategies = create_strategies(["random"])
    pictures = [
        draw_masks([scene()], strategies, model_input=SMALL, seed=seed).tobytes()
        for seed in (0, 0, 1)
    ]
    assert pictures[0] == pictures[1] != pictures[2]


def test_drawing_leaves_the_global_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draw_masks([scene()], create_strategies(["random"]), model_input=SMALL)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(30, 20), (200, 40), (40, 200)])
def test_images_of_any_mode_and_shape_are_drawn(mode, size):
    figure = draw_masks(
        [Image.new("RGB", size, "orange").convert(mode)], create_strategies(["pgs"])
    )
    assert figure.size == (2 * MARGIN + 2 * 224 + GAP, 2 * MARGIN + 224 + TITLE_SIZE + GAP + 27)


def test_columns_carry_any_title_for_a_strategy_of_ones_own():
    strategies = {
        "with edges": create_masking("pgs"),
        "without edges, and with a title that is longer than its column": create_masking(
            "pgs", edges=False
        ),
    }
    figure = draw_masks([scene()], strategies, model_input=SMALL, names=["a scene"])
    assert figure.width == 2 * MARGIN + 3 * SIDE + 2 * GAP


def test_names_of_another_number_than_the_images_are_refused():
    with pytest.raises(ValueError, match="names must be as many as images, 1, got 2"):
        draw_masks([scene()], create_strategies(["random"]), names=["a", "b"])


def test_stages_come_before_pgs_and_leave_its_picture_as_it_is():
    strategies = create_strategies(["random", "pgs"])
    plain = draw_masks([scene()], strategies, model_input=SMALL)
    staged = draw_masks([scene()], strategies, model_input=SMALL, stages=True)
    assert staged.width == plain.width + 4 * (SIDE + GAP)
    assert panel(staged, row=0, column=6).tobytes() == panel(plain, row=0, column=2).tobytes()


def test_stages_of_further_strategies_are_rows_below():
    strategies = create_strategies(["pgs", "random", "pgs:center_weight=0.5"])
    names = list(strategies)
    first, second = (
        draw_masks([scene()], {n: strategies[n] for n in part}, model_input=SMALL, stages=True)
        for part in (names[:2], names[2:])
    )
    both = draw_masks([scene()], strategies, model_input=SMALL, stages=True)
    # What a format holds is known before anything is drawn.
    with pytest.raises(ValueError, match="on a side"):
        draw_masks(
            [scene()], strategies, model_input=SMALL, stages=True, max_side=max(both.size) - 1
        )
    assert both.size == (first.width, first.height + second.height)
    assert both.crop((0, 0, *first.size)).tobytes() == first.tobytes()
    below = (0, first.height, second.width, both.height)
    assert both.crop(below).tobytes() == second.tobytes()


def test_without_edges_there_is_no_picture_of_them():
    strategies = create_strategies(["pgs:edges=false,transport=false"])
    figure = draw_masks([scene()], strategies, model_input=SMALL, stages=True)
    assert figure.width == 2 * MARGIN + 5 * SIDE + 4 * GAP


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="there is no image to draw"):
        draw_masks([], create_strategies(["random"]))


@pytest.mark.parametrize(
    "images",
    ["scene.png", Path("scene.png"), Image.new("RGB", (8, 8)), None, np.zeros((1, 8, 8, 3))],
)
def test_what_is_no_list_of_images_is_refused(images):
    with pytest.raises(ValueError, match=f"images.*{type(images).__name__}"):
        draw_masks(images, create_strategies(["random"]), model_input=SMALL)


@pytest.mark.parametrize("strategies", [["random"], create_masking("random"), "random"])
def test_strategies_without_titles_are_refused(strategies):
    with pytest.raises(ValueError, match=f"strategies.*{type(strategies).__name__}"):
        draw_masks([scene()], strategies, model_input=SMALL)


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((8, 8, 3), np.uint8), "ndarray"),
        (b"JPEG", "bytes"),
        (torch.zeros(8, 8), r"\(8, 8\)"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\)"),
        (torch.zeros(3, 0, 8), r"\(3, 0, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        # Normalized, in 0 to 255, or not finite: it would be drawn in wrong colors.
        (torch.full((3, 8, 8), -0.5), "-0.5"),
        (torch.full((3, 8, 8), 255.0), "255"),
        (torch.full((3, 8, 8), torch.nan), "nan"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, named):
    with pytest.raises(ValueError, match=f"an image.*{named}"):
        draw_masks([image], create_strategies(["random"]), model_input=SMALL)


def test_each_strategy_gets_the_ratios_it_takes():
    strategies = create_strategies(["none", "random", "pgs"], mask_ratio=0.4, mask_ratio_min=0.2)
    assert strategies["random"].mask_ratio == 0.4
    assert (strategies["pgs"].mask_ratio, strategies["pgs"].mask_ratio_min) == (0.4, 0.2)


def test_options_after_a_colon_make_variants_of_one_strategy():
    strategies = create_strategies(
        ["pgs", "pgs:edges=false,edge-weight=1,mask_ratio=0.25"], mask_ratio=0.5
    )
    first, second = strategies.values()
    assert (first.options.edges, first.mask_ratio) == (True, 0.5)
    assert (second.options.edges, second.options.edge_weight) == (False, 1)
    assert second.mask_ratio == 0.25


def test_a_default_lower_bound_gives_way_to_a_small_ratio():
    strategy = create_strategies(["cluster"], mask_ratio=0.2)["cluster"]
    assert (strategy.mask_ratio, strategy.mask_ratio_min) == (0.2, 0.2)


def test_cluster_reaches_the_mean_ratio_on_the_images_shown():
    strategies = create_strategies(["cluster"], mask_ratio=0.5)
    before = strategies["cluster"].threshold
    drawings = [draw_scene(make_scene(f"masks {number}")) for number in range(4)]
    images = [Image.fromarray(drawing.pixels) for drawing in drawings]
    figure = draw_masks(images, strategies, model_input=SMALL)
    shares = [masked_share(panel(figure, row=row, column=1)) for row in range(4)]
    assert sum(shares) / 4 == pytest.approx(0.5, abs=0.01)
    assert strategies["cluster"].threshold == before


def test_a_ratio_that_no_strategy_takes_is_refused():
    with pytest.raises(ValueError, match="mask_ratio_min has no effect on none, random"):
        create_strategies(["none", "random"], mask_ratio_min=0.2)


def test_pictures_files_and_tensors_are_drawn_alike(tmp_path):
    scene().save(tmp_path / "scene.png")
    pixels = torch.from_numpy(np.asarray(scene()).copy()).permute(2, 0, 1)
    images = [scene(), tmp_path / "scene.png", str(tmp_path / "scene.png"), pixels, pixels / 255]
    strategies = create_strategies(["pgs"])
    drawn = {draw_masks([one], strategies, model_input=SMALL).tobytes() for one in images}
    batch = draw_masks(pixels[None], strategies, model_input=SMALL)
    assert drawn == {batch.tobytes()}


def test_a_strategy_outside_the_package_is_named_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "outside_masking.py").write_text(
        "from clip_pgs.masking import register_masking\n"
        "from clip_pgs.masking.baselines import RandomMasking\n"
        "@register_masking('outside')\n"
        "class Outside(RandomMasking):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "outside_masking:Outside:mask_ratio=0.25"
    assert create_strategies([text])[text].mask_ratio == 0.25
