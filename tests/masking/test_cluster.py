import dataclasses
import json
import math
import threading

import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.calibration import NUM_BATCHES, ThresholdRecord, bisect_threshold
from clip_pgs.masking.cluster import DEFAULT_THRESHOLDS, default_threshold
from clip_pgs.masking.sampling import kept_patches, patchify
from clip_pgs.masking.strategy import interpolate
from masking import oracle
from masking.test_contract import rows
from support.images import make_inputs, square_on_gradient


def noise_like(batch_size, num_patches, *, seed=0):
    return torch.rand(batch_size, num_patches, generator=torch.Generator().manual_seed(seed))


def mean_ratio(strategy, inputs):
    return 1 - strategy(inputs).kept_counts().float().mean().item() / inputs.num_patches


def kept_by_hand(inputs, i, *, threshold, ratio_min, anchor_ratio, random_share):
    """Return the kept positions of image i by slow float64 loops."""
    noise, num_patches = inputs.noise[i].tolist(), inputs.num_patches
    by_noise = sorted(range(num_patches), key=lambda j: -noise[j])
    anchors = by_noise[: max(1, round(anchor_ratio * num_patches))]
    patches = oracle.cut(inputs.pixels[i].double().numpy(), inputs.patch_size[0])
    similarity = oracle.cosine(patches, anchors)
    if inputs.progress:
        tokens = oracle.cosine(inputs.tokens[i].double().numpy(), anchors)
        similarity = (1 - inputs.progress) * similarity + inputs.progress * tokens
    score = similarity.max(axis=0)
    return oracle.kept(
        score,
        anchors,
        ratio_max=(num_patches - 1) / num_patches,
        ratio_min=ratio_min,
        threshold=threshold,
        random_share=random_share,
        noise=inputs.noise[i],
    )


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [0.1, 0.6])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_selection_equals_a_slow_float64_loop(progress, threshold, share):
    inputs = make_inputs(3, grid_size=(7, 10), noise=noise_like(3, 70), progress=progress)
    options = {
        "mask_ratio_min": 0.2,
        "anchor_ratio": 0.05,
        "threshold": threshold,
        "random_share": share,
    }
    kept = rows(create_masking("cluster", **options)(inputs))
    options["ratio_min"] = options.pop("mask_ratio_min")
    for i in range(3):
        assert kept[i] == kept_by_hand(inputs, i, **options)


def two_textures():
    """Return an image of 4 x 4 patches: the left half one texture, the right half another."""
    left, right = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.cat([left.repeat(1, 4, 2), right.repeat(1, 4, 2)], dim=2)[None]


@pytest.mark.parametrize("anchor", [0, 5, 10, 15])
def test_the_half_that_looks_like_the_anchor_goes(anchor):
    noise = torch.zeros(1, 16)
    noise[0, anchor] = 0.9
    selection = create_masking("cluster", mask_ratio_min=0.0, threshold=0.9)(
        PatchInputs(two_textures(), 4, noise=noise)
    )
    is_left = anchor % 4 < 2
    expected = [j for j in range(16) if (j % 4 < 2) != is_left]
    assert rows(selection) == [expected]


def test_an_image_of_one_texture_keeps_one_patch():
    image = torch.randn(1, 3, 4, 4).repeat(1, 1, 4, 4)
    selection = create_masking("cluster", threshold=0.5)(PatchInputs(image, 4))
    assert selection.kept_counts().tolist() == [1]


def test_the_lower_bound_holds_where_nothing_looks_like_an_anchor():
    selection = create_masking("cluster", mask_ratio_min=0.25, threshold=2.0)(
        PatchInputs(torch.randn(3, 3, 16, 16), 4)
    )
    assert selection.kept_counts().tolist() == [12] * 3


@pytest.mark.parametrize("target", [0.35, 0.5, 0.75])
@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_calibration_hits_the_mean_ratio_within_one_percent(target, progress):
    inputs = make_inputs(12, grid_size=(10, 10), noise=noise_like(12, 100), progress=progress)
    strategy = create_masking("cluster", mask_ratio=target)
    strategy.calibrate(inputs)
    assert mean_ratio(strategy, inputs) == pytest.approx(target, abs=0.01)


