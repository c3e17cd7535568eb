import pytest
import torch

from clip_pgs import MaskingStrategy, PatchSelection
from clip_pgs.integrations.open_clip import (
    apply_masking,
    calibrate_masking,
    load_masking_state,
    masking_state,
    set_masking_noise,
    set_masking_progress,
    update_masking,
)
from support.models import image_batch, small_clip, small_timm_clip


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
    ],
)
def test_the_state_of_another_masking_is_refused(state, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_masking_state(apply_masking(small_clip(), "random"), state)


def test_the_teacher_of_another_tower_is_refused():
    state = masking_state(apply_masking(small_clip(layers=1), "attentive"))
    with pytest.raises(ValueError, match="the teacher's weights do not fit the image tower"):
        load_masking_state(apply_masking(small_clip(), "attentive"), state)
