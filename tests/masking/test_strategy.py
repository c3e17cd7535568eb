import re
import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, PatchSelection, create_masking, list_maskings, sobel_edges
from clip_pgs.masking import MaskingStrategy, masking_options
from clip_pgs.masking.baselines import RandomMasking
from clip_pgs.masking.edges import canny_edges
from clip_pgs.masking.strategy import (
    _REGISTRY,
    check_mask_ratio,
    check_share,
    drawn_count,
    keep_count,
    lower_bound,
    mask_count,
    register_masking,
)
from masking.test_contract import rows, select
from support.images import make_inputs

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
        ({"pixels": [0.5]}, r"pixels must have shape \(B, 3, H, W\), got list"),
        ({"patch_size": 20}, "patch_size must divide the image: 32 x 48 pixels"),
        ({"progress": 1.5}, r"progress must be in \[0, 1\], got 1.5"),
        ({"progress": None}, "progress must be one number, got NoneType"),
        ({"progress": torch.zeros(2)}, r"progress must be one number, got \(2,\), torch.float32"),
        ({"tokens": "x"}, r"tokens must .* \(B, N, D\) .* got str"),
        ({"tokens": torch.zeros(2, 5, 8)}, r"tokens must .* \(B, N, D\)"),
        ({"noise": torch.zeros(2, 5)}, r"noise must .* \(B, N\) = \(2, 6\)"),
        ({"noise": torch.zeros(2, 6).long()}, "noise must be floating point, .* torch.int64"),
        ({"noise": "x"}, r"noise must .* \(B, N\) = \(2, 6\), got str"),
        ({"noise": torch.full((2, 6), torch.nan)}, r"noise must lie in \[0, 1\), got nan to nan"),
        ({"noise": torch.tensor([0.5, 1]).tile(2, 3)}, r"noise must lie in \[0, 1\), got 0.5 to 1"),
        ({"noise": torch.full((2, 6), -0.1)}, r"noise must lie in \[0, 1\), got -0.1 to -0.1"),
        ({"progress": "x"}, r"progress must be in \[0, 1\], got 'x'"),
        ({"attention": torch.zeros(6)}, r"attention must .* \(B, N\) = \(2, 6\)"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(changes, sentence):
    fields = {"pixels": IMAGES, "patch_size": 16, **changes}
    with pytest.raises(ValueError, match=sentence):
        PatchInputs(**fields)


@pytest.mark.parametrize(
    "sides", [0, True, 16.0, "16", None, (16,), (8.0, 8), (True, 1), (16,) * 3, torch.tensor(16)]
)
def test_sides_that_are_no_whole_numbers_are_refused(sides):
    rule = "must be a whole number of at least 1, or two, got "
    for use in (PatchInputs, sobel_edges, canny_edges):
        with pytest.raises(ValueError, match=f"^patch_size {rule}"):
            use(IMAGES, sides)


@pytest.mark.parametrize("sides", [np.int64(16), (np.int32(16), 16), [16, 16]])
def test_whole_numbers_of_any_kind_are_sides(sides):
    assert PatchInputs(IMAGES, sides).patch_size == (16, 16)


class Wrong(MaskingStrategy):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, inputs, *, generator=None):
        return self.answer


