import json
from contextlib import nullcontext
from functools import partial

import torch

from clip_pgs.inspection.__main__ import main
from clip_pgs.inspection.cost.compilation import Compilation, watch_compilation
from clip_pgs.inspection.cost.random_data import draw_captions
from clip_pgs.inspection.cost.setups import Conditions, build_setups
from clip_pgs.inspection.strategies import parse_specs
from support.models import image_batch, small_clip
from support.options import write_model_config

BATCH, CONTEXT, VOCABULARY = 4, 32, 100
TITLES = ["plain CLIP", "random", "pgs:mask_ratio_min=0.3"]


def compiled_setups(*maskings):
    captions = draw_captions("web", batch_size=BATCH, context_length=CONTEXT, vocab_size=VOCABULARY)
    return build_setups(
        small_clip(text={"context_length": CONTEXT}),
        parse_specs(maskings),
        Conditions(image_batch(BATCH), captions, nullcontext, compiles=True),
        mask_ratio=0.5,
    )


def watch(setup):
    return watch_compilation(setup, vocab_size=VOCABULARY)


def test_compiled_models_stay_whole_and_are_not_compiled_again():
    setups = compiled_setups(*TITLES[1:])
    assert [setup.title for setup in setups] == TITLES
    assert [watch(setup) for setup in setups] == [Compilation(0, 0)] * len(TITLES)


def test_the_setup_is_left_as_it_was():
    setup = compiled_setups("random")[1]
    texts, runnable = setup.texts, setup.runnable
    watch(setup)
    assert torch.equal(setup.texts, texts)
    assert setup.runnable is runnable
    assert all(parameter.grad is None for parameter in setup.model.parameters())


def test_a_break_is_counted():
    setup = compiled_setups("random")[1]
    setup.model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    assert watch(setup).graph_breaks > 0


def test_a_graph_for_every_length_is_counted():
    setup = compiled_setups("random")[1]
    # Of the lengths 8, 16, 24 and 32, three come before.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        assert watch(setup).recompilations == 1


def test_the_command_prints_and_writes_both_counts(tmp_path, capsys, monkeypatch):
    # A backend that makes code takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = ["--model", write_model_config(tmp_path / "compiled_test_model.json"), "--compile"]
    flags += ["--batch-size", "4", "--steps", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main(["cost", *flags, "--maskings", "random"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-2:] == ["breaks", "recompiled"]
    assert lines[4].split()[-2:] == ["0", "0"]
    rows = json.loads((tmp_path / "cost.json").read_text())["results"]
    assert [(row["graph_breaks"], row["recompilations"]) for row in rows] == [(0, 0), (0, 0)]
