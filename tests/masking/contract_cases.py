"""The strategies, options and images that the contract suite runs over."""

import pytest
import torch

from clip_pgs import PatchInputs, list_maskings

# Strategies whose images drop different shares, with the bounds of those shares.
ADAPTIVE = {
    "pgs": {"mask_ratio": 0.5, "mask_ratio_min": 0.3},
    "cluster": {"mask_ratio": 0.5, "mask_ratio_min": 0.3},
}
MORE_OPTIONS = {
    "pgs-adaptive": ("pgs", ADAPTIVE["pgs"]),
    "pgs-border": ("pgs", {"candidate_region": "border"}),
    "pgs-border-and-beyond": (
        "pgs",
        {"candidate_region": "border", "candidate_ratio": 0.6, **ADAPTIVE["pgs"]},
    ),
    "pgs-canny": ("pgs", {"edge_detector": "canny"}),
    "pgs-center": ("pgs", {"center_weight": 1.0}),
    "pgs-neighbourhood": ("pgs", {"neighbourhood": 1}),
    "pgs-neighbourhood-adaptive": ("pgs", {"neighbourhood": 2, **ADAPTIVE["pgs"]}),
    "pgs-neighbourhood-untransported": ("pgs", {"neighbourhood": 2, "transport": False}),
    "pgs-released-0.3": ("pgs-released", {"mask_ratio_min": 0.3}),
    "pgs-released-biased": ("pgs-released", {"attention_bias": True}),
}
CASES = {name: (name, {}) for name in list_maskings()} | MORE_OPTIONS
every_strategy = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)

HARD_IMAGES = {
    "black": torch.zeros(1, 3, 56, 56),
    "constant": torch.full((1, 3, 56, 56), 1.7),
    "saturated": torch.full((1, 3, 56, 56), 255.0),
    "one bright line": torch.zeros(1, 3, 56, 56).index_fill_(3, torch.tensor([9]), 1e4),
}


def hard_inputs(pixels):
    """Return inputs of patches of 8 for images without structure, and attention to match."""
    return PatchInputs(pixels, 8, attention=torch.zeros(1, 49))


def select(strategy, inputs, *, seed=0):
    """Return a selection drawn from a seed."""
    return strategy(inputs, generator=torch.Generator().manual_seed(seed))


def rows(selection):
    """Return the kept positions of each image as lists."""
    if selection.valid is None:
        return selection.index.tolist()
    return [
        index[valid].tolist() for index, valid in zip(selection.index, selection.valid, strict=True)
    ]
