"""Groups of dropped patches and their means, against slow loops in float64."""

import numpy as np
import pytest
import torch

from clip_pgs import PatchSelection, create_masking, list_maskings
from clip_pgs.integrations.masked_tower import valid_mean
from clip_pgs.masking.merge import Merge, merge_tokens
from clip_pgs.masking.sampling import kept_patches
from clip_pgs.masking.strategy import masking_options
from support.images import make_inputs


def cell_of(patch, grid_size, cells):
    """Return the number of the cell that a patch lies in, by its row and its column."""
    (height, width), (rows, columns) = grid_size, cells
    row, column = divmod(patch, width)
    return int(row / height * rows + 1e-9) * columns + int(column / width * columns + 1e-9)


def merged_by_loops(tokens, kept, memberships):
    """Return the mean of each group's dropped patches, None where there are none.

    Args:
        tokens: Of one image, (N, D).
        kept: The patches that stay.
        memberships: For each group, {patch: weight}.
    """
    merged = []
    for group in memberships:
        total, weight = np.zeros(tokens.shape[1]), 0.0
        for patch, share in group.items():
            if patch not in kept:
                total += share * tokens[patch]
                weight += share
        merged.append(total / weight if weight else None)
    return merged


def check_merged(merge, selection, tokens, grid_size, memberships):
    """Compare means and empty groups with the loops; memberships are per image."""
    weights = merge.weights(selection, grid_size)
    merged = merge_tokens(tokens, weights)
    num_patches = grid_size[0] * grid_size[1]
    for i, kept_row in enumerate(kept_patches(selection, num_patches)):
        kept = kept_row.nonzero()[:, 0].tolist()
        expected = merged_by_loops(tokens[i].double().numpy(), kept, memberships[i])
        assert len(expected) == len(weights[i])
        for g, mean in enumerate(expected):
            assert (weights[i, g].sum() > 0) == (mean is not None)
            np.testing.assert_allclose(
                merged[i, g].numpy(), 0.0 if mean is None else mean, atol=1e-5
            )
        assert (weights[i, :, kept] == 0).all()


@pytest.mark.parametrize("name", [name for name in list_maskings() if name != "none"])
@pytest.mark.parametrize(("grid_size", "cells"), [((7, 7), (2, 2)), ((4, 6), (3, 4))])
def test_cells_of_every_strategy_equal_the_slow_loops(name, grid_size, cells):
    inputs = make_inputs(4, grid_size=grid_size)
    ratios = {"mask_ratio": 0.6} if "mask_ratio" in masking_options(name) else {}
    selection = create_masking(name, **ratios)(inputs)
    memberships = [{} for _ in range(cells[0] * cells[1])]
    for patch in range(grid_size[0] * grid_size[1]):
        memberships[cell_of(patch, grid_size, cells)][patch] = 1.0
    merge = Merge.parse(f"{cells[0]}x{cells[1]}")
    check_merged(merge, selection, inputs.tokens, grid_size, [memberships] * 4)


@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}, {"neighborhood": 2}])
def test_candidates_take_what_the_transport_plan_sends_them(options):
    inputs = make_inputs(3, wants_candidate_weights=True, noise=torch.rand(3, 49))
    strategy = create_masking("pgs", mask_ratio=0.6, num_iters=200, **options)
    selection = strategy(inputs)
    candidates = strategy.steps(inputs, inputs.noise).candidate_index
    memberships = []
    for i in range(3):
        similarity = similarity_by_loops(inputs, i, candidates[i].tolist(), options)
        plan = 49 * plan_in_reach(similarity)
        memberships.append([{j: plan[c, j] for j in range(49)} for c in range(len(plan))])
    check_merged(Merge.parse("candidates"), selection, inputs.tokens, (7, 7), memberships)


