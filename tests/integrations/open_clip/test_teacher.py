import copy
import math
import warnings
from functools import partial

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs.integrations.open_clip import (
    apply_masking,
    last_selection,
    load_masking_state,
    masked_inference,
    masking_state,
    set_masking_noise,
    update_masking,
)
from clip_pgs.integrations.teacher import teacher_momentum
from support import ddp_teacher
from support.models import image_batch, small_clip, small_coca, small_eva_clip, small_timm_clip
from support.ranks import output, run_together

DINOV3 = partial(
    small_eva_clip,
    use_rot_pos_emb=True,
    rope_type="dinov3",
    rope_rotate_half=True,
    use_abs_pos_emb=False,
    num_reg_tokens=2,
)


def scores(model, images):
    return model.visual.masking.teacher.scores(images)


def attentive(model, **options):
    return apply_masking(model, "attentive", **{"resolution": 1.0, **options}).train()


def test_the_teacher_is_no_part_of_the_model():
    plain, model = small_clip(), attentive(small_clip())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert len(list(model.modules())) == len(list(plain.modules())) + 2
    teacher = model.visual.masking.teacher.tower
    assert not teacher.training
    assert not any(weight.requires_grad for weight in teacher.parameters())


@pytest.mark.parametrize("make", [small_clip, small_timm_clip])
@pytest.mark.parametrize("part", ["block", "attention"])
def test_hooks_on_the_tower_see_nothing_of_the_teacher(make, part):
    model, seen = make(), []
    visual = model.visual
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    for block in blocks:
        module = block if part == "block" else block.attn
        module.register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
    attentive(model).encode_image(image_batch())
    assert seen == [(3, 9, 64)] * len(blocks)


def test_momentum_rises_to_one_along_a_cosine():
    got = [teacher_momentum(0.996, step=step, total_steps=4) for step in (0, 1, 2, 4, 9)]
    expected = [1 - 0.004 * (math.cos(math.pi * share) + 1) / 2 for share in (0, 0.25, 0.5, 1, 1)]
    assert got == pytest.approx(expected, abs=1e-12)
    assert got[0] == pytest.approx(0.996)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ({"step": -1, "total_steps": 2}, "step"),
        ({"step": math.nan, "total_steps": 2}, "step"),
        ({"step": None, "total_steps": 2}, "step"),
        ({"step": "0", "total_steps": 2}, "step"),
        ({"step": 0, "total_steps": 0}, "total_steps"),
        ({"step": 0, "total_steps": math.nan}, "total_steps"),
    ],
)
def test_a_step_that_is_none_is_refused(numbers, name):
    with pytest.raises(ValueError, match=rf"^{name} must be in \[[01], inf\], got"):
        update_masking(attentive(small_clip()), **numbers)


