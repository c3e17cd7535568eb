import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from timm.layers import HybridEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from clip_pgs import PatchSelection, list_maskings
from clip_pgs.integrations.open_clip import (
    apply_masking,
    force_selection,
    last_selection,
    num_patches,
    patch_size,
    set_mask_ratio,
    set_masking_noise,
)
from clip_pgs.integrations.open_clip.open_clip_vit import masked_block
from clip_pgs.masking.sampling import kept_patches
from support.host_waits import noting_host_waits
from support.models import (
    image_batch,
    over,
    small_clip,
    small_coca,
    small_eva_clip,
    small_resnet_clip,
    small_timm_clip,
    text_batch,
)

OPEN_CLIP_TOWERS = {
    "class token": {},
    "average": {"pool_type": "avg"},
    "average, norm after": {"pool_type": "avg", "final_ln_after_pool": True},
    "attentional": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "parallel": {"attentional_pool": "parallel", "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "cascade": {"attentional_pool": "cascade", "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "all tokens": {"pool_type": "none"},
    "output tokens": {"output_tokens": True},
    "qk norm": {"qk_norm": True},
    "layer scale": {"ls_init_value": 0.1},
}
TIMM_TOWERS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "average": {"global_pool": "avg", "class_token": False},
    "average of all": {"global_pool": "avg", "pool_include_prefix": True},
    "max": {"global_pool": "max", "reg_tokens": 1},
    "average and max": {"global_pool": "avgmax", "class_token": False},
    "siglip": {"global_pool": "map", "class_token": False},
    "map of all": {"global_pool": "map", "reg_tokens": 1, "pool_include_prefix": True},
    "all tokens": {"global_pool": ""},
    "unplaced class token": {"no_embed_class": True, "reg_tokens": 1},
    "pre norm": {"pre_norm": True},
    "qk norm": {"qk_norm": True},
    "layer scale": {"init_values": 0.1},
    "post norm": {"block_fn": ResPostBlock},
    "parallel": {"block_fn": ParallelScalingBlock},
}
# As EVA01, EVA02-E, EVA02-B, PE-Core, DINOv3 and RoPE-ViT are built.
EVA_TOWERS = {
    "eva01": {"qkv_bias": True},
    "eva02, post norm": {"use_post_norm": True, "use_rot_pos_emb": True},
    "eva02": {
        "use_rot_pos_emb": True,
        "ref_feat_shape": (8, 8),
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
    },
    "pe": {
        "use_rot_pos_emb": True,
        "global_pool": "map",
        "attn_type": "rope",
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True,
    },
    "dinov3": {
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "use_abs_pos_emb": False,
        "no_embed_class": True,
        "num_reg_tokens": 2,
        "dynamic_img_size": True,
        "init_values": 0.1,
    },
    "mixed": {
        "use_rot_pos_emb": True,
        "rope_type": "mixed",
        "global_pool": "avg",
        "qk_norm": True,
    },
}


def timm_clip_without_fused_attention():
    model = small_timm_clip(global_pool="map")
    for module in model.visual.trunk.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


BUILDERS = {
    **{name: partial(small_clip, **vision) for name, vision in OPEN_CLIP_TOWERS.items()},
    **{f"timm: {name}": partial(small_timm_clip, **trunk) for name, trunk in TIMM_TOWERS.items()},
    **{f"timm: {name}": partial(small_eva_clip, **trunk) for name, trunk in EVA_TOWERS.items()},
    "timm: distilled": partial(small_timm_clip, trunk_class=VisionTransformerDistilled),
    "timm: without fused attention": timm_clip_without_fused_attention,
}
every_tower = over(
    "build",
    BUILDERS,
    *("class token", "parallel", "output tokens"),
    *("timm: siglip", "timm: post norm", "timm: dinov3"),
)
FIXED = PatchSelection(torch.tensor([[0, 5, 6, 11], [1, 2, 3, 4], [7, 8, 9, 15]]))
ADAPTIVE = PatchSelection(
    torch.tensor([[0, 5, 6, 11], [1, 2, 2, 2], [7, 8, 9, 9]]),
    torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]]),
)
EVERY_PATCH = torch.arange(16).repeat(3, 1)
SELECTIONS = {
    "fixed": FIXED,
    "adaptive": ADAPTIVE,
}
both_selections = pytest.mark.parametrize(
    "selection", list(SELECTIONS.values()), ids=list(SELECTIONS)
)


