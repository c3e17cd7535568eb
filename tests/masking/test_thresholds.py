import pytest

from clip_pgs.masking.thresholds import ThresholdRecord, bisect_threshold, interpolate

POINTS = ((0.2, 1.0), (0.4, 0.5), (0.8, 0.3))


@pytest.mark.parametrize(
    ("position", "height"),
    [(0.0, 1.0), (0.2, 1.0), (0.3, 0.75), (0.4, 0.5), (0.6, 0.4), (0.8, 0.3), (0.9, 0.3)],
)
def test_straight_lines_join_the_points(position, height):
    assert interpolate(POINTS, position) == pytest.approx(height)


def test_bisection_finds_where_a_falling_curve_meets_the_target():
    threshold = bisect_threshold(lambda threshold: (1 - threshold**3) / 2, target=0.4)
    assert threshold == pytest.approx(0.2 ** (1 / 3), abs=1e-6)


def test_between_two_steps_the_nearer_one_is_taken():
    def ratio(threshold):
        return 0.6 if threshold < 0.25 else 0.495

    assert ratio(bisect_threshold(ratio, target=0.5)) == 0.495
    assert ratio(bisect_threshold(ratio, target=0.595)) == 0.6


def test_it_asks_equally_often_whatever_the_answer():
    counts = []
    for answer in (0.0, 0.5, 1.0):
        calls = []
        bisect_threshold(lambda threshold: calls.append(threshold) or answer, target=0.5)  # noqa: B023
        counts.append(len(calls))
    assert len(set(counts)) == 1


def test_a_record_survives_its_state():
    record = ThresholdRecord()
    record.add(0.4, 0.5, 0.0)
    record.add(0.6, 0.5, 0.02)
    record.add(0.7, 0.5, 0.31)
    again = ThresholdRecord.from_state(record.state())
    assert again == record
    assert again.thresholds == pytest.approx([0.5, 0.7])
    assert again.num_batches == [2, 1]


def test_a_state_is_no_window_into_the_record():
    record = ThresholdRecord()
    record.add(0.4, 0.5, 0.0)
    record.state()["thresholds"].append(9.0)
    assert record.thresholds == [0.4]
