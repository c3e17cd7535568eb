import copy
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import PatchEmbed

from clip_pgs import MaskingStrategy, PatchSelection, create_masking
from clip_pgs.integrations import apply
from clip_pgs.integrations.apply import tower_masking
from clip_pgs.integrations.open_clip import (
    apply_masking,
    calibrate_masking,
    force_selection,
    last_selection,
    load_masking_state,
    masked_inference,
    masking_state,
    num_patches,
    patch_size,
    pixel_dtype,
    remove_masking,
    set_mask_ratio,
    set_masking_noise,
    set_masking_progress,
    update_masking,
)
from clip_pgs.masking.baselines import RandomMasking
from support.models import (
    TEXT,
    image_batch,
    small_clip,
    small_coca,
    small_resnet_clip,
    small_timm_clip,
    text_batch,
)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("name", ["none", "random", "pgs"])
def test_eval_mode_is_bit_identical_to_plain_open_clip(name, custom_text):
    plain = small_clip(custom_text=custom_text).eval()
    masked = apply_masking(copy.deepcopy(plain), name).eval()
    for got, expected in zip(
        masked(image_batch(), text_batch()), plain(image_batch(), text_batch()), strict=True
    ):
        assert torch.equal(got, expected)


def test_masking_none_is_bit_identical_in_train_mode_too():
    plain = small_clip().train()
    masked = apply_masking(copy.deepcopy(plain), "none")
    assert torch.equal(masked.visual(image_batch()), plain.visual(image_batch()))


def test_train_mode_drops_patches():
    model = apply_masking(small_clip(), "random", mask_ratio=0.75).train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 4)


def test_the_state_dict_keeps_its_keys_and_loads_both_ways():
    plain, masked = small_clip(seed=0), apply_masking(small_clip(seed=1), "pgs")
    assert list(masked.state_dict()) == list(plain.state_dict())
    masked.load_state_dict(plain.state_dict())
    plain.load_state_dict(masked.state_dict())
    assert not dict(masked.visual.masking.named_buffers())


def test_it_works_in_place_and_returns_the_model():
    model = small_clip()
    assert apply_masking(model, "pgs") is model
    assert isinstance(model.visual, VisionTransformer)


def test_a_strategy_object_is_taken_as_it_is():
    model = apply_masking(small_clip(), create_masking("random", mask_ratio=0.25)).train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 12)


def test_a_second_call_replaces_the_first_strategy():
    model = apply_masking(apply_masking(small_clip(), "random"), "pgs", mask_ratio=0.25).train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 12)


def test_removing_gives_the_plain_tower_back():
    plain = small_clip().train()
    model = remove_masking(apply_masking(copy.deepcopy(plain), "pgs"))
    assert type(model.visual) is VisionTransformer
    assert torch.equal(model.visual(image_batch()), plain.visual(image_batch()))
    assert remove_masking(model) is model


def test_a_copy_masks_by_itself():
    model = apply_masking(small_clip(), "random").train()
    twin = copy.deepcopy(model)
    twin.visual(image_batch())
    assert last_selection(model) is None
    assert last_selection(twin) is not None


def test_the_same_noise_repeats_the_selection():
    model = apply_masking(small_clip(), "pgs").train()
    set_masking_noise(model, torch.rand(3, 16))
    first = model.visual(image_batch())
    assert torch.equal(model.visual(image_batch()), first)
    set_masking_noise(model, None)
    others = [model.visual(image_batch()) for _ in range(4)]
    assert any(not torch.equal(other, first) for other in others)


def test_progress_reaches_the_strategy():
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.5).train()
    noise = torch.rand(64, 16, generator=torch.Generator().manual_seed(0))
    images = image_batch(64)
    set_masking_noise(model, noise)
    model.visual(images)
    before = last_selection(model).index
    set_masking_progress(model, 1.0)
    model.visual(images)
    assert not torch.equal(last_selection(model).index, before)


def test_wrapped_models_are_reached():
    model = apply_masking(small_clip(), "random").train()
    wrapped = torch.nn.Module()
    wrapped.module = model
    set_masking_progress(torch.compile(wrapped), 0.5)
    assert model.visual.masking.progress == 0.5