class LargestMask(TorchDispatchMode):
    """Remember the largest boolean or float attention mask given to attention."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values(), result):
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def encode(model, images, selection):
    with force_selection(model, selection):
        features = model.visual(images)
    return features if isinstance(features, tuple) else (features,)


def repaint_masked(images, selection, *, scale=100.0):
    """Return the images with other pixels in every patch outside the selection."""
    keep = kept_patches(selection, 16).reshape(3, 1, 4, 4)
    keep = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return torch.where(keep, images, scale * torch.randn_like(images))


@every_tower
def test_keeping_every_patch_equals_open_clip_in_train_mode(build):
    plain = build().train()
    masked = apply_masking(copy.deepcopy(plain), "random")
    expected = plain.visual(image_batch())
    expected = expected if isinstance(expected, tuple) else (expected,)
    for valid in (None, torch.ones(3, 16, dtype=torch.bool)):
        got = encode(masked, image_batch(), PatchSelection(EVERY_PATCH, valid))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_dropout_and_drop_path_of_timm_draw_as_ever():
    rates = ("drop_path_rate", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate")
    plain = small_timm_clip(**dict.fromkeys(rates, 0.25)).train()
    masked = apply_masking(copy.deepcopy(plain), "random")
    torch.manual_seed(0)
    expected = plain.visual(image_batch())
    torch.manual_seed(0)
    torch.testing.assert_close(
        encode(masked, image_batch(), PatchSelection(EVERY_PATCH))[0],
        expected,
        atol=1e-6,
        rtol=1e-6,
    )
    torch.manual_seed(1)
    assert not torch.allclose(plain.visual(image_batch()), expected)


def test_the_masked_block_is_bit_equal_to_open_clips():
    torch.manual_seed(0)
    block = ResidualAttentionBlock(64, 2).train()
    tokens, everything = torch.randn(3, 17, 64), torch.ones(3, 1, 1, 17, dtype=torch.bool)
    assert torch.equal(masked_block(block, tokens, everything), block(tokens))


class Adapter(nn.Module):
    """Low-rank adaptation as peft wraps a layer: what it is asked for is the layer's."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        width = getattr(base_layer, "embed_dim", None)
        self.down = nn.Linear(width or base_layer.in_features, 4)
        self.up = nn.Linear(4, width or base_layer.out_features)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x, *args, **options):
        more, out = self.up(self.down(x)), self.base_layer(x, *args, **options)
        return (out[0] + more, *out[1:]) if isinstance(out, tuple) else out + more


def adapt(owner, name):
    setattr(owner, name, Adapter(getattr(owner, name)))


def prune_half(owner, name):
    prune.l1_unstructured(owner, name, 0.5)


# What is done to each block, by the model that it is done to.
CHANGED_ATTENTION = {
    "adapter": (small_clip, lambda block: adapt(block, "attn")),
    "adapter of the projection": (small_clip, lambda block: adapt(block.attn, "out_proj")),
    "pruned": (small_clip, lambda block: prune_half(block.attn, "in_proj_weight")),
    "adapter of the custom attention": (
        partial(small_clip, qk_norm=True),
        lambda block: adapt(block, "attn"),
    ),
    "timm: adapter": (small_timm_clip, lambda block: adapt(block.attn, "qkv")),
    "timm: adapter of attention": (small_timm_clip, lambda block: adapt(block, "attn")),
    "timm: pruned": (small_timm_clip, lambda block: prune_half(block.attn.qkv, "weight")),
    "timm: normalized": (
        small_timm_clip,
        lambda block: parametrizations.weight_norm(block.attn.qkv),
    ),
    "timm: adapter of eva's": (
        partial(small_eva_clip, qkv_fused=False),
        lambda block: adapt(block.attn, "v_proj"),
    ),
}


def blocks_of(model):
    visual = model.visual
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


def changed_clip(name):
    build, change = CHANGED_ATTENTION[name]
    model = build()
    # timm's own attention tells its width in its projections.
    for block in blocks_of(model):
        if not hasattr(block.attn, "embed_dim"):
            block.attn.embed_dim = 64
        change(block)
    return model.double().train()


