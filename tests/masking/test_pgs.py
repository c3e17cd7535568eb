import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_pgs import PatchInputs, PatchSelection, create_masking, pgs_scores, sinkhorn_plan
from clip_pgs.masking.edges import canny_edges
from clip_pgs.masking.pgs import CALIBRATED_THRESHOLDS, CENTER_SHIFTS, calibrated_threshold
from clip_pgs.masking.sampling import kept_patches, patchify
from clip_pgs.masking.strategy import interpolate
from masking import oracle
from support.images import make_inputs, smooth_images, square_on_gradient


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ratio_min", [None, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_selection_equals_a_slow_float64_loop(progress, ratio_min, share):
    noise = torch.rand(2, 70, generator=torch.Generator().manual_seed(1))
    inputs = make_inputs(2, grid_size=(7, 10), noise=noise, progress=progress)
    options = {"mask_ratio": 0.5, "mask_ratio_min": ratio_min, "random_share": share}
    selection = create_masking("pgs", **options)(inputs)
    kept = kept_patches(selection, 70)
    for i in range(2):
        image = inputs.pixels[i].double().numpy()
        candidates = oracle.candidates(noise[i], oracle.edge_map(image, 8), protection=4.0, count=4)
        scores = oracle.scores(
            image, inputs.tokens[i].double().numpy(), candidates, patch_size=8, progress=progress
        )
        expected = oracle.kept(
            scores,
            candidates,
            ratio_max=0.5,
            ratio_min=0.5 if ratio_min is None else ratio_min,
            threshold=calibrated_threshold(progress, num_patches=70),
            random_share=share,
            noise=noise[i],
        )
        assert kept[i].nonzero().flatten().tolist() == expected


def test_equal_bounds_mean_a_fixed_count():
    inputs = make_inputs(3)
    fixed = create_masking("pgs", mask_ratio=0.4, mask_ratio_min=0.4)
    assert fixed(inputs).valid is None
    assert fixed(inputs).index.shape == (3, 30)


def test_a_higher_threshold_masks_fewer():
    inputs = make_inputs(4, noise=torch.rand(4, 49, generator=torch.Generator().manual_seed(0)))
    counts = [
        create_masking("pgs", mask_ratio=0.9, mask_ratio_min=0.0, threshold=threshold)(
            inputs
        ).kept_counts()
        for threshold in (-0.5, 0.2, 0.9)
    ]
    assert (counts[0] <= counts[1]).all()
    assert (counts[1] <= counts[2]).all()
    assert counts[0].sum() < counts[2].sum()


def test_the_calibrated_threshold_joins_its_points():
    for progress, threshold in CALIBRATED_THRESHOLDS:
        assert calibrated_threshold(progress) == pytest.approx(threshold)
    (start, low), (end, high) = CALIBRATED_THRESHOLDS[:2]
    assert calibrated_threshold((start + end) / 2) == pytest.approx((low + high) / 2)


def test_the_calibrated_threshold_goes_with_the_grid_and_stays_what_it_was_on_14_by_14():
    for progress in torch.linspace(0, 1, 41).tolist():
        before = interpolate(CALIBRATED_THRESHOLDS, progress) - interpolate(CENTER_SHIFTS, 0.0)
        assert calibrated_threshold(progress, num_patches=196) == before
        # 8 times the patches leave half the distance from 1, at the end less.
        left = [1 - calibrated_threshold(progress, num_patches=n) for n in (90, 196, 720)]
        assert left[1] / left[2] == pytest.approx((720 / 196) ** (1 / 3))
        exponent = 1 / 3 + max(progress - 0.5, 0) * 2 / 7
        assert left[0] / left[1] == pytest.approx((196 / 90) ** exponent)
        for beyond, end in ((4, 49), (4096, 729)):
            assert calibrated_threshold(progress, num_patches=beyond) == calibrated_threshold(
                progress, num_patches=end
            )


@pytest.mark.parametrize("size", [(56, 56), (112, 112), (216, 216)])
def test_without_a_threshold_each_grid_follows_its_own(size):
    images = torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(0)).cumsum(3)
    count = size[0] * size[1] // 64
    noise = torch.rand(6, count, generator=torch.Generator().manual_seed(0))
    inputs = PatchInputs(images, 8, noise=noise)
    bounds = {"mask_ratio": 0.9, "mask_ratio_min": 0.0}
    stated = {"threshold": calibrated_threshold(0.0, num_patches=count)}
    implied = create_masking("pgs", **bounds)(inputs).kept_counts()
    assert torch.equal(implied, create_masking("pgs", **bounds, **stated)(inputs).kept_counts())
    assert implied.min() < count


