from __future__ import annotations

import ot
import pytest
import torch

from clip_pgs import create_masking
from clip_pgs.inspection.stages import kept_legend, pgs_stages, stage_columns
from clip_pgs.masking.sampling import kept_patches, patchify
from support.images import make_inputs

GRID = (5, 6)


def inputs_with_noise(**changes):
    noise = torch.rand(2, 30, generator=torch.Generator().manual_seed(9))
    return make_inputs(grid_size=GRID, noise=noise, **changes)


def cosine(inputs, candidates):
    patches = patchify(inputs.pixels, inputs.patch_size).double()
    unit = torch.nn.functional.normalize(patches - patches.mean(dim=2, keepdim=True), dim=2)
    return torch.stack(
        [unit[image][candidates[image]] @ unit[image].T for image in range(len(unit))]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"edges": False},
        {"center_weight": 0.4},
        {"edge_detector": "canny", "edge_protection": 9.0},
        {"candidate_region": "border"},
        {"neighbourhood": 2, "transport": False},
    ],
)
def test_the_stages_lead_to_the_selection(options):
    strategy = create_masking("pgs", mask_ratio=0.5, candidate_ratio=0.1, **options)
    inputs = inputs_with_noise()
    stages = pgs_stages(strategy, inputs)
    scores = stages.scores.clone()
    for image, candidates in enumerate(stages.candidates):
        scores[image, candidates] += 10
    masked = scores.argsort(dim=1, descending=True)[:, :15]
    kept = kept_patches(strategy(inputs), 30)
    assert not kept.gather(1, masked).any()
    assert (strategy.mask_ratio, strategy.mask_ratio_min) == (0.5, 0.5)


def test_without_edges_the_candidates_are_the_largest_random_numbers():
    inputs = inputs_with_noise()
    stages = pgs_stages(create_masking("pgs", edges=False, candidate_ratio=0.2), inputs)
    expected = inputs.noise.topk(6, dim=1).indices.sort(dim=1).values
    assert torch.equal(stages.candidates, expected)
    assert stages.edges is None


def test_the_owner_of_a_patch_has_the_largest_entry_of_pots_plan():
    inputs = inputs_with_noise()
    strategy = create_masking("pgs", candidate_ratio=0.2, temperature=0.3, num_iters=500)
    stages = pgs_stages(strategy, inputs)
    similarity = cosine(inputs, stages.candidates)
    for image in range(2):
        cost = 1 - similarity[image].numpy()
        plan = ot.sinkhorn([1 / 6] * 6, [1 / 30] * 30, cost, 0.3, numItermax=5000, stopThr=1e-12)
        most = torch.from_numpy(30 * plan).max(dim=0)
        assert torch.equal(stages.owner[image], most.indices)
        assert torch.allclose(stages.share[image].double(), most.values, atol=1e-3)


def test_without_transport_the_owner_is_the_most_similar_candidate():
    inputs = inputs_with_noise()
    stages = pgs_stages(create_masking("pgs", transport=False, candidate_ratio=0.2), inputs)
    nearest = cosine(inputs, stages.candidates).max(dim=1)
    assert torch.equal(stages.owner, nearest.indices)
    assert torch.allclose(stages.share.double(), nearest.values.clamp_min(0), atol=1e-5)


def test_a_candidate_owns_nothing_beyond_its_neighbourhood():
    stages = pgs_stages(
        create_masking("pgs", neighbourhood=1, candidate_ratio=0.1), inputs_with_noise()
    )
    for image in range(2):
        for position in range(30):
            owner = int(stages.candidates[image, stages.owner[image, position]])
            rows = abs(owner // GRID[1] - position // GRID[1])
            columns = abs(owner % GRID[1] - position % GRID[1])
            if max(rows, columns) > 1:
                assert stages.share[image, position] == 0


@pytest.mark.parametrize(
    ("options", "progress", "kept", "ends"),
    [
        ({}, 0.0, "The highest scores are masked, ", ("kept", "masked")),
        ({"random_share": 1.0}, 0.0, "drawn at random, whatever", ("low", "high")),
        ({"random_images": 1.0}, 0.0, "drawn at random, whatever", ("low", "high")),
        ({"random_share": 0.3}, 0.0, "and 0.3 of what the model sees", ("low", "high")),
        ({"random_share_end": 0.6}, 0.0, "The highest scores are masked, ", ("kept", "masked")),
        ({"random_share_end": 0.6}, 1.0, "and 0.6 of what the model sees", ("low", "high")),
        ({"random_images": 0.4}, 0.0, "In 0.4 of the images all of it", ("low", "high")),
    ],
)
def test_the_legends_are_true_of_patches_that_are_drawn(options, progress, kept, ends):
    strategy = create_masking("pgs", **options)
    stages = pgs_stages(strategy, inputs_with_noise(progress=progress))
    assert kept in kept_legend(strategy, stages).text
    score = stage_columns(strategy, stages, torch.zeros(2, 3, 20, 24), GRID)[-1].legend
    assert score.ends == ends
    assert ("masked first" in score.text) == (ends == ("kept", "masked"))


@pytest.mark.parametrize(
    ("options", "spared", "less"),
    [
        ({}, ", rarely where edges are.", "less its edges."),
        ({"edge_weight": 0.0}, ", rarely where edges are.", "How redundant a patch is. "),
        ({"edge_protection": 0.0}, "may go.", "less its edges."),
        ({"center_weight": 1.0}, "are and in the middle.", "less its edges and the middle."),
        ({"center_weight": 1.0, "edges": False}, ", rarely in the middle.", "less the middle."),
    ],
)
def test_the_legends_name_what_lowers_odds_and_scores(options, spared, less):
    strategy = create_masking("pgs", **options)
    stages = pgs_stages(strategy, inputs_with_noise())
    candidates, _, score = stage_columns(strategy, stages, torch.zeros(2, 3, 20, 24), GRID)[-3:]
    assert spared in candidates.legend.text
    assert less in score.legend.text


def test_inputs_without_noise_are_refused():
    with pytest.raises(ValueError, match="need its noise, got none"):
        pgs_stages(create_masking("pgs"), make_inputs())
