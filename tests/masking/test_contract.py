"""What every masking strategy promises: the patches it keeps, and how it computes.

A strategy outside this repository keeps the same promises: `python -m pytest -p MODULE
tests/masking/test_contract.py` imports its module, and runs over whatever is registered then.
"""

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clip_pgs import PatchInputs, create_masking, list_maskings
from clip_pgs.masking import describe_masking, pgs, sampling
from clip_pgs.masking.strategy import keep_count
from support.images import make_inputs, smooth_images
from support.tf32 import products_in_float32

BOUNDS = {"mask_ratio": 0.5, "mask_ratio_min": 0.3}


def cases_of(name):
    """Return the options that a strategy is tested with; its variants are more of many alike."""
    declared = describe_masking(name)
    plain = [{}, BOUNDS] if declared.adaptive else [{}]
    for options in (*plain, *declared.variants):
        marks = () if options in plain else pytest.mark.slow
        yield pytest.param(
            name, options, id="-".join([name, *map(str, options.values())]), marks=marks
        )


every_strategy = pytest.mark.parametrize(
    ("name", "options"), [case for name in list_maskings() for case in cases_of(name)]
)

HARD_IMAGES = {
    "black": torch.zeros(1, 3, 56, 56),
    "constant": torch.full((1, 3, 56, 56), 1.7),
    "saturated": torch.full((1, 3, 56, 56), 255.0),
    "one bright line": torch.zeros(1, 3, 56, 56).index_fill_(3, torch.tensor([9]), 1e4),
}


def hard_inputs(pixels):
    """Return inputs of patches of 8 for images without structure, and attention to match."""
    return PatchInputs(pixels, 8, attention=torch.zeros(1, 49))


def select(strategy, inputs, *, seed=0):
    """Return a selection drawn from a seed."""
    return strategy(inputs, generator=torch.Generator().manual_seed(seed))


def rows(selection):
    """Return the kept positions of each image as lists."""
    if selection.valid is None:
        return selection.index.tolist()
    return [
        index[valid].tolist() for index, valid in zip(selection.index, selection.valid, strict=True)
    ]