def mean_ratio(strategy, inputs):
    return 1 - strategy(inputs).kept_counts().float().mean().item() / inputs.num_patches


def calibrated(strategy, inputs):
    """Show a strategy the same batch until it asks for no more."""
    while strategy.needs_calibration(inputs.progress):
        strategy.calibrate(inputs)
    return strategy


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("target", [0.35, 0.45])
def test_training_finds_the_threshold_of_a_mean_ratio(progress, target):
    noise = torch.rand(8, 49, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(8, noise=noise, progress=progress)
    bounds = {"mask_ratio": 0.5, "mask_ratio_min": 0.3}
    strategy = create_masking("pgs", mask_ratio_mean=target, **bounds)
    assert torch.equal(strategy(inputs).index, create_masking("pgs", **bounds)(inputs).index)
    calibrated(strategy, inputs)
    assert mean_ratio(strategy, inputs) == pytest.approx(target, abs=0.01)
    ratios = 1 - strategy(inputs).kept_counts() / 49
    assert len(ratios.unique()) > 2
    again = create_masking("pgs", mask_ratio_mean=target, **bounds)
    again.load_state(json.loads(json.dumps(strategy.state())))
    assert torch.equal(again(inputs).index, strategy(inputs).index)
    assert not again.needs_calibration(progress)


@pytest.mark.parametrize(
    "options", [{"center_weight": 2.0}, {"edge_weight": 4.0}, {"neighborhood": 1}]
)
def test_training_finds_thresholds_as_low_as_the_weights_make_scores(options, caplog):
    noise = torch.rand(8, 196, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(8, grid_size=(14, 14), patch_size=4, noise=noise)
    bounds = {"mask_ratio": 0.99, "mask_ratio_min": 0.1, "mask_ratio_mean": 0.97}
    strategy = calibrated(create_masking("pgs", **bounds, **options), inputs)
    assert mean_ratio(strategy, inputs) == pytest.approx(0.97, abs=0.01)
    assert caplog.text == ""
    again = create_masking("pgs", **bounds, **options)
    again.load_state(strategy.state())
    assert again.threshold == strategy.threshold


def test_the_mean_ratio_follows_a_schedule():
    inputs = make_inputs(8, noise=torch.rand(8, 49, generator=torch.Generator().manual_seed(0)))
    strategy = create_masking("pgs", mask_ratio=0.5, mask_ratio_min=0.3, mask_ratio_mean=0.4)
    calibrated(strategy, inputs).set_mask_ratio(0.25)
    assert strategy.needs_calibration(0.0)
    assert mean_ratio(calibrated(strategy, inputs), inputs) == pytest.approx(0.2, abs=0.01)


def test_without_a_mean_ratio_training_finds_nothing():
    strategy = create_masking("pgs", mask_ratio=0.5, mask_ratio_min=0.3)
    assert not strategy.needs_calibration(0.0)
    assert strategy.state() == {}


def test_an_object_on_a_smooth_slope_is_kept():
    image, foreground = square_on_gradient()
    is_object = patchify(foreground[None, None].float(), (8, 8))[0].mean(dim=1) > 0.5
    strategy = create_masking("pgs", mask_ratio=0.5)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        selection = strategy(PatchInputs(image, 8), generator=generator)
        assert kept_patches(selection, 196)[0][is_object].float().mean() == 1.0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio_mean": 0.4}, r"mask_ratio_mean must be in \[0\.5, 0\.5\], got 0\.4"),
        (
            {"mask_ratio_mean": 0.4, "mask_ratio_min": 0.3, "threshold": 0.2},
            "mask_ratio_mean needs .* no threshold, got .*threshold=0.2",
        ),
        ({"mask_ratio_min": -0.1}, r"mask_ratio_min must be in \[0, 1\), got -0.1"),
        (
            {"mask_ratio": 0.3, "mask_ratio_min": 0.5},
            "mask_ratio_min must not exceed mask_ratio = 0.3, got 0.5",
        ),
        ({"candidate_ratio": 0.0}, r"candidate_ratio must be in \(0, 1\], got 0.0"),
        ({"edge_protection": -1}, "edge_protection must be in .*, got -1"),
        ({"edge_weight": -1}, "edge_weight must be in .*, got -1"),
        ({"temperature": 0}, "temperature must be in .*, got 0"),
        ({"num_iters": 0}, "num_iters must be in .*, got 0"),
        ({"solver": "emd"}, "solver must be one of log, pot, got 'emd'"),
        ({"random_share": 1.1}, r"random_share must be in \[0, 1\], got 1.1"),
        ({"random_images": 2}, r"random_images must be in \[0, 1\], got 2"),
        ({"random_share_end": -0.1}, r"random_share_end must be in \[0, 1\], got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs", **options)


GRID = (7, 5)
BORDER = [j for j in range(35) if j // 5 in (0, 6) or j % 5 in (0, 4)]


@pytest.mark.parametrize(("num_patches", "expected"), [(196, 10), (64, 3), (8, 1), (4, 1)])
def test_candidates_are_five_percent_and_at_least_one(num_patches, expected):
    # With transport and edges off and a threshold above every score, candidates alone are masked.
    strategy = create_masking(
        "pgs", mask_ratio=0.9, mask_ratio_min=0.0, edges=False, transport=False, threshold=2.0
    )
    inputs = PatchInputs(torch.randn(3, 3, 4, 4 * num_patches), 4)
    assert (num_patches - strategy(inputs).kept_counts()).tolist() == [expected] * 3


def candidate_frequency(**options):
    strategy = create_masking(
        "pgs", mask_ratio=0.9, mask_ratio_min=0.0, threshold=9.0, candidate_ratio=0.1, **options
    )
    image = smooth_images(1, height=32, width=40)
    noise = torch.rand(3000, 20, generator=torch.Generator().manual_seed(0))
    selection = strategy(PatchInputs(image.expand(3000, -1, -1, -1), 8, noise=noise))
    drawn = ~kept_patches(selection, 20)
    return drawn.float().mean(dim=0).numpy(), oracle.edge_map(image[0].double().numpy(), 8)


def test_without_protection_candidates_are_uniform():
    frequency, _ = candidate_frequency(edge_protection=0.0)
    # Binomial standard deviation 0.0055; four of them.
    np.testing.assert_allclose(frequency, 0.1, atol=0.022)


def test_strong_edges_are_rarely_candidates():
    frequency, edges = candidate_frequency()
    assert frequency[edges.argmax()] < 0.02
    assert frequency[edges.argmin()] > 0.1


def test_without_edges_candidates_are_uniform_whatever_the_protection():
    frequency, _ = candidate_frequency(edges=False, edge_protection=50.0)
    np.testing.assert_allclose(frequency, 0.1, atol=0.022)


def inputs_with_noise(**changes):
    noise = torch.rand(2, 35, generator=torch.Generator().manual_seed(4))
    return make_inputs(2, grid_size=GRID, noise=noise, **changes)


def border_candidates(inputs, **options):
    strategy = create_masking("pgs", candidate_region="border", **options)
    return strategy.steps(inputs, inputs.noise).candidate_index


@pytest.mark.parametrize("protection", [0.0, 4.0, 50.0])
@pytest.mark.parametrize(("ratio", "count"), [(0.02, 1), (0.2, 7), (0.4, 14), (0.7, 24), (1, 35)])
def test_candidates_of_the_border_equal_a_slow_loop_and_others_follow(ratio, count, protection):
    # 20 of the 35 patches lie on the border.
    inputs = inputs_with_noise()
    found = border_candidates(inputs, candidate_ratio=ratio, edge_protection=protection)
    for i in range(2):
        edges = oracle.edge_map(inputs.pixels[i].double().numpy(), 8)
        expected = oracle.candidates(
            inputs.noise[i], edges, protection=protection, count=count, places=BORDER
        )
        assert sorted(found[i].tolist()) == sorted(expected)
        assert (set(expected) <= set(BORDER)) == (count <= 20)


def test_the_luckiest_patch_inside_comes_after_the_unluckiest_of_the_border():
    # The largest and the smallest number that a float32 draw gives.
    inputs = make_inputs(1, grid_size=GRID, noise=torch.full((1, 35), 1 - 2**-24))
    inputs.noise[0, BORDER] = 0.0
    options = {"candidate_ratio": 20 / 35, "edge_protection": 30.0, "center_weight": 3.0}
    assert sorted(border_candidates(inputs, **options)[0].tolist()) == BORDER


def test_every_patch_of_the_border_is_as_likely_without_protection():
    noise = torch.rand(4000, 35, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(1, grid_size=GRID)
    pixels = inputs.pixels.expand(4000, -1, -1, -1)
    found = border_candidates(PatchInputs(pixels, 8, noise=noise), edges=False, candidate_ratio=0.1)
    frequency = torch.bincount(found.flatten(), minlength=35) / 4000
    # Four of 20; binomial standard deviation 0.0063.
    expected = [0.2 if j in BORDER else 0.0 for j in range(35)]
    np.testing.assert_allclose(frequency, expected, atol=0.026)


def test_on_a_single_row_every_patch_is_on_the_border():
    inputs = make_inputs(3, grid_size=(1, 12))
    chosen = [
        create_masking("pgs", candidate_ratio=0.3, candidate_region=region)(
            inputs, generator=torch.Generator().manual_seed(1)
        )
        for region in ("border", "image")
    ]
    assert torch.equal(chosen[0].index, chosen[1].index)


def test_candidates_of_the_border_are_masked_first():
    inputs = inputs_with_noise()
    kept = kept_patches(
        create_masking("pgs", mask_ratio=0.2, candidate_ratio=0.2, candidate_region="border")(
            inputs
        ),
        35,
    )
    drawn = border_candidates(inputs, candidate_ratio=0.2)
    assert kept.sum(dim=1).tolist() == [28, 28]
    assert not kept.gather(1, drawn).any()


def test_an_unknown_region_is_refused():
    sentence = "candidate_region must be one of image, border, got 'edge'"
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs", candidate_region="edge")


CANDIDATES = torch.tensor([[3, 30, 11], [8, 0, 20]])
ABLATIONS = {
    "whole": {},
    "no edges": {"edges": False},
    "no transport": {"transport": False},
    "neither": {"edges": False, "transport": False},
    "sharp": {"temperature": 0.05, "num_iters": 20},
    "heavy edges": {"edge_weight": 1.5},
}


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", list(ABLATIONS.values()), ids=list(ABLATIONS))
def test_scores_equal_a_slow_float64_loop(options, progress):
    inputs = make_inputs(2, grid_size=(7, 5), progress=progress)
    scores = pgs_scores(inputs, CANDIDATES, **options)
    for i in range(2):
        expected = oracle.scores(
            inputs.pixels[i].double().numpy(),
            inputs.tokens[i].double().numpy(),
            CANDIDATES[i].tolist(),
            patch_size=8,
            progress=progress,
            **options,
        )
        assert np.abs(scores[i].numpy() - expected).max() <= 1e-4


def test_the_pot_solver_gives_the_same_scores():
    inputs = make_inputs(2, grid_size=(7, 5))
    difference = pgs_scores(inputs, CANDIDATES, solver="pot") - pgs_scores(inputs, CANDIDATES)
    assert difference.abs().max() <= 1e-4


def test_tokens_play_no_part_before_training():
    inputs = make_inputs(2, grid_size=(7, 5))
    without = PatchInputs(inputs.pixels, 8)
    assert torch.equal(pgs_scores(inputs, CANDIDATES), pgs_scores(without, CANDIDATES))


def test_tokens_are_needed_once_training_runs():
    inputs = PatchInputs(torch.zeros(2, 3, 56, 40), 8, progress=0.25)
    with pytest.raises(ValueError, match="pgs needs tokens once progress > 0"):
        pgs_scores(inputs, CANDIDATES)


@pytest.mark.parametrize(
    ("candidates", "sentence"),
    [
        (CANDIDATES + 35, r"in \[0, N\) with N = 35, got"),
        (CANDIDATES - 35, r"in \[0, N\) with N = 35, got"),
        (CANDIDATES.float(), "int64, got .*float32"),
        (CANDIDATES[:1], "with B = 2 and K >= 1"),
        (CANDIDATES[:, :0], "with B = 2 and K >= 1"),
        (CANDIDATES[:, [0, 1, 0]], "of which no two in a row are alike"),
        ([0], "int64, got list"),
    ],
)
def test_candidates_that_are_none_are_refused(candidates, sentence):
    with pytest.raises(ValueError, match=f"pgs_scores needs a candidate_index .*{sentence}"):
        pgs_scores(make_inputs(2, grid_size=(7, 5)), candidates)


@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 3, 32, 32)], ids=["None", "pixels"])
def test_pixels_alone_are_no_inputs(inputs):
    for use in (create_masking("pgs"), lambda inputs: pgs_scores(inputs, CANDIDATES)):
        with pytest.raises(ValueError, match=r"^inputs must be PatchInputs, got "):
            use(inputs)


def test_candidates_are_not_lifted():
    assert pgs_scores(make_inputs(2, grid_size=(7, 5)), CANDIDATES).max() <= 1.0 + 1e-5


def slow_scores(inputs, i, **options):
    return oracle.scores(
        inputs.pixels[i].double().numpy(),
        inputs.tokens[i].double().numpy(),
        CANDIDATES[i].tolist(),
        patch_size=8,
        progress=inputs.progress,
        **options,
    )


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("reach", [0, 1, 2, 3])
def test_scores_within_a_neighborhood_equal_a_slow_float64_loop(reach, transport, progress):
    inputs = make_inputs(2, grid_size=(7, 5), progress=progress)
    scores = pgs_scores(inputs, CANDIDATES, neighborhood=reach, transport=transport).numpy()
    for i in range(2):
        expected = slow_scores(inputs, i, transport=transport, reach=reach, columns=5)
        reached = np.isfinite(expected)
        assert 0 < reached.sum() < 35 or reach == 3
        assert np.abs(scores[i] - expected)[reached].max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"edge_weight": 3.0}, {"center_weight": 5.0}])
