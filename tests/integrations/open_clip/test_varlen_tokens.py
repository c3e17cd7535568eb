"""The tokens of a masked tower: packed, padded, the last block's, and the released bias."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs import PatchSelection
from clip_pgs.integrations import masked_tower, varlen_tokens
from clip_pgs.integrations.open_clip import apply_masking, force_selection
from clip_pgs.integrations.open_clip.open_clip_vit import MaskedVisionTransformer
from clip_pgs.integrations.open_clip.timm_vit import MaskedTimmModel
from clip_pgs.integrations.varlen_tokens import (
    PackedTokens,
    can_pack,
    packs_by_default,
    released_attention_bias,
)
from support.models import image_batch, over, small_clip, small_timm_clip
from support.tower_gradients import adaptive, features_and_gradients

POOLER = {"attn_pooler_queries": 4, "attn_pooler_heads": 2}
PACKED_MODELS = {
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
every_packed_model = over(
    "build", PACKED_MODELS, "class token", "attentional", "output tokens", "timm: registers"
)

PACKED_COUNTS = {
    "mixed": [12, 4, 7, 4],
    "one image": [5],
    "the least": [1, 1],
    "no padding": [12, 12],
}


def packed_or_padded(build, selection, *, pack_tokens, **options):
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

    monkeypatch.setattr(varlen_tokens, "_runs_kernel", lambda value: True)
    monkeypatch.setattr(varlen_tokens, "varlen_attn", record)
    return calls


@pytest.mark.parametrize("counts", list(PACKED_COUNTS))
@every_packed_model
def test_features_and_gradients_are_those_of_padded_rows(build, counts):
    selection = adaptive(PACKED_COUNTS[counts])
    got = packed_or_padded(build, selection, pack_tokens=True)
    expected = packed_or_padded(build, selection, pack_tokens=False)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@every_packed_model
def test_the_kernels_branch_gives_the_same(on_kernel, build):
    selection = adaptive(PACKED_COUNTS["mixed"])
    got = packed_or_padded(build, selection, pack_tokens=True)
    assert len(on_kernel) == 2
    expected = packed_or_padded(build, selection, pack_tokens=False)
    assert len(on_kernel) == 2
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("branch", ["image by image", "kernel"])
@pytest.mark.parametrize("model", ["class token", "average", "timm: class token"])
def test_gradient_checkpointing_changes_no_gradient(request, model, branch):
    if branch == "kernel":
        request.getfixturevalue("on_kernel")
    selection = adaptive(PACKED_COUNTS["mixed"])
    got = packed_or_padded(PACKED_MODELS[model], selection, pack_tokens=True, checkpointing=True)
    expected = packed_or_padded(PACKED_MODELS[model], selection, pack_tokens=True)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_two_calls_give_the_same_bits():
    selection = adaptive(PACKED_COUNTS["mixed"])
    got, again = (packed_or_padded(small_clip, selection, pack_tokens=True) for _ in range(2))
    torch.testing.assert_close(got, again, atol=0, rtol=0)


@pytest.mark.parametrize("model", ["class token", "timm: class token"])
def test_the_kernel_gets_one_dtype_and_static_lengths_under_autocast(on_kernel, model):
    masked = apply_masking(PACKED_MODELS[model](), "random", pack_tokens=True).train()
    with force_selection(masked, adaptive(PACKED_COUNTS["mixed"])):
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_compiled_model_with_the_kernel_compiles_no_more_after_two_steps(monkeypatch, on_kernel):
    # Like the kernel, an operation that torch.compile does not look into.
    monkeypatch.setattr(varlen_tokens, "varlen_attn", opaque_block_diagonal)
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


COUNTS = [12, 4, 7, 4]


def packs(model, selection, *, masking="random", **options):
    """Return whether a forward pass packs, by the number of rows that the MLPs see."""
    masked, rows = apply_masking(model, masking, **options).train(), []
    mlp = next(m for name, m in masked.visual.named_modules() if name.endswith(".0.mlp"))
    mlp.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1]))
    with force_selection(masked, selection):
        masked.visual(image_batch(len(selection.index)))
    return len(rows[0]) == 1


def test_adaptive_rows_alone_are_packed_and_only_where_it_is_asked_for():
    selection = adaptive(COUNTS)
    assert packs(small_clip(), selection, pack_tokens=True)
    assert not packs(small_clip(), selection, pack_tokens=False)
    same = PatchSelection(torch.arange(4).repeat(len(COUNTS), 1))
    assert not packs(small_clip(), same, pack_tokens=True)


@pytest.mark.parametrize(
    ("device", "shape", "expected"),
    [
        ("cpu", (8, 139, 768), True),
        ("cpu", (8, 35, 768), True),
        ("cpu", (64, 35, 128), False),
        ("meta", (8, 139, 768), False),
    ],
)
def test_by_default_it_is_done_where_it_is_measured_to_be_faster(device, shape, expected):
    assert packs_by_default(torch.empty(shape, device=device)) == expected


def test_a_model_goes_by_that_default():
    selection = adaptive(COUNTS)
    assert packs(small_clip(width=640, head_width=320, layers=1), selection)
    assert not packs(small_clip(), selection)


def clip_with_attention_dropout():
    model = small_clip()
    model.visual.transformer.resblocks[1].attn.dropout = 0.5
    return model


@pytest.mark.parametrize(
    "model",
    [
        small_clip(qk_norm=True),
        clip_with_attention_dropout(),
        small_timm_clip(drop_path_rate=0.5),
        small_timm_clip(attn_drop_rate=0.5),
        small_timm_clip(block_fn=ResPostBlock),
    ],
    ids=["qk norm", "attention dropout", "drop path", "timm attention dropout", "post norm"],
)
def test_other_blocks_and_dropout_keep_their_padding(model):
    assert not packs(model, adaptive(COUNTS), pack_tokens=True)


def test_the_released_attention_bias_keeps_its_padding():
    selection = adaptive(COUNTS)
    selection.similar = torch.zeros_like(selection.valid)
    assert not packs(small_clip(), selection, pack_tokens=True)


@pytest.mark.parametrize(
    ("dtype", "head_width", "generation", "fits"),
    [
        (torch.bfloat16, 64, 9, True),
        (torch.float16, 256, 8, True),
        (torch.float32, 64, 9, False),
        (torch.bfloat16, 264, 9, False),
        (torch.bfloat16, 12, 9, False),
        (torch.float16, 64, 7, False),
    ],
)
def test_on_cuda_tokens_are_packed_where_there_is_a_kernel(
    monkeypatch, dtype, head_width, generation, fits
):
    properties = SimpleNamespace(major=generation)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode():
        tokens = torch.empty(2, 5, 64, device="cuda", dtype=dtype)
        assert can_pack(tokens, head_width=head_width) == fits


FIRST_TOKEN_MODELS = {
    "open_clip": small_clip,
    "layer scale": partial(small_clip, ls_init_value=0.5),
    "norm after": partial(small_clip, pool_type="tok", final_ln_after_pool=True),
    "timm": small_timm_clip,
    "timm, no bias": partial(small_timm_clip, qkv_bias=False, init_values=0.5),
    "timm, registers": partial(small_timm_clip, reg_tokens=2),
    "timm, head norms": partial(small_timm_clip, qk_norm=True, scale_attn_norm=True),
}
SELECTIONS = {
    "fixed": PatchSelection(torch.tensor([[0, 5, 6], [1, 2, 3], [7, 8, 9]])),
    "adaptive": PatchSelection(
        torch.tensor([[0, 5, 6], [1, 1, 1], [7, 8, 8]]),
        torch.tensor([[True] * 3, [True, False, False], [True, True, False]]),
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("selection", list(SELECTIONS))
@over("build", FIRST_TOKEN_MODELS, "open_clip", "timm, registers")
def test_features_and_gradients_are_those_of_a_whole_block(
    monkeypatch, build, selection, checkpointing
):
    def run():
        masked = apply_masking(build(), "random", pack_tokens=False)
        return features_and_gradients(masked, SELECTIONS[selection], checkpointing=checkpointing)

    got = run()
    for kind in (MaskedVisionTransformer, MaskedTimmModel):
        monkeypatch.setattr(kind, "reads_first_token", lambda self: False)
    expected = run()
    # DistributedDataParallel waits for every one of them.
    assert all(gradient is not None for gradient in got[1].values())
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def forward_flops(model):
    masked = apply_masking(model, "random").train()
    selection = PatchSelection(torch.arange(12).repeat(2, 1))
    # The counter knows no CPU flash kernel.
    attention, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.no_grad(), force_selection(masked, selection), attention, counter:
        masked.visual(image_batch(2))
    return counter.get_total_flops()


@pytest.mark.parametrize("build", [small_clip, small_timm_clip], ids=["open_clip", "timm"])
def test_most_of_the_last_blocks_operations_are_saved(monkeypatch, build):
    short = forward_flops(build())
    for kind in (MaskedVisionTransformer, MaskedTimmModel):
        monkeypatch.setattr(kind, "reads_first_token", lambda self: False)
    tokens, width = 13, 64
    # 12 of them do without query, output and MLP (20 D * D) and without their attention (4 T D).
    saved = 2 * (tokens - 1) * (20 * width * width + 4 * tokens * width)
    assert forward_flops(build()) - short == saved


@pytest.mark.parametrize(
    "model",
    [
        small_clip(pool_type="avg"),
        small_clip(output_tokens=True),
        small_clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
        small_clip(qk_norm=True),
        small_timm_clip(global_pool="avg"),
        small_timm_clip(global_pool="map"),
        small_timm_clip(block_fn=ParallelScalingBlock),
        small_timm_clip(drop_path_rate=0.5),
        small_timm_clip(proj_drop_rate=0.5),
        small_timm_clip(attn_drop_rate=0.5),
    ],
    ids=[
        "average",
        "output tokens",
        "attentional",
        "qk norm",
        "timm average",
        "timm map",
        "timm parallel",
        "timm drop path",
        "timm dropout",
        "timm attention dropout",
    ],
)
def test_where_patches_are_read_or_numbers_drawn_blocks_run_whole(model):
    tower = apply_masking(model, "random").visual
    parts = tower.block_parts(list(tower.blocks())[-1])
    assert parts is None or not parts.is_all or not tower.reads_first_token()


SIMILAR = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
INDEX = torch.tensor([[0, 4, 9], [1, 2, 3], [7, 8, 15]])


def bias_by_hand(similar, num_heads):
    """Return the released code's bias pair by pair, as nested lists (B, H, T, T)."""
    rows = [[False, *row] for row in similar.tolist()]
    return [
        [
            [[float(not (query or key)) for key in row] for query in row]
            for row in (rows[(image * num_heads + head) % len(rows)] for head in range(num_heads))
        ]
        for image in range(len(rows))
    ]


