"""What a seed fixes for all arms, so that their runs are pairs."""

import pytest
import torch

from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.options import parse_options
from clip_pgs.training.phases import plan_phases
from support.runs import flags, write_shards

ARMS = {
    "none": {},
    "random": {"masking": "random", "mask_ratio": 0.75},
    "pgs": {"masking": "pgs"},
    "merged": {"masking": "pgs", "merge": "2x2"},
    "attentive": {"masking": "attentive"},
    "fewer steps": {"epochs": 1},
}


def begin(folder, **options):
    """Return a run's first weights, and the pictures and captions of its second epoch."""
    args = parse_options(flags(folder, aug_cfg="scale=(0.3, 0.9)", **options))
    check_options(args)
    parts = build_model(args, torch.device("cpu"))
    stream = plan_phases(args, parts)[0].stream
    stream.start_at(1, 0)
    return parts.model.state_dict(), list(stream)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_a_seed_begin_with_the_same_weights_and_see_the_same_samples(tmp_path, arm):
    data = write_shards(tmp_path / "train")
    weights, samples = begin(tmp_path, train_data=data, seed=3)
    arm_weights, arm_samples = begin(tmp_path, train_data=data, seed=3, **ARMS[arm])
    assert all(torch.equal(arm_weights[name], weight) for name, weight in weights.items())
    for (images, texts), (arm_images, arm_texts) in zip(samples, arm_samples, strict=True):
        assert torch.equal(images, arm_images)
        assert torch.equal(texts, arm_texts)


def test_another_seed_changes_all_of_it(tmp_path):
    data = write_shards(tmp_path / "train")
    weights, samples = begin(tmp_path, train_data=data, seed=3)
    other_weights, other_samples = begin(tmp_path, train_data=data, seed=4)
    assert not torch.equal(weights["visual.conv1.weight"], other_weights["visual.conv1.weight"])
    assert not torch.equal(samples[0][1], other_samples[0][1])
