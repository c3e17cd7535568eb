"""Where tokens are packed, and where images keep their padding."""

from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import apply_masking, force_selection
from clip_pgs.integrations.open_clip.tokens import can_pack, packs_by_default
from support.models import image_batch, small_clip, small_timm_clip
from support.tower_gradients import adaptive

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
    assert not packs(small_clip(), PatchSelection(selection.index), pack_tokens=True)


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
