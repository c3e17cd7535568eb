"""`fully_shard` over an image tower: what masking promises holds of a sharded one, too."""

import pytest
import torch
from torch import distributed

import clip_pgs.integrations.transformers  # noqa: F401 (its models)
from clip_pgs.integrations.open_clip import (
    apply_masking,
    last_selection,
    load_masking_state,
    masked_inference,
    masking_state,
    remove_masking,
    set_mask_ratio,
    set_masking_noise,
    set_masking_progress,
)
from support.hf_models import hf_images, hf_model
from support.models import image_batch, small_clip, small_eva_clip, small_timm_clip

fsdp = pytest.importorskip("torch.distributed.fsdp")

MODELS = {
    "open_clip": small_clip,
    "timm": small_timm_clip,
    "eva": small_eva_clip,
    "transformers": lambda: hf_model("CLIPModel").vision_model,
}
every_model = pytest.mark.parametrize("name", MODELS)
CHANGES = {
    "apply": lambda model: apply_masking(model, "random"),
    "remove": remove_masking,
    "inside": lambda model: masked_inference(model, "random").__enter__(),
}


@pytest.fixture(scope="module")
def mesh():
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(model, mesh):
    """Shard the image tower, which may be the whole model."""
    fsdp.fully_shard(getattr(model, "visual", model), mesh=mesh)
    return model


def encode(name, model):
    if name == "transformers":
        return model(**hf_images(model)).pooler_output
    return model.encode_image(image_batch())


@every_model
@pytest.mark.parametrize("masking", ["pgs", "attentive"])
def test_a_masked_tower_is_driven_and_read_as_before_it_was_sharded(name, masking, mesh):
    whole, parts = (apply_masking(MODELS[name]().train(), masking) for _ in range(2))
    sharded(parts, mesh)
    features = []
    for model in (whole, parts):
        set_masking_progress(model, 0.5)
        set_mask_ratio(model, 0.25)
        set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
        features.append(encode(name, model))
    assert last_selection(parts).index.shape == (3, 12)
    assert torch.equal(last_selection(parts).index, last_selection(whole).index)
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


def test_what_training_found_is_in_the_state_of_a_sharded_tower(mesh):
    model = sharded(apply_masking(MODELS["transformers"]().train(), "attentive"), mesh)
    state = masking_state(model)
    assert state["teacher"]
    load_masking_state(model, state)


@every_model
@pytest.mark.parametrize("change", CHANGES)
def test_the_masking_of_a_sharded_tower_cannot_be_changed(name, change, mesh):
    model = sharded(apply_masking(MODELS[name](), "pgs"), mesh)
    with pytest.raises(ValueError, match=r"the image tower is a FSDP.*before fully_shard"):
        CHANGES[change](model)


@every_model
def test_a_sharded_tower_is_not_masked_and_stays_plain(name, mesh):
    model = sharded(MODELS[name](), mesh)
    with pytest.raises(ValueError, match=r"the image tower is a FSDP.*before fully_shard"):
        apply_masking(model, "pgs")
    assert remove_masking(model) is model
    assert masking_state(model) == {}
