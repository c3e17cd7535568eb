import pytest

from clip_pgs.inspection.cost.peaks import Peak
from clip_pgs.inspection.cost.rows import make_rows
from clip_pgs.inspection.cost.timing import Timings


def timings(steps, *, selection=0.0, peak_bytes=None):
    parts = {"forward": 0.25, "backward": 0.5, "update": 0.25, "selection": selection}
    seconds = {part: [share * step for step in steps] for part, share in parts.items()}
    return Timings(seconds, list(steps), peak_bytes)


def rows(**options):
    return make_rows(
        ["plain", "pgs"],
        # The second round was slow for both: their ratio there is as good as any.
        [timings([2.0, 20.0, 4.0]), timings([1.0, 11.0, 2.4], selection=0.01, peak_bytes=2**29)],
        flops=[1000.0, 400.0],
        text_tokens=[77.0, 20.5],
        batch_size=8,
        peak=Peak(1000.0, "told"),
        **options,
    )


def test_ratios_are_medians_over_rounds_of_ratios():
    plain, pgs = rows()
    assert plain.time_over_first == 1.0
    assert pgs.time_over_first == pytest.approx(0.55)
    assert pgs.flops_over_first == pytest.approx(0.4)
    assert pgs.time_over_ideal == pytest.approx(0.55 / 0.4)


def test_times_are_medians():
    _, pgs = rows()
    assert (pgs.step, pgs.forward, pgs.backward, pgs.update) == pytest.approx((2.4, 0.6, 1.2, 0.6))
    assert pgs.samples_per_second == pytest.approx(8 / 2.4)
    assert (pgs.selection, pgs.selection_share) == pytest.approx((0.024, 0.01))


def test_utilisation_is_the_share_of_the_peak():
    plain, pgs = rows()
    assert plain.utilisation == pytest.approx(1000 / 4 / 1000)
    assert pgs.utilisation == pytest.approx(400 / 2.4 / 1000)


def test_memory_is_told_where_it_was_measured():
    plain, pgs = rows()
    assert plain.peak_gib is None
    assert pgs.peak_gib == 0.5
