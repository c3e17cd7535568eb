"""What every masking strategy promises about how it computes."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clip_pgs import PatchInputs, create_masking
from masking.contract_cases import HARD_IMAGES, every_strategy, hard_inputs, rows, select
from support.images import make_inputs, smooth_images


class ForbidHostSync(TorchDispatchMode):
    """Raise where a tensor's value would have to travel to the host."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


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
    half = make_inputs(progress=0.5, pixels=inputs.pixels.to(dtype), tokens=inputs.tokens.to(dtype))
    whole = select(create_masking(name, **options), inputs)
    assert select(create_masking(name, **options), half).index.shape == whole.index.shape


@every_strategy
@pytest.mark.parametrize("kind", list(HARD_IMAGES))
def test_images_without_structure_are_masked_like_any_other(name, options, kind):
    selection = select(create_masking(name, **options), hard_inputs(HARD_IMAGES[kind]))
    for row in rows(selection):
        assert row == sorted(set(row))
        # The released code truncates what it keeps, everything else what it drops.
        assert len(row) >= {"none": 49, "pgs-released": 24}.get(name, 25)


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


def test_the_host_guard_sees_a_read():
    with pytest.raises(AssertionError, match="reads a tensor"), ForbidHostSync():
        torch.ones(1).item()


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
