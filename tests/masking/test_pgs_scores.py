import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, pgs_scores
from masking import oracle
from support.images import make_inputs

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


def test_candidates_are_not_lifted():
    assert pgs_scores(make_inputs(2, grid_size=(7, 5)), CANDIDATES).max() <= 1.0 + 1e-5