def calibrate_together(strategies, parts):
    """Calibrate one strategy per part, each in a thread, that average as processes do."""
    shares, barrier = [0.0] * len(parts), threading.Barrier(len(parts))

    def calibrate(rank):
        def average(share):
            shares[rank] = share
            barrier.wait()
            mean = sum(shares) / len(shares)
            barrier.wait()
            return mean

        strategies[rank].calibrate(parts[rank], average=average)

    threads = [threading.Thread(target=calibrate, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_processes_find_one_threshold_for_all_their_images():
    inputs = make_inputs(8, grid_size=(10, 10), noise=noise_like(8, 100))
    whole = create_masking("cluster")
    whole.calibrate(inputs)
    parts = [
        PatchInputs(inputs.pixels[part], 8, noise=inputs.noise[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    strategies = [create_masking("cluster"), create_masking("cluster")]
    calibrate_together(strategies, parts)
    assert [strategy.threshold for strategy in strategies] == [whole.threshold] * 2


def test_a_ratio_out_of_reach_is_told(caplog):
    inputs = PatchInputs(torch.zeros(2, 3, 56, 56), 8)
    create_masking("cluster", mask_ratio=0.7, mask_ratio_min=0.2).calibrate(inputs)
    assert "no threshold gives this batch a mean mask ratio of 0.700" in caplog.text


def calibrated(strategy, *, progress=0.0, times=1, seed=0):
    for i in range(times):
        noise = noise_like(4, 49, seed=seed + i)
        strategy.calibrate(make_inputs(4, seed=seed + i, noise=noise, progress=progress))
    return strategy


def test_it_asks_for_several_batches_at_each_tenth_of_training():
    strategy = create_masking("cluster")
    for progress in (0.0, 0.1, 0.3, 0.9):
        for _ in range(NUM_BATCHES):
            assert strategy.needs_calibration(progress)
            calibrated(strategy, progress=progress)
        assert not strategy.needs_calibration(progress)
        assert not strategy.needs_calibration(progress + 0.09)
        assert strategy.needs_calibration(min(progress + 0.1, 1.0))


def test_the_threshold_is_the_mean_over_the_batches_of_a_point():
    alone = [calibrated(create_masking("cluster"), seed=seed).threshold for seed in range(3)]
    together = calibrated(create_masking("cluster"), times=3)
    assert together.threshold == pytest.approx(sum(alone) / 3)


def test_another_ratio_asks_again_and_starts_from_the_default():
    strategy = calibrated(create_masking("cluster"), times=NUM_BATCHES)
    strategy.set_mask_ratio(0.6)
    assert strategy.needs_calibration(0.0)
    assert strategy.threshold == default_threshold(0.6)


def test_the_same_ratio_again_changes_nothing():
    strategy = calibrated(create_masking("cluster"), times=NUM_BATCHES)
    found = strategy.threshold
    strategy.set_mask_ratio(0.5)
    assert strategy.threshold == found
    assert not strategy.needs_calibration(0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_images_that_are_not_finite_do_not_move_the_threshold(bad, progress, caplog):
    inputs = make_inputs(6, noise=noise_like(6, 49), progress=progress)
    part = "tokens" if progress else "pixels"
    damaged = getattr(inputs, part).clone()
    damaged[[1, 4], ..., 3] = bad
    mixed, finite = create_masking("cluster"), create_masking("cluster")
    mixed.calibrate(dataclasses.replace(inputs, **{part: damaged}))
    whole = [0, 2, 3, 5]
    parts = {name: getattr(inputs, name)[whole] for name in ("pixels", "tokens", "noise")}
    finite.calibrate(dataclasses.replace(inputs, attention=None, **parts))
    assert mixed.state() == finite.state()

    all_damaged = dataclasses.replace(inputs, **{part: torch.full_like(damaged, bad)})
    mixed.calibrate(all_damaged)
    assert mixed.state() == finite.state()
    assert "no image of this batch is finite" in caplog.text


def test_a_process_without_finite_images_moves_the_threshold_of_the_others_nowhere():
    inputs = make_inputs(4, noise=noise_like(4, 49))
    alone, beside = create_masking("cluster"), create_masking("cluster")
    alone.calibrate(inputs)
    beside.calibrate(inputs, average=lambda share: (share + beside.mask_ratio) / 2)
    assert beside.threshold == alone.threshold
    # And in the other process, which hears of the others alone.
    other = create_masking("cluster")
    heard = []
    damaged = dataclasses.replace(inputs, pixels=torch.full_like(inputs.pixels, torch.nan))
    other.calibrate(damaged, average=lambda share: heard.append(share) or 0.5)
    assert set(heard) == {0.0, other.mask_ratio}


def test_a_ratio_below_the_default_bound_takes_its_place():
    strategy = create_masking("cluster", mask_ratio=0.2)
    assert strategy.mask_ratio_min == 0.2
    assert create_masking("cluster", mask_ratio=0.4).mask_ratio_min == 0.3


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_at_a_ratio_of_0_whole_images_stay(threshold):
    strategy = create_masking("cluster", mask_ratio=0.5, threshold=threshold)
    strategy.set_mask_ratio(0.0)
    for each in (strategy, create_masking("cluster", mask_ratio=0.0, threshold=threshold)):
        assert each(make_inputs()).kept_counts().tolist() == [49, 49]


def test_a_schedule_from_0_leaves_the_counts_free():
    strategy = create_masking("cluster", mask_ratio=0.0)
    strategy.set_mask_ratio(0.5)
    inputs = make_inputs(12, grid_size=(10, 10), noise=noise_like(12, 100))
    strategy.calibrate(inputs)
    assert mean_ratio(strategy, inputs) == pytest.approx(0.5, abs=0.01)
    assert len(strategy(inputs).kept_counts().unique()) > 2


def test_a_threshold_of_ones_own_is_never_calibrated():
    strategy = create_masking("cluster", threshold=0.4)
    assert not strategy.needs_calibration(0.0)
    strategy.set_mask_ratio(0.6)
    assert strategy.threshold == 0.4


def test_state_restores_threshold_and_what_is_left_to_calibrate():
    first = calibrated(create_masking("cluster"), times=NUM_BATCHES)
    calibrated(first, progress=0.25, times=3)
    again = create_masking("cluster")
    again.load_state(json.loads(json.dumps(first.state())))
    assert again.threshold == first.threshold
    assert again.state() == first.state()
    assert again.state()["progress"] == [0.0, 0.25]
    assert again.needs_calibration(0.25)
    calibrated(again, progress=0.25, times=NUM_BATCHES - 3)
    assert not again.needs_calibration(0.25)


def test_the_state_before_calibration_restores_the_default():
    strategy = create_masking("cluster")
    strategy.load_state(strategy.state())
    assert strategy.threshold == default_threshold(0.5)


@pytest.mark.parametrize("state", [{"threshold": 0.4}, {"thresholds": [0.4], "progress": []}])
def test_anything_else_is_no_state(state):
    with pytest.raises(ValueError, match="the state of a threshold must hold lists of one length"):
        create_masking("cluster").load_state(state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thresholds", math.nan),
        ("thresholds", "a"),
        ("thresholds", 2.0),
        ("mask_ratios", math.inf),
        ("mask_ratios", -0.1),
        ("progress", None),
        ("progress", [0.5]),
        ("num_batches", -5),
        ("num_batches", True),
        ("num_batches", 10**400),
    ],
)
def test_a_state_of_other_numbers_is_refused_and_changes_nothing(name, value):
    strategy = calibrated(create_masking("cluster"))
    before = strategy.state()
    with pytest.raises(ValueError, match=f"^{name} of the state must be in "):
        strategy.load_state({**before, name: [value]})
    assert strategy.state() == before


@pytest.mark.parametrize(
    ("name", "options"),
    [("pgs", {}), ("pgs", {"mask_ratio_min": 0.3}), ("cluster", {"threshold": 0.4})],
)
def test_a_strategy_that_training_does_not_fit_stays_as_it_is(name, options):
    strategy = create_masking(name, **options)
    before = strategy.threshold
    assert strategy.calibrate(make_inputs(4)) is False
    assert strategy.threshold == before
    assert not strategy.state() or strategy.state() == create_masking(name, **options).state()


def test_the_default_threshold_joins_its_points():
    for mask_ratio, threshold in DEFAULT_THRESHOLDS:
        assert default_threshold(mask_ratio) == pytest.approx(threshold)
    (start, low), (end, high) = DEFAULT_THRESHOLDS[2:4]
    assert default_threshold((start + end) / 2) == pytest.approx((low + high) / 2)
    assert default_threshold(0.0) == 1.0
    assert default_threshold(0.99) == DEFAULT_THRESHOLDS[-1][1]


def test_an_object_on_a_smooth_slope_is_kept_in_good_part():
    image, foreground = square_on_gradient()
    is_object = patchify(foreground[None, None].float(), (8, 8))[0].mean(dim=1) > 0.5
    inputs = PatchInputs(image.expand(20, -1, -1, -1), 8, noise=noise_like(20, 196))
    strategy = create_masking("cluster")
    strategy.calibrate(inputs)
    kept = kept_patches(strategy(inputs), 196)[:, is_object].float().mean()
    assert kept > 0.8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1\.0"),
        (
            {"mask_ratio": 0.2, "mask_ratio_min": 0.3},
            r"mask_ratio_min must not exceed mask_ratio = 0\.2, got 0\.3",
        ),
        ({"anchor_ratio": 0.0}, r"anchor_ratio must be in \(0, 1\], got 0\.0"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("cluster", **options)


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