@pytest.mark.parametrize("name", CHANGED_ATTENTION)
@pytest.mark.parametrize("layout", ["alike", "padded", "packed"])
def test_what_was_put_into_attention_acts_as_in_open_clip(name, layout):
    plain, masked = changed_clip(name), changed_clip(name)
    apply_masking(masked, "random", pack_tokens=layout == "packed")
    valid = None if layout == "alike" else torch.ones(3, 16, dtype=torch.bool)
    images = image_batch().double()
    for _ in range(2):
        expected, got = (
            plain.visual(images),
            encode(masked, images, PatchSelection(EVERY_PATCH, valid))[0],
        )
        torch.testing.assert_close(got, expected)
        expected.square().sum().backward()
        got.square().sum().backward()
    for (weight, one), other in zip(
        plain.visual.named_parameters(), masked.visual.parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), weight
        torch.testing.assert_close(other.grad, one.grad, msg=weight)


@pytest.mark.parametrize("name", CHANGED_ATTENTION)
def test_what_was_put_into_attention_sees_the_patches_of_each_image_alone(name):
    model = apply_masking(changed_clip(name), "random", pack_tokens=True)
    images = image_batch().double()
    together = encode(model, images, ADAPTIVE)[0]
    for i, count in enumerate(ADAPTIVE.kept_counts().tolist()):
        kept = PatchSelection(ADAPTIVE.index[i : i + 1, :count])
        torch.testing.assert_close(together[i : i + 1], encode(model, images[i : i + 1], kept)[0])


@pytest.mark.parametrize("name", ["adapter", "timm: adapter", "timm: pruned"])
def test_attention_that_was_changed_is_not_scored_by_its_weights(name):
    with pytest.raises(ValueError, match="AttentiveMasking reads the attention of the class token"):
        apply_masking(changed_clip(name), "attentive")


@pytest.mark.parametrize("make", [small_clip, small_timm_clip, small_eva_clip])
@pytest.mark.parametrize("layout", ["alike", "padded", "packed", "inference"])
def test_hooks_on_attention_are_called_in_every_block(make, layout):
    model, seen = make(), []
    when = "always" if layout == "inference" else "train"
    apply_masking(model, "random", when=when, pack_tokens=layout == "packed")
    model.train(layout != "inference")
    for block in blocks_of(model):
        block.attn.register_forward_hook(lambda module, given, output: seen.append(module))
    selection = FIXED if layout in ("alike", "inference") else ADAPTIVE
    encode(model, image_batch(), selection)
    assert seen == [block.attn for block in blocks_of(model)]


@pytest.mark.parametrize("make", [small_clip, small_timm_clip, small_eva_clip])
@pytest.mark.parametrize("layout", ["alike", "padded", "packed", "inference"])
@pytest.mark.parametrize("part", ["block", "attention"])
def test_a_forward_pass_put_in_place_of_a_blocks_is_run(make, layout, part):
    model, seen = make(), []
    when = "always" if layout == "inference" else "train"
    apply_masking(model, "random", when=when, pack_tokens=layout == "packed")
    model.train(layout != "inference")

    def noting(forward, *given, **options):
        seen.append(forward.__self__)
        return forward(*given, **options)

    modules = [block if part == "block" else block.attn for block in blocks_of(model)]
    for module in modules:
        # As accelerate's hooks do.
        module.forward = partial(noting, module.forward)
    encode(model, image_batch(), FIXED if layout in ("alike", "inference") else ADAPTIVE)
    assert seen == modules


@every_tower
@both_selections
def test_pixels_outside_the_selection_change_no_output_bit(build, selection):
    model = apply_masking(build(), "random").train()
    images = image_batch()
    for one, other in zip(
        encode(model, images, selection),
        encode(model, repaint_masked(images, selection), selection),
        strict=True,
    ):
        assert torch.equal(one, other)


@every_tower
@both_selections
@pytest.mark.parametrize("pack_tokens", [False, True], ids=["padded", "packed"])
def test_pixels_outside_the_selection_get_no_gradient(build, selection, pack_tokens):
    model = apply_masking(build(), "random", pack_tokens=pack_tokens).train()
    images = image_batch().requires_grad_()
    sum(output.square().sum() for output in encode(model, images, selection)).backward()
    outside = repaint_masked(torch.zeros(3, 3, 64, 64), selection) != 0
    assert (images.grad[outside] == 0).all()
    assert (images.grad[~outside] != 0).any()


