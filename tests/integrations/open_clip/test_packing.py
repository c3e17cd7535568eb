import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import apply_masking, force_selection, masked_tower, tokens
from clip_pgs.integrations.open_clip.tokens import PackedTokens
from support.models import image_batch, small_clip, small_timm_clip
from support.tower_gradients import adaptive, features_and_gradients

POOLER = {"attn_pooler_queries": 4, "attn_pooler_heads": 2}
MODELS = {
    "class token": small_clip,
    "layer scale": partial(small_clip, ls_init_value=0.5),
    "average": partial(small_clip, pool_type="avg"),
    "average, norm after": partial(small_clip, pool_type="avg", final_ln_after_pool=True),
    "all tokens": partial(small_clip, pool_type="none"),
    "output tokens": partial(small_clip, output_tokens=True),
    "attentional": partial(small_clip, attentional_pool=True, **POOLER),
    "parallel": partial(small_clip, attentional_pool="parallel", **POOLER),
    "timm: class token": partial(small_timm_clip, qk_norm=True, scale_attn_norm=True),
    "timm: registers": partial(small_timm_clip, reg_tokens=2),
    "timm: average": partial(small_timm_clip, global_pool="avg", class_token=False),
    "timm: max": partial(small_timm_clip, global_pool="max"),
    "timm: map": partial(small_timm_clip, global_pool="map", class_token=False),
    "timm: all tokens": partial(small_timm_clip, global_pool=""),
}


COUNTS = {
    "mixed": [12, 4, 7, 4],
    "one image": [5],
    "the least": [1, 1],
    "no padding": [12, 12],
}


def run(build, selection, *, pack_tokens, **options):
    model = apply_masking(build(), "random", pack_tokens=pack_tokens)
    return features_and_gradients(model, selection, **options)


def block_diagonal(query, key, value, offsets_q, offsets_k, max_q, max_k):
    """Stand in for `varlen_attn`: attention over everything, cut down to the blocks of images."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    assert query.dtype == key.dtype == value.dtype
    for x, offsets, longest in ((query, offsets_q, max_q), (key, offsets_k, max_k)):
        assert x.stride(-1) == 1
        assert offsets[0] == 0
        assert offsets[-1] == len(x)
        assert (offsets.diff() > 0).all()
        assert (offsets.diff() <= longest).all()
    image_q, image_k = (
        torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        for offsets in (offsets_q, offsets_k)
    )
    logits = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    logits = logits.masked_fill(image_q[:, None] != image_k, float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), value)


@torch.library.custom_op("clip_pgs_tests::block_diagonal", mutates_args=())
def opaque_block_diagonal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    max_q: int,
    max_k: int,
) -> Tensor:
    return block_diagonal(query, key, value, offsets_q, offsets_k, max_q, max_k)


@opaque_block_diagonal.register_fake
def _(query, key, value, offsets_q, offsets_k, max_q, max_k):
    return torch.empty_like(query)


@pytest.fixture
def on_kernel(monkeypatch):
    """Send attention where it goes on CUDA, with a slow reference in the kernel's place."""
    calls = []

    def record(*args):
        calls.append(args)
        return block_diagonal(*args)

    monkeypatch.setattr(tokens, "_runs_kernel", lambda value: True)
    monkeypatch.setattr(tokens, "varlen_attention", record)
    return calls


@pytest.mark.parametrize("counts", list(COUNTS))
@pytest.mark.parametrize("model", list(MODELS))
def test_features_and_gradients_are_those_of_padded_rows(model, counts):
    selection = adaptive(COUNTS[counts])
    got = run(MODELS[model], selection, pack_tokens=True)
    expected = run(MODELS[model], selection, pack_tokens=False)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("model", list(MODELS))
def test_the_kernels_branch_gives_the_same(on_kernel, model):
    selection = adaptive(COUNTS["mixed"])
    got = run(MODELS[model], selection, pack_tokens=True)
    assert len(on_kernel) == 2
    expected = run(MODELS[model], selection, pack_tokens=False)
    assert len(on_kernel) == 2
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("branch", ["image by image", "kernel"])
@pytest.mark.parametrize("model", ["class token", "average", "timm: class token"])
def test_gradient_checkpointing_changes_no_gradient(request, model, branch):
    if branch == "kernel":
        request.getfixturevalue("on_kernel")
    selection = adaptive(COUNTS["mixed"])
    got = run(MODELS[model], selection, pack_tokens=True, checkpointing=True)
    expected = run(MODELS[model], selection, pack_tokens=True)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_two_calls_give_the_same_bits():
    selection = adaptive(COUNTS["mixed"])
    got, again = (run(small_clip, selection, pack_tokens=True) for _ in range(2))
    torch.testing.assert_close(got, again, atol=0, rtol=0)