def test_patches_that_no_candidate_reaches_score_lowest(options):
    inputs = make_inputs(2, grid_size=(7, 5))
    scores = pgs_scores(inputs, CANDIDATES, neighborhood=1, **options)
    assert torch.isfinite(scores).all()
    for i in range(2):
        reached = np.isfinite(slow_scores(inputs, i, reach=1, columns=5))
        assert scores[i, ~reached].max() < scores[i, reached].min()


def test_a_neighborhood_as_large_as_the_image_changes_nothing():
    inputs = make_inputs(2, grid_size=(7, 5))
    difference = pgs_scores(inputs, CANDIDATES, neighborhood=6) - pgs_scores(inputs, CANDIDATES)
    assert difference.abs().max() <= 1e-6


def test_a_plan_moves_nothing_where_pairs_are_forbidden():
    scores = torch.rand(1, 3, 8, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 4:] = scores[0, 1:, :2] = scores[0, :, 7] = -torch.inf
    plan = sinkhorn_plan(scores)[0]
    assert (plan[torch.isinf(scores[0])] == 0).all()
    torch.testing.assert_close(8 * plan.sum(dim=0), torch.tensor([1.0] * 7 + [0.0]))


def test_a_row_without_any_pair_stays_empty():
    scores = torch.zeros(1, 2, 4)
    scores[0, 0] = -torch.inf
    expected = torch.tensor([[0.0] * 4, [0.25] * 4])
    torch.testing.assert_close(sinkhorn_plan(scores)[0], expected)