@every_tower
@pytest.mark.parametrize("pack_tokens", [False, True], ids=["padded", "packed"])
def test_adaptive_rows_equal_encoding_each_image_by_itself(build, pack_tokens):
    model = apply_masking(build(), "random", pack_tokens=pack_tokens).train()
    images = image_batch()
    together = encode(model, images, ADAPTIVE)[0]
    for i, count in enumerate(ADAPTIVE.kept_counts().tolist()):
        alone = encode(model, images[i : i + 1], PatchSelection(ADAPTIVE.index[i : i + 1, :count]))[
            0
        ]
        expected = together[i, : alone.shape[1]] if together.ndim == 3 else together[i]
        torch.testing.assert_close(alone[0], expected, atol=1e-5, rtol=1e-5)


def by_hand(tower, image, kept, places):
    """Encode one image's kept patches by timm's own trunk, turned as if they stood elsewhere."""
    trunk = tower.trunk
    x = trunk._pos_embed(trunk.patch_embed(image[None]))
    x = x[0] if isinstance(x, tuple) else x
    prefix, patches = x.tensor_split([trunk.num_prefix_tokens], dim=1)
    x = trunk.norm_pre(torch.cat([prefix, patches[:, kept]], dim=1))
    turned = rope_of_patches(tower)
    for i, block in enumerate(trunk.blocks):
        x = block(x) if turned is None else block(x, rope=turned[i][..., places, :])
    return tower.head(trunk.forward_head(trunk.norm(x)))[0]


@pytest.mark.parametrize("name", EVA_TOWERS)
@pytest.mark.parametrize(
    ("selection", "pack_tokens"),
    [(FIXED, False), (ADAPTIVE, False), (ADAPTIVE, True)],
    ids=["fixed", "padded", "packed"],
)
def test_rotary_positions_go_with_the_kept_patches(name, selection, pack_tokens):
    model = small_eva_clip(**EVA_TOWERS[name])
    model = apply_masking(model, "random", pack_tokens=pack_tokens).double().train()
    images = image_batch().double()
    together = encode(model, images, selection)[0]
    for i, count in enumerate(selection.kept_counts().tolist()):
        kept = selection.index[i, :count]
        expected = by_hand(model.visual, images[i], kept, kept)
        torch.testing.assert_close(together[i], expected, atol=1e-6, rtol=1e-5)
        if model.visual.trunk.rope is not None:
            elsewhere = by_hand(model.visual, images[i], kept, kept.flip(0))
            assert (together[i] - elsewhere).norm() > 1e-3 * expected.norm()


def test_rotary_positions_drawn_in_training_are_those_of_the_tower():
    trunk = {**EVA_TOWERS["dinov3"], "rope_shift_coords": 1.0}
    plain = small_eva_clip(**trunk).train()
    masked = apply_masking(copy.deepcopy(plain), "random")
    torch.manual_seed(0)
    expected = plain.visual(image_batch())
    torch.manual_seed(0)
    got = encode(masked, image_batch(), PatchSelection(EVERY_PATCH))[0]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(plain.visual(image_batch()), expected, atol=1e-4)


def small_hybrid_clip(**trunk):
    stem = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7, stride=4, padding=3), torch.nn.Conv2d(8, 64, 7, 4, padding=3)
    )
    embed_layer = partial(HybridEmbed, backbone=stem, proj=False)
    return small_timm_clip(embed_layer=embed_layer, patch_size=1, **trunk)


@pytest.mark.parametrize("trunk", [{}, {"pos_embed": "none", "global_pool": "avg"}])
def test_behind_a_convolutional_stem_the_blocks_see_the_kept_patches_alone(trunk):
    plain = small_hybrid_clip(**trunk).double()
    model = apply_masking(copy.deepcopy(plain), "random")
    images = image_batch().double()
    assert torch.equal(model.eval().visual(images), plain.eval().visual(images))
    model.train()
    every = encode(model, images, PatchSelection(EVERY_PATCH))[0]
    torch.testing.assert_close(every, plain.train().visual(images), atol=1e-6, rtol=1e-6)
    together = encode(model, images, ADAPTIVE)[0]
    for i, count in enumerate(ADAPTIVE.kept_counts().tolist()):
        kept = ADAPTIVE.index[i, :count]
        expected = by_hand(model.visual, images[i], kept, kept)
        torch.testing.assert_close(together[i], expected, atol=1e-6, rtol=1e-5)
    assert num_patches(model) == 16
    assert patch_size(model) == (16, 16)


