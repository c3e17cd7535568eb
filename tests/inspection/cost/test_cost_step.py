import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image

from clip_pgs.inspection.__main__ import main
from clip_pgs.inspection.cost.step import (
    Benchmark,
    Peak,
    Setup,
    Timings,
    draw_captions,
    known_peak,
    make_rows,
    measured_peak,
    time_steps,
    watch_compilation,
)
from clip_pgs.inspection.model_input import parse_specs
from support.commands import refusal
from support.models import TEXT, VISION, image_batch, small_clip
from support.options import write_model_config

BATCH, CONTEXT, VOCABULARY = 4, 32, 100
TITLES = ["plain CLIP", "random", "pgs:mask_ratio_min=0.3"]
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


def lengths(tokens):
    return tokens.argmax(dim=1) + 1


@pytest.mark.parametrize(("kind", "mean", "tolerance"), [("flickr8k", 14.1, 0.5), ("web", 26, 2)])
def test_captions_are_as_long_as_real_ones(kind, mean, tolerance):
    tokens = draw_captions(kind, batch_size=4000, context_length=77, vocab_size=49408)
    assert lengths(tokens).float().mean().item() == pytest.approx(mean, abs=tolerance)


def test_some_captions_of_the_web_fill_the_context_and_none_of_flickr8k_does():
    def longest(kind):
        tokens = draw_captions(kind, batch_size=512, context_length=77, vocab_size=49408)
        return lengths(tokens).max().item()

    assert longest("web") == 77
    assert longest("flickr8k") < 48


def test_a_caption_ends_with_the_highest_id_and_zeros_follow():
    tokens = draw_captions("flickr8k", batch_size=64, context_length=20, vocab_size=100)
    assert tokens.shape == (64, 20)
    for row, length in zip(tokens, lengths(tokens).tolist(), strict=True):
        assert row[length - 1] == 99
        assert (row[: length - 1] > 0).all()
        assert (row[: length - 1] < 99).all()
        assert not row[length:].any()


def test_a_seed_gives_the_same_captions_again():
    options = {"batch_size": 4, "context_length": 16, "vocab_size": 100}
    assert torch.equal(draw_captions("web", **options), draw_captions("web", **options))
    assert not torch.equal(draw_captions("web", seed=1, **options), draw_captions("web", **options))


def captions(*, batch_size=BATCH, length=5, context_length=16):
    tokens = torch.randint(
        1, 99, (batch_size, context_length), generator=torch.Generator().manual_seed(0)
    )
    tokens[:, length - 1], tokens[:, length:] = 99, 0
    return tokens


def setups(*maskings, model=None, texts=None, **changes):
    model = small_clip() if model is None else model
    texts = captions() if texts is None else texts
    place = {"device": torch.device("cpu"), "precision": "fp32", "batch_size": BATCH}
    benchmark = Benchmark("small", None, mask_ratio=0.5, **place, **changes)
    batch = image_batch(BATCH), texts
    return [Setup(model, benchmark, *batch, spec) for spec in (None, *parse_specs(maskings))]


def test_the_first_setup_is_the_plain_model_with_whole_captions():
    model = small_clip()
    plain, _ = setups("pgs", model=model)
    expected = ClipLoss()(*model(image_batch(BATCH), captions())[:3])
    assert torch.equal(plain.forward(), expected)
    assert plain.text_tokens() == 16
    assert plain.selection() is None


def test_trimming_alone_changes_no_result():
    plain, unmasked = setups("none")
    assert unmasked.text_tokens() == 8
    torch.testing.assert_close(unmasked.forward(), plain.forward(), atol=1e-6, rtol=0)


def test_trimming_can_be_left_out():
    assert setups("random", trims=False)[1].text_tokens() == 16


