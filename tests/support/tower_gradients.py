"""What an image tower gives in training: its output and the gradient of every parameter."""

import torch

from clip_pgs.integrations.open_clip import force_selection
from support.models import image_batch


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