def test_output_tokens_are_zero_in_padding_slots():
    model = apply_masking(small_clip(output_tokens=True), "random").train()
    _, tokens = encode(model, image_batch(), ADAPTIVE)
    assert tokens.shape == (3, 4, 64)
    assert (tokens[~ADAPTIVE.valid] == 0).all()
    assert (tokens[ADAPTIVE.valid] != 0).all()


@both_selections
def test_no_mask_per_head_and_query_is_built(selection):
    model = apply_masking(small_clip(), "random", pack_tokens=False).train()
    with LargestMask() as seen:
        encode(model, image_batch(), selection)
    # 3 images, 2 heads, 5 tokens: a (B * heads, L, L) or (B, heads, L, L) tensor may only be the
    # attention weights of the CPU's own kernel, never an input mask.
    assert (6, 5, 5) not in seen.shapes
    assert ((3, 1, 1, 5) in seen.shapes) == (selection.valid is not None)


@every_tower
@both_selections
def test_gradient_checkpointing_changes_no_gradient(build, selection):
    gradients = []
    for checkpointing in (False, True):
        model = apply_masking(build(), "random").train()
        model.set_grad_checkpointing(checkpointing)
        encode(model, image_batch(), selection)[0].square().sum().backward()
        gradients.append([p.grad for p in model.visual.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_gradient_checkpointing_draws_the_selection_once():
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.5, mask_ratio_min=0.25).train()
    model.set_grad_checkpointing(True)
    output = model.visual(image_batch())
    drawn = last_selection(model)
    state = torch.get_rng_state()
    output.sum().backward()
    assert last_selection(model) is drawn
    assert torch.equal(torch.get_rng_state(), state)


@every_tower
@both_selections
def test_bf16_autocast_runs_and_stays_close(build, selection):
    model = apply_masking(build(), "random").train()
    exact = encode(model, image_batch(), selection)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encode(model, image_batch(), selection)[0]
    assert torch.isfinite(rough).all()
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.25}])
def test_a_pure_bf16_model_trains_a_step(options):
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.5, **options).to(torch.bfloat16).train()
    model.visual(image_batch().bfloat16()).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.visual.parameters())


def test_autocast_leaves_the_selection_alone():
    model = apply_masking(small_clip(), "pgs").train()
    torch.manual_seed(0)
    model.visual(image_batch())
    plain = last_selection(model).index
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.visual(image_batch())
    assert torch.equal(last_selection(model).index, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (small_clip, {}),
        (partial(small_eva_clip, use_rot_pos_emb=True), {"mask_ratio_min": 0.25}),
    ],
    ids=["fixed", "adaptive and rotary"],
)
def test_the_tower_compiles_into_one_graph(build, options):
    model = apply_masking(build(), "pgs", mask_ratio=0.5, **options).train()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    model.visual.masking.noise = noise
    expected = model.visual(image_batch())
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image_batch()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_a_compiled_tower_takes_batches_of_any_size():
    model = apply_masking(small_clip(), "pgs").train()
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, backend="eager")
    for batch_size in (4, 3, 2):
        torch.manual_seed(0)
        expected = model.visual(image_batch(batch_size))
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(image_batch(batch_size)), expected)


@pytest.mark.slow
def test_progress_recompiles_a_few_times_and_then_no_more():
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.5).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, backend="eager")
    for step in range(4):
        model.visual.masking.progress = step / 10
        compiled(image_batch())
    torch._dynamo.utils.counters.clear()
    for step in range(4, 10):
        model.visual.masking.progress = step / 10
        compiled(image_batch())
    assert torch._dynamo.utils.counters["frames"]["total"] == 0


@pytest.mark.slow
def test_a_schedule_of_mask_ratios_compiles_two_graphs():
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.5, mask_ratio_min=0.3).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.visual, backend="eager")
    num_slots = []
    for mask_ratio in (0.5, 0.25, 0.75, 0.6, 0.5):
        set_mask_ratio(model, mask_ratio)
        compiled(image_batch())
        num_slots.append(last_selection(model).index.shape[1])
    assert num_slots == [12, 14, 9, 11, 12]
    assert torch._dynamo.utils.counters["frames"]["total"] == 2


# ------------------------------------------------------------------------------------------------
# Dropped patches merged into further tokens
# ------------------------------------------------------------------------------------------------

