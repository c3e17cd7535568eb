import json

import pytest
import torch

from clip_pgs.inspection.__main__ import main
from clip_pgs.inspection.cost.scaling import Size, default_sizes, measure_scaling


def test_sweeps_vary_one_size_each():
    sizes = default_sizes(8)
    assert [s.num_patches for s in sizes if s.sweep == "patches"] == [196, 400, 784]
    assert [s.num_candidates for s in sizes if s.sweep == "candidates"] == [10, 20, 39, 78]
    assert [s.num_images for s in sizes if s.sweep == "images"] == [8, 16, 32]


def test_the_first_of_a_sweep_is_what_the_others_are_compared_with():
    sizes = [Size("images", side=2, num_images=n) for n in (1, 2)]
    first, second = measure_scaling(sizes, device=torch.device("cpu"), num_rounds=2, width=8)
    assert first.exponent is None
    assert 2**second.exponent == pytest.approx(second.seconds / first.seconds)


def test_the_command_writes_its_rows(tmp_path, capsys):
    flags = ["--batch-size", "1", "--steps", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main(["scaling", *flags]) == 0
    assert "exponent" in capsys.readouterr().out
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["num_patches"] for row in content["results"][:3]] == [196, 400, 784]
    assert "processes" not in content


def test_bad_input_ends_with_code_2_and_one_sentence(capsys):
    assert main(["scaling", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1, got 0\n"
