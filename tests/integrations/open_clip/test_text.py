import copy

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional

from clip_pgs.integrations.open_clip import (
    CaptionGroups,
    CaptionTrimmer,
    allow_short_text,
    caption_trimmer,
    is_text_trimming_lossless,
)
from support.models import image_batch, small_clip, small_coca

END_OF_TEXT = 99
CAUSAL = {"context_length": 77, "layers": 2, "eos_id": END_OF_TEXT}
both_models = pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
LONG_TAIL = [4, 5, 5, 6, 6, 7, 8, 8, 9, 11, 12, 14, 15, 16, 40, 77]


def captions(lengths, *, seed=0):
    """Return token ids (B, 77) of captions with these lengths, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, END_OF_TEXT, (len(lengths), 77), generator=generator)
    order = torch.randperm(len(lengths), generator=generator)
    for row, length in zip(order.tolist(), lengths, strict=True):
        tokens[row, length - 1] = END_OF_TEXT
        tokens[row, length:] = 0
    return tokens


def loss_of(model, images, texts):
    image_features, text_features, logit_scale = model(images, texts)[:3]
    return ClipLoss()(image_features, text_features, logit_scale)


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


every_trimming = pytest.mark.parametrize(
    ("lengths", "shares"),
    [([3, 9, 24, 17], (1.0,)), (LONG_TAIL, (1.0,)), (LONG_TAIL, (0.5, 0.375, 0.125))],
    ids=["one length", "long tail uncut", "groups"],
)


@both_models
@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
@every_trimming
def test_features_loss_and_gradients_are_those_of_padded_captions(
    custom_text, pool_type, lengths, shares
):
    # In float64, so that only another result, and no rounding, could make a difference.
    plain = small_clip(custom_text=custom_text, text={**CAUSAL, "pool_type": pool_type}).double()
    model = allow_short_text(copy.deepcopy(plain))
    images, padded = image_batch(len(lengths)).double(), captions(lengths)
    trimmed = caption_trimmer(model, shares=shares)(padded)
    assert isinstance(trimmed, CaptionGroups) == (len(shares) > 1)

    features, expected_features = model.encode_text(trimmed), plain.encode_text(padded)
    torch.testing.assert_close(features, expected_features, atol=1e-12, rtol=0)
    loss, expected_loss = loss_of(model, images, trimmed), loss_of(plain, images, padded)
    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=0)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(gradients_of(model), gradients_of(plain), atol=1e-12, rtol=0)


@both_models
@every_trimming
def test_float32_features_differ_by_rounding_alone(custom_text, lengths, shares):
    model = allow_short_text(small_clip(custom_text=custom_text, text=CAUSAL))
    padded = captions(lengths)
    trimmed = caption_trimmer(model, shares=shares)(padded)
    torch.testing.assert_close(
        model.encode_text(trimmed, normalize=True),
        model.encode_text(padded, normalize=True),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("longest", "width"), [(2, 8), (8, 8), (9, 16), (33, 40), (64, 64), (65, 77), (77, 77)]
)
def test_a_batch_is_cut_to_the_next_of_a_few_lengths(longest, width):
    padded = captions([2, longest])
    trimmed = CaptionTrimmer("argmax")(padded)
    assert torch.equal(trimmed, padded[:, :width])


def test_a_short_context_is_a_length_of_its_own():
    texts = captions([3, 12])[:, :12]
    assert torch.equal(CaptionTrimmer("argmax")(texts), texts)


def test_groups_hold_every_caption_once_at_its_place():
    padded = captions(LONG_TAIL)
    groups = CaptionTrimmer("argmax")(padded)
    assert [tuple(group.shape) for group in groups.tokens] == [(8, 8), (6, 16), (2, 77)]
    rows = [row for group in groups.tokens for row in group]
    for caption, place in zip(padded, groups.order.tolist(), strict=True):
        assert torch.equal(rows[place], caption[: len(rows[place])])
        assert not caption[len(rows[place]) :].any()
    assert groups.mean_length() == (8 * 8 + 6 * 16 + 2 * 77) / 16


def test_the_sizes_of_groups_depend_on_the_batch_size_alone():
    trimmer = CaptionTrimmer("argmax")
    sizes = {
        tuple(len(group) for group in trimmer(captions([5] * n + [77] * (32 - n))).tokens)
        for n in (16, 20, 30)
    }
    assert sizes == {(16, 12, 4)}


def test_captions_of_one_length_stay_one_tensor():
    trimmed = CaptionTrimmer("argmax")(captions([6] * 32))
    assert trimmed.shape == (32, 8)


def test_a_caption_without_an_end_keeps_the_features_it_has():
    plain = small_clip(text={**CAUSAL, "pool_type": "eos"}).eval()
    model = allow_short_text(copy.deepcopy(plain))
    texts = captions([9, 9])
    texts[0][texts[0] == END_OF_TEXT] = 1
    trimmed = caption_trimmer(model)(texts)
    torch.testing.assert_close(
        model.encode_text(trimmed), plain.encode_text(texts), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "model",
    [
        small_coca(),
        small_coca(text={"embed_cls": False}),
        small_clip(custom_text=True, text={**CAUSAL, "no_causal_mask": True, "pool_type": "last"}),
        small_clip(custom_text=True, text={**CAUSAL, "no_causal_mask": True}),
        small_clip(text={**CAUSAL, "pool_type": "last"}),
        small_clip(custom_text=True, text={**CAUSAL, "pool_type": "first"}),
        torch.nn.Linear(2, 2),
    ],
    ids=["CoCa", "CoCa without class token", "SigLIP", "bidirectional", "last", "first", "no CLIP"],
)
def test_no_trimming_where_padding_reaches_the_features(model):
    assert caption_trimmer(model) is None


def test_a_hugging_face_tower_is_not_trimmed():
    class OtherTower(torch.nn.Module):
        pool_type, attn_mask, cls_emb = "argmax", torch.zeros(1), None

    model = small_clip(custom_text=True)
    model.text = OtherTower()
    assert caption_trimmer(model) is None


def test_groups_move_as_one():
    groups = CaptionTrimmer("argmax")(captions(LONG_TAIL)).to(torch.device("meta"))
    assert {tensor.device.type for tensor in (*groups.tokens, groups.order)} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("custom_text", [False, True])
def test_a_compiled_model_takes_groups_without_a_break(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=CAUSAL))
    groups = caption_trimmer(model)(captions(LONG_TAIL))
    images = image_batch(len(LONG_TAIL))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for one, other in zip(compiled(images, groups), model(images, groups), strict=True):
        assert torch.equal(one, other)


BIDIRECTIONAL = {**CAUSAL, "no_causal_mask": True, "pool_type": "last"}


def short_captions(batch_size=4, *, seed=0):
    """Return token ids (B, 24), each caption ending with the highest id, zeros behind it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, END_OF_TEXT, (batch_size, 24), generator=generator)
    for row, length in enumerate((24, 5, 11, 2)):
        tokens[row, length - 1] = END_OF_TEXT
        tokens[row, length:] = 0
    return tokens