class ForbidHostSync(TorchDispatchMode):
    """Raise where a tensor's value would have to travel to the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list_maskings())
def test_a_strategy_says_what_it_keeps_and_what_its_options_do(name):
    declared = describe_masking(name)
    assert declared.name == name
    assert declared.keeps
    assert declared.paper
    assert declared.requires <= {"tokens", "attention"}
    assert declared.adaptive <= {"mask_ratio_min"}.issubset(o.name for o in declared.options)
    assert all(option.help for option in declared.options)


@every_strategy
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_a_batch_without_images_keeps_as_many_patches_of_none(name, options, progress):
    strategy = create_masking(name, **options)
    some = make_inputs(2, progress=progress)
    parts = ("pixels", "tokens", "attention", "noise")
    none = {part: v[:0] for part in parts if (v := getattr(some, part)) is not None}
    selection = select(strategy, dataclasses.replace(some, **none))
    assert selection.index.shape == (0, select(strategy, some).index.shape[1])
    assert selection.valid is None or selection.valid.shape == selection.index.shape


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
    strategy = create_masking(name, **options)
    selection = select(strategy, make_inputs(batch_size=6))
    assert (selection.valid is not None) == strategy.keeps_different_counts()
    if selection.valid is None:
        return
    for index, valid in zip(selection.index.tolist(), selection.valid.tolist(), strict=True):
        count = sum(valid)
        assert valid == [True] * count + [False] * (len(valid) - count)
        assert index[count:] == [index[count - 1]] * (len(valid) - count)


@pytest.mark.parametrize("name", list_maskings())
def test_bounds_that_are_equal_pad_only_where_the_strategy_says_so(name):
    if not describe_masking(name).adaptive:
        pytest.skip("no adaptive count")
    strategy = create_masking(name, mask_ratio=0.5, mask_ratio_min=0.5)
    selection = select(strategy, make_inputs(batch_size=6))
    assert (selection.valid is not None) == strategy.keeps_different_counts()


@every_strategy
@pytest.mark.parametrize("ratio", [0.5, 0.4, 0.75, 0.0])
def test_a_fixed_count_is_the_stated_one_and_an_adaptive_one_keeps_to_its_bound(
    name, options, ratio
):
    if "mask_ratio" not in [option.name for option in describe_masking(name).options]:
        pytest.skip("no mask ratio")
    strategy = create_masking(name, **{"mask_ratio": 0.5, **options})
    strategy.set_mask_ratio(ratio)
    selection = select(strategy, make_inputs(batch_size=6, grid_size=(14, 14), patch_size=4))
    least = getattr(strategy, "mask_ratio_min", ratio)
    # The released code truncates what it keeps, everything else what it drops.
    assert abs(selection.index.shape[1] - keep_count(196, least)) <= 1
    assert selection.kept_counts().min() >= 1


@pytest.mark.parametrize("name", list_maskings())
def test_a_ratio_set_later_acts_like_one_given_at_first(name):
    known = [option.name for option in describe_masking(name).options]
    if "mask_ratio" not in known:
        pytest.skip("no mask ratio")

    def create(**options):
        return create_masking(name, **{key: options[key] for key in options if key in known})

    # A lower bound keeps its share of the ratio, and so does a mean.
    strategy = create(mask_ratio=0.75, mask_ratio_min=0.45, mask_ratio_mean=0.6)
    strategy.set_mask_ratio(0.5)
    expected = create(mask_ratio=0.5, mask_ratio_min=0.3, mask_ratio_mean=0.4)
    inputs = make_inputs(grid_size=(14, 14), patch_size=4)
    assert rows(select(strategy, inputs)) == rows(select(expected, inputs))


@every_strategy
def test_shape_does_not_depend_on_the_images(name, options):
    strategy = create_masking(name, **options)
    shapes = {
        tuple(select(strategy, hard_inputs(pixels)).index.shape)
        for pixels in (*HARD_IMAGES.values(), smooth_images(1), smooth_images(1, seed=4))
    }
    assert len(shapes) == 1


@every_strategy
@pytest.mark.parametrize("kind", list(HARD_IMAGES))
def test_images_without_structure_are_masked_like_any_other(name, options, kind):
    selection = select(create_masking(name, **options), hard_inputs(HARD_IMAGES[kind]))
    for row in rows(selection):
        assert row == sorted(set(row))
        assert 16 <= len(row) <= 49


@every_strategy
def test_same_generator_seed_gives_same_selection(name, options):
    strategy, inputs = create_masking(name, **options), make_inputs(grid_size=(7, 5))
    assert rows(select(strategy, inputs)) == rows(select(strategy, inputs))


@pytest.mark.parametrize("name", list_maskings())
def test_another_seed_gives_another_selection_where_it_is_random(name):
    strategy, inputs = create_masking(name), make_inputs(grid_size=(14, 14), patch_size=4)
    first, *others = (rows(select(strategy, inputs, seed=seed)) for seed in range(9))
    is_same = all(other == first for other in others)
    assert is_same != describe_masking(name).random


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


@pytest.mark.parametrize("name", list_maskings())
def test_only_what_it_requires_is_read(name):
    requires, inputs = describe_masking(name).requires, make_inputs(progress=0.5)
    expected = rows(select(create_masking(name), inputs))
    for part in {"tokens", "attention"} - requires:
        setattr(inputs, part, None)
    assert rows(select(create_masking(name), inputs)) == expected
    for part in requires:
        lacking = make_inputs(progress=0.5, **{part: None})
        with pytest.raises(ValueError, match=f"needs .*{part}"):
            select(create_masking(name), lacking)


@every_strategy
def test_selection_carries_no_gradient(name, options):
    inputs = make_inputs(progress=0.5)
    inputs.pixels.requires_grad_()
    inputs.tokens.requires_grad_()
    selection = select(create_masking(name, **options), inputs)
    assert not selection.index.requires_grad
    assert selection.valid is None or not selection.valid.requires_grad


@every_strategy
def test_a_strategy_adds_nothing_to_the_state_dict(name, options):
    assert not create_masking(name, **options).state_dict()


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_give_a_full_selection(name, options, dtype):
    inputs = make_inputs(progress=0.5)
    half = make_inputs(progress=0.5, pixels=inputs.pixels.to(dtype), tokens=inputs.tokens.to(dtype))
    whole = select(create_masking(name, **options), inputs)
    assert select(create_masking(name, **options), half).index.shape == whole.index.shape


@every_strategy
def test_a_default_of_float64_changes_nothing(name, options):
    strategy, inputs = create_masking(name, **options), make_inputs(batch_size=2)
    expected = rows(select(strategy, inputs))
    torch.set_default_dtype(torch.float64)
    try:
        found = rows(select(create_masking(name, **options), inputs))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


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
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_every_tensor_is_made_on_the_images_device(name, options):
    # A fake tensor computes shapes and devices alone, and refuses to mix devices.
    with FakeTensorMode():
        inputs = PatchInputs(
            torch.zeros(2, 3, 56, 56, device="cuda"),
            8,
            tokens=torch.zeros(2, 49, 24, device="cuda"),
            attention=torch.zeros(2, 49, device="cuda"),
            progress=0.5,
        )
        assert create_masking(name, **options)(inputs).index.device.type == "cuda"


@every_strategy
@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_products_on_a_gpu_are_float32_whatever_the_trainer_allows(name, options, progress):
    strategy, inputs = create_masking(name, **options), make_inputs(progress=progress)
    parts = ("pixels", "tokens", "attention")
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = {part: getattr(inputs, part).to("cuda") for part in parts}
        with products_in_float32():
            strategy(dataclasses.replace(inputs, **moved))


class ForbidFloat64(TorchDispatchMode):
    """Raise where a tensor of float64 is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) != torch.float64, f"{func} makes float64"
        return result


@every_strategy
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_a_device_without_float64_needs_none(name, options, progress, monkeypatch):
    on_apple = sampling.exact_dtype(torch.device("mps"))
    assert on_apple == torch.float32
    for module in (sampling, pgs):
        monkeypatch.setattr(module, "exact_dtype", lambda device: on_apple)
    strategy, inputs = create_masking(name, **options), make_inputs(progress=progress)
    with ForbidFloat64():
        select(strategy, inputs)


@pytest.mark.slow
@every_strategy
def test_it_compiles_into_one_graph_with_the_same_result(name, options):
    strategy = create_masking(name, **options)
    noise = torch.rand(2, 49, generator=torch.Generator().manual_seed(2))
    pixels, attention = smooth_images(), make_inputs().attention

    def positions(pixels, noise):
        selection = strategy(PatchInputs(pixels, 8, noise=noise, attention=attention))
        return selection.index, selection.kept_counts()

    torch._dynamo.reset()
    index, counts = torch.compile(positions, fullgraph=True, backend="aot_eager")(pixels, noise)
    expected_index, expected_counts = positions(pixels, noise)
    assert torch.equal(index, expected_index)
    assert torch.equal(counts, expected_counts)