def test_the_first_patches_to_go_lie_around_the_candidates():
    # One candidate of 49 with a reach of 1: nine patches at most resemble it, and they go first.
    strategy = create_masking(
        "pgs", mask_ratio=4 / 49, candidate_ratio=0.01, neighborhood=1, edges=False
    )
    masked = ~kept_patches(strategy(make_inputs(20)), 49).reshape(20, 7, 7)
    for image in masked.numpy():
        rows, columns = np.nonzero(image)
        assert len(rows) == 4
        assert np.ptp(rows) <= 2
        assert np.ptp(columns) <= 2


@pytest.mark.parametrize("edges", [True, False])
def test_the_centre_takes_its_gaussian_off_the_score(edges):
    inputs = make_inputs(2, grid_size=(7, 5))
    plain = pgs_scores(inputs, CANDIDATES, edges=edges)
    scores = pgs_scores(inputs, CANDIDATES, edges=edges, center_weight=0.7)
    for j in range(35):
        y, x = (j // 5 + 0.5) / 7 - 0.5, (j % 5 + 0.5) / 5 - 0.5
        expected = 0.7 * np.exp(-(x * x + y * y) / (2 * 0.2**2))
        assert (plain[:, j] - scores[:, j]).tolist() == pytest.approx([expected] * 2, abs=1e-5)


def test_a_protected_centre_draws_fewer_candidates():
    # Candidates alone are masked where the threshold lies above every score.
    strategy = create_masking(
        "pgs", mask_ratio=0.9, mask_ratio_min=0.0, threshold=9.0, edges=False, center_weight=1.0
    )
    pixels = smooth_images(1).expand(2000, -1, -1, -1)
    noise = torch.rand(2000, 49, generator=torch.Generator().manual_seed(0))
    drawn = ~kept_patches(strategy(PatchInputs(pixels, 8, noise=noise)), 49)
    frequency = drawn.float().mean(dim=0).reshape(7, 7)
    assert frequency[3, 3] < 0.005
    assert frequency[0, 0] > 0.05


def test_a_centre_weight_keeps_more_of_the_middle():
    inputs = make_inputs(20, noise=torch.rand(20, 49, generator=torch.Generator().manual_seed(0)))
    shares = []
    for weight in (0.0, 0.5, 2.0):
        kept = kept_patches(create_masking("pgs", center_weight=weight)(inputs), 49)
        shares.append(kept.reshape(20, 7, 7)[:, 2:5, 2:5].float().mean().item())
    assert shares == sorted(shares)
    assert shares[2] > 0.95


def test_the_adaptive_threshold_follows_the_centre_weight():
    assert calibrated_threshold(0.5, center_weight=0.0) == calibrated_threshold(0.5)
    for weight, shift in CENTER_SHIFTS:
        assert calibrated_threshold(1.0, center_weight=weight) == pytest.approx(0.73 - shift)
    options = {"mask_ratio": 0.9, "mask_ratio_min": 0.0, "center_weight": 1.0}
    inputs = make_inputs(4, noise=torch.rand(4, 49, generator=torch.Generator().manual_seed(0)))
    implied = create_masking("pgs", **options)(inputs).kept_counts()
    expected = calibrated_threshold(0.0, num_patches=49) - 0.205
    stated = create_masking("pgs", threshold=expected, **options)(inputs).kept_counts()
    assert implied.tolist() == stated.tolist()


def test_canny_takes_the_place_of_sobel_in_the_score():
    inputs = make_inputs(2, grid_size=(7, 5))
    difference = pgs_scores(inputs, CANDIDATES, edges=False) - pgs_scores(
        inputs, CANDIDATES, edge_detector="canny"
    )
    torch.testing.assert_close(difference, 0.5 * canny_edges(inputs.pixels, 8))


def test_canny_protects_candidates_too():
    strategy = create_masking(
        "pgs",
        mask_ratio=0.9,
        mask_ratio_min=0.0,
        threshold=9.0,
        edge_detector="canny",
        edge_protection=50.0,
        candidate_ratio=0.1,
    )
    image = smooth_images(1)
    noise = torch.rand(500, 49, generator=torch.Generator().manual_seed(0))
    selection = strategy(PatchInputs(image.expand(500, -1, -1, -1), 8, noise=noise))
    drawn = (~kept_patches(selection, 49)).any(dim=0)
    assert not drawn[canny_edges(image, 8)[0] > 0.5].any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"edge_detector": "prewitt"}, "edge_detector must be one of sobel, canny, got 'prewitt'"),
        ({"center_weight": -1}, "center_weight must be in .*, got -1"),
        ({"neighborhood": -1}, "neighborhood must be in .*, got -1"),
        ({"unknown": 1}, "masking 'pgs' has no option 'unknown'; it takes mask_ratio, "),
        ({"edges": "no"}, "edges takes true or false, got 'no'"),
        ({"neighborhood": 1.5}, r"neighborhood (must be|takes) a whole number.*, got 1\.5"),
        (
            {"neighborhood": 1, "solver": "pot"},
            "neighborhood goes with solver='log', got solver='pot'",
        ),
    ],
)
def test_options_that_scores_cannot_use_are_refused_there_too(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs", **options)
    with pytest.raises(ValueError, match=sentence):
        pgs_scores(make_inputs(2, grid_size=(7, 5)), CANDIDATES, **options)


def kept_frequency(**options):
    """Return how often each patch of one image stays, over 4000 draws."""
    noise = torch.rand(4000, 49, generator=torch.Generator().manual_seed(6))
    inputs = PatchInputs(smooth_images(1).expand(4000, -1, -1, -1), 8, noise=noise)
    strategy = create_masking("pgs", mask_ratio=0.75, **options)
    return kept_patches(strategy(inputs), 49).float().mean(dim=0).numpy()


def test_all_at_random_keeps_every_patch_as_often_and_half_shows_each_now_and_then():
    # 13 of 49 stay; binomial standard deviation 0.007, five of them.
    np.testing.assert_allclose(kept_frequency(random_share=1.0), 13 / 49, atol=0.035)
    assert kept_frequency().min() < 0.03
    # Six of the others, fewer than 43, come back.
    assert kept_frequency(random_share=0.5).min() > 6 / 43 - 0.035


@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["fixed", "adaptive"])
def test_a_random_share_keeps_as_many_patches(options):
    inputs = make_inputs(4, noise=torch.rand(4, 49, generator=torch.Generator().manual_seed(0)))
    counts = [
        create_masking("pgs", random_share=share, **options)(inputs).kept_counts().tolist()
        for share in (0.0, 0.5, 1.0)
    ]
    assert counts[0] == counts[1] == counts[2]


