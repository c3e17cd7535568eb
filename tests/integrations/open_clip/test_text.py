import copy

import pytest
import torch
from torch.nn import functional

from clip_pgs.integrations.open_clip import allow_short_text, is_text_trimming_lossless
from support.models import image_batch, small_clip, small_coca

END_OF_TEXT = 99
CAUSAL = {"context_length": 77, "layers": 2}
BIDIRECTIONAL = {**CAUSAL, "no_causal_mask": True, "pool_type": "last"}


def captions(batch_size=4, *, seed=0):
    """Return token ids (B, 24), each caption ending with the highest id, zeros behind it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, END_OF_TEXT, (batch_size, 24), generator=generator)
    for row, length in enumerate((24, 5, 11, 2)):
        tokens[row, length - 1] = END_OF_TEXT
        tokens[row, length:] = 0
    return tokens


both_models = pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])


@both_models
@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_short_captions_give_the_features_of_padded_ones(custom_text, pool_type, training):
    text = {**CAUSAL, "pool_type": pool_type, "eos_id": END_OF_TEXT}
    plain = small_clip(custom_text=custom_text, text=text).train(training)
    model = allow_short_text(copy.deepcopy(plain))
    assert is_text_trimming_lossless(model)
    padded = functional.pad(captions(), (0, 53))
    expected = plain.encode_text(padded, normalize=True)
    got = model.encode_text(captions(), normalize=True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@both_models
@pytest.mark.parametrize("text", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_full_captions_give_the_same_bits_as_before(custom_text, text):
    plain = small_clip(custom_text=custom_text, text=text)
    model = allow_short_text(copy.deepcopy(plain))
    padded = functional.pad(captions(), (0, 53))
    for mode in (True, False):
        got, expected = model.train(mode), plain.train(mode)
        assert torch.equal(got.encode_text(padded), expected.encode_text(padded))
        for one, other in zip(
            got(image_batch(4), padded), expected(image_batch(4), padded), strict=True
        ):
            assert torch.equal(one, other)


@both_models
def test_the_state_dict_keeps_its_keys_and_a_second_call_changes_nothing(custom_text):
    plain = small_clip(custom_text=custom_text, text=CAUSAL)
    model = allow_short_text(allow_short_text(copy.deepcopy(plain)))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model, type(plain))
    model.encode_text(captions())


@both_models
def test_gradients_reach_the_positions_in_use_alone(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=CAUSAL)).train()
    model.encode_text(captions()).square().sum().backward()
    text = model.text if custom_text else model
    used = text.positional_embedding.grad.abs().sum(dim=1) > 0
    assert used[:24].all()
    assert not used[24:].any()


@both_models
def test_gradient_checkpointing_takes_short_captions(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=CAUSAL)).train()
    expected = model.encode_text(captions())
    model.set_grad_checkpointing(True)
    got = model.encode_text(captions())
    assert torch.equal(got, expected)
    got.sum().backward()


@both_models
def test_a_bidirectional_tower_takes_short_captions_but_not_without_a_change(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=BIDIRECTIONAL)).eval()
    assert model.encode_text(captions()).shape == (4, 64)
    assert not is_text_trimming_lossless(model)


def test_coca_takes_short_captions_as_openclip_gives_them():
    plain = small_coca().eval()
    model = allow_short_text(copy.deepcopy(plain))
    short = captions()[:, :9]
    got, expected = model(image_batch(4), short), plain(image_batch(4), short)
    assert torch.equal(got["logits"], expected["logits"])
    assert torch.equal(got["text_features"], expected["text_features"])
    # Its class token stands behind the caption, at a position that moves with the length.
    assert not is_text_trimming_lossless(model)


def test_wrapped_models_are_reached():
    model = small_clip(text=CAUSAL)
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert allow_short_text(wrapped) is wrapped
    assert is_text_trimming_lossless(wrapped)
    model.encode_text(captions())


def test_a_text_tower_of_another_kind_is_left_as_it_is():
    model = torch.nn.Module()
    model.text = torch.nn.Linear(2, 2)
    assert allow_short_text(model) is model
    assert type(model.text) is torch.nn.Linear
    assert not is_text_trimming_lossless(model)
