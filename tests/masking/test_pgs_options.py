"""PGS beyond the paper's defaults: edge detectors, neighbourhoods and the centre."""

import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, create_masking, pgs_scores, sinkhorn_plan
from clip_pgs.masking.canny import canny_edges
from clip_pgs.masking.patches import kept_patches
from clip_pgs.masking.pgs_masking import CENTER_SHIFTS, calibrated_threshold
from masking import oracle
from support.images import make_inputs, smooth_images

CANDIDATES = torch.tensor([[3, 30, 11], [8, 0, 20]])


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
def test_scores_within_a_neighbourhood_equal_a_slow_float64_loop(reach, transport, progress):
    inputs = make_inputs(2, grid_size=(7, 5), progress=progress)
    scores = pgs_scores(inputs, CANDIDATES, neighbourhood=reach, transport=transport).numpy()
    for i in range(2):
        expected = slow_scores(inputs, i, transport=transport, reach=reach, columns=5)
        reached = np.isfinite(expected)
        assert 0 < reached.sum() < 35 or reach == 3
        assert np.abs(scores[i] - expected)[reached].max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"edge_weight": 3.0}, {"center_weight": 5.0}])
def test_patches_that_no_candidate_reaches_score_lowest(options):
    inputs = make_inputs(2, grid_size=(7, 5))
    scores = pgs_scores(inputs, CANDIDATES, neighbourhood=1, **options)
    assert torch.isfinite(scores).all()
    for i in range(2):
        reached = np.isfinite(slow_scores(inputs, i, reach=1, columns=5))
        assert scores[i, ~reached].max() < scores[i, reached].min()


def test_a_neighbourhood_as_large_as_the_image_changes_nothing():
    inputs = make_inputs(2, grid_size=(7, 5))
    difference = pgs_scores(inputs, CANDIDATES, neighbourhood=6) - pgs_scores(inputs, CANDIDATES)
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
        "pgs", mask_ratio=4 / 49, candidate_ratio=0.01, neighbourhood=1, edges=False
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
    stated = create_masking("pgs", threshold=0.42 - 0.205, **options)(inputs).kept_counts()
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
        ({"neighbourhood": -1}, "neighbourhood must be in .*, got -1"),
        ({"neighbourhood": 1.5}, r"neighbourhood (must be|takes) a whole number.*, got 1\.5"),
        (
            {"neighbourhood": 1, "solver": "pot"},
            "neighbourhood goes with solver='log', got solver='pot'",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs", **options)
    with pytest.raises(ValueError, match=sentence):
        pgs_scores(make_inputs(2, grid_size=(7, 5)), CANDIDATES, **options)
