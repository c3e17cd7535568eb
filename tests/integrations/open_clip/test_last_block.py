from functools import partial

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import apply_masking, force_selection
from clip_pgs.integrations.open_clip.open_clip_vit import MaskedVisionTransformer
from clip_pgs.integrations.open_clip.timm_vit import MaskedTimmModel
from support.models import image_batch, small_clip, small_timm_clip
from support.tower_gradients import features_and_gradients

MODELS = {
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
@pytest.mark.parametrize("model", list(MODELS))
def test_features_and_gradients_are_those_of_a_whole_block(
    monkeypatch, model, selection, checkpointing
):
    def run():
        masked = apply_masking(MODELS[model](), "random", pack_tokens=False)
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
    assert parts is None or not tower.reads_first_token()