@pytest.mark.parametrize("model", ["class token", "timm: class token"])
def test_the_kernel_gets_one_dtype_and_static_lengths_under_autocast(on_kernel, model):
    masked = apply_masking(MODELS[model](), "random", pack_tokens=True).train()
    with force_selection(masked, adaptive(COUNTS["mixed"])):
        expected = masked.visual(image_batch(4))
        on_kernel.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = masked.visual(image_batch(4))
    whole, first = on_kernel
    assert {args[0].dtype for args in on_kernel} == {torch.bfloat16}
    assert whole[3].tolist() == whole[4].tolist() == [0, 13, 18, 26, 31]
    assert (whole[5], whole[6]) == (13, 13)
    assert first[3].tolist() == [0, 1, 2, 3, 4]
    assert first[4].tolist() == [0, 13, 18, 26, 31]
    assert (first[5], first[6]) == (1, 13)
    assert (rough - expected).norm() < 0.05 * expected.norm()


def test_the_kernel_of_torch_takes_what_it_is_given():
    # Tensors without data pass for a GPU's; they still meet the operation's own signature.
    with FakeTensorMode():
        valid = torch.ones(3, 5, dtype=torch.bool, device="cuda")
        offsets = torch.empty(4, dtype=torch.int32, device="cuda")
        packed = PackedTokens(torch.empty(11, dtype=torch.int64, device="cuda"), offsets, 5)
        tokens = packed.pack(torch.empty(*valid.shape, 64, device="cuda", dtype=torch.bfloat16))
        heads = tokens.unflatten(1, (2, 32))
        whole = packed.attend(heads, heads, heads)
        first = packed.attend(packed.first_tokens(heads), heads, heads)
        back = packed.unpack(whole.flatten(1))
    assert (whole.shape, whole.dtype, whole.device.type) == ((11, 2, 32), torch.bfloat16, "cuda")
    assert (first.shape, first.dtype) == ((3, 2, 32), torch.bfloat16)
    assert back.shape == (3, 5, 64)


def test_rows_are_packed_and_filled_up_again():
    valid = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    packed, tokens = PackedTokens.of(valid), torch.arange(1.0, 10.0).reshape(3, 3, 1)
    assert packed.lengths == [2, 1, 3]
    assert packed.pack(tokens)[:, 0].tolist() == [1, 2, 4, 7, 8, 9]
    assert packed.first_tokens(packed.pack(tokens))[:, 0].tolist() == [1, 4, 7]
    assert packed.unpack(packed.pack(tokens))[..., 0].tolist() == [[1, 2, 0], [4, 0, 0], [7, 8, 9]]


def test_packing_is_no_part_of_the_state():
    packed, padded = (
        apply_masking(small_clip(), "pgs", mask_ratio_min=0.25, pack_tokens=flag)
        for flag in (True, False)
    )
    assert list(packed.state_dict()) == list(padded.state_dict()) == list(small_clip().state_dict())


def test_a_compiled_model_on_the_cpu_pads_and_compiles_once():
    model = apply_masking(small_clip(), "random", pack_tokens=True).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, backend="eager")
    torch._dynamo.utils.counters.clear()
    for counts in ([12, 4, 7], [3, 9, 12], [5, 5, 6]):
        with force_selection(model, adaptive(counts)):
            got = compiled(image_batch())
            torch.testing.assert_close(got, model.visual(image_batch()), atol=1e-6, rtol=1e-6)
    assert torch._dynamo.utils.counters["frames"]["total"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_model_with_the_kernel_compiles_no_more_after_two_steps(monkeypatch, on_kernel):
    # Like the kernel, an operation that torch.compile does not look into.
    monkeypatch.setattr(tokens, "varlen_attention", opaque_block_diagonal)
    monkeypatch.setattr(masked_tower, "can_pack", lambda x, *, head_width: True)
    model = apply_masking(small_clip(layers=3), "random", pack_tokens=True).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, backend="eager")
    compiled_frames = []
    for counts in ([12, 4, 7], [3, 9, 12], [5, 5, 6], [12, 12, 12], [1, 1, 1], [2, 9, 4]):
        torch._dynamo.utils.counters.clear()
        with torch.no_grad(), force_selection(model, adaptive(counts)):
            got = compiled(image_batch())
            compiled_frames.append(torch._dynamo.utils.counters["frames"]["total"])
            torch.testing.assert_close(got, model.visual(image_batch()), atol=1e-6, rtol=1e-6)
    assert min(compiled_frames[:2]) > 0
    assert max(compiled_frames[2:]) == 0


def test_operations_are_counted_on_kept_tokens_alone():
    def count(model, selection):
        masked = apply_masking(model, "random", pack_tokens=True).train()
        # The counter knows no CPU flash kernel.
        attention, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
        with force_selection(masked, selection), attention, counter:
            masked.visual(image_batch(len(selection.index))).sum().backward()
        return counter.get_total_flops()

    def fixed(num_kept, rows):
        return PatchSelection(torch.arange(num_kept).repeat(rows, 1))

    mixed = count(small_clip(), adaptive([12, 4, 7]))
    alone = sum(count(small_clip(), fixed(n, 1)) for n in (12, 4, 7))
    assert mixed == pytest.approx(alone, rel=0.02)
    assert mixed < 0.85 * count(small_clip(), fixed(12, 3))