def test_a_random_share_goes_to_its_end_over_training_in_five_levels():
    noise = torch.rand(2, 49, generator=torch.Generator().manual_seed(0))
    strategy = create_masking("pgs", random_share=1.0, random_share_end=0.2)
    for progress, share in ((0.0, 1.0), (0.19, 1.0), (0.2, 0.8), (0.5, 0.6), (0.9, 0.2)):
        inputs = make_inputs(2, noise=noise, progress=progress)
        constant = create_masking("pgs", random_share=share)
        assert torch.equal(strategy(inputs).index, constant(inputs).index)


def test_a_share_of_the_images_is_kept_at_random_and_the_others_as_without():
    noise = torch.rand(4000, 49, generator=torch.Generator().manual_seed(7))
    images = smooth_images(4).repeat(1000, 1, 1, 1)
    indices = [
        create_masking("pgs", mask_ratio=0.75, **options)(PatchInputs(images, 8, noise=noise)).index
        for options in ({}, {"random_share": 1.0}, {"random_images": 0.3}, {"random_images": 1.0})
    ]
    as_pgs, as_random, mixed, all_random = indices
    assert torch.equal(all_random, as_random)
    is_random = (mixed == as_random).all(dim=1)
    assert (is_random != (mixed == as_pgs).all(dim=1)).all()
    # Binomial standard deviation 0.007, five of them; of the draw itself it tells nothing.
    assert is_random.float().mean().item() == pytest.approx(0.3, abs=0.036)
    kept = kept_patches(PatchSelection(mixed[is_random]), 49).float().mean(dim=0)
    np.testing.assert_allclose(kept.numpy(), 13 / 49, atol=5 * 0.0128)