def test_a_tower_that_is_wrapped_alone_is_reached():
    plain = small_clip().train()
    model = apply_masking(copy.deepcopy(plain), "attentive").train()
    model.visual = torch.nn.DataParallel(model.visual)
    model(image_batch(), text_batch())
    assert last_selection(model).index.shape == (3, 8)
    assert "teacher" in masking_state(model)
    set_mask_ratio(model, 0.75)
    model(image_batch(), text_batch())
    assert last_selection(model).index.shape == (3, 4)
    remove_masking(model)
    assert torch.equal(model.encode_image(image_batch()), plain.encode_image(image_batch()))


def prepare(tower, how):
    """Put a forward pass in place of a tower's, as others do."""
    if how == "compiled":
        tower.forward = torch.compile(tower.forward, backend="eager")
    else:
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(tower, hooks.ModelHook())


@pytest.mark.parametrize("build", [small_clip, small_timm_clip, small_resnet_clip])
@pytest.mark.parametrize("how", ["accelerate", "compiled"])
def test_a_tower_whose_forward_pass_was_put_in_place_is_changed_before_it(build, how):
    said = "the image tower has a forward pass that was put in place of its own"
    model = build()
    prepare(model.visual, how)
    plain = type(model.visual)
    with pytest.raises(ValueError, match=said):
        apply_masking(model, "random")
    with pytest.raises(ValueError, match=said), masked_inference(model, "random"):
        pass
    assert type(remove_masking(model).visual) is plain


@pytest.mark.parametrize("how", ["accelerate", "compiled"])
def test_a_masked_tower_stays_masked_under_a_forward_pass_in_place_of_its_own(how):
    model = apply_masking(small_clip(), "random", mask_ratio=0.75).train()
    prepare(model.visual, how)
    for change in (remove_masking, lambda model: apply_masking(model, "pgs")):
        model(image_batch(), text_batch())
        assert last_selection(model).index.shape == (3, 4)
        with pytest.raises(ValueError, match="change its masking before accelerate"):
            change(model)
    set_mask_ratio(model, 0.5)
    model(image_batch(), text_batch())
    assert last_selection(model).index.shape == (3, 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_a_masked_model_is_exported_and_traced_in_eval_mode_and_scripted_when_plain():
    plain, images = small_clip().eval(), image_batch()
    expected = plain.visual(images)
    tower = apply_masking(copy.deepcopy(plain), "pgs").visual
    exported = torch.export.export(tower, (images,)).module()
    traced = torch.jit.trace(tower, (images,))
    scripted = torch.jit.script(remove_masking(apply_masking(plain, "pgs")).visual)
    for graph in (exported, traced, scripted):
        torch.testing.assert_close(graph(images), expected)


def test_num_patches_counts_the_grid():
    assert num_patches(small_clip()) == 16
    assert num_patches(small_clip(image_size=[64, 32])) == 8
    assert num_patches(small_timm_clip(img_size=(64, 32))) == 8


@pytest.mark.parametrize("build", [small_clip, small_timm_clip], ids=["open_clip", "timm"])
def test_patch_size_and_dtype_are_told_of_plain_and_masked_models(build):
    for model in (build(), apply_masking(build(), "random")):
        assert patch_size(model) == (16, 16)
        assert pixel_dtype(model) == torch.float32
        assert pixel_dtype(model.to(torch.bfloat16)) == torch.bfloat16


def test_pixels_behind_the_last_whole_patch_are_left_out_as_by_the_convolution():
    model = apply_masking(small_clip(image_size=70), "pgs", mask_ratio=0.5).train()
    model.visual(torch.nn.functional.pad(image_batch(), (0, 6, 0, 6), value=3.0))
    assert last_selection(model).index.shape == (3, 8)


def test_the_mask_ratio_changes_between_steps():
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.25).train()
    set_mask_ratio(model, 0.75)
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 4)
    with pytest.raises(ValueError, match="NoMasking has no mask ratio"):
        set_mask_ratio(apply_masking(small_clip(), "none"), 0.5)


def test_towers_of_another_kind_are_named():
    model = small_clip()
    model.visual = torch.nn.Identity()
    # Which integration was imported first says what comes first.
    sentence = "CLIP has the image tower Identity; masking supports .*OpenCLIP's own"
    with pytest.raises(ValueError, match=sentence):
        apply_masking(model, "pgs")
    with pytest.raises(ValueError, match="Linear has no image tower; masking supports"):
        apply_masking(torch.nn.Linear(2, 2), "pgs")