def test_packing_is_what_was_asked_for_and_runs_fewer_operations():
    adaptive = "pgs:mask_ratio_min=0.2,threshold=-0.1"
    packed, padded = (setups(adaptive, pack_tokens=is_on)[1] for is_on in (True, False))
    torch.manual_seed(0)
    expected = padded.forward()
    torch.manual_seed(0)
    torch.testing.assert_close(packed.forward(), expected, atol=1e-6, rtol=0)
    assert packed.step_flops() < padded.step_flops()


def test_setups_share_their_weights_and_nothing_else():
    plain, masked = setups("random")
    for one, other in zip(plain.model.parameters(), masked.model.parameters(), strict=True):
        assert one is other
    assert type(plain.model.visual) is not type(masked.model.visual)


def test_what_selects_gives_a_selection():
    selection = setups("pgs")[1].selection()()
    assert selection.index.shape == (BATCH, 8)


def tower_flops(num_tokens, width, layers, *, last_for_one=False, embed_dim=64):
    """Count a tower by hand, a multiply-add as two: blocks, attention and projection.

    A last block for one token still needs keys and values of all.
    """
    block = 24 * num_tokens * width**2 + 4 * num_tokens**2 * width
    last = (4 * num_tokens + 20) * width**2 + 4 * num_tokens * width if last_for_one else block
    return 3 * ((layers - 1) * block + last + 2 * width * embed_dim)


@pytest.mark.parametrize(
    ("number", "image_tokens", "text_tokens", "selection"),
    # The selection compares one candidate with 16 patches of 768 numbers.
    [(0, 17, 16, 0), (1, 9, 8, 0), (2, 9, 8, 2 * 16 * 768)],
    ids=["plain", "random", "pgs"],
)
def test_operations_are_those_of_a_count_by_hand(number, image_tokens, text_tokens, selection):
    width, text_width = VISION["width"], TEXT["width"]
    # The patch embedding sees all 16 patches, and no gradient goes on to the pixels.
    per_sample = 2 * (2 * 16 * 3 * 16 * 16 * width) + selection
    is_masked = number > 0
    per_sample += tower_flops(image_tokens, width, VISION["layers"], last_for_one=is_masked)
    per_sample += tower_flops(text_tokens, text_width, TEXT["layers"])
    setup = setups("random", "pgs")[number]
    assert setup.step_flops() == BATCH * per_sample


def test_counting_leaves_no_gradient():
    setup = setups("random")[1]
    setup.step_flops()
    assert all(parameter.grad is None for parameter in setup.model.parameters())


def test_every_round_times_every_setup_once():
    both = setups("pgs")
    optimizer = torch.optim.AdamW(both[0].model.parameters(), lr=1e-6)
    plain, pgs = time_steps(both, optimizer, num_rounds=3)
    assert len(plain.steps) == len(pgs.steps) == 3
    for (selection, *parts), step in zip(pgs.seconds, pgs.steps, strict=True):
        assert step == pytest.approx(sum(parts))
        assert selection > 0
    assert [seconds[0] for seconds in plain.seconds] == [0, 0, 0]


def test_no_patches_of_a_selection_take_memory_during_a_step():
    both, tokens = setups("pgs"), []
    tower, forward = both[1].model.visual, both[1].forward
    embed = tower.embed_patches

    def embed_patches(images):
        found = embed(images)
        tokens.append(weakref.ref(found))
        return found

    def step():
        assert not any(reference() is not None for reference in tokens)
        return forward()

    tower.embed_patches, both[1].forward = embed_patches, step
    time_steps(both, torch.optim.AdamW(both[0].model.parameters(), lr=1e-6), num_rounds=2)
    assert tokens


def compiled_setups(*maskings):
    texts = draw_captions("web", batch_size=BATCH, context_length=CONTEXT, vocab_size=VOCABULARY)
    model = small_clip(text={"context_length": CONTEXT})
    return setups(*maskings, model=model, texts=texts, compiles=True)


def watch(setup):
    return watch_compilation(setup, vocab_size=VOCABULARY)