def take_step(model, step, *, total_steps=6):
    """Move all weights by something like an optimiser's step, and the teacher after them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    update_masking(model, step=step, total_steps=total_steps)


def test_the_teacher_is_the_moving_average_of_the_weights():
    model = attentive(small_clip(), momentum=0.5)
    mine = {name: weight.double() for name, weight in model.visual.state_dict().items()}
    for step in range(4):
        take_step(model, step)
        keep = 1 - 0.5 * (math.cos(math.pi * step / 6) + 1) / 2
        for name, weight in model.visual.state_dict().items():
            mine[name] = keep * mine[name] + (1 - keep) * weight.double()
    for name, weight in model.visual.masking.teacher.tower.state_dict().items():
        torch.testing.assert_close(weight.double(), mine[name], atol=1e-6, rtol=1e-6)


def test_steps_may_be_counted_by_tensors():
    got = teacher_momentum(0.5, step=torch.tensor(1), total_steps=torch.tensor([6]))
    assert got == teacher_momentum(0.5, step=1, total_steps=6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_dtype_warns(dtype):
    model = attentive(small_clip()).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.visual(image_batch().to(dtype))
    assert last_selection(model).index.shape == (3, 8)


def test_a_selection_changes_between_steps_and_never_within_one():
    model = attentive(small_clip(), momentum=0.0)
    model.visual(image_batch())
    first = last_selection(model).index
    model.visual(image_batch())
    assert torch.equal(last_selection(model).index, first)
    take_step(model, 0)
    model.visual(image_batch())
    assert not torch.equal(last_selection(model).index, first)


def test_maskings_without_a_teacher_are_left_alone():
    model = apply_masking(small_clip(), "random")
    update_masking(model, step=0, total_steps=2)
    assert masking_state(model) == {}


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    straight = attentive(small_clip(), momentum=0.5)
    for step in range(2):
        take_step(straight, step)
    torch.save([straight.state_dict(), masking_state(straight)], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = attentive(small_clip(seed=5), momentum=0.5)
    resumed.load_state_dict(weights)
    load_masking_state(resumed, state)
    for step in range(2, 4):
        take_step(straight, step)
        take_step(resumed, step)
    for one, other in zip(
        masking_state(straight)["teacher"].values(),
        masking_state(resumed)["teacher"].values(),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert torch.equal(scores(straight, image_batch()), scores(resumed, image_batch()))


def test_loaded_weights_are_where_the_teacher_starts():
    source, model = small_clip(seed=3), attentive(small_clip(seed=4))
    model.load_state_dict(source.state_dict())
    expected = scores(attentive(copy.deepcopy(source)), image_batch())
    assert torch.equal(scores(model, image_batch()), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, "text"])
def test_a_state_with_other_weights_is_refused_and_changes_nothing(value):
    model = attentive(small_clip())
    before, state = scores(model, image_batch()), masking_state(model)
    name = next(iter(state["teacher"]))
    state["teacher"][name] = value if value == "text" else state["teacher"][name] * value
    with pytest.raises(ValueError, match=f"^the teacher's weights .*{name}"):
        load_masking_state(model, state)
    assert torch.equal(scores(model, image_batch()), before)


@pytest.mark.parametrize("inside", ["random", "attentive"])
def test_what_a_model_is_given_inside_masked_inference_reaches_its_teacher(inside):
    source, model = small_clip(seed=3), attentive(small_clip(seed=4))
    with masked_inference(model, inside):
        model.load_state_dict(source.state_dict())
    expected = scores(attentive(copy.deepcopy(source)), image_batch())
    assert torch.equal(scores(model, image_batch()), expected)
    with masked_inference(model, inside):
        model.to("meta")
    weights = model.visual.masking.teacher.tower.parameters()
    assert {weight.device.type for weight in weights} == {"meta"}


def test_a_copy_has_a_teacher_of_its_own():
    model = attentive(small_clip(), momentum=0.0)
    twin = copy.deepcopy(model)
    before = scores(model, image_batch())
    take_step(twin, 0)
    twin.load_state_dict(small_clip(seed=7).state_dict())
    assert torch.equal(scores(model, image_batch()), before)
    assert not torch.equal(scores(twin, image_batch()), before)


def test_a_second_masking_leaves_nothing_of_the_teacher():
    model = apply_masking(attentive(small_clip()), "random").train()
    model.load_state_dict(small_clip(seed=1).state_dict())
    assert masking_state(model) == {}


def test_the_teacher_moves_with_the_model_and_stays_float32():
    model = attentive(small_clip()).to(torch.bfloat16).to("meta")
    weights = list(model.visual.masking.teacher.tower.parameters())
    assert {weight.device.type for weight in weights} == {"meta"}
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_a_pure_bf16_model_trains_a_step_and_its_teacher_follows():
    model = attentive(small_clip(), momentum=0.9).to(torch.bfloat16).train()
    exact = scores(model, image_batch())
    rough = scores(model, image_batch().bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=5e-3, rtol=5e-2)
    model.visual(image_batch().bfloat16()).float().sum().backward()
    take_step(model, 0)
    assert all(torch.isfinite(weight).all() for weight in masking_state(model)["teacher"].values())


def test_gradient_checkpointing_changes_no_gradient_and_no_selection():
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = attentive(small_clip())
        model.set_grad_checkpointing(checkpointing)
        model.visual(image_batch()).square().sum().backward()
        gradients.append([weight.grad for weight in model.visual.parameters()])
        kept.append(last_selection(model).index)
    assert torch.equal(*kept)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_clip, small_timm_clip], ids=["open_clip", "timm"])
def test_the_tower_and_its_teacher_compile_into_one_graph(build):
    model = attentive(build(), resolution=0.5)
    set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
    expected = model.visual(image_batch())
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image_batch()), expected, atol=1e-6, rtol=1e-6)


def test_the_teachers_cost_is_counted_with_the_models():
    def count(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(image_batch())
        return counter.get_total_flops()

    shape = {"layers": 12}
    masked = count(apply_masking(small_clip(**shape), "random", mask_ratio=0.5).train().visual)
    whole = count(small_clip(**shape).train().visual)
    full = count(attentive(small_clip(**shape), mask_ratio=0.5).visual)
    half = count(attentive(small_clip(**shape), mask_ratio=0.5, resolution=0.5).visual)
    assert 0.9 * whole < full - masked < 1.1 * whole
    assert 0.15 * whole < half - masked < 0.35 * whole


@pytest.mark.slow
def test_two_processes_have_the_same_teacher(tmp_path):
    assert run_together(ddp_teacher.main, tmp_path) == [0, 0], output(tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    start = masking_state(attentive(small_clip()))["teacher"]
    for name, weight in first["teacher"].items():
        assert torch.equal(weight, second["teacher"][name])
    assert any(not torch.equal(weight, start[name]) for name, weight in first["teacher"].items())
    assert not torch.equal(first["loss"], second["loss"])


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
        partial(small_eva_clip, use_rot_pos_emb=True, qkv_fused=False),
        partial(small_eva_clip, use_rot_pos_emb=True, rope_type="mixed", num_reg_tokens=2),
        DINOV3,
    ],
    ids=["custom block", "timm", "timm with registers", "eva", "mixed rope", "dinov3"],
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


def test_half_resolution_turns_by_the_middles_of_larger_patches():
    images = image_batch()
    model, small = attentive(DINOV3(), resolution=0.5), DINOV3(img_size=32)
    halved = functional.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    with torch.no_grad(), RecordAttention() as recorded:
        small.visual(halved)
    coarse = torch.stack(recorded.rows).mean(dim=0)[:, 0, -4:].reshape(3, 1, 2, 2)
    expected = functional.interpolate(coarse, size=(4, 4), mode="bilinear").flatten(1)
    torch.testing.assert_close(scores(model, images), expected, atol=1e-6, rtol=1e-5)


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


def test_loading_a_text_tower_alone_leaves_the_teacher_as_it_is():
    model = attentive(small_clip())
    take_step(model, 0)
    teacher = model.visual.masking.teacher
    before = teacher.state()
    text = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    model.load_state_dict(text, strict=False)
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state().items())
    one = {"visual.conv1.weight": model.state_dict()["visual.conv1.weight"]}
    model.load_state_dict(one, strict=False)
    tower = model.visual.state_dict()
    assert all(torch.equal(tower[name], weight) for name, weight in teacher.state().items())
    assert not all(torch.equal(before[name], tower[name]) for name in tower)
