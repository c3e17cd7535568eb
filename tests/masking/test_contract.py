"""What every masking strategy promises, whatever it computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_pgs import PatchInputs, create_masking, list_maskings
from clip_pgs.masking.sampling import keep_count
from support.images import make_inputs, smooth_images

ADAPTIVE = {"pgs": {"mask_ratio": 0.5, "mask_ratio_min": 0.3}}
CASES = [(name, {}) for name in list_maskings()] + list(ADAPTIVE.items())
IDS = [name + ("-adaptive" if options else "") for name, options in CASES]
every_strategy = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
HARD_IMAGES = {
    "black": torch.zeros(1, 3, 56, 56),
    "constant": torch.full((1, 3, 56, 56), 1.7),
    "saturated": torch.full((1, 3, 56, 56), 255.0),
    "one bright pixel": torch.zeros(1, 3, 56, 56).index_fill_(3, torch.tensor([9]), 1e4),
}


class ForbidHostSync(TorchDispatchMode):
    """Raise where a tensor's value would have to travel to the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


def select(strategy, inputs, *, seed=0):
    return strategy(inputs, generator=torch.Generator().manual_seed(seed))


def rows(selection):
    if selection.valid is None:
        return selection.index.tolist()
    return [
        index[valid].tolist() for index, valid in zip(selection.index, selection.valid, strict=True)
    ]


@every_strategy
@pytest.mark.parametrize("grid_size", [(7, 7), (7, 5), (3, 11)])
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
        assert options.get("mask_ratio_min") is None
        return
    for index, valid in zip(selection.index.tolist(), selection.valid.tolist(), strict=True):
        count = sum(valid)
        assert valid == [True] * count + [False] * (len(valid) - count)
        assert index[count:] == [index[count - 1]] * (len(valid) - count)


@pytest.mark.parametrize("name", [name for name in list_maskings() if name != "none"])
@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 98), (0.3, 138), (0.75, 49), (0.0, 196)])
def test_fixed_strategies_keep_exactly_the_stated_count(name, ratio, expected):
    inputs = make_inputs(grid_size=(14, 14), patch_size=4)
    selection = select(create_masking(name, mask_ratio=ratio), inputs)
    assert selection.index.shape == (2, expected)
    assert selection.valid is None


@pytest.mark.parametrize(("name", "options"), list(ADAPTIVE.items()))
def test_adaptive_counts_stay_between_the_two_ratios(name, options):
    inputs = make_inputs(batch_size=12, grid_size=(10, 10), patch_size=8)
    selection = select(create_masking(name, **options), inputs)
    assert selection.index.shape[1] == keep_count(100, options["mask_ratio_min"])
    counts = selection.kept_counts()
    assert counts.min() >= keep_count(100, options["mask_ratio"])
    assert counts.max() <= keep_count(100, options["mask_ratio_min"])


@every_strategy
def test_shape_does_not_depend_on_the_images(name, options):
    strategy = create_masking(name, **options)
    shapes = {
        tuple(select(strategy, PatchInputs(pixels, 8)).index.shape)
        for pixels in (*HARD_IMAGES.values(), smooth_images(1), smooth_images(1, seed=4))
    }
    assert len(shapes) == 1


@every_strategy
def test_same_generator_seed_gives_same_selection(name, options):
    strategy, inputs = create_masking(name, **options), make_inputs(grid_size=(7, 5))
    assert rows(select(strategy, inputs)) == rows(select(strategy, inputs))


@pytest.mark.parametrize("name", [name for name in list_maskings() if name != "none"])
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
            progress=progress,
        )
        assert rows(strategy(alone)) == [together[i]]


@every_strategy
def test_selection_carries_no_gradient(name, options):
    inputs = make_inputs(progress=0.5)
    inputs.pixels.requires_grad_()
    inputs.tokens.requires_grad_()
    selection = select(create_masking(name, **options), inputs)
    assert not selection.index.requires_grad
    assert selection.valid is None or not selection.valid.requires_grad


@every_strategy
def test_a_strategy_has_no_parameter_and_no_buffer(name, options):
    assert not create_masking(name, **options).state_dict()


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_give_a_full_selection(name, options, dtype):
    inputs = make_inputs(progress=0.5)
    half = PatchInputs(inputs.pixels.to(dtype), 8, tokens=inputs.tokens.to(dtype), progress=0.5)
    whole = select(create_masking(name, **options), inputs)
    assert select(create_masking(name, **options), half).index.shape == whole.index.shape


@every_strategy
@pytest.mark.parametrize("kind", list(HARD_IMAGES))
def test_images_without_structure_are_masked_like_any_other(name, options, kind):
    selection = select(create_masking(name, **options), PatchInputs(HARD_IMAGES[kind], 8))
    for row in rows(selection):
        assert row == sorted(set(row))
        assert len(row) >= (49 if name == "none" else 25)


@every_strategy
def test_autocast_changes_nothing(name, options):
    strategy, inputs = create_masking(name, **options), make_inputs(progress=0.5)
    plain = rows(select(strategy, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows(select(strategy, inputs)) == plain


@every_strategy
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_no_value_is_read_on_the_host(name, options, progress):
    strategy, inputs = create_masking(name, **options), make_inputs(progress=progress)
    with ForbidHostSync():
        strategy(inputs)


def test_the_host_guard_sees_a_read():
    with pytest.raises(AssertionError, match="reads a tensor"), ForbidHostSync():
        torch.ones(1).item()


@every_strategy
def test_it_compiles_into_one_graph_with_the_same_result(name, options):
    strategy = create_masking(name, **options)
    noise = torch.rand(2, 49, generator=torch.Generator().manual_seed(2))
    pixels = smooth_images()

    def positions(pixels, noise):
        selection = strategy(PatchInputs(pixels, 8, noise=noise))
        return selection.index, selection.kept_counts()

    torch._dynamo.reset()
    index, counts = torch.compile(positions, fullgraph=True, backend="aot_eager")(pixels, noise)
    expected_index, expected_counts = positions(pixels, noise)
    assert torch.equal(index, expected_index)
    assert torch.equal(counts, expected_counts)