@pytest.mark.slow
def test_compiled_models_stay_whole_and_are_not_compiled_again():
    setups = compiled_setups(*TITLES[1:])
    assert [setup.title for setup in setups] == TITLES
    assert [watch(setup) for setup in setups] == 3 * [{"graph_breaks": 0, "recompilations": 0}]


@pytest.mark.slow
def test_the_setup_is_left_as_it_was():
    setup = compiled_setups("random")[1]
    texts, runnable = setup.texts, setup.runnable
    watch(setup)
    assert torch.equal(setup.texts, texts)
    assert setup.runnable is runnable
    assert all(parameter.grad is None for parameter in setup.model.parameters())


@pytest.mark.slow
def test_a_break_is_counted():
    setup = compiled_setups("random")[1]
    setup.model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    assert watch(setup)["graph_breaks"] > 0


@pytest.mark.slow
def test_a_graph_for_every_length_is_counted():
    setup = compiled_setups("random")[1]
    # Of the lengths 8, 16, 24 and 32, three come before.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        assert watch(setup)["recompilations"] == 1


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("name", "is_half", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", True, 312),
        ("NVIDIA A100-PCIE-40GB", False, 156),
        ("NVIDIA H100 80GB HBM3", True, 989.5),
        ("NVIDIA H100 PCIe", True, 756),
        ("NVIDIA H200", True, 989.5),
        ("NVIDIA H200 NVL", True, 835.5),
    ],
)
def test_the_peak_is_that_of_dense_tensor_cores(name, is_half, teraflops):
    peak = known_peak(name, is_half=is_half)
    assert peak.flops == pytest.approx(teraflops * 1e12)
    assert "data sheet" in peak.source


def test_an_unlisted_gpu_has_no_known_peak():
    assert known_peak("NVIDIA GeForce RTX 3090", is_half=True) is None


def test_a_measured_peak_is_a_rate_this_machine_can_have():
    assert 1e8 < measured_peak(torch.device("cpu")).flops < 1e14


def timings(title, steps, *, flops, selection=0.0, peak_bytes=None):
    seconds = [[share * step for share in (selection, 0.25, 0.5, 0.25)] for step in steps]
    return Timings(title, 77.0, flops, seconds, peak_bytes)


def rows():
    # The second round was slow for both: their ratio there is as good as any.
    plain = timings("plain", [2.0, 20.0, 4.0], flops=1000.0)
    pgs = timings("pgs", [1.0, 11.0, 2.4], flops=400.0, selection=0.01, peak_bytes=2**29)
    return make_rows([plain, pgs], batch_size=8, peak=Peak(1000.0, "told"))


def test_ratios_are_medians_over_rounds_of_ratios():
    plain, pgs = rows()
    assert plain["time_over_first"] == 1.0
    assert pgs["time_over_first"] == pytest.approx(0.55)
    assert pgs["flops_over_first"] == pytest.approx(0.4)
    assert pgs["time_over_ideal"] == pytest.approx(0.55 / 0.4)


def test_times_are_medians():
    _, pgs = rows()
    parts = [pgs[part] for part in ("step", "forward", "backward", "update")]
    assert parts == pytest.approx([2.4, 0.6, 1.2, 0.6])
    assert pgs["samples_per_second"] == pytest.approx(8 / 2.4)
    assert (pgs["selection"], pgs["selection_share"]) == pytest.approx((0.024, 0.01))


def test_utilisation_is_the_share_of_the_peak():
    plain, pgs = rows()
    assert plain["utilization"] == pytest.approx(1000 / 4 / 1000)
    assert pgs["utilization"] == pytest.approx(400 / 2.4 / 1000)


def test_memory_is_told_where_it_was_measured():
    plain, pgs = rows()
    assert plain["peak_gib"] is None
    assert pgs["peak_gib"] == 0.5


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cost_test_model.json"
    path.write_text(json.dumps(CONFIG))
    return path