class OverlappingPatches(PatchEmbed):
    """Stands for an embedding of somebody else's."""


def timm_clip(name):
    vision = {"timm_model_name": name, "image_size": 64, "timm_proj": "linear", "timm_pool": ""}
    return open_clip.model.CustomTextCLIP(32, vision, dict(TEXT))


def timm_clip_of_another_pool():
    model = small_timm_clip()
    model.visual.trunk.attn_pool = torch.nn.Identity()
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: timm_clip("test_resnet"), "timm's ResNet, and masking would need its blocks"),
        (lambda: timm_clip("vit_relpos_small_patch16_224"), "timm's VisionTransformerRelPos"),
        (
            lambda: small_timm_clip(embed_layer=OverlappingPatches),
            "embeds patches by timm's OverlappingPatches; masking needs PatchEmbed or HybridEmbed",
        ),
        (lambda: small_timm_clip(dynamic_img_pad=True), "without dynamic_img_pad"),
        (lambda: small_timm_clip(patch_drop_rate=0.5), r"by itself \(patch_drop_rate=0.5\); build"),
        (lambda: small_timm_clip(pos_embed="none"), "the image tower has no position embedding"),
        (timm_clip_of_another_pool, "pools by timm's Identity, which cannot leave tokens out"),
    ],
    ids=[
        "resnet",
        "relative positions",
        "patch embedding",
        "padding",
        "patch drop",
        "places",
        "pool",
    ],
)
def test_a_timm_tower_that_cannot_be_masked_is_named(build, sentence):
    model = build()
    with pytest.raises(ValueError, match=sentence):
        apply_masking(model, "pgs")
    assert type(model.visual) is TimmModel


def test_a_tower_that_drops_patches_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"drops patches by itself \(patch_dropout=0.5\)"):
        apply_masking(small_clip(patch_dropout=0.5), "pgs")


@pytest.mark.parametrize(("masking", "low"), [("pgs", 0.3), ("cluster", 0.3), ("cluster", 0.5)])
def test_padding_is_refused_where_a_text_decoder_reads_patch_tokens(masking, low):
    sentence = "hands patch tokens to its text decoder, which would read the padding"
    model = small_coca(attentional_pool=False)
    with pytest.raises(ValueError, match=sentence):
        apply_masking(model, masking, mask_ratio=0.5, mask_ratio_min=low)


def test_a_fixed_count_is_taken_where_a_text_decoder_reads_patch_tokens():
    model = apply_masking(small_coca(attentional_pool=False), "pgs", mask_ratio=0.5).train()
    assert model(image_batch(), text_batch())["logits"].isfinite().all()


def test_padding_changes_nothing_that_the_text_decoder_of_coca_gets():
    model = apply_masking(small_coca(), "random").train()
    index = torch.tensor([[0, 3, 9, 9]])
    padded = PatchSelection(index, torch.tensor([[True, True, True, False]]))
    logits = []
    for selection in (padded, PatchSelection(index[:, :3])):
        with force_selection(model, selection):
            logits.append(model(image_batch(1), text_batch(1))["logits"])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_wrong_option_leaves_the_model_plain():
    model = small_clip()
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\)"):
        apply_masking(model, "pgs", mask_ratio=2.0)
    assert type(model.visual) is VisionTransformer


def test_options_beside_a_strategy_object_are_refused():
    with pytest.raises(ValueError, match="options go with a masking's name, got mask_ratio"):
        apply_masking(small_clip(), create_masking("random"), mask_ratio=0.5)


def test_progress_is_of_a_type_that_the_device_has(monkeypatch):
    monkeypatch.setattr(apply, "exact_dtype", lambda device: torch.float32)
    model = apply_masking(small_clip(), "pgs")
    set_masking_progress(model, 0.5)
    found = tower_masking(model).progress_tensor
    assert (found.dtype, found.item()) == (torch.float32, 0.5)