TWO_OF_SIX = torch.tensor([[0, 5], [1, 2]])


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (None, "must be a PatchSelection, got NoneType"),
        (TWO_OF_SIX, r"must be a PatchSelection, got \(2, 2\), torch.int64"),
        (PatchSelection(None), r"\(B, K\), with B = 2 .* int64, got NoneType"),
        (PatchSelection(TWO_OF_SIX[:1]), r"B = 2 .* got \(1, 2\)"),
        (PatchSelection(TWO_OF_SIX.repeat(2, 1)), r"B = 2 .* got \(4, 2\)"),
        (PatchSelection(TWO_OF_SIX[0]), r"\(B, K\).* got \(2,\)"),
        (PatchSelection(TWO_OF_SIX[:, :0]), r"K >= 1.* got \(2, 0\)"),
        (PatchSelection(TWO_OF_SIX.float()), "int64, got .*float32"),
        (PatchSelection(TWO_OF_SIX > 1), "int64, got .*bool"),
        (PatchSelection(TWO_OF_SIX + 1), r"\[0, N\) with N = 6, got 1 to 6"),
        (PatchSelection(TWO_OF_SIX - 1), r"\[0, N\) with N = 6, got -1 to 4"),
        (PatchSelection(TWO_OF_SIX // 3), "keep a patch or more of each image, each once"),
        (PatchSelection(TWO_OF_SIX, TWO_OF_SIX > 4), "keep a patch or more of each image"),
        (PatchSelection(TWO_OF_SIX, TWO_OF_SIX < 5), "repeat one in padding slots"),
        (PatchSelection(TWO_OF_SIX, TWO_OF_SIX), r"valid .*\(2, 2\), bool, got .*int64"),
        (PatchSelection(TWO_OF_SIX, TWO_OF_SIX[:1] > 1), r"valid .*\(2, 2\), bool, got \(1, 2\)"),
        (PatchSelection(TWO_OF_SIX, similar=TWO_OF_SIX[0] > 1), "similar .* got"),
    ],
)
def test_a_selection_that_is_none_is_refused_with_the_strategy_and_the_rule(answer, rule):
    with pytest.raises(ValueError, match=f"the selection of Wrong .*{rule}"):
        Wrong(answer)(PatchInputs(IMAGES, 16))


def test_a_selection_is_taken_as_it_is():
    selection = PatchSelection(torch.tensor([[4, 4], [1, 2]]), torch.tensor([[1, 0], [1, 1]]) > 0)
    assert Wrong(selection)(PatchInputs(IMAGES, 16)) is selection


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


@pytest.mark.parametrize("ratio", ["half", None, float("nan"), [0.5]])
def test_a_ratio_that_is_no_number_is_refused(ratio):
    for change in (create_masking("random").set_mask_ratio, lambda r: RandomMasking(mask_ratio=r)):
        with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\)"):
            change(ratio)


@pytest.mark.parametrize("name", [5, None, ["pgs"]])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match="name of a masking must be a text"):
        create_masking(name)


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
        ("random", {"mask_ratio": True}, "mask_ratio takes a finite number, got True"),
        ("random", {"mask_ratio": None}, "mask_ratio takes a finite number, got None"),
        ("gaussian", {"sigma": "wide"}, "sigma takes a finite number, got 'wide'"),
        ("gaussian", {"sigma": float("inf")}, "sigma takes a finite number, got inf"),
        ("gaussian", {"sigma": 10**400}, "sigma takes a finite number, got 1000"),
        ("pgs", {"edge_weight": float("nan")}, "edge_weight takes a finite number, got nan"),
        ("pgs", {"threshold": "low"}, "threshold takes a finite number, got 'low'"),
        ("pgs", {"edges": "abc"}, "edges takes true or false, got 'abc'"),
        ("pgs", {"edges": 1}, "edges takes true or false, got 1"),
        ("pgs", {"num_iters": 1.5}, "num_iters takes a whole number, got 1.5"),
        ("pgs", {"num_iters": None}, "num_iters takes a whole number, got None"),
        ("pgs", {"neighborhood": [1]}, "neighborhood takes a whole number, got [1]"),
        ("pgs", {"solver": 1}, "solver takes a name, got 1"),
        ("pgs-released", {"num_epochs": {}}, "num_epochs takes a finite number, got {}"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_its_name(name, options, problem):
    with pytest.raises(ValueError, match=re.escape(f"masking '{name}': {problem}")):
        create_masking(name, **options)


def test_numbers_of_numpy_and_whole_numbers_are_numbers():
    options = {"rule": "weights", "sigma": np.float32(0.5), "mask_ratio": 0}
    assert create_masking("gaussian", **options).mask_ratio == 0
    assert create_masking("pgs", num_iters=np.int64(3), threshold=None).options.num_iters == 3


def test_an_older_spelling_stands_for_its_option_and_never_beside_it():
    assert create_masking("pgs", neighbourhood=2).options.neighborhood == 2
    with pytest.raises(ValueError, match="'pgs': neighborhood is given twice"):
        create_masking("pgs", neighbourhood=2, neighborhood=2)


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="masking 'random' is registered already"):

        @register_masking("random")
        class Another(MaskingStrategy):
            pass


