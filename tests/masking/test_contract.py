"""What every masking strategy promises about the patches it keeps."""

import pytest
import torch

from clip_pgs import PatchInputs, create_masking, list_maskings
from clip_pgs.masking.ratios import keep_count
from masking.contract_cases import (
    ADAPTIVE,
    HARD_IMAGES,
    every_strategy,
    hard_inputs,
    rows,
    select,
)
from support.images import make_inputs, smooth_images


@every_strategy
@pytest.mark.parametrize("grid_size", [(7, 7), (7, 5), (3, 11), (1, 12), (12, 1)])
def test_kept_patches_are_in_range_unique_and_ascending(name, options, grid_size):
    selection = select(create_masking(name, **options), make_inputs(grid_size=grid_size))
    for row in rows(selection):
        assert row == sorted(set(row))
        assert row[0] >= 0
        assert row[-1] < grid_size[0] * grid_size[1]


@every_strategy
def test_index_is_int64_and_valid_is_bool_of_the_same_shape(name, options):
    selection = select(create_masking(name, **options), make_inputs())
    assert selection.index.dtype == torch.int64
    if selection.valid is not None:
        assert selection.valid.dtype == torch.bool
        assert selection.valid.shape == selection.index.shape


@every_strategy
def test_valid_slots_come_first_and_padding_repeats_a_kept_patch(name, options):
    selection = select(create_masking(name, **options), make_inputs(batch_size=6))
    if selection.valid is None:
        assert name not in ADAPTIVE or (name == "pgs" and "mask_ratio_min" not in options)
        return
    for index, valid in zip(selection.index.tolist(), selection.valid.tolist(), strict=True):
        count = sum(valid)
        assert valid == [True] * count + [False] * (len(valid) - count)
        assert index[count:] == [index[count - 1]] * (len(valid) - count)


@pytest.mark.parametrize(
    "name", [name for name in list_maskings() if name not in ("none", "cluster", "pgs-released")]
)
@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 98), (0.3, 138), (0.75, 49), (0.0, 196)])
def test_fixed_strategies_keep_exactly_the_stated_count(name, ratio, expected):
    inputs = make_inputs(grid_size=(14, 14), patch_size=4)
    selection = select(create_masking(name, mask_ratio=ratio), inputs)
    assert selection.index.shape == (2, expected)
    assert selection.valid is None


@pytest.mark.parametrize("name", [name for name in list_maskings() if name != "none"])
def test_a_ratio_set_later_acts_like_one_given_at_first(name):
    inputs = make_inputs(grid_size=(14, 14), patch_size=4)
    strategy = create_masking(name, mask_ratio=0.75)
    strategy.set_mask_ratio(0.5)
    bound = {} if name != "cluster" else {"mask_ratio_min": 0.2}
    expected = create_masking(name, mask_ratio=0.5, **bound)
    if name == "pgs-released":
        strategy.threshold = expected.threshold
    assert rows(select(strategy, inputs)) == rows(select(expected, inputs))


@pytest.mark.parametrize("name", list(ADAPTIVE))
def test_adaptive_counts_stay_between_their_bounds(name):
    options = ADAPTIVE[name]
    inputs = make_inputs(batch_size=12, grid_size=(10, 10), patch_size=8)
    selection = select(create_masking(name, **options), inputs)
    assert selection.index.shape[1] == keep_count(100, options["mask_ratio_min"])
    counts = selection.kept_counts()
    # The ratio of cluster is a mean, so that an image may keep as little as one patch.
    assert counts.min() >= (1 if name == "cluster" else keep_count(100, options["mask_ratio"]))
    assert counts.max() <= keep_count(100, options["mask_ratio_min"])


@every_strategy
def test_shape_does_not_depend_on_the_images(name, options):
    strategy = create_masking(name, **options)
    shapes = {
        tuple(select(strategy, hard_inputs(pixels)).index.shape)
        for pixels in (*HARD_IMAGES.values(), smooth_images(1), smooth_images(1, seed=4))
    }
    assert len(shapes) == 1


@every_strategy
def test_same_generator_seed_gives_same_selection(name, options):
    strategy, inputs = create_masking(name, **options), make_inputs(grid_size=(7, 5))
    assert rows(select(strategy, inputs)) == rows(select(strategy, inputs))


@pytest.mark.parametrize(
    "name", [name for name in list_maskings() if name not in ("none", "attentive")]
)
def test_another_seed_gives_another_selection(name):
    strategy, inputs = create_masking(name), make_inputs(grid_size=(14, 14), patch_size=4)
    assert rows(select(strategy, inputs)) != rows(select(strategy, inputs, seed=1))


@every_strategy
def test_without_generator_the_global_seed_decides(name, options):
    strategy, inputs = create_masking(name, **options), make_inputs()
    torch.manual_seed(3)
    first = rows(strategy(inputs))
    torch.manual_seed(3)
    assert rows(strategy(inputs)) == first


@every_strategy
def test_given_noise_decides_and_draws_nothing(name, options):
    strategy = create_masking(name, **options)
    noise = torch.rand(2, 49, generator=torch.Generator().manual_seed(8))
    before = torch.get_rng_state()
    first = rows(strategy(make_inputs(noise=noise)))
    assert torch.equal(before, torch.get_rng_state())
    assert rows(strategy(make_inputs(noise=noise))) == first


@every_strategy
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_an_image_is_selected_alike_alone_and_in_a_batch(name, options, progress):
    strategy = create_masking(name, **options)
    noise = torch.rand(4, 49, generator=torch.Generator().manual_seed(2))
    batch = make_inputs(4, noise=noise, progress=progress)
    together = rows(strategy(batch))
    for i in range(4):
        alone = PatchInputs(
            batch.pixels[i : i + 1],
            8,
            tokens=batch.tokens[i : i + 1],
            noise=noise[i : i + 1],
            attention=batch.attention[i : i + 1],
            progress=progress,
        )
        assert rows(strategy(alone)) == [together[i]]