# Cell by cell of a 2 x 2 grid over the 4 x 4 patches.
CELLS = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
# The first image keeps a whole cell, whose group is empty; the others keep fewer patches.
WITH_EMPTY_GROUP = torch.tensor([[0, 1, 4, 5], [1, 2, 2, 2], [7, 8, 9, 9]])
WEIGHTS = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(3)).softmax(dim=1)
MERGED = {
    "fixed": PatchSelection(WITH_EMPTY_GROUP[:1].repeat(3, 1), candidate_weights=WEIGHTS),
    "adaptive": PatchSelection(WITH_EMPTY_GROUP, ADAPTIVE.valid, candidate_weights=WEIGHTS),
}
GROUPINGS = {"2x2": True, "candidates": False, "2x2+candidates": True}


def alone(model, image, kept, groups, *, repeats=False):
    """Encode one image whose tokens are laid out one by one, without any mask.

    Args:
        model: A masked model in float64.
        image: Shape (3, 64, 64).
        kept: Its kept patches.
        groups: For each group, {patch: weight}.
        repeats: Repeat a merged token as often as there are patches in it, which is what counts in
            the logits stand for.
    """
    tower = model.visual
    tokens = tower.add_positions(tower.embed_patches(image[None]))[0]
    layout = [{j: 1.0} for j in kept]
    for group in groups:
        members = {j: weight for j, weight in group.items() if j not in kept}
        if members:
            layout += [members] * (len(members) if repeats else 1)

    def mean(of_patches, members):
        return sum(w * of_patches[j] for j, w in members.items()) / sum(members.values())

    x = tower.add_prefix(torch.stack([mean(tokens, members) for members in layout])[None])
    turned = rope_of_patches(tower)
    for i, block in enumerate(tower.blocks()):
        if turned is None:
            x = block(x)
        else:
            rope = [mean(turned[i].movedim(-2, 0), members) for members in layout]
            x = block(x, rope=torch.stack(rope, dim=-2))
    features = tower.read_out(x, None)
    return features[0] if isinstance(features, tuple) else features


def rope_of_patches(tower):
    """Return timm's rotary embedding of 16 patches, one (..., 16, R) per block; None for none."""
    rope = getattr(getattr(tower, "trunk", None), "rope", None)
    if rope is None:
        return None
    embedding = rope.get_embed((4, 4))
    is_per_block = embedding.ndim > 2
    return list(embedding) if is_per_block else [embedding] * len(tower.blocks())


def groups_of(merge, i):
    groups = [dict.fromkeys(cell, 1.0) for cell in CELLS] if GROUPINGS[merge] else []
    if merge.endswith("candidates"):
        groups += [dict(enumerate(row)) for row in WEIGHTS[i].double().tolist()]
    return groups


@every_tower
@pytest.mark.parametrize("merge", GROUPINGS)
@pytest.mark.parametrize(
    ("selection", "pack_tokens"),
    [("fixed", None), ("adaptive", False), ("adaptive", True)],
    ids=["fixed", "padded", "packed"],
)
def test_merged_tokens_equal_a_sequence_laid_out_token_by_token(
    build, merge, selection, pack_tokens
):
    selection = MERGED[selection]
    strategy = "pgs" if "candidates" in merge else "random"
    model = apply_masking(build(), strategy, merge=merge, pack_tokens=pack_tokens).double().train()
    images = image_batch().double()
    together = encode(model, images, selection)[0]
    for i, count in enumerate(selection.kept_counts().tolist()):
        kept = selection.index[i, :count].tolist()
        expected = alone(model, images[i], kept, groups_of(merge, i))[0]
        got = together[i]
        if got.ndim == 2:
            # All tokens come out, and padding is zero.
            got = got[(got != 0).any(dim=1)]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("selection", MERGED)
@pytest.mark.parametrize(
    "build",
    [
        small_clip,
        partial(small_clip, qk_norm=True),
        partial(small_clip, output_tokens=True),
        partial(small_timm_clip, qk_norm=True),
        partial(small_timm_clip, block_fn=ParallelScalingBlock),
    ],
)
def test_counts_weigh_a_merged_token_as_often_as_it_has_patches(build, selection):
    selection = MERGED[selection]
    model = apply_masking(build(), "random", merge="2x2", merge_counts=True).double().train()
    images = image_batch().double()
    together = encode(model, images, selection)[0]
    for i, count in enumerate(selection.kept_counts().tolist()):
        kept = selection.index[i, :count].tolist()
        expected = alone(model, images[i], kept, groups_of("2x2", i), repeats=True)[0]
        torch.testing.assert_close(together[i], expected, atol=1e-6, rtol=1e-5)


