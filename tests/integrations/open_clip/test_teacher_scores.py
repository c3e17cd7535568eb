import math
from functools import partial

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from clip_pgs.integrations.open_clip import apply_masking, last_selection
from support.models import image_batch, small_clip, small_coca, small_timm_clip


class RecordAttention(TorchFunctionMode):
    """Remember the attention of every call of scaled-dot-product attention, mean over heads."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2]
            logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            self.rows.append(logits.softmax(dim=-1).mean(dim=1))
        return func(*args, **(kwargs or {}))


def hooked_attention(modules, run):
    """Run and return each `nn.MultiheadAttention`'s own weights, mean over heads, (B, Q, T)."""
    rows = []

    def record(module, args, kwargs):
        query, key, value = (args + tuple(kwargs.values()))[:3]
        rows.append(type(module).forward(module, query, key, value, need_weights=True)[1])

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return rows


def class_attention(model, images):
    """Return the class token's attention to the patches of OpenCLIP's tower, the slow way."""
    blocks = model.visual.transformer.resblocks
    rows = hooked_attention([block.attn for block in blocks], lambda: model.visual(images))
    return torch.stack(rows).mean(dim=0)[:, 0, 1:]


def scores(model, images):
    return model.visual.masking.teacher.scores(images)


def attentive(model, **options):
    return apply_masking(model, "attentive", **{"resolution": 1.0, **options}).train()


def test_scores_are_the_class_tokens_attention_mean_over_heads_and_layers():
    model = attentive(small_clip(layers=3))
    got, expected = (
        scores(model, image_batch()),
        class_attention(small_clip(layers=3), image_batch()),
    )
    assert got.shape == (3, 16)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        partial(small_clip, qk_norm=True),
        small_timm_clip,
        partial(small_timm_clip, reg_tokens=2, qk_norm=True, no_embed_class=True),
    ],
    ids=["custom block", "timm", "timm with registers"],
)
def test_other_blocks_are_scored_by_their_own_attention(build):
    model = attentive(build())
    with torch.no_grad(), RecordAttention() as recorded:
        build().visual(image_batch())
    expected = torch.stack(recorded.rows).mean(dim=0)[:, 0, -16:]
    torch.testing.assert_close(scores(model, image_batch()), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("include_prefix", [False, True])
def test_a_siglip_tower_is_scored_by_the_query_that_pools(include_prefix):
    trunk = {"global_pool": "map", "reg_tokens": 1, "pool_include_prefix": include_prefix}
    model = attentive(small_timm_clip(**trunk))
    with torch.no_grad(), RecordAttention() as recorded:
        small_timm_clip(**trunk).visual(image_batch())
    expected = recorded.rows[-1][:, 0, -16:]
    torch.testing.assert_close(scores(model, image_batch()), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", [True, "parallel", "cascade"])
def test_coca_is_scored_by_the_query_that_pools(pool):
    model, plain = attentive(small_coca(attentional_pool=pool)), small_coca(attentional_pool=pool)
    tower = plain.visual
    poolers = [tower.attn_pool] + ([tower.attn_pool_contrastive] if pool is not True else [])
    rows = hooked_attention([pooler.attn for pooler in poolers], lambda: tower(image_batch()))
    expected = {
        True: lambda: rows[0][:, 0],
        "parallel": lambda: rows[1][:, 0],
        "cascade": lambda: torch.einsum("bq,bqt->bt", rows[1][:, 0], rows[0]),
    }[pool]()[:, 1:]
    torch.testing.assert_close(scores(model, image_batch()), expected, atol=1e-6, rtol=1e-5)


def test_half_resolution_is_a_tower_of_half_the_side():
    model = attentive(small_clip(image_size=[64, 96]), resolution=0.5)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    small = small_clip(image_size=[32, 48])
    state = model.visual.state_dict()
    positions = resample_abs_pos_embed(state["positional_embedding"][None], (2, 3), (4, 6))
    small.visual.load_state_dict({**state, "positional_embedding": positions[0]})
    halved = functional.interpolate(images, size=(32, 48), mode="bilinear", antialias=True)
    coarse = class_attention(small, halved).reshape(2, 1, 2, 3)
    expected = functional.interpolate(coarse, size=(4, 6), mode="bilinear").flatten(1)
    torch.testing.assert_close(scores(model, images), expected, atol=1e-5, rtol=1e-4)


def test_the_tower_sees_the_patches_with_the_highest_scores():
    model = attentive(small_clip(), mask_ratio=0.75)
    model.visual(image_batch())
    best = scores(model, image_batch()).topk(4).indices.sort().values
    assert torch.equal(last_selection(model).index, best)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (small_clip(pool_type="avg"), "the image tower pools by 'avg'"),
        (small_clip(pool_type="none"), "the image tower pools by 'none'"),
        (small_timm_clip(global_pool="avg", class_token=False), "the image tower pools by 'avg'"),
    ],
    ids=["average", "all tokens", "timm average"],
)
def test_a_tower_without_a_class_token_or_a_query_is_refused(model, reason):
    before = type(model.visual)
    with pytest.raises(ValueError, match=f"the image feature, and {reason}"):
        apply_masking(model, "attentive")
    assert type(model.visual) is before