def test_random_images_keep_as_many_patches_where_the_count_adapts():
    inputs = make_inputs(8, noise=torch.rand(8, 49, generator=torch.Generator().manual_seed(0)))
    plain, mixed = (
        create_masking("pgs", mask_ratio_min=0.3, random_images=share)(inputs).kept_counts()
        for share in (0.0, 1.0)
    )
    assert torch.equal(plain, mixed)


def test_the_released_code_has_no_random_share():
    with pytest.raises(ValueError, match="cluster, pgs would take 'random_share'"):
        create_masking("pgs-released", random_share=0.5)


NUM_PATCHES, NUM_CANDIDATES = 169, 8  # 13 x 13 patches, 5 percent of them


class RecordShapes(TorchDispatchMode):
    """Keep the shape of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["fixed", "adaptive"])
def test_no_tensor_pairs_patches_with_patches(options, progress):
    pixels = smooth_images(2, height=52, width=52)
    tokens = torch.randn(2, NUM_PATCHES, 24, generator=torch.Generator().manual_seed(0))
    with RecordShapes() as record:
        create_masking("pgs", **options)(PatchInputs(pixels, 4, tokens=tokens, progress=progress))
    assert (2, NUM_CANDIDATES, NUM_PATCHES) in record.shapes
    assert not [shape for shape in record.shapes if shape.count(NUM_PATCHES) > 1]