@every_tower
@pytest.mark.parametrize("counts", [False, True])
def test_merging_nothing_equals_open_clip_in_train_mode(build, counts):
    plain = build().train()
    masked = apply_masking(
        copy.deepcopy(plain), "random", mask_ratio=0.0, merge="2x2", merge_counts=counts
    )
    expected = plain.visual(image_batch())
    got = masked.visual(image_batch())
    if isinstance(expected, tuple):
        torch.testing.assert_close(got[1][:, :16], expected[1], atol=1e-5, rtol=1e-5)
        assert (got[1][:, 16:] == 0).all()
        got, expected = got[0], expected[0]
    if expected.ndim == 3:
        got = got[:, : expected.shape[1]]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in list_maskings() if name != "none"])
def test_every_strategy_merges_what_it_drops_and_eval_mode_stays_plain(name):
    plain = small_clip()
    model = apply_masking(copy.deepcopy(plain), name, merge="2x2", merge_counts=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.eval().visual(image_batch()), plain.eval().visual(image_batch()))
    images = image_batch().requires_grad_()
    model.train().visual(images).square().sum().backward()
    kept = kept_patches(last_selection(model), 16)
    patches = images.grad.reshape(3, 3, 4, 16, 4, 16).abs().sum(dim=(1, 3, 5)).reshape(3, 16)
    assert torch.isfinite(images.grad).all()
    assert not kept.all()
    assert (patches[~kept] > 0).all()


def test_masked_inference_merges_as_training_does():
    features = []
    for when in ("train", "always"):
        model = apply_masking(small_clip(), "pgs", merge="2x2+candidates", when=when)
        model.train(when == "train")
        set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
        features.append(model.visual(image_batch()))
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.25}])
@pytest.mark.parametrize("counts", [False, True])
def test_merging_repeats_itself_with_checkpointing_and_a_second_pass(options, counts):
    gradients = []
    for checkpointing in (False, True):
        model = apply_masking(
            small_clip(), "pgs", merge="2x2+candidates", merge_counts=counts, **options
        ).train()
        model.set_grad_checkpointing(checkpointing)
        set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
        features = model.visual(image_batch())
        assert torch.equal(model.visual(image_batch()), features)
        features.square().sum().backward()
        gradients.append([p.grad for p in model.visual.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("build", [small_clip, partial(small_timm_clip, global_pool="map")])
@pytest.mark.parametrize("counts", [False, True])
def test_merging_trains_in_bf16_and_under_autocast(build, counts):
    options = {"merge": "2x2+candidates", "merge_counts": counts, "mask_ratio_min": 0.25}
    model = apply_masking(build(), "pgs", **options).train()
    exact = encode(model, image_batch(), MERGED["adaptive"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encode(model, image_batch(), MERGED["adaptive"])[0]
    assert (rough - exact).norm() < 0.05 * exact.norm()
    model.to(torch.bfloat16).visual(image_batch().bfloat16()).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.visual.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [False, True])
def test_a_tower_that_merges_compiles_into_one_graph(counts):
    options = {"merge": "2x2+candidates", "merge_counts": counts, "mask_ratio_min": 0.25}
    model = apply_masking(small_clip(), "pgs", pack_tokens=False, **options).train()
    set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
    with noting_host_waits() as waits:
        expected = model.visual(image_batch())
    assert not waits
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image_batch()), expected, atol=1e-6, rtol=1e-6)


def test_output_tokens_hold_the_merged_ones_after_the_kept():
    model = apply_masking(small_clip(output_tokens=True), "random", merge="2x2").train()
    _, tokens = encode(model, image_batch(), MERGED["adaptive"])
    assert tokens.shape == (3, 4 + 4, 64)
    assert (tokens[0, 4] == 0).all()
    assert (tokens[1, 2:4] == 0).all()
    assert (tokens[:, 5:] != 0).any(dim=2).all()


def test_a_selection_without_weights_cannot_be_merged_by_candidate():
    model = apply_masking(small_clip(), "pgs", merge="candidates").train()
    with pytest.raises(ValueError, match="candidate_weights"):
        encode(model, image_batch(), FIXED)


def test_merging_is_refused_where_padding_would_be_read_or_a_bias_is_set():
    with pytest.raises(ValueError, match="text decoder, which would read the padding"):
        apply_masking(small_coca(attentional_pool=False), "random", merge="2x2")
    apply_masking(small_coca(), "random", merge="2x2").train()(image_batch(), text_batch())
    with pytest.raises(ValueError, match="merge and attention_bias"):
        apply_masking(small_clip(), "pgs-released", attention_bias=True, merge="2x2")
    with pytest.raises(ValueError, match="merge must be at most as fine"):
        apply_masking(small_clip(), "random", merge="2x5")


@pytest.mark.parametrize("make", [small_clip, small_timm_clip, small_eva_clip])
@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["alike", "packed"])
@pytest.mark.parametrize("when", ["train", "always"])
def test_forward_hooks_of_blocks_see_the_kept_tokens(make, options, when):
    model = make()
    apply_masking(model, "pgs", mask_ratio=0.5, when=when, **options)
    model.train(when == "train")
    blocks, seen = blocks_of(model), []
    for block in blocks:
        block.register_forward_hook(lambda module, given, output: seen.append(output))
    model.encode_image(image_batch())
    assert len(seen) == len(blocks)
    assert all(torch.is_tensor(output) and output.isfinite().all() for output in seen)