@both_models
@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_short_captions_give_the_features_of_padded_ones(custom_text, pool_type, training):
    text = {**CAUSAL, "pool_type": pool_type, "eos_id": END_OF_TEXT}
    plain = small_clip(custom_text=custom_text, text=text).train(training)
    model = allow_short_text(copy.deepcopy(plain))
    assert is_text_trimming_lossless(model)
    padded = functional.pad(short_captions(), (0, 53))
    expected = plain.encode_text(padded, normalize=True)
    got = model.encode_text(short_captions(), normalize=True)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@both_models
@pytest.mark.parametrize("text", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_full_captions_give_the_same_bits_as_before(custom_text, text):
    plain = small_clip(custom_text=custom_text, text=text)
    model = allow_short_text(copy.deepcopy(plain))
    padded = functional.pad(short_captions(), (0, 53))
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
    model.encode_text(short_captions())


@both_models
def test_gradients_reach_the_positions_in_use_alone(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=CAUSAL)).train()
    model.encode_text(short_captions()).square().sum().backward()
    text = model.text if custom_text else model
    used = text.positional_embedding.grad.abs().sum(dim=1) > 0
    assert used[:24].all()
    assert not used[24:].any()


@both_models
def test_gradient_checkpointing_takes_short_captions(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=CAUSAL)).train()
    expected = model.encode_text(short_captions())
    model.set_grad_checkpointing(True)
    got = model.encode_text(short_captions())
    assert torch.equal(got, expected)
    got.sum().backward()


@both_models
def test_a_bidirectional_tower_takes_short_captions_but_not_without_a_change(custom_text):
    model = allow_short_text(small_clip(custom_text=custom_text, text=BIDIRECTIONAL)).eval()
    assert model.encode_text(short_captions()).shape == (4, 64)
    assert not is_text_trimming_lossless(model)


def test_coca_takes_short_captions_as_openclip_gives_them():
    plain = small_coca().eval()
    model = allow_short_text(copy.deepcopy(plain))
    short = short_captions()[:, :9]
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
    model.encode_text(short_captions())


def test_a_text_tower_of_another_kind_is_left_as_it_is():
    model = torch.nn.Module()
    model.text = torch.nn.Linear(2, 2)
    assert allow_short_text(model) is model
    assert type(model.text) is torch.nn.Linear
    assert not is_text_trimming_lossless(model)
