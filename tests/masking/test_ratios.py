import pytest

from clip_pgs.masking.ratios import (
    check_mask_ratio,
    check_share,
    drawn_count,
    keep_count,
    lower_bound,
    mask_count,
)


@pytest.mark.parametrize(
    ("num_patches", "ratio", "masked"),
    [(196, 0.5, 98), (196, 0.3, 58), (100, 0.29, 29), (100, 0.9, 90), (49, 0.0, 0), (10, 0.7, 7)],
)
def test_mask_count_floors_the_exact_product(num_patches, ratio, masked):
    assert mask_count(num_patches, ratio) == masked
    assert keep_count(num_patches, ratio) == num_patches - masked


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 7.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got"):
        check_mask_ratio(ratio)


@pytest.mark.parametrize(
    ("num_patches", "ratio", "drawn"), [(196, 0.05, 10), (64, 0.05, 3), (4, 0.05, 1), (7, 1.0, 7)]
)
def test_a_share_draws_the_nearest_count_and_at_least_one(num_patches, ratio, drawn):
    assert drawn_count(num_patches, ratio) == drawn


@pytest.mark.parametrize("share", [0.0, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"anchors must be in \(0, 1\], got"):
        check_share(share, name="anchors")


def test_the_lower_bound_is_the_ratio_unless_one_is_given():
    assert lower_bound(0.5, None) == lower_bound(0.5, 0.5) == 0.5
    assert lower_bound(0.5, 0.0) == 0.0


@pytest.mark.parametrize(
    ("bound", "sentence"),
    [
        (-0.1, r"mask_ratio_min must be in \[0, 1\), got -0.1"),
        (0.51, "mask_ratio_min must not exceed mask_ratio = 0.5, got 0.51"),
    ],
)
def test_a_lower_bound_outside_its_range_is_refused(bound, sentence):
    with pytest.raises(ValueError, match=sentence):
        lower_bound(0.5, bound)