@pytest.mark.parametrize("make", [small_clip, small_timm_clip, small_coca, small_resnet_clip])
def test_maps_of_whole_images_are_refused_where_a_mask_would_act(make):
    images = torch.randn(2, 3, 96, 96) if make is small_resnet_clip else image_batch(2)
    model = make()
    plain = model.eval().visual.forward_intermediates(images)["image_features"]
    apply_masking(model, "random")
    assert torch.equal(model.visual.forward_intermediates(images)["image_features"], plain)
    for is_training, when in ((True, "train"), (False, "always")):
        apply_masking(model, "random", when=when).train(is_training)
        for maps in (model.forward_intermediates, model.visual.forward_intermediates):
            with pytest.raises(ValueError, match=r"^forward_intermediates gives maps"):
                maps(images)
        model.encode_image(images)
        assert last_selection(model) is not None


@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["alike", "packed"])
def test_threads_may_share_a_model_whose_blocks_have_hooks(options):
    model = apply_masking(small_clip(), "pgs", when="always", pack_tokens=True, **options).eval()
    set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        expected = model.encode_image(image_batch())
        seen = []
        for block in model.visual.transformer.resblocks:
            block.register_forward_pre_hook(lambda module, given: given)
            block.register_forward_hook(
                lambda module, given, named, output: seen.append(module), with_kwargs=True
            )

    @torch.no_grad()
    def encode(_):
        return [model.encode_image(image_batch()) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        found = [features for several in pool.map(encode, range(4)) for features in several]
    assert all(torch.equal(features, expected) for features in found)
    blocks = set(model.visual.transformer.resblocks)
    assert len(seen) == 40 * len(blocks)
    assert set(seen) == blocks
    assert all("forward" not in vars(block) for block in blocks)


def test_backward_hooks_of_blocks_are_called():
    model = apply_masking(small_clip(), "pgs", mask_ratio_min=0.3, pack_tokens=True).train()
    blocks, seen = model.visual.transformer.resblocks, []
    for block in blocks:
        block.register_full_backward_hook(lambda module, given, grads: seen.append(module))
    model.encode_image(image_batch().requires_grad_()).sum().backward()
    assert seen == list(reversed(blocks))


WRAPPERS = {
    "saves memory": checkpoint_wrapper,
    "compiles": partial(torch.compile, backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("vision", [{}, {"qk_norm": True}], ids=["usual", "custom"])
@pytest.mark.parametrize(
    ("masking", "options"),
    [("pgs", {}), ("pgs", {"mask_ratio_min": 0.2}), ("pgs", {"merge": "2x2"}), ("attentive", {})],
)
def test_blocks_in_a_wrapper_compute_what_they_do_without(wrapper, vision, masking, options):
    torch._dynamo.reset()
    features = []
    for wrap in (lambda block: block, WRAPPERS[wrapper]):
        model = small_clip(**vision)
        blocks = model.visual.transformer.resblocks
        for place, block in enumerate(blocks):
            blocks[place] = wrap(block)
        apply_masking(model.train(), masking, **options)
        set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
        features.append(model.encode_image(image_batch()))
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)
    features[1].sum().backward()