def test_pairs_without_a_similar_token_get_one_and_images_are_interleaved():
    got = released_attention_bias(SIMILAR, num_heads=2, dtype=torch.float32)
    assert got.tolist() == bias_by_hand(SIMILAR, 2)


@pytest.mark.parametrize("vision", [{}, {"qk_norm": True}], ids=["default block", "custom block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_added_to_the_logits_of_every_block(monkeypatch, vision, checkpointing):
    model = apply_masking(small_clip(**vision), "random").train()
    model.set_grad_checkpointing(checkpointing)
    masks, plain_attention = [], functional.scaled_dot_product_attention

    def record(*args, **kwargs):
        masks.append(kwargs["attn_mask"])
        return plain_attention(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    with force_selection(model, PatchSelection(INDEX, similar=SIMILAR)):
        model.visual(image_batch())
    assert [mask.tolist() for mask in masks] == [bias_by_hand(SIMILAR, 2)] * 2


def test_it_changes_the_features_and_no_bias_changes_none():
    model = apply_masking(small_clip(), "random").train()
    features = []
    for similar in (None, SIMILAR, torch.zeros_like(SIMILAR)):
        with force_selection(model, PatchSelection(INDEX, similar=similar)):
            features.append(model.visual(image_batch()))
    assert not torch.allclose(features[1], features[0], atol=1e-4)
    # The same number on every logit of a row is no bias.
    torch.testing.assert_close(features[2], features[0], atol=1e-5, rtol=1e-5)


def test_the_released_strategy_uses_it_where_it_is_asked_to():
    features = []
    for attention_bias in (False, True):
        options = {"mask_ratio": 0.5, "attention_bias": attention_bias}
        model = apply_masking(small_clip(), "pgs-released", **options).train()
        torch.manual_seed(0)
        features.append(model.visual(image_batch()))
    assert not torch.equal(*features)


def test_timm_towers_refuse_it():
    sentence = "attention_bias is made for OpenCLIP's own VisionTransformer, and the image tower"
    with pytest.raises(ValueError, match=sentence):
        apply_masking(small_timm_clip(), "pgs-released", attention_bias=True)
