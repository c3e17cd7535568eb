"""scripts/simulate_cc12m.py, tried on a few small shards."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_pgs.data.tar import index_shard
from support.scripts import ENVIRONMENT, ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("simulate_cc12m")
    sys.modules.pop("simulate_cc12m")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("shards", "pairs"), [(3, 200), (2, 300), (3, 400)])
def test_shards_of_another_size_are_refused_and_stay(
    script, tmp_path, monkeypatch, capsys, shards, pairs
):
    script.write_shards(tmp_path, 3, 300)
    before = contents(tmp_path)
    options = ["--shards", f"{shards}", "--pairs", f"{pairs}"]
    monkeypatch.setattr(sys, "argv", ["simulate_cc12m.py", str(tmp_path), *options])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert f"{shards} shards of {pairs} pairs" in error
    assert contents(tmp_path) == before


def test_shards_of_the_same_size_stay_and_lost_indexes_are_made_anew(script, tmp_path):
    first, second, third = map(Path, script.write_shards(tmp_path, 3, 300))
    before = first.stat().st_ctime_ns
    # As an interruption and a copy leave them.
    (tmp_path / f".{second.name}.index").write_bytes(b"half")
    os.utime(third)
    script.write_shards(tmp_path, 3, 300)
    assert first.stat().st_ctime_ns == before
    assert [len(index_shard(str(path))) for path in (first, second, third)] == [300] * 3


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