def test_plain_models_have_no_masking_to_set():
    for call in (
        lambda: set_masking_progress(small_clip(), 0.5),
        lambda: set_masking_noise(small_clip(), None),
        lambda: last_selection(small_clip()),
        lambda: force_selection(small_clip(), None).__enter__(),
    ):
        with pytest.raises(ValueError, match="the model is not masked; call apply_masking first"):
            call()


@pytest.mark.parametrize(
    "progress", [1.5, "x", None, float("nan"), torch.zeros(2), 10**400], ids=lambda p: str(p)[:9]
)
def test_progress_outside_its_range_is_refused(progress):
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got "):
        set_masking_progress(apply_masking(small_clip(), "pgs"), progress)


SETTERS = {
    "progress": (set_masking_progress, lambda masking: masking.progress),
    "mask_ratio": (set_mask_ratio, lambda masking: masking.strategy.mask_ratio),
}


@pytest.mark.parametrize("name", SETTERS)
@pytest.mark.parametrize(
    "number",
    [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.array(0.5)],
    ids=["tensor", "one element", "scalar", "array"],
)
def test_a_number_is_taken_out_of_a_tensor_or_array_of_one(name, number):
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.25).train()
    setter, getter = SETTERS[name]
    setter(model, number)
    assert getter(model.visual.masking) == 0.5
    assert isinstance(getter(model.visual.masking), float)
    model.visual(image_batch())


@pytest.mark.parametrize("name", SETTERS)
@pytest.mark.parametrize("number", ["0.5", b"0.5", np.array("0.5"), torch.empty(1, device="meta")])
def test_what_is_no_number_is_refused_with_what_it_is(name, number):
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.25)
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1[])], got [^0]"):
        SETTERS[name][0](model, number)
    assert SETTERS[name][1](model.visual.masking) in (0.0, 0.25)


@pytest.mark.parametrize("masking", [5, None, MaskingStrategy])
def test_what_is_neither_a_name_nor_a_strategy_is_refused(masking):
    model = small_clip()
    with pytest.raises(ValueError, match="masking must be a name or a MaskingStrategy, got"):
        apply_masking(model, masking)
    assert type(model.visual) is VisionTransformer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masking", ["none", "random"])
@pytest.mark.parametrize("make", [small_clip, small_timm_clip])
def test_a_forced_selection_acts_whatever_else_masks_until_its_block_ends(make, masking, training):
    model = apply_masking(make(), masking).train(training)
    few, one = (PatchSelection(torch.arange(count).repeat(3, 1)) for count in (4, 1))
    with torch.no_grad():
        # Of eval mode, and of "none".
        whole = apply_masking(make(), "none").train(training).encode_image(image_batch())
        with force_selection(model, few):
            kept = model.encode_image(image_batch())
            assert last_selection(model) is few
            with force_selection(model, one):
                model.encode_image(image_batch())
                assert last_selection(model) is one
            assert torch.equal(model.encode_image(image_batch()), kept)
        assert not torch.allclose(kept, whole)
        if masking == "none" or not training:
            assert torch.equal(model.encode_image(image_batch()), whole)


def test_a_forced_selection_that_is_none_is_refused():
    model = apply_masking(small_clip(), "random")
    with pytest.raises(ValueError, match="takes a PatchSelection"), force_selection(model, None):
        pass


def test_a_forced_selection_of_other_images_is_refused():
    model = apply_masking(small_clip(), "random").train()
    selection = PatchSelection(torch.arange(8).repeat(2, 1))
    with (
        force_selection(model, selection),
        pytest.raises(ValueError, match=r"force_selection .* B = 3 .* got \(2, 8\)"),
    ):
        model.encode_image(image_batch(3))


@pytest.mark.parametrize("masking", ["random", "attentive", "cluster"])
@pytest.mark.parametrize(
    "images",
    [
        image_batch()[:0],
        image_batch()[0],
        image_batch()[..., 16:, 16:],
        image_batch()[:, :1],
        torch.cat([image_batch()] * 2, dim=1),
        image_batch().numpy(),
        [1.0],
        None,
    ],
    ids=["none", "one", "small", "gray", "six channels", "numpy", "list", "None"],
)
def test_what_are_no_images_of_the_towers_size_is_refused_by_a_masked_tower(masking, images):
    model = apply_masking(small_clip(), masking).train()
    sentence = r"images must have shape \(B, 3, H, W\), with B >= 1 and 4 x 4 patches of 16 x 16 p"
    for use in (model.visual, lambda images: calibrate_masking(model, images)):
        if use is model.visual or masking == "cluster":
            with pytest.raises(ValueError, match=sentence):
                use(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64, torch.complex64])
