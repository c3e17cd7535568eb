import pytest

from clip_pgs.masking.ratios import check_mask_ratio, keep_count, mask_count


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