def similarity_by_loops(inputs, i, candidates, options):
    """Return the similarity of one image's candidates and patches, -inf out of reach."""
    reach = options.get("neighborhood", 7)
    patches = inputs.pixels[i].double().reshape(3, 7, 8, 7, 8).permute(1, 3, 0, 2, 4)
    patches = patches.reshape(49, -1).numpy()
    found = np.full((len(candidates), 49), -np.inf)
    for c, candidate in enumerate(candidates):
        for j in range(49):
            rows = abs(candidate // 7 - j // 7)
            if max(rows, abs(candidate % 7 - j % 7)) <= reach:
                one, other = (patches[k] - patches[k].mean() for k in (candidate, j))
                found[c, j] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return found


def plan_in_reach(similarity):
    """Return the plan of what has a way, 0 elsewhere."""
    reached = np.isfinite(similarity).any(axis=0)
    kernel = np.exp(similarity[:, reached] / 0.1)
    for _ in range(200):
        kernel = kernel / kernel.sum(axis=1, keepdims=True)
        kernel = kernel / kernel.sum(axis=0, keepdims=True)
    plan = np.zeros_like(similarity)
    plan[:, reached] = kernel / similarity.shape[1]
    return plan


def test_asking_for_weights_changes_no_selection():
    noise = torch.rand(2, 49)
    strategy = create_masking("pgs", mask_ratio_min=0.3)
    plain, asked = (
        strategy(make_inputs(noise=noise, wants_candidate_weights=wanted))
        for wanted in (False, True)
    )
    assert plain.candidate_weights is None
    torch.testing.assert_close(asked.candidate_weights.sum(dim=1), torch.ones(2, 49))
    assert torch.equal(plain.index, asked.index)
    assert torch.equal(plain.valid, asked.valid)


def test_both_kinds_of_groups_stand_behind_each_other():
    inputs = make_inputs(wants_candidate_weights=True)
    selection = create_masking("pgs")(inputs)
    both = Merge.parse("2x3+candidates").weights(selection, (7, 7))
    cells, candidates = (
        Merge.parse(text).weights(selection, (7, 7)) for text in ("2x3", "candidates")
    )
    assert torch.equal(both, torch.cat([cells, candidates], dim=1))
    assert both.shape == (2, 6 + 2, 49)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_many_large_tokens_are_finite_and_exact(dtype):
    tokens = torch.full((1, 600, 2), 150.0, dtype=dtype)
    assert torch.equal(merge_tokens(tokens, torch.ones(1, 1, 600)), tokens[:, :1])
    assert torch.equal(valid_mean(tokens, torch.arange(600)[None] < 577), tokens[:, 0])


def test_means_in_half_precision_stay_close_under_autocast():
    selection = PatchSelection(torch.tensor([[0, 3]]))
    tokens = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights = Merge.parse("1x1").weights(selection, (16, 16))
    expected = merge_tokens(tokens, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merge_tokens(tokens, weights), expected)
        half = merge_tokens(tokens.bfloat16(), weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("text", ["", "2", "2x", "0x2", "2x2+", "+candidates", "2X2", "2x2x2", 3])
def test_what_is_no_grouping_is_refused(text):
    with pytest.raises(ValueError, match="merge must be none, ROWSxCOLUMNS"):
        Merge.parse(text)


@pytest.mark.parametrize(
    ("text", "name", "options", "match"),
    [
        ("5x2", "random", {}, "merge must be at most as fine as the 4x4 patches"),
        ("2x2", "none", {}, "merge needs a masking that drops patches"),
        ("candidates", "random", {}, "merge by candidates needs pgs"),
        ("2x2+candidates", "cluster", {}, "merge by candidates needs pgs"),
        ("candidates", "pgs", {"transport": False}, "merge by candidates needs pgs"),
    ],
)
def test_groups_that_a_strategy_or_a_grid_lacks_are_refused(text, name, options, match):
    with pytest.raises(ValueError, match=match):
        Merge.parse(text).check(create_masking(name, **options), (4, 4))


def test_counts_need_groups():
    with pytest.raises(ValueError, match="merge_counts needs merge"):
        Merge.parse("none", counts=True)
