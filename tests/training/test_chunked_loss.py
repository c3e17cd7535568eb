"""`--loss-chunk`: OpenCLIP's losses, whose matrix of similarities is never there as a whole."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_pgs.training.build import build_loss
from clip_pgs.training.chunked_loss import in_chunks
from clip_pgs.training.options import parse_options
from support.gradients import relative_difference, step_gradients
from support.losses import (
    CASES,
    compare,
    compare_all,
    loss_inputs,
    value_and_gradients,
)
from support.ranks import output, run_together
from support.runs import flags, write_model


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that anything made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def largest_tensor(loss, inputs):
    with LargestTensor() as largest:
        value_and_gradients(loss, inputs)
    return largest.numel


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_whole_matrix(case):
    compare(case)


@pytest.mark.slow
def test_so_they_are_on_two_processes(tmp_path):
    assert run_together(compare_all, tmp_path) == [0, 0], output(tmp_path)


@pytest.mark.parametrize("case", ["clip-local0-grad0", "siglip-bidir"])
def test_no_tensor_is_larger_than_a_chunk_of_rows(case):
    whole, chunked = (loss_inputs(case, batch_size=128) for _ in range(2))
    assert largest_tensor(CASES[case](), whole) == 128 * 128
    assert largest_tensor(in_chunks(CASES[case](), 32), chunked) == 32 * 128


@pytest.mark.parametrize("case", ["clip-local0-grad0", "siglip-bidir"])
def test_backward_keeps_no_chunk(case):
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    inputs = loss_inputs(case, batch_size=128)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        in_chunks(CASES[case](), 32)(**inputs)
    # The features themselves.
    assert max(kept) == 16 * 128


@pytest.mark.parametrize("options", [{}, {"siglip": True}, {"accum_freq": 2}])
def test_the_flag_changes_the_memory_and_not_the_gradient(tmp_path, options):
    path = write_model(tmp_path)
    expected, _ = step_gradients(path, **options)
    gradients, _ = step_gradients(path, loss_chunk=3, **options)
    assert relative_difference(gradients, expected) <= 1e-6
    argv = flags(tmp_path, model=path, dataset_type="synthetic", loss_chunk=32, **options)
    case = "siglip" if "siglip" in options else "clip"
    loss = build_loss(parse_options(argv), torch.nn.Identity())
    assert largest_tensor(loss, loss_inputs(case, batch_size=128)) == 32 * 128
