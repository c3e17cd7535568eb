import pytest
import torch

from clip_pgs import PatchInputs, PatchSelection, create_masking

IMAGES = torch.zeros(2, 3, 32, 48)


def test_grid_follows_the_image_and_the_patch():
    inputs = PatchInputs(IMAGES, (16, 8))
    assert inputs.grid_size == (2, 6)
    assert inputs.num_patches == 12
    assert inputs.batch_size == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pixels": IMAGES[0]}, r"pixels must have shape \(B, 3, H, W\), got \(3, 32, 48\)"),
        ({"pixels": IMAGES.long()}, "pixels must be floating point, got torch.int64"),
        ({"patch_size": 20}, "patch_size must divide the image: 32 x 48 pixels"),
        ({"patch_size": 0}, r"patch_size must be at least 1, got \(0, 0\)"),
        ({"progress": 1.5}, r"progress must be in \[0, 1\], got 1.5"),
        ({"tokens": torch.zeros(2, 5, 8)}, r"tokens must have shape \(B, N, D\)"),
        ({"noise": torch.zeros(2, 5)}, r"noise must have shape \(B, N\) = \(2, 6\)"),
        ({"attention": torch.zeros(6)}, r"attention must have shape \(B, N\) = \(2, 6\)"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(changes, sentence):
    fields = {"pixels": IMAGES, "patch_size": 16, **changes}
    with pytest.raises(ValueError, match=sentence):
        PatchInputs(**fields)


def test_kept_counts_count_valid_slots():
    index = torch.tensor([[0, 1, 2], [3, 3, 3]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert PatchSelection(index, valid).kept_counts().tolist() == [3, 1]
    assert PatchSelection(index).kept_counts().tolist() == [3, 3]


def test_a_ratio_set_between_steps_decides_the_count():
    strategy = create_masking("random", mask_ratio=0.5)
    strategy.set_mask_ratio(0.25)
    assert strategy(PatchInputs(IMAGES, 8)).index.shape == (2, 18)


def test_a_lower_bound_keeps_its_share_of_the_ratio():
    strategy = create_masking("pgs", mask_ratio=0.5, mask_ratio_min=0.3)
    for ratio in (0.25, 0.0, 0.75):
        strategy.set_mask_ratio(ratio)
        assert strategy.mask_ratio == ratio
        assert strategy.mask_ratio_min == pytest.approx(0.6 * ratio)


def test_a_fixed_count_stays_fixed():
    strategy = create_masking("pgs", mask_ratio=0.3)
    for ratio in (0.41, 0.0, 0.7):
        strategy.set_mask_ratio(ratio)
        assert strategy(PatchInputs(IMAGES, 8)).valid is None


def test_a_ratio_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got 1.0"):
        create_masking("random").set_mask_ratio(1.0)


def test_a_strategy_without_a_ratio_says_so():
    with pytest.raises(ValueError, match=r"NoMasking has no mask ratio, got 0\.5"):
        create_masking("none").set_mask_ratio(0.5)


def test_a_strategy_finds_nothing_unless_it_says_so():
    strategy = create_masking("random")
    assert not strategy.needs_calibration(0.0)
    strategy.calibrate(PatchInputs(IMAGES, 8))
    strategy.load_state(strategy.state())
    assert strategy.state() == {}


def test_another_strategys_state_is_refused():
    with pytest.raises(ValueError, match=r"the state of RandomMasking must hold \[\], got"):
        create_masking("random").load_state({"threshold": 0.4})
