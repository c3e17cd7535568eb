"""A compiled model that has seen a few lengths of captions is not compiled again."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from clip_pgs.integrations.open_clip import (
    apply_masking,
    last_selection,
    set_masking_noise,
    set_masking_progress,
)
from clip_pgs.training.build import build_trimmer
from support.models import image_batch, small_clip
from support.runs import MODEL, write_model
from support.trainers import open_trainer

CONTEXT = 77
# Tokens of the longest caption of a batch: one length, another, and the whole context.
WARM_UP = (12, 30, CONTEXT)
LATER = (8, 18, 40, 60, 22, CONTEXT, 45)


def draw_captions(longest, *, batch_size=16):
    """Return token ids (B, 77) of captions of many lengths, each ending with the highest token."""
    generator = torch.Generator().manual_seed(longest)
    ids = torch.randint(1, 49000, (batch_size, CONTEXT), generator=generator)
    lengths = torch.randint(3, longest + 1, (batch_size,), generator=generator)
    lengths[0] = longest
    ids[torch.arange(CONTEXT) >= lengths[:, None]] = 0
    return ids.scatter(1, lengths[:, None] - 1, 49407)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"masking": "pgs"}, id="pgs"),
        pytest.param({"masking": "pgs", "mask_ratio_min": 0.3}, id="adaptive"),
        pytest.param(
            {"masking": "pgs", "masking_option": ["random_share=1", "random_share_end=0.2"]},
            id="share",
        ),
    ],
)
def test_steps_keep_their_graphs_whole_and_few(tmp_path, monkeypatch, options):
    # What breaks a graph or outdates it is found before any backend sees it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    text = {**MODEL["text_cfg"], "context_length": CONTEXT}
    trainer = open_trainer(
        tmp_path,
        model=write_model(tmp_path, config={**MODEL, "text_cfg": text}),
        dataset_type="synthetic",
        epochs=1,
        train_num_samples=160,
        batch_size=16,
        torchcompile=True,
        **options,
    )
    trim = build_trimmer(trainer.phase.options, trainer.model)
    trainer.start_epoch(0)
    torch._dynamo.reset()
    counters.clear()
    (images, _), *_ = trainer.next_batches()[0]
    num_graphs = []
    for longest in (*WARM_UP, *LATER):
        trainer.train_step([(images, trim(draw_captions(longest)))])
        num_graphs.append(counters["frames"]["total"])
    assert num_graphs == [1, 2, 3, *(3 for _ in LATER)]
    assert counters["graph_break"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random", {}),
        ("pgs", {"mask_ratio_min": 0.3}),
        ("pgs", {"random_share": 1.0, "random_share_end": 0.2}),
        ("cluster", {"threshold": 0.5, "random_share": 0.8, "random_share_end": 0.0}),
        ("pgs-released", {}),
    ],
)
def test_one_graph_serves_all_of_training_and_selects_as_without(name, options):
    torch._dynamo.reset()
    counters.clear()
    model = apply_masking(small_clip().train(), name, **options)
    compiled = torch.compile(model, backend="eager")
    for step, progress in enumerate((0.0, 0.1, 0.3, 0.75, 1.0)):
        set_masking_progress(model, progress)
        set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(step)))
        model.encode_image(image_batch())
        expected = last_selection(model)
        compiled(image_batch())
        found = last_selection(model)
        assert found is not expected
        assert torch.equal(found.index, expected.index)
        assert (found.valid is None) or torch.equal(found.valid, expected.valid)
    assert counters["frames"]["total"] == 1
    assert counters["graph_break"] == {}