def test_images_of_another_dtype_are_refused_by_a_masked_tower(dtype):
    model = apply_masking(small_clip(), "random").train()
    with pytest.raises(ValueError, match=f"^images must be torch.float32, .* got {dtype}"):
        model.encode_image(image_batch().to(dtype))
    if dtype != torch.float16:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match=r"^images must be torch\.float32"),
        ):
            model.encode_image(image_batch().to(dtype))


@pytest.mark.parametrize("size", ["32", 32.0, 0, None, True, (32,), (32,) * 3, torch.tensor(32)])
def test_image_sizes_that_are_none_are_refused(size):
    model = small_clip()
    if size is None:
        size = (None, 32)
    with pytest.raises(ValueError, match=r"^image_size must be a whole number .*, or two, got "):
        apply_masking(model, "pgs", image_size=size)
    assert type(model.visual) is VisionTransformer


BUILDERS = {
    "class token": small_clip,
    "average": partial(small_clip, pool_type="avg"),
    "custom block": partial(small_clip, qk_norm=True),
    "coca": small_coca,
    "timm": small_timm_clip,
    "siglip": partial(small_timm_clip, global_pool="map", class_token=False),
}
every_tower = pytest.mark.parametrize("build", list(BUILDERS.values()), ids=list(BUILDERS))


@every_tower
@pytest.mark.parametrize("valid", [None, torch.ones(3, 16, dtype=torch.bool)], ids=["", "valid"])
def test_masks_at_inference_that_mask_nothing_change_almost_nothing(build, valid):
    plain = build().eval()
    model = apply_masking(copy.deepcopy(plain), "random", when="always")
    everything = PatchSelection(torch.arange(16).repeat(3, 1), valid)
    with torch.no_grad(), force_selection(model, everything):
        got, expected = model.encode_image(image_batch()), plain.encode_image(image_batch())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@every_tower
@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["fixed", "adaptive"])
def test_inference_sees_what_training_sees(build, options):
    model = apply_masking(build(), "pgs", when="always", mask_ratio=0.5, **options)
    features = []
    for mode in (True, False):
        torch.manual_seed(0)
        with torch.no_grad():
            features.append(model.train(mode).encode_image(image_batch()))
    assert last_selection(model).kept_counts().min() < 16
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


def test_the_strategy_none_is_bit_identical_at_inference():
    plain = small_clip().eval()
    model = apply_masking(copy.deepcopy(plain), "none", when="always")
    assert torch.equal(model.visual(image_batch()), plain.visual(image_batch()))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="when must be one of train, always, got 'never'"):
        apply_masking(small_clip(), "pgs", when="never")


class Holder(RandomMasking):
    """Holds a tensor, in one of the ways of a module."""

    def __init__(self, hold):
        super().__init__(mask_ratio=0.5)
        hold(self, torch.linspace(0, 1, 16))


def in_a_parameter(module, prior):
    module.prior = torch.nn.Parameter(prior)


def in_a_buffer(module, prior):
    module.register_buffer("prior", prior)


def in_a_part(module, prior):
    module.part = torch.nn.Module()
    module.part.register_buffer("prior", prior)


@pytest.mark.parametrize("hold", [in_a_parameter, in_a_buffer, in_a_part])
def test_a_strategy_that_adds_keys_to_the_state_dict_is_refused(hold):
    model = small_clip()
    with pytest.raises(ValueError, match=r"Holder would put .*prior into the model's state dict"):
        apply_masking(model, Holder(hold))
    assert type(model.visual) is VisionTransformer


def test_a_strategy_keeps_a_tensor_beside_the_state_dict():
    def hold(module, prior):
        module.register_buffer("prior", prior, persistent=False)

    model = apply_masking(small_clip(), Holder(hold)).double()
    assert model.visual.masking.strategy.prior.dtype == torch.float64
    assert [*model.state_dict()] == [*small_clip().state_dict()]