def test_a_strategy_with_a_buffer_is_refused_by_its_name(monkeypatch):
    build = RandomMasking.__init__

    def build_with_buffer(self, mask_ratio: float = 0.5):
        build(self, mask_ratio=mask_ratio)
        self.register_buffer("prior", torch.ones(4))

    monkeypatch.setattr(RandomMasking, "__init__", build_with_buffer)
    with pytest.raises(ValueError, match="RandomMasking would put prior into the model's state"):
        create_masking("random")


TYPED = """\
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from clip_pgs.masking import FixedRatioMasking, MaskingStrategy, register_masking
if TYPE_CHECKING:
    import numpy as np
    from collections.abc import Sequence

@register_masking("typed")
class Typed(FixedRatioMasking):
    def __init__(self, *, mask_ratio: float = 0.5, odds: {hint} = None) -> None:
        super().__init__(mask_ratio=mask_ratio)

@dataclass
class Options:
    mask_ratio: float = 0.5
    odds: {hint} = None

@register_masking("typed-by-dataclass", options=Options)
class TypedByDataclass(MaskingStrategy):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.mask_ratio = options.get("mask_ratio", 0.5)
"""


@pytest.mark.parametrize("hint", ["Sequence[float]", "np.ndarray | None", "None[int]"])
@pytest.mark.parametrize("name", ["Typed", "TypedByDataclass"])
def test_a_type_that_only_a_type_checker_knows_refuses_no_strategy(
    tmp_path, monkeypatch, hint, name
):
    for part in ("_entries", "_declarations"):
        monkeypatch.setattr(_REGISTRY, part, dict(getattr(_REGISTRY, part)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "typed_masking", raising=False)
    (tmp_path / "typed_masking.py").write_text(TYPED.format(hint=hint))
    strategy = create_masking(f"typed_masking:{name}", mask_ratio=0.25, odds=[1, 2])
    assert strategy.mask_ratio == 0.25
    monkeypatch.delitem(sys.modules, "typed_masking")


def test_options_come_with_their_defaults():
    assert masking_options("random") == {"mask_ratio": 0.5}
    assert masking_options("pgs")["mask_ratio_min"] is None


HOSTILE = [1 - 1e-12, 10**400, float("nan"), "1"]
# More of many alike.
MORE_HOSTILE = [1e300, -1e300, 1e-300, 10**30, -(10**30), [], {}]


def numeric_options():
    """Return (strategy, option) of every option that takes numbers."""
    return [
        (name, option)
        for name in list_maskings()
        for option, hint in get_type_hints(type(create_masking(name)).__init__).items()
        if {float, int} & {hint, *get_args(hint)}
    ]


@pytest.mark.parametrize(("name", "option"), numeric_options())
@pytest.mark.parametrize(
    "value",
    [*HOSTILE, *(pytest.param(value, marks=pytest.mark.slow) for value in MORE_HOSTILE)],
    ids=lambda value: repr(value)[:9],
)
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


BLOCKED = ["open_clip", "timm", "torchvision", "webdataset", "ot", "PIL", "numpy", "pandas"]
PROGRAM = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import clip_pgs, torch
inputs = clip_pgs.PatchInputs(torch.rand(1, 3, 32, 32), 8)
print(clip_pgs.create_masking("pgs")(inputs).index.shape[1])
"""


@pytest.mark.slow
def test_the_core_imports_and_runs_with_torch_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8"
