import pytest

from clip_pgs import create_masking, list_maskings
from clip_pgs.masking import MaskingStrategy, masking_options
from clip_pgs.masking.registry import register_masking


def test_the_names_are_listed_in_order():
    assert list_maskings() == sorted(list_maskings())
    assert {"none", "random", "pgs"} <= set(list_maskings())


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(
        ValueError, match=r"unknown masking 'pgz'; choose from .*none, pgs, .*random"
    ):
        create_masking("pgz")


def test_an_unknown_option_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'random' has no option 'edges'; it takes mask_ratio"):
        create_masking("random", edges=False)


def test_an_unknown_option_names_the_strategies_that_have_it():
    with pytest.raises(ValueError, match=r"; pgs, pgs-released would take 'edges'$"):
        create_masking("gaussian", edges=False)
    with pytest.raises(ValueError, match=r"it takes mask_ratio$"):
        create_masking("random", nonsense=1)


def test_only_adaptive_strategies_take_a_lower_bound():
    with pytest.raises(ValueError, match="'random' has no option 'mask_ratio_min'"):
        create_masking("random", mask_ratio=0.5, mask_ratio_min=0.3)


def test_a_strategy_without_options_says_so():
    with pytest.raises(ValueError, match="it takes none at all"):
        create_masking("none", mask_ratio=0.5)


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="masking 'random' is registered already"):

        @register_masking("random")
        class Another(MaskingStrategy):
            pass


def test_options_come_with_their_defaults():
    assert masking_options("random") == {"mask_ratio": 0.5}
    assert masking_options("pgs")["mask_ratio_min"] is None