class KeepBright(MaskingStrategy):
    """Keeps half the patches; learns the mean of pixels, tokens and noise of one batch."""

    def __init__(self):
        super().__init__()
        self.found = [0.0, 0.0, 0.0]

    def forward(self, inputs, *, generator=None):
        index = torch.arange(inputs.num_patches // 2, device=inputs.device)
        return PatchSelection(index.repeat(inputs.batch_size, 1))

    def state(self):
        return {"found": list(self.found)}

    def load_state(self, state):
        super().load_state(state)
        self.found = list(state["found"])

    def needs_calibration(self, progress):
        return progress < 0.5

    def calibrate(self, inputs, *, average=None):
        seen = [inputs.pixels, inputs.tokens, inputs.noise]
        self.found = [(average or float)(float(part.mean())) for part in seen]


@pytest.mark.parametrize("build", [small_clip, small_timm_clip], ids=["open_clip", "timm"])
def test_calibration_sees_what_a_forward_pass_sees(build):
    model = apply_masking(build(), KeepBright()).train()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    set_masking_noise(model, noise)
    images = image_batch()
    assert calibrate_masking(model, images)
    weights = dict(model.visual.named_parameters())
    kernel = weights.get("conv1.weight", weights.get("trunk.patch_embed.proj.weight"))
    bias = weights.get("trunk.patch_embed.proj.bias")
    tokens = torch.nn.functional.conv2d(images, kernel, bias, stride=16)
    expected = [part.mean().item() for part in (images, tokens, noise)]
    assert model.visual.masking.strategy.found == pytest.approx(expected)


def test_calibration_averages_over_processes():
    model = apply_masking(small_clip(), KeepBright()).train()
    set_masking_noise(model, torch.rand(3, 16))
    assert calibrate_masking(model, image_batch(), average=lambda number: 7.0)
    assert model.visual.masking.strategy.found == [7.0, 7.0, 7.0]


def test_a_strategy_that_does_not_ask_is_not_calibrated():
    model = apply_masking(small_clip(), KeepBright())
    set_masking_progress(model, 0.75)
    assert not calibrate_masking(model, image_batch())
    assert not calibrate_masking(apply_masking(small_clip(), "random"), image_batch())


def test_calibration_tells_whether_anything_was_fitted():
    model = apply_masking(small_clip(), "cluster").train()
    before = masking_state(model)
    assert not calibrate_masking(model, torch.full_like(image_batch(), torch.nan))
    assert masking_state(model) == before
    assert calibrate_masking(model, image_batch())
    assert masking_state(model) != before


def test_what_a_strategy_found_is_saved_and_restored(tmp_path):
    source, target = (apply_masking(small_clip(), KeepBright()) for _ in range(2))
    source.visual.masking.strategy.found = [1.0, 2.0, 3.0]
    torch.save(masking_state(source), tmp_path / "state.pt")
    load_masking_state(target, torch.load(tmp_path / "state.pt", weights_only=True))
    assert masking_state(target) == {"strategy": {"found": [1.0, 2.0, 3.0]}}


def test_a_model_that_is_not_masked_has_no_state():
    assert masking_state(small_clip()) == {}
    load_masking_state(small_clip(), {})
    with pytest.raises(ValueError, match="the model is not masked"):
        update_masking(small_clip(), step=0, total_steps=1)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"teacher": {}}, "the state holds a teacher, and RandomMasking has none"),
        ({"strategy": {"threshold": 0.5}}, "the state of RandomMasking must hold"),
        ({"student": {}}, "a masking's state has no part student"),
        ({"strategy": 0.5}, "a masking's state must map each part to a mapping, got {'strat"),
        ({"teacher": None}, "must map each part to a mapping"),
        ([], r"must map each part to a mapping, got \[\]"),
        (None, "must map each part to a mapping, got None"),
    ],
)
def test_the_state_of_another_masking_is_refused(state, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_masking_state(apply_masking(small_clip(), "random"), state)


def test_the_teacher_of_another_tower_is_refused():
    state = masking_state(apply_masking(small_clip(layers=1), "attentive"))
    with pytest.raises(ValueError, match="the teacher's weights do not fit the image tower"):
        load_masking_state(apply_masking(small_clip(), "attentive"), state)