def run(config, *flags):
    flags = ("--batch-size", "4", "--steps", "2", "--device", "cpu", *flags)
    return main(["cost", "--model", str(config), *flags])


def test_it_prints_a_line_per_model_and_writes_what_it_measured(config, tmp_path, capsys):
    output = tmp_path / "a folder"
    assert run(config, "--maskings", "none", "random", "pgs", "-o", str(output)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{config} at 32 x 32, batch 4, fp32, cpu, " + lines[0].split(", ")[-1]
    assert [line.split("  ")[0] for line in lines[3:7]] == ["plain CLIP", "none", "random", "pgs"]

    content = json.loads((output / "cost.json").read_text())
    assert content["rounds"] == 2
    assert content["batch_size"] == 4
    rows = {row["title"]: row for row in content["results"]}
    assert rows["plain CLIP"]["text_tokens"] == 16
    assert rows["plain CLIP"]["time_over_first"] == 1
    assert rows["pgs"]["flops_over_first"] < rows["none"]["flops_over_first"]
    assert rows["pgs"]["selection"] > 0
    assert rows["pgs"]["peak_gib"] is None
    with Image.open(output / "cost.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("name", ["configs/models/demo_vit.json", "demo_vit"])
def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert run(name, "--steps", "1", "--masking", "random") == 0
    assert f"{name} at 64 x 64" in capsys.readouterr().out


def test_plain_clip_alone_needs_no_ratio(config, capsys):
    assert run(config, "--steps", "1", "--masking", "none") == 0
    assert "plain CLIP" in capsys.readouterr().out


def test_captions_of_the_web_and_bfloat16_run(config, capsys):
    flags = ("--captions", "web", "--precision", "amp_bf16", "--progress", "0.5")
    assert run(config, *flags, "--maskings", "pgs:mask_ratio_min=0.3") == 0
    assert "amp_bf16" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--steps", "9" * 30),
        ("--batch-size", "0"),
        ("--batch-size", "9" * 30),
        ("--batch-size", "1000000"),
        ("--progress", "2"),
        ("--progress", "nan"),
        ("--seed", "9" * 30),
        ("--image-size", "-1"),
        ("--device", "nonsense"),
        ("--device", "meta"),
        ("--device", "cuda:99"),
        ("--maskings", "pgx"),
        ("--mask-ratio", "1"),
        ("--mask-ratio", "nan"),
        ("--model", "no such"),
        ("--model", "no.json"),
        ("--model", "damaged.json"),
        ("--model", "large.json"),
        ("--model", "coca_ViT-B-32"),
        ("--output", "file"),
        ("--output", "file/below"),
        ("--output", "."),
    ],
)
def test_bad_input_is_one_sentence(config, capsys, monkeypatch, flag, value):
    monkeypatch.chdir(config.parent)
    Path("file").touch()
    Path("damaged.json").write_text("{")
    large = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 2**20}}
    Path("large.json").write_text(json.dumps(large))
    Path("cost.png").mkdir()
    said = refusal(main, ["cost", "--model", config, "--device", "cpu", flag, value], capsys)
    assert "<class" not in said
    assert "coca" not in value or said.endswith("coca_ViT-B-32 is a CoCa\n")


@pytest.mark.parametrize("maskings", [["none"], ["none", "random", "pgs"]])
@pytest.mark.parametrize("flag", ["--pack-tokens", "--no-pack-tokens"])
def test_packing_of_maskings_that_never_pack_is_refused(
    config, capsys, monkeypatch, maskings, flag
):
    monkeypatch.chdir(config.parent)
    argv = ["cost", "--model", config, "--device", "cpu", "--maskings", *maskings, flag]
    assert "pack_tokens has no effect on none" in refusal(main, argv, capsys)


def test_a_config_that_is_refused_does_not_spoil_the_next(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.json").write_text("{")
    refusal(main, ["cost", "--model", tmp_path / "damaged.json"], capsys)
    assert run(config, "--maskings", "random") == 0
