import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.patches import kept_patches, patchify
from clip_pgs.masking.pgs_masking import CALIBRATED_THRESHOLDS, calibrated_threshold
from masking import oracle
from support.images import make_inputs, square_on_gradient


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ratio_min", [None, 0.3])
def test_the_selection_equals_a_slow_float64_loop(progress, ratio_min):
    noise = torch.rand(2, 70, generator=torch.Generator().manual_seed(1))
    inputs = make_inputs(2, grid_size=(7, 10), noise=noise, progress=progress)
    selection = create_masking("pgs", mask_ratio=0.5, mask_ratio_min=ratio_min)(inputs)
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
            threshold=calibrated_threshold(progress),
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
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs", **options)
