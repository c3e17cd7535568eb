import json

import pytest
import torch

from clip_pgs.inspection.__main__ import main
from clip_pgs.inspection.cost.scaling import (
    Size,
    default_sizes,
    measure_scaling,
    measure_world,
    world_sizes,
)
from clip_pgs.inspection.cost.step import Benchmark
from support.commands import refusal
from support.options import write_model_config


def test_sweeps_vary_one_size_each():
    sizes = default_sizes(8)
    assert [s.counts[0] for s in sizes if s.sweep == "patches"] == [196, 400, 784]
    assert [s.counts[1] for s in sizes if s.sweep == "candidates"] == [10, 20, 39, 78]
    assert [s.counts[2] for s in sizes if s.sweep == "images"] == [8, 16, 32]


def test_the_first_of_a_sweep_is_what_the_others_are_compared_with():
    sizes = [Size("images", side=2, num_images=n) for n in (1, 2)]
    first, second = measure_scaling(sizes, device=torch.device("cpu"), num_rounds=2)
    assert first["exponent"] is None
    assert 2 ** second["exponent"] == pytest.approx(second["seconds"] / first["seconds"])


def test_the_command_writes_its_rows(tmp_path, capsys):
    flags = ["--batch-size", "1", "--steps", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main(["scaling", *flags]) == 0
    assert "exponent" in capsys.readouterr().out
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["num_patches"] for row in content["results"][:3]] == [196, 400, 784]
    assert "processes" not in content


def step_of(model, device="cpu"):
    return Benchmark(model, None, torch.device(device), "fp32", 2)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_processes_double_up_to_the_most(most, sizes):
    assert world_sizes(most) == sizes


@pytest.mark.slow
def test_the_command_steps_on_one_process_and_on_two(tmp_path, capsys):
    model = write_model_config(tmp_path / "world_test_model.json")
    flags = ["--processes", "2", "--model", model, "--batch-size", "2", "--steps", "2"]
    assert main(["scaling", *flags, "--device", "cpu", "-o", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "processes  ms per step  samples/s  per process  efficiency" in lines
    content = json.loads((tmp_path / "scaling.json").read_text())["processes"]
    assert (content["model"], content["batch_size"]) == (model, 2)
    one, two = content["results"]
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["efficiency"] == 1
    assert two["samples_per_second"] == pytest.approx(2 * 2 / two["seconds"])
    assert two["efficiency"] == pytest.approx(one["seconds"] / two["seconds"])


def test_a_model_of_processes_is_looked_at_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["scaling", "--device", "cpu", "--processes", "2", "--model", "no such"]
    assert refusal(main, argv, capsys).startswith("error: 'no such' is neither a model config")


@pytest.mark.slow
def test_what_a_process_raises_is_said_in_one_sentence(tmp_path):
    step = step_of(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"a process failed, of 1: ValueError: .*none\.json"):
        measure_world(step, "pgs", [1], num_steps=2)


def test_too_few_gpus_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes need as many GPUs, and there are 1"):
        measure_world(step_of("ViT-B-16", "cuda"), "pgs", [1, 2], num_steps=2)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--steps", "9" * 30),
        ("--batch-size", "1000000"),
        ("--progress", "nan"),
        ("--processes", "0"),
        ("--masking", "random"),
        ("--model", "ViT-S-16"),
        ("--image-size", "32"),
        ("--precision", "fp32"),
        ("--processes", "9" * 30),
        ("--masking", "pgx"),
        ("--device", "nonsense"),
        ("--output", "file/below"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    refusal(main, ["scaling", "--device", "cpu", flag, value], capsys)
