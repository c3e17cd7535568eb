import json
import os

import pytest

from clip_pgs.inspection.__main__ import main
from clip_pgs.inspection.cost.world_scaling import SharedStep, measure_world, world_sizes
from support.options import write_model_config


def shared_step(model, **changes):
    fields = {
        "image_size": None,
        "masking": "pgs",
        "batch_size": 2,
        "precision": "fp32",
        "device_type": "cpu",
        "num_threads": 1,
        "num_steps": 2,
        **changes,
    }
    return SharedStep(model, **fields)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_processes_double_up_to_the_most(most, sizes):
    assert world_sizes(most) == sizes


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


def test_what_a_process_raises_is_said_in_one_sentence(tmp_path):
    step = shared_step(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="a process failed, of 1: ValueError: there is no model"):
        measure_world(step, [1])


def test_too_few_gpus_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes need as many GPUs, and there are 1"):
        measure_world(shared_step("ViT-B-16", device_type="cuda"), [1, 2])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--masking", "pgx"], "unknown masking 'pgx'"),
    ],
)
def test_bad_options_end_with_code_2_and_one_sentence(capsys, flags, sentence):
    assert main(["scaling", *flags]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {sentence}")
    assert stderr.count(os.linesep) == 1
