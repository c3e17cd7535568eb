import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from clip_pgs import MaskingStrategy, PatchInputs, create_masking, sinkhorn_plan
from clip_pgs.masking.pgs_released import NUM_BALANCING_PASSES, balance
from masking import oracle
from support.images import make_inputs


def noise_like(batch_size, num_patches, *, seed=0):
    return torch.rand(batch_size, num_patches, generator=torch.Generator().manual_seed(seed))


def slow_balance(matrix):
    """Divide by column and row sums, both taken first, in loops over float64."""
    matrix = matrix.copy()
    for _ in range(NUM_BALANCING_PASSES):
        column_sums = [sum(matrix[:, j]) + 1e-3 for j in range(len(matrix))]
        row_sums = [sum(matrix[i]) + 1e-3 for i in range(len(matrix))]
        for i in range(len(matrix)):
            for j in range(len(matrix)):
                matrix[i, j] = matrix[i, j] / column_sums[j] / row_sums[i]
    return matrix


def cosines(vectors):
    unit = [vector / (math.sqrt((vector**2).sum()) + 1e-6) for vector in vectors]
    return np.array([[a @ b for b in unit] for a in unit])


def standardised(vectors):
    return [(vector - vector.mean()) / (vector.std(ddof=1) + 1e-6) for vector in vectors]


def kept_by_hand(inputs, i, *, share, threshold, transport, ratio_min, candidate_ratio):
    """Return the kept positions of image i without edges, by slow float64 loops."""
    noise, num_patches = inputs.noise[i].double().numpy(), inputs.num_patches
    candidates = np.argsort(noise)[int(num_patches * (1 - candidate_ratio)) :]
    patches = oracle.cut(inputs.pixels[i].double().numpy(), inputs.patch_size[0])
    similarity = (1 - share) * cosines(standardised(patches))
    similarity += share * cosines(list(inputs.tokens[i].double().numpy()))
    if transport:
        similarity = similarity + slow_balance(similarity)
    is_similar = (similarity[candidates] > threshold).any(axis=0)
    second = oracle.second_draw(inputs.noise[i])
    order = sorted(range(num_patches), key=lambda j: (is_similar[j], second[j]))
    # Nearer to the threshold, float32 may fall on its other side.
    assert np.abs(similarity[candidates] - threshold).min() > 1e-4
    return sorted(order[: int(num_patches * (1 - ratio_min))]), is_similar


def positive_inputs(*, progress=0.0):
    """Return inputs of 4 x 5 patches all alike enough that no sum comes near zero."""
    base = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))
    change = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(4))
    pixels = base.repeat(1, 4, 5) + 0.7 * change
    tokens = 2 + torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(5))
    return PatchInputs(pixels, 8, tokens=tokens, noise=noise_like(3, 20), progress=progress)


@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("threshold", [0.6, 1.01])
def test_without_edges_the_selection_equals_a_slow_float64_loop(transport, progress, threshold):
    inputs = positive_inputs(progress=progress)
    selection = create_masking(
        "pgs-released",
        mask_ratio=0.6,
        mask_ratio_min=0.4,
        threshold=threshold,
        edges=False,
        transport=transport,
        candidate_ratio=0.1,
        attention_bias=True,
    )(inputs)
    for i in range(3):
        kept, is_similar = kept_by_hand(
            inputs,
            i,
            share=progress,
            threshold=threshold,
            transport=transport,
            ratio_min=0.4,
            candidate_ratio=0.1,
        )
        assert selection.index[i].tolist() == kept
        assert selection.similar[i].tolist() == is_similar[kept].tolist()


def test_both_sums_are_taken_before_either_division():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64) - 0.2
    matrix = matrix + matrix.transpose(1, 2)
    for found, given in zip(balance(matrix), matrix, strict=True):
        np.testing.assert_allclose(found.numpy(), slow_balance(given.numpy()), rtol=1e-5)


@pytest.mark.parametrize("opposite", [Fraction(-9, 10), Fraction(-999, 1000), Fraction(1, 2)])
def test_balancing_is_no_transport_plan(opposite):
    # Rows and columns of this matrix have one sum s, and a pass makes it s / (s + 1e-3)^2: about
    # 1 / s, and s again in the next pass. Sinkhorn's scaling brings every sum to 1.
    start = total = 1 + opposite
    for _ in range(NUM_BALANCING_PASSES):
        total = (total / (total + Fraction(1, 1000)) ** 2).limit_denominator(10**15)
    matrix = torch.tensor([[[1.0, opposite], [opposite, 1.0]]], dtype=torch.float64)
    balanced = balance(matrix)
    torch.testing.assert_close(balanced, matrix * float(total / start), rtol=1e-9, atol=0)
    assert abs(balanced[0].sum(dim=0)[0].item() - 1) > 0.25
    torch.testing.assert_close(2 * sinkhorn_plan(matrix).sum(dim=1), torch.ones(1, 2))


def candidates(inputs, **options):
    """Return the candidates of each image: all that is dropped at a threshold near 1."""
    strategy = create_masking(
        "pgs-released", threshold=0.9999, mask_ratio_min=0.06, transport=False, **options
    )
    index = strategy(inputs).index.tolist()
    return [sorted(set(range(inputs.num_patches)) - set(row)) for row in index]


