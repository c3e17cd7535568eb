"""scripts/simulate_cc12m.py, tried on a few small shards."""

import subprocess
import sys

import pytest

from support.scripts import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_it_prints_its_tables(tmp_path):
    script, sizes = ROOT / "scripts" / "simulate_cc12m.py", ["--shards", "64", "--pairs", "300"]
    command = [sys.executable, script, tmp_path, *sizes, "--samples", "4096", "--steps", "4"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, first, second, third = done.stdout.split("\n\n")
    assert head.startswith("64 shards of 300 pairs")
    assert len(first.splitlines()) == 2 + 4 + 2 * 3
    assert [line.split(" | ")[0] for line in second.splitlines()[2:]] == ["| 1", "| 8", "| 64"]
    assert "clip-pgs" in third
    assert "perfect" in third
