"""What a ViT-MAE of Hugging Face is shown."""

import copy

import pytest
import torch
import transformers

from clip_pgs import (
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    create_masking,
    list_maskings,
)
from clip_pgs.integrations.mae import feed_mae_noise, mae_noise
from clip_pgs.masking.sampling import kept_patches
from support.models import image_batch


def small_mae(mask_ratio=0.75, **sizes):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        **{"image_size": 64, "patch_size": 16, **sizes},
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        decoder_hidden_size=32,
        decoder_intermediate_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        mask_ratio=mask_ratio,
    )
    return transformers.ViTMAEForPreTraining(config).train()


class KeepBright(MaskingStrategy):
    """Keeps the brightest patches; remembers whether it was given tokens."""

    requires = frozenset({"tokens"})

    def __init__(self, num_keep):
        super().__init__()
        self.num_keep = num_keep
        self.tokens = None

    def forward(self, inputs, *, generator=None):
        self.tokens = inputs.tokens
        return PatchSelection(brightest(inputs.pixels, self.num_keep))


def brightest(images, num_keep):
    """Return the indices of the brightest of 16 patches, ascending."""
    means = images.unflatten(2, (4, 16)).unflatten(4, (4, 16)).mean(dim=(1, 3, 5)).flatten(1)
    return means.topk(num_keep, dim=1).indices.sort(dim=1).values


def shown(model, images):
    """Return which patches the model was shown, (B, 16)."""
    return model(images).mask == 0


@pytest.mark.parametrize("is_copied", [False, True], ids=["same", "copied"])
def test_a_second_call_replaces_the_first_strategy(is_copied):
    model, images = small_mae(), image_batch()
    first = feed_mae_noise(model, "random")
    model = copy.deepcopy(model) if is_copied else model
    second = feed_mae_noise(model, KeepBright(4))
    bright = torch.zeros(3, 16, dtype=torch.bool).scatter(1, brightest(images, 4), True)
    assert torch.equal(shown(model, images), bright)
    first.remove()
    assert torch.equal(shown(model, images), bright)
    second.remove()
    assert any(not torch.equal(shown(model, images), bright) for _ in range(4))


@pytest.mark.parametrize(("sign", "num_keep"), [("keep", 4), ("hide", 12)])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_model_is_shown_what_the_strategy_says(sign, num_keep, mode):
    model, images = small_mae().train(mode), image_batch()
    feed = feed_mae_noise(model, KeepBright(num_keep), sign=sign)
    bright = torch.zeros(3, 16, dtype=torch.bool)
    bright.scatter_(1, brightest(images, num_keep), True)
    expected = bright if sign == "keep" else ~bright
    assert torch.equal(shown(model, images), expected)
    feed.remove()
    assert any(not torch.equal(shown(model, images), expected) for _ in range(4))


@pytest.mark.parametrize("sign", ["keep", "hide"])
@pytest.mark.parametrize("name", ["random", "pgs", "grid"])
def test_given_noise_the_shown_patches_are_those_of_the_strategy(name, sign):
    strategy = create_masking(name, mask_ratio=0.75 if sign == "keep" else 0.25)
    images, noise = image_batch(), torch.rand(3, 16)
    selection = strategy(PatchInputs(images, 16, noise=noise))
    numbers = mae_noise(strategy, images, sign=sign, noise=noise)
    assert ((numbers >= 0) & (numbers < 1)).all()
    kept = kept_patches(selection, 16)
    assert torch.equal(
        small_mae()(images, noise=numbers).mask == 0, kept if sign == "keep" else ~kept
    )


@pytest.mark.parametrize("mask_ratio", [0.75, 0.6])
@pytest.mark.parametrize("sign", ["keep", "hide"])
def test_a_name_alone_takes_the_models_own_count(mask_ratio, sign):
    model = small_mae(mask_ratio, image_size=112)
    feed = feed_mae_noise(model, "pgs", sign=sign)
    inputs = PatchInputs(torch.randn(2, 3, 112, 112), 16)
    num_shown = int(49 * (1 - mask_ratio))
    num_kept = feed.strategy(inputs).index.shape[1]
    assert num_kept == (num_shown if sign == "keep" else 49 - num_shown)


@pytest.mark.parametrize("name", sorted(set(list_maskings()) - {"attentive"}))
def test_a_name_alone_is_enough_at_every_ratio(name):
    for mask_ratio in (0.75, 0.25):
        for sign in ("keep", "hide"):
            model = small_mae(mask_ratio)
            feed_mae_noise(model, name, sign=sign)
            assert model(image_batch()).mask.sum(dim=1).tolist() == [16 * mask_ratio] * 3


@pytest.mark.parametrize("num_keep", [2, 9])
def test_another_count_is_filled_up_or_thinned_out_at_random(num_keep):
    model, images = small_mae(), image_batch(1)
    feed_mae_noise(model, KeepBright(num_keep))
    bright = brightest(images, num_keep)[0]
    seen = [shown(model, images)[0] for _ in range(20)]
    assert all(each[bright].sum() == min(num_keep, 4) for each in seen)
    assert all(each.sum() == 4 for each in seen)
    assert len({tuple(each.tolist()) for each in seen}) > 1


def test_a_callers_own_noise_goes_first_and_weights_stay_alone():
    model, images = small_mae(), image_batch()
    before, noise = list(model.state_dict()), torch.rand(3, 16)
    expected = model(images, noise=noise).mask
    feed_mae_noise(model, "pgs")
    assert torch.equal(model(images, noise=noise).mask, expected)
    assert list(model.state_dict()) == before


def test_tokens_are_given_once_there_is_progress():
    model, images = small_mae(), image_batch()
    feed = feed_mae_noise(model, KeepBright(4))
    model(images).loss.backward()
    assert feed.strategy.tokens is None
    feed.progress = 0.5
    model(images)
    expected = model.vit.embeddings.patch_embeddings(images)
    torch.testing.assert_close(feed.strategy.tokens, expected)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: feed_mae_noise(torch.nn.Linear(2, 2), "pgs"), "Linear is no ViT-MAE"),
        (lambda: feed_mae_noise(small_mae(), None), "masking must be a name or a"),
        (lambda: feed_mae_noise(small_mae(), "attentive"), "reads a teacher's attention"),
        (lambda: feed_mae_noise(small_mae(mask_ratio=0.97), "pgs"), "shows none of its 16 patches"),
        (lambda: feed_mae_noise(small_mae(mask_ratio=0.0), "pgs", sign="hide"), "hides none of"),
        (lambda: feed_mae_noise(small_mae(), "pgs", sign="show"), "sign must be one of keep, hide"),
        (lambda: mae_noise(KeepBright(4), image_batch(), sign="no"), "sign must be one of"),
        (
            lambda: feed_mae_noise(small_mae(), KeepBright(4), mask_ratio=0.5),
            "options go with a masking's name, got mask_ratio",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
