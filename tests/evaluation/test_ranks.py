import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes_share_the_sets_and_one_tells_the_result(
    finished_run, data_root, damaged_folder, tmp_path
):
    sets = tmp_path / "sets.txt"
    sets.write_text(f"six\npairs\n{damaged_folder}\nlinear-probe: six\nsugar_crepe/add_att\n")
    arguments = [finished_run, "--datasets", sets, "--data-root", data_root]
    arguments += ["--output", tmp_path / "out", "--workers", "0", "--no-report"]
    environment = os.environ | {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    done = subprocess.run(
        ["bash", ROOT / "clip-test.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("In percent") == 1
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].islower()}
    assert "test/0.tar cannot be read" in rows["damaged"]
    for name in ("pairs", "sugar_crepe/add_att", "average"):
        assert "failed" not in rows[name]
    # Two of five pieces of work at least went to either process.
    for rank in (0, 1):
        assert done.stderr.count(f"rank {rank} [") >= 1
    statuses = {
        path.stem: json.loads(path.read_text())["status"] for path in tmp_path.glob("out/*.json")
    }
    assert statuses == {
        "zeroshot_classification_six": "done",
        "zeroshot_classification_damaged": "failed",
        "zeroshot_retrieval_pairs": "done",
        "linear_probe_six": "done",
        "compositionality_sugar_crepe-add_att": "done",
    }
    table = (tmp_path / "out/results.csv").read_text()
    assert len(table.splitlines()) == 1 + 5


def test_a_number_of_processes_that_is_none_is_refused(tmp_path):
    environment = os.environ | {"NPROC_PER_NODE": "two"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "clip-test.sh", "logs/none"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert (
        done.stderr == "error: NPROC_PER_NODE must be a whole number in [1, 1000000], got 'two'\n"
    )