def released_candidates(inputs):
    """Return the candidates and the cosines of patches, computed in the released code's order.

    Its edges are what rounding left of means that are 0, so that every step counts: the colors of a
    pixel lie side by side, mean and deviation are taken apart, a convolution finds the edges.
    """
    side, (rows, columns) = inputs.patch_size[0], inputs.grid_size
    patches = inputs.pixels.reshape(-1, 3, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(len(patches), rows * columns, -1)
    mean, std = patches.mean(dim=2, keepdim=True), patches.std(dim=2, keepdim=True)
    patches = (patches - mean) / (std + 1e-6)
    gray = patches.mean(dim=2).reshape(-1, 1, rows, columns)
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    edges = torch.nn.functional.conv2d(gray, kernels, padding=1).square().sum(dim=1).sqrt()
    edges = edges.flatten(1)
    low, high = edges.amin(dim=1, keepdim=True), edges.amax(dim=1, keepdim=True)
    keys = inputs.noise + 1e6 * (edges - low) / (high - low + 1e-6)
    order = keys.argsort(dim=1, stable=True)
    unit = patches / (patches.norm(dim=2, keepdim=True) + 1e-6)
    return order[:, int(0.95 * inputs.num_patches) :], torch.bmm(unit, unit.transpose(1, 2))


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_the_released_codes_to_the_last_patch(seed):
    inputs = make_inputs(3, grid_size=(7, 7), noise=noise_like(3, 49, seed=seed))
    expected, _ = released_candidates(inputs)
    assert candidates(inputs) == expected.sort(dim=1).values.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_what_exceeds_the_threshold_is_the_released_codes_to_the_last_patch(seed):
    inputs = make_inputs(3, grid_size=(7, 7), noise=noise_like(3, 49, seed=seed))
    index, similarity = released_candidates(inputs)
    balanced = similarity
    for _ in range(50):
        sums = [balanced.sum(dim=dim, keepdim=True) + 1e-3 for dim in (1, 2)]
        balanced = balanced / sums[0] / sums[1]
    similarity = similarity + balanced
    chosen = torch.stack([one[rows] for one, rows in zip(similarity, index, strict=True)])
    # Nothing is dropped, so that the selection speaks of all patches.
    options = {"mask_ratio": 0.5, "mask_ratio_min": 0.0, "attention_bias": True}
    selection = create_masking("pgs-released", **options)(inputs)
    assert torch.equal(selection.similar, (chosen > 0.5).any(dim=1))


def test_without_edges_random_numbers_choose_the_candidates():
    inputs = [make_inputs(1, noise=noise_like(1, 49, seed=seed)) for seed in range(20)]
    assert len({tuple(candidates(one, edges=False)[0]) for one in inputs}) == 20


@pytest.mark.parametrize(("options", "expected"), [({}, 98), ({"mask_ratio_min": 0.3}, 137)])
def test_it_keeps_98_or_137_of_196_patches(options, expected):
    strategy = create_masking("pgs-released", **options)
    selection = strategy(make_inputs(2, grid_size=(14, 14)))
    assert selection.index.shape == (2, expected)
    assert selection.valid is None
    assert not strategy.keeps_different_counts()


def test_too_few_unmasked_patches_are_filled_up_with_masked_ones():
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 5, 4)
    strategy = create_masking("pgs-released", transport=False, attention_bias=True)
    selection = strategy(PatchInputs(image, 8))
    assert selection.index.shape == (1, 10)
    assert selection.similar.all()


def test_the_threshold_is_the_target_mask_ratio():
    inputs = make_inputs(4, noise=noise_like(4, 49))
    options = {"mask_ratio_min": 0.3, "transport": False}
    implied = create_masking("pgs-released", mask_ratio=0.7, **options)(inputs)
    stated = create_masking("pgs-released", threshold=0.7, **options)(inputs)
    assert torch.equal(implied.index, stated.index)


def test_the_mix_weight_is_the_epoch_over_32():
    options = {"transport": False, "mask_ratio_min": 0.3}
    short = create_masking("pgs-released", num_epochs=8, **options)
    whole = create_masking("pgs-released", **options)
    noise = noise_like(4, 49)
    quarter = whole(make_inputs(4, noise=noise, progress=0.25)).index
    assert torch.equal(short(make_inputs(4, noise=noise, progress=1.0)).index, quarter)
    assert not torch.equal(whole(make_inputs(4, noise=noise, progress=1.0)).index, quarter)


def test_the_attention_bias_is_off_unless_asked_for():
    assert not create_masking("pgs-released").attention_bias
    assert create_masking("pgs-released")(make_inputs()).similar is None
    assert create_masking("pgs-released", attention_bias=True).attention_bias
    assert not MaskingStrategy.attention_bias


def test_tokens_are_needed_once_training_runs():
    inputs = PatchInputs(torch.zeros(2, 3, 56, 40), 8, progress=0.25)
    with pytest.raises(ValueError, match="pgs-released needs tokens once progress > 0"):
        create_masking("pgs-released")(inputs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask_ratio_min": 0.6}, r"mask_ratio_min must not exceed mask_ratio = 0\.5, got 0\.6"),
        ({"candidate_ratio": 1.0}, r"candidate_ratio must be in \[0, 1\), got 1\.0"),
        ({"num_epochs": 0}, "num_epochs must be in .*, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs-released", **options)
