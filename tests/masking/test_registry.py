import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from clip_pgs import create_masking, list_maskings
from clip_pgs.masking import MaskingStrategy, masking_options
from clip_pgs.masking.registry import register_masking
from masking.contract_cases import rows, select
from support.images import make_inputs


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


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("random", {"mask_ratio": True}, "mask_ratio takes a number, got True"),
        ("random", {"mask_ratio": None}, "mask_ratio takes a number, got None"),
        ("gaussian", {"sigma": "wide"}, "sigma takes a number, got 'wide'"),
        ("gaussian", {"sigma": float("inf")}, "sigma takes a finite number, got inf"),
        ("gaussian", {"sigma": 10**400}, "sigma takes a finite number, got 1000"),
        ("pgs", {"edge_weight": float("nan")}, "edge_weight takes a finite number, got nan"),
        ("pgs", {"threshold": "low"}, "threshold takes a number, got 'low'"),
        ("pgs", {"edges": "abc"}, "edges takes true or false, got 'abc'"),
        ("pgs", {"edges": 1}, "edges takes true or false, got 1"),
        ("pgs", {"num_iters": 1.5}, "num_iters takes a whole number, got 1.5"),
        ("pgs", {"num_iters": None}, "num_iters takes a whole number, got None"),
        ("pgs", {"neighbourhood": [1]}, "neighbourhood takes a whole number, got [1]"),
        ("pgs", {"solver": 1}, "solver takes a name, got 1"),
        ("pgs-released", {"num_epochs": {}}, "num_epochs takes a number, got {}"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_its_name(name, options, problem):
    with pytest.raises(ValueError, match=re.escape(f"masking '{name}': {problem}")):
        create_masking(name, **options)


def test_numbers_of_numpy_and_whole_numbers_are_numbers():
    assert create_masking("gaussian", sigma=np.float32(0.5), mask_ratio=0).mask_ratio == 0
    assert create_masking("pgs", num_iters=np.int64(3), threshold=None).num_iters == 3


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="masking 'random' is registered already"):

        @register_masking("random")
        class Another(MaskingStrategy):
            pass


def test_options_come_with_their_defaults():
    assert masking_options("random") == {"mask_ratio": 0.5}
    assert masking_options("pgs")["mask_ratio_min"] is None


HOSTILE = (1e300, -1e300, 1e-300, 10**30, -(10**30), 10**400, 1 - 1e-12, float("nan"), "1", [], {})


def numeric_options():
    """Return (strategy, option) of every option that takes numbers."""
    return [
        (name, option)
        for name in list_maskings()
        for option, hint in get_type_hints(type(create_masking(name)).__init__).items()
        if {float, int} & {hint, *get_args(hint)}
    ]


@pytest.mark.parametrize(("name", "option"), numeric_options())
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:9])
def test_a_hostile_number_is_refused_by_its_name_or_does_no_harm(name, option, value):
    inputs = make_inputs(2, progress=0.5)
    others = {"mask_ratio_min": 0.3} if "mask_ratio_min" in masking_options(name) else {}
    error = None
    try:
        strategy = create_masking(name, **{**others, option: value})
    except ValueError as refusal:
        error = str(refusal)
    if error is not None:
        assert option in error
        assert "\n" not in error
        return
    for row in rows(select(strategy, inputs)):
        assert row == sorted(set(row))
        assert 1 <= len(row) <= 49
    if name == "pgs":
        assert strategy.steps(inputs, torch.rand(2, 49)).scores.isfinite().all()
