"""What `torch.compile` makes of a setup: whether its graph is whole, and what compiles it anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from clip_pgs.inspection.cost.random_data import draw_captions
from clip_pgs.inspection.cost.setups import Setup

# Longest captions as shares of the context. The second length makes the compiler take any; the
# whole context alone is not cut.
_WARM_UP = (1.0, 0.2, 0.4)
_LATER = (0.25, 0.5, 0.3, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Compilation:
    """How often a compiled model leaves its graph or needs another.

    Attributes:
        graph_breaks: Places where it leaves its graph.
        recompilations: Graphs that were added after three batches, whose longest captions differ,
            by six batches whose longest captions differ again.
    """

    graph_breaks: int
    recompilations: int


def allow_graphs_of(num_models: int) -> None:
    """Let the compiler keep a graph of each of so many models, which share their code.

    Past its limit it runs code uncompiled without a word.
    """
    limit = torch._dynamo.config.recompile_limit + num_models
    torch._dynamo.config.recompile_limit = limit


def watch_compilation(setup: Setup, *, vocab_size: int) -> Compilation:
    """Run a setup's model on captions of many lengths, forward.

    Breaks and guards are found before code is made of a graph, which would take minutes; so none
    is made here, and nothing of it is left for the compiled model.

    Args:
        setup: Its weights stay as they are, and its captions come back.
        vocab_size: Token ids are below it.
    """
    own, runnable = setup.conditions.captions, setup.runnable
    torch._dynamo.reset()
    counters.clear()
    setup.runnable = torch.compile(setup.model, backend="eager")  # type: ignore[assignment]
    try:
        for share in _WARM_UP:
            _run(setup, _captions(own, share, vocab_size))
        graphs_before = counters["frames"]["total"]
        for share in _LATER:
            _run(setup, _captions(own, share, vocab_size))
        return Compilation(
            graph_breaks=sum(counters["graph_break"].values()),
            recompilations=counters["frames"]["total"] - graphs_before,
        )
    finally:
        setup.runnable = runnable
        setup.read(own)
        torch._dynamo.reset()


def _run(setup: Setup, captions: Tensor) -> None:
    setup.read(captions)
    setup.forward()


def _captions(like: Tensor, share: float, vocab_size: int) -> Tensor:
    """Return captions the longest of which fills a share of the context."""
    batch_size, context_length = like.shape
    longest = max(3, round(share * context_length))
    short = draw_captions(
        "web", batch_size=batch_size, context_length=longest, vocab_size=vocab_size
    )
    short[0] = 1
    short[0, -1] = vocab_size - 1
    return nn.functional.pad(short, (0, context_length - longest))
