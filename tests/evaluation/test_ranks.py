import json
import os
import shutil
import signal
import subprocess
import sys
import time
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


FULL_SUITE = """
import os
from clip_pgs.evaluation import Scores, models, register_suite

load = models.load_model

def load_unless_full(source, **options):
    if os.environ["RANK"] == "1" and "first" in source:
        raise RuntimeError("CUDA out of memory")
    return load(source, **options)

models.load_model = load_unless_full

@register_suite("full", title="Full", summary="", task="full", types=("classification",),
                metrics={"acc": "acc"}, main_metrics=("acc",), unit="percent")
def score(encoder, eval_set):
    return Scores({"acc": 0.5}, 1)
"""


@pytest.mark.slow
def test_a_model_that_one_process_cannot_open_is_told_by_the_first_and_passed_over_by_all(
    finished_run, data_root, tmp_path
):
    (tmp_path / "full_suite.py").write_text(FULL_SUITE)
    (tmp_path / "sets.txt").write_text("six\n")
    for name in ("first", "second"):
        shutil.copytree(finished_run, tmp_path / name)
    command = [sys.executable, "-m", "clip_pgs.cli", "test", "first", "second", "--nproc", "2"]
    command += ["--suite", "full_suite:score", "--datasets", "sets.txt"]
    command += ["--data-root", str(data_root), "--workers", "0", "--no-report"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (complaint,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert complaint == "error: first cannot be opened on cpu: CUDA out of memory"
    assert not (tmp_path / "first/eval").exists()
    assert (tmp_path / "second/eval/results.csv").is_file()


SLOW_SUITE = """
import os, time
from clip_pgs.evaluation import Scores, register_suite

@register_suite("slow", title="Slow", summary="", task="slow", types=("classification",),
                metrics={"acc": "acc"}, main_metrics=("acc",), unit="percent")
def score(encoder, eval_set):
    with open(f"rank_{os.environ['RANK']}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)
    return Scores({"acc": 0.5}, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "number", "code", "sentence"),
    [
        ("launch", signal.SIGTERM, 85, "stopped by SIGTERM; the same command continues"),
        ("launch", signal.SIGINT, 130, "interrupted; the same command continues"),
        ("rank_1", signal.SIGTERM, 85, "stopped by SIGTERM; the same command continues"),
        ("rank_1", signal.SIGKILL, 1, "error: process 1 was ended by SIGKILL"),
    ],
)
def test_what_ends_one_of_two_processes_is_told_once(
    who, number, code, sentence, finished_run, data_root, tmp_path
):
    (tmp_path / "slow_suite.py").write_text(SLOW_SUITE)
    (tmp_path / "sets.txt").write_text("six\nshapes\n")
    shutil.copytree(data_root / "six", tmp_path / "data/six")
    shutil.copytree(data_root / "six", tmp_path / "data/shapes")
    command = [sys.executable, "-m", "clip_pgs.cli", "test", str(finished_run), "--nproc", "2"]
    command += ["--suite", "slow_suite:score", "--datasets", "sets.txt", "--data-root", "data"]
    command += ["--output", "out", "--workers", "0", "--no-report"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as launch:
        pids = [tmp_path / f"rank_{rank}" for rank in (0, 1)]
        while not all(path.is_file() and path.read_text() for path in pids):
            assert launch.poll() is None, launch.stderr.read()
            time.sleep(0.1)
        os.kill(launch.pid if who == "launch" else int((tmp_path / who).read_text()), number)
        said = launch.communicate(timeout=60)[1]
    assert launch.returncode == code
    assert said.splitlines()[-1] == sentence
    assert "Traceback" not in said
    assert said.count("stopped by") + said.count("interrupted") == (code != 1)


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
