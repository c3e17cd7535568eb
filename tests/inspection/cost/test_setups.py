from contextlib import nullcontext

import pytest
import torch
from open_clip.loss import ClipLoss

from clip_pgs.inspection.cost.flop_count import count_step_flops
from clip_pgs.inspection.cost.setups import Conditions, build_setups
from clip_pgs.inspection.cost.timing import time_steps
from clip_pgs.inspection.strategies import parse_specs
from support.models import TEXT, VISION, image_batch, small_clip

BATCH = 4


def captions(*, batch_size=BATCH, length=5, context_length=16):
    tokens = torch.randint(
        1, 99, (batch_size, context_length), generator=torch.Generator().manual_seed(0)
    )
    tokens[:, length - 1], tokens[:, length:] = 99, 0
    return tokens


def setups(*maskings, model=None, **conditions):
    return build_setups(
        small_clip() if model is None else model,
        parse_specs(maskings),
        Conditions(image_batch(BATCH), captions(), nullcontext, **conditions),
        mask_ratio=0.5,
    )


def test_the_first_setup_is_the_plain_model_with_whole_captions():
    model = small_clip()
    plain, _ = setups("pgs", model=model)
    expected = ClipLoss()(*model(image_batch(BATCH), captions())[:3])
    assert torch.equal(plain.forward(), expected)
    assert plain.text_tokens() == 16
    assert plain.selection() is None


def test_trimming_alone_changes_no_result():
    plain, unmasked = setups("none")
    assert unmasked.text_tokens() == 8
    torch.testing.assert_close(unmasked.forward(), plain.forward(), atol=1e-6, rtol=0)


def test_trimming_can_be_left_out():
    assert setups("random", trims=False)[1].text_tokens() == 16


def test_packing_is_what_was_asked_for_and_runs_fewer_operations():
    adaptive = "pgs:mask_ratio_min=0.2,threshold=-0.1"
    packed, padded = (setups(adaptive, pack_tokens=is_on)[1] for is_on in (True, False))
    torch.manual_seed(0)
    expected = padded.forward()
    torch.manual_seed(0)
    torch.testing.assert_close(packed.forward(), expected, atol=1e-6, rtol=0)
    assert count_step_flops(packed) < count_step_flops(padded)


def test_setups_share_their_weights_and_nothing_else():
    plain, masked = setups("random")
    for one, other in zip(plain.model.parameters(), masked.model.parameters(), strict=True):
        assert one is other
    assert type(plain.model.visual) is not type(masked.model.visual)


def test_what_selects_gives_a_selection():
    selection = setups("pgs")[1].selection()()
    assert selection.index.shape == (BATCH, 8)


def tower_flops(num_tokens, width, layers, *, last_for_one=False, embed_dim=64):
    """Count a tower by hand, a multiply-add as two: blocks, attention and projection.

    A last block for one token still needs keys and values of all.
    """
    block = 24 * num_tokens * width**2 + 4 * num_tokens**2 * width
    last = (4 * num_tokens + 20) * width**2 + 4 * num_tokens * width if last_for_one else block
    return 3 * ((layers - 1) * block + last + 2 * width * embed_dim)


@pytest.mark.parametrize(
    ("number", "image_tokens", "text_tokens", "selection"),
    # The selection compares one candidate with 16 patches of 768 numbers.
    [(0, 17, 16, 0), (1, 9, 8, 0), (2, 9, 8, 2 * 16 * 768)],
    ids=["plain", "random", "pgs"],
)
def test_operations_are_those_of_a_count_by_hand(number, image_tokens, text_tokens, selection):
    width, text_width = VISION["width"], TEXT["width"]
    # The patch embedding sees all 16 patches, and no gradient goes on to the pixels.
    per_sample = 2 * (2 * 16 * 3 * 16 * 16 * width) + selection
    is_masked = number > 0
    per_sample += tower_flops(image_tokens, width, VISION["layers"], last_for_one=is_masked)
    per_sample += tower_flops(text_tokens, text_width, TEXT["layers"])
    setup = setups("random", "pgs")[number]
    assert count_step_flops(setup) == BATCH * per_sample


def test_counting_leaves_no_gradient():
    setup = setups("random")[1]
    count_step_flops(setup)
    assert all(parameter.grad is None for parameter in setup.model.parameters())


def test_every_round_times_every_setup_once():
    both = setups("pgs")
    optimizer = torch.optim.AdamW(both[0].model.parameters(), lr=1e-6)
    ticks = []
    plain, pgs = time_steps(both, optimizer, num_rounds=3, progress=lambda: ticks.append(1))
    assert len(plain.steps) == len(pgs.steps) == 3
    assert len(ticks) == 8
    for i in range(3):
        parts = (pgs.seconds[part][i] for part in ("forward", "backward", "update"))
        assert pgs.steps[i] == pytest.approx(sum(parts))
        assert pgs.seconds["selection"][i] > 0
        assert plain.seconds["selection"][i] == 0
