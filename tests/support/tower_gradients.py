"""What an image tower gives in training for a selection, and selections of different counts."""

import torch

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import force_selection
from support.models import image_batch


def adaptive(counts, *, slots=12, seed=0):
    """Return a selection whose rows keep so many of 16 patches."""
    order = torch.rand(len(counts), 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    kept = torch.where(valid, order[:, :slots], 16).sort(dim=1).values
    last = kept.gather(1, valid.sum(dim=1, keepdim=True) - 1)
    return PatchSelection(torch.where(valid, kept, last), valid)


def features_and_gradients(model, selection, *, checkpointing=False):
    """Run a masked model's tower forward and backward in float64.

    Args:
        model: A masked model; its weights become float64.
        selection: The patches to keep, as many rows as there are images.
        checkpointing: Whether blocks are computed again in the backward pass.

    Returns:
        Outputs, and {parameter: gradient}, None where none arrived.
    """
    model.double().train().set_grad_checkpointing(checkpointing)
    with force_selection(model, selection):
        outputs = model.visual(image_batch(len(selection.index)).double())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (output * torch.linspace(-1, 1, output.shape[-1])).square().sum() for output in outputs
    )
    loss.backward()
    gradients = {name: p.grad for name, p in model.visual.named_parameters()}
    return [output.detach() for output in outputs], gradients
