import math

import pytest

from clip_pgs.masking.schedule import scheduled_levels, scheduled_ratio


def levels(kind, *, num_levels, start=0.7, end=0.3, points=1000):
    """Return the ratios over training without repetition, in order."""
    ratios = [
        scheduled_ratio(start, end, progress=i / points, kind=kind, num_levels=num_levels)
        for i in range(points + 1)
    ]
    return list(dict.fromkeys(ratios))


def test_linear_levels_are_equally_far_apart():
    assert levels("linear", num_levels=5) == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])


def test_cosine_levels_lie_on_half_a_period():
    expected = [0.5 + 0.2 * math.cos(math.pi * i / 4) for i in range(5)]
    assert levels("cosine", num_levels=5) == pytest.approx(expected)


def test_a_constant_schedule_ignores_the_end():
    assert levels("constant", num_levels=5) == [0.7]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("num_levels", [2, 3, 10])
def test_the_first_and_the_last_level_are_exact(kind, num_levels):
    ratios = levels(kind, num_levels=num_levels, start=0.1, end=0.7)
    assert len(ratios) == num_levels
    assert (ratios[0], ratios[-1]) == (0.1, 0.7)


def test_without_an_end_the_start_holds():
    assert {scheduled_ratio(0.7, None, progress=i / 10) for i in range(11)} == {0.7}


def test_every_level_lasts_equally_long():
    ratios = [scheduled_ratio(0.0, 0.5, progress=i / 30, num_levels=3) for i in range(30)]
    assert [ratios.count(ratio) for ratio in (0.0, 0.25, 0.5)] == [10, 10, 10]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 4, 10, 29, 300])
@pytest.mark.parametrize("num_levels", [2, 3, 7, 10])
def test_levels_last_as_many_steps_as_have_their_ratio(kind, num_steps, num_levels):
    options = {"kind": kind, "num_levels": num_levels}
    found = scheduled_levels(0.7, 0.3, num_steps=num_steps, **options)
    steps = [
        scheduled_ratio(0.7, 0.3, progress=step / num_steps, **options) for step in range(num_steps)
    ]
    assert [ratio for ratio, lasting in found for _ in range(lasting)] == pytest.approx(steps)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": 1.1}, r"start must be in \[0, 1\], got 1\.1"),
        ({"end": -0.1}, r"end must be in \[0, 1\], got -0\.1"),
        ({"progress": 1.1}, r"progress must be in \[0, 1\], got 1\.1"),
        ({"kind": "step"}, "kind must be one of constant, linear, cosine, got 'step'"),
        ({"num_levels": 1}, "num_levels must be >= 2, got 1"),
    ],
)
def test_wrong_arguments_are_refused(changes, sentence):
    arguments = {"start": 0.5, "end": 0.3, "progress": 0.0, **changes}
    with pytest.raises(ValueError, match=sentence):
        scheduled_ratio(arguments.pop("start"), arguments.pop("end"), **arguments)
