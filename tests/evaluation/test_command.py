import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from clip_pgs.evaluation import load_model
from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.command import choose_device
from clip_pgs.evaluation.report.gather import gather_runs
from clip_pgs.evaluation.results import read_results
from clip_pgs.files import folder_lock
from support.disk import files_limited_to

ROOT = Path(__file__).resolve().parents[2]


def test_run_is_evaluated_into_its_own_folder(run, options, capsys):
    assert main([str(run), *options]) == 0
    names = {path.name for path in (run / "eval").iterdir()}
    assert names == {
        "features",
        "results.csv",
        "zeroshot_classification_six.json",
        "zeroshot_retrieval_pairs.json",
    }
    output = capsys.readouterr().out
    assert "zeroshot-classification  acc1" in output
    assert "zeroshot-retrieval  text R@1" in output
    acc1 = json.loads((run / "eval/zeroshot_classification_six.json").read_text())["metrics"][
        "acc1"
    ]
    row = next(line for line in output.splitlines() if line.startswith("six"))
    assert row.split()[1] == f"{100 * acc1:.1f}"


@pytest.mark.parametrize(("name", "is_written"), [("not/here", False), ("vtab/cifar10", True)])
def test_missing_set_gives_exit_code_1_and_a_row_and_a_file_where_a_list_of_ours_names_it(
    run, options, dataset_list, capsys, name, is_written
):
    dataset_list.write_text(f"six\n{name}\n")
    assert main([str(run), *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    reason = next(line for line in lines if line.startswith(name))
    assert "  missing: no folder" in reason
    with (run / "eval/results.csv").open() as file:
        rows = {row["dataset"]: row["status"] for row in csv.DictReader(file)}
    assert rows == {"six": "done"} | ({name: "missing"} if is_written else {})
    assert len(list((run / "eval").glob("zeroshot_*.json"))) == len(rows)


def test_a_runs_folder_of_results_that_is_a_link_is_no_place_for_results(run, options, capsys):
    mine = Path("mine")
    mine.mkdir()
    (mine / "results.csv").write_text("precious")
    (run / "eval").symlink_to(mine.absolute())
    assert main([str(run), *options]) == 2
    assert "eval is a link; say by --output where" in capsys.readouterr().err
    assert [path.read_text() for path in mine.iterdir()] == ["precious"]


@pytest.mark.parametrize("words", [["--output"], ["report", "-o"]], ids=" ".join)
def test_an_output_without_a_name_is_refused(run, capsys, words):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*words[:-1], str(run), words[-1], ""])
    assert "must name a place, got ''" in capsys.readouterr().err


@pytest.mark.parametrize("output", [None, "out"])
@pytest.mark.parametrize("name", ["report", "epoch_1/report"])
def test_nothing_is_written_through_a_link_among_results(run, options, capsys, output, name):
    place = run / "eval" if output is None else Path(output)
    (place / name).parent.mkdir(parents=True)
    (place / name).symlink_to(Path().absolute())
    assert main([str(run), *options, *(["--output", output] if output else [])]) == 2
    assert f"{place / name} is a link to a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("output", [None, "out"])
def test_a_damaged_result_of_another_set_is_told_once_a_call(run, options, caplog, output):
    folder = run / "eval" if output is None else Path(output)
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text('{"weights_')
    place = [] if output is None else ["--output", output]
    for _ in range(2):
        caplog.clear()
        assert main([str(run), *options[:-1], *place]) == 0
        assert caplog.text.count("cut.json") == 1


def test_of_a_mistyped_set_alone_no_file_is_written_or_named(run, options, dataset_list, capsys):
    dataset_list.write_text("sxi\n")
    assert main([str(run), *options]) == 1
    said = capsys.readouterr().out
    assert "sxi" in said
    assert "results.csv" not in said
    assert not (run / "eval").exists()


def test_report_is_written_and_named_in_the_last_line(run, options, capsys):
    assert main([str(run), *options[:-1]]) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"The report is {run}/eval/report/report.html"
    page = (run / "eval/report/report.html").read_text()
    assert "tiny_run" in page
    assert "six" in page


def test_scores_stay_where_the_disk_has_no_room_for_their_report(run, options, capsys):
    with files_limited_to(9000):
        assert main([str(run), *options[:-1]]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {run}/eval/report/figures/\S+: File too large\n", said)
    names = {path.name for path in (run / "eval").iterdir()}
    assert {"results.csv", "zeroshot_classification_six.json"} <= names


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("suite", "metric"), [("zeroshot-classification", "acc1"), ("linear-probe", "lp_acc1")]
)
def test_report_has_chance_for_classes_also_where_the_data_are_gone(
    run, options, data_root, tmp_path, suite, metric
):
    place = shutil.copytree(data_root, tmp_path / "copy")
    sets = [place if option == str(data_root) else option for option in options[:-1]]
    assert place in sets
    assert main([str(run), *map(str, sets), "--suite", suite]) == 0
    shutil.rmtree(place)
    assert main(["report", str(run), "-o", "again"]) == 0
    with Path("again/results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "chance"]
    chance = {(row["name"], row["metric"]): float(row["value"]) for row in rows}
    assert chance["six", metric] == pytest.approx(1 / 6)


@pytest.mark.usefixtures("without_pictures")
def test_report_is_on_the_present_weights_alone_and_the_rest_is_told(
    run, options, save_run, caplog
):
    assert main([str(run), *options]) == 0
    model = load_model(run).model
    with torch.no_grad():
        model.visual.proj.mul_(2.0)
    save_run(run, model)
    assert main([str(run), *options[:-1], "--suite", "zeroshot-retrieval"]) == 0
    table = (run / "eval/report/results.csv").read_text()
    assert "pairs" in table
    assert "six" not in table
    (said,) = [text for text in caplog.messages if "leaves out" in text]
    assert "six" in said
    assert "pairs" not in said


def test_missing_demo_data_comes_with_the_command_that_makes_it(run, capsys, caplog):
    assert main([str(run), "--suite", "zeroshot-retrieval"]) == 1
    assert "missing: no folder data/demo/eval/retrieval" in capsys.readouterr().out
    assert "clip-pgs data world data/demo" in caplog.text


def test_two_models_go_to_two_folders(run, options):
    sources = [str(run), str(run / "checkpoints/epoch_1.pt")]
    assert main([*sources, *options, "--suite", "zeroshot-retrieval", "--output", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["tiny_run", "tiny_run_epoch_1"]


def test_checkpoint_without_a_run_goes_to_eval_results(run, options):
    shutil.copy(run / "checkpoints/epoch_1.pt", "lone.pt")
    arguments = ["lone.pt", "--model", "tiny-eval-vit", "--suite", "zeroshot-retrieval"]
    assert main([*arguments, *options]) == 0
    assert Path("eval_results/lone/results.csv").is_file()


def test_results_of_another_model_of_the_name_stay_unless_they_are_to_go(
    run, options, capsys, monkeypatch
):
    arguments = ["--model", "tiny-eval-vit", "--suite", "zeroshot-retrieval", *options]
    for place in ("a", "b"):
        Path(place).mkdir()
        shutil.copy(run / "checkpoints/epoch_1.pt", f"{place}/lone.pt")
    assert main(["a/lone.pt", *arguments]) == 0
    # The same weights, from wherever.
    assert main(["b/lone.pt", *arguments]) == 0
    content = torch.load("b/lone.pt", weights_only=True)
    content["state_dict"]["visual.proj"] += 1
    torch.save(content, "c.pt")
    shutil.move("c.pt", "a/lone.pt")
    before = Path("eval_results/lone/results.csv").read_bytes()
    capsys.readouterr()
    assert main(["a/lone.pt", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: eval_results/lone holds results of {Path.cwd()}/b/lone.pt; na")
    assert Path("eval_results/lone/results.csv").read_bytes() == before
    assert main(["a/lone.pt", *arguments, "--force"]) == 0
    assert Path("eval_results/lone/results.csv").read_bytes() != before
    # One of the same name in another folder.
    arguments += ["--output", str(Path.cwd() / "out")]
    for place, code in (("a", 0), ("../b", 2)):
        monkeypatch.chdir(place)
        assert main(["lone.pt", *arguments]) == code


@pytest.mark.parametrize("source", ["export", "checkpoints/epoch_1.pt"])
@pytest.mark.parametrize("way", ["relative", "through a link"])
def test_results_recorded_under_a_path_as_typed_are_replaced_after_more_training(
    run, save_run, options, source, way
):
    Path("link").symlink_to(run.absolute())
    typed = os.path.relpath(run / source) if way == "relative" else f"link/{source}"
    arguments = [typed, *options, "--suite", "zeroshot-retrieval", "--output", "out"]
    assert main(arguments) == 0
    (path,) = Path("out").glob("zeroshot_retrieval*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"pretrained": typed}))
    model = load_model(run).model
    with torch.no_grad():
        model.visual.proj.add_(1)
    save_run(run, model)
    assert main(arguments) == 0
    renewed = json.loads(path.read_text())
    assert renewed["pretrained"] == str(run.absolute() / source)
    assert renewed["weights_digest"] != record["weights_digest"]


def test_of_two_exports_that_are_named_alike_from_their_folders_the_first_is_kept(
    run, save_run, options, capsys, monkeypatch
):
    other = shutil.copytree(run, run.with_name("other"))
    model = load_model(run).model
    with torch.no_grad():
        model.visual.proj.add_(1)
    save_run(other, model)
    shared = Path.cwd() / "shared"
    arguments = [*options, "--suite", "zeroshot-retrieval", "--output", str(shared)]
    monkeypatch.chdir(run)
    assert main([".", *arguments]) == 0
    before = (shared / "results.csv").read_bytes()
    monkeypatch.chdir(f"../{other.name}")
    capsys.readouterr()
    assert main([".", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {shared} holds results of {shared.parent / run / 'export'}; na")
    assert (shared / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("place", "source"),
    [("logs/tiny_run", "."), ("logs/tiny_run/export", "."), ("logs/tiny_run/eval", "../export")],
)
def test_a_run_is_found_from_within(run, options, monkeypatch, place, source):
    (run / "eval").mkdir()
    export = Path.cwd() / run / "export"
    record = {"masking": "random", "masking_options": {"mask_ratio": 0.5}, "epochs": 1}
    (run / "options.json").write_text(json.dumps(record))
    output = Path.cwd() / "out"
    monkeypatch.chdir(place)
    arguments = [*options, "--suite", "zeroshot-retrieval", "--output", str(output)]
    assert main([source, *arguments, "--inference-masking", "run"]) == 0
    (result,) = read_results(output)
    assert (result.pretrained, result.inference_masking) == (str(export), "random 0.5")


def test_a_checkpoint_beyond_a_link_is_named_where_it_is(run, options):
    Path("elsewhere/inner").mkdir(parents=True)
    Path("link").symlink_to("elsewhere/inner")
    shutil.copy(run / "checkpoints/epoch_1.pt", "elsewhere/lone.pt")
    Path("elsewhere/latest.pt").symlink_to("lone.pt")
    arguments = [*options, "--model", "tiny-eval-vit", "--suite", "zeroshot-retrieval"]
    for name in ("lone", "latest"):
        assert main([f"link/../{name}.pt", *arguments, "--output", name]) == 0
        (result,) = read_results(Path(name))
        assert result.pretrained == str(Path.cwd() / f"elsewhere/{name}.pt")


def test_a_set_whose_file_is_that_of_another_is_refused_and_takes_no_score_away(
    run, data_root, capsys
):
    shutil.copytree(data_root / "six", "sets/a/b")
    shutil.copytree(data_root / "six", "other/a-b")
    Path("sets.txt").write_text("zeroshot-classification: a/b\n")
    Path("others.txt").write_text("zeroshot-classification: a-b\n")
    common = ["--workers", "0", "--no-report"]
    assert main([str(run), "--datasets", "sets.txt", "--data-root", "sets", *common]) == 0
    path = run / "eval/zeroshot_classification_a-b.json"
    before = path.read_bytes()
    arguments = [str(run), "--datasets", "others.txt", "--data-root", "other", *common]
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {path} holds the result of a/b, which that of a-b would replace"
    )
    assert path.read_bytes() == before
    assert main([*arguments, "--force"]) == 0
    assert json.loads(path.read_text())["dataset"] == "a-b"


def test_one_folder_under_its_other_name_keeps_its_score(run, data_root):
    shutil.copytree(data_root / "six", "sets/a-b")
    for name in ("a/b", "a-b"):
        Path("sets.txt").write_text(f"zeroshot-classification: {name}\n")
        common = ["--datasets", "sets.txt", "--data-root", "sets", "--workers", "0", "--no-report"]
        assert main([str(run), *common]) == 0
    path = run / "eval/zeroshot_classification_a-b.json"
    assert json.loads(path.read_text())["dataset"] == "a-b"


def test_a_call_that_waited_keeps_the_results_of_the_one_before(run, options, capsys, caplog):
    arguments = ["--model", "tiny-eval-vit", "--suite", "zeroshot-retrieval", *options]
    shutil.copy(run / "checkpoints/epoch_1.pt", "a.pt")
    content = torch.load("a.pt", weights_only=True)
    content["state_dict"]["visual.proj"] += 1
    torch.save(content, "b.pt")
    assert main(["a.pt", *arguments, "--output", "of_a"]) == 0
    Path("out").mkdir()

    def finish_a():
        with folder_lock(Path("out"), on_busy=lambda: None):
            is_held.set()
            end = time.monotonic() + 60
            while "waiting for another process" not in caplog.text and time.monotonic() < end:
                time.sleep(0.02)
            shutil.copytree("of_a", "out", dirs_exist_ok=True)

    is_held = threading.Event()
    other = threading.Thread(target=finish_a)
    other.start()
    assert is_held.wait(60)
    capsys.readouterr()
    assert main(["b.pt", *arguments, "--output", "out"]) == 2
    other.join()
    assert "waiting for another process, which evaluates into out" in caplog.text
    assert f"out holds results of {Path.cwd()}/a.pt; name another" in capsys.readouterr().err
    assert Path("out/results.csv").read_bytes() == Path("of_a/results.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["logs/no_run"], "no run, export or checkpoint at logs/no_run"),
        (["logs/tiny_run", "--suite", "zeroshot"], "unknown suite 'zeroshot'"),
        (["logs/tiny_run", "--datasets", "no_list.txt"], "unknown data set list 'no_list.txt'"),
        (["logs/tiny_run", "--data-root", "no_root"], "data root no_root is not a folder"),
        (["logs/tiny_run", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["logs/tiny_run", "--device", "cuda:99"], "--device cuda:99 is not available"),
        (["logs/tiny_run", "logs/no_run"], "no run, export or checkpoint at logs/no_run"),
        (["logs/tiny_run", "logs/tiny_run/"], "two models would write to"),
        (["logs/tiny_run", "--model", "RN50"], "--model RN50 is for a source that is a checkpoint"),
        (["logs/tiny_run", "--model-config", "a.json"], "--model-config a.json is for a source"),
        (["logs/tiny_run", "--pretrained", "openai"], "--pretrained openai is for a source that"),
    ],
)
def test_bad_input_gives_exit_code_2_one_sentence_and_no_files(run, capsys, arguments, sentence):
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nTried"), OSError(5, "I/O")])
def test_a_model_that_cannot_be_opened_stops_no_other(run, options, capsys, monkeypatch, error):
    def load(source, **options):
        if "checkpoints" in source:
            raise error
        return load_model(source, **options)

    monkeypatch.setattr("clip_pgs.evaluation.models.load_model", load)
    shutil.copytree(run, "other")
    sources = [str(run), str(run / "checkpoints/epoch_1.pt"), "other"]
    arguments = [*sources, *options[:-1], "--suite", "zeroshot-retrieval"]
    assert main(arguments) > 0
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
    assert "CUDA out of memory. Tried" in said.err or "I/O" in said.err
    assert said.out.splitlines()[-1] == "The report is eval_results/report/report.html"
    assert all(Path(place, "eval/results.csv").is_file() for place in (run, "other"))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_has_a_gpu_of_its_own(name):
    chosen = [choose_device(name, world_size=2, local_rank=rank) for rank in (0, 1)]
    assert chosen == ["cuda:0", "cuda:1"]
    assert choose_device(name) == "cuda"
    with pytest.raises(ValueError, match="each process takes a GPU of its own, and there are 2"):
        choose_device(name, world_size=3, local_rank=2)


@pytest.mark.parametrize("name", [None, "cuda"])
@pytest.mark.parametrize("launch", ["bound tasks", "torchrun", "unbound tasks"])
def test_tasks_that_each_see_a_gpu_of_their_own_take_it(two_gpus, monkeypatch, launch, name):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for variable, is_set in (
        ("CUDA_VISIBLE_DEVICES", launch != "unbound tasks"),
        ("TORCHELASTIC_RUN_ID", launch == "torchrun"),
    ):
        monkeypatch.delenv(variable, raising=False)
        if is_set:
            monkeypatch.setenv(variable, "0")
    assert choose_device(name, world_size=2, local_rank=0) == "cuda:0"
    if launch == "bound tasks":
        assert choose_device(name, world_size=2, local_rank=1) == "cuda:0"
    else:
        with pytest.raises(ValueError, match="there are 1 for process 1"):
            choose_device(name, world_size=2, local_rank=1)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_by_number_is_refused_to_several_processes():
    assert choose_device("cuda:1") == "cuda:1"
    assert choose_device("cpu", world_size=2, local_rank=1) == "cpu"
    with pytest.raises(ValueError, match="--device cuda:1 is one GPU for 2 processes"):
        choose_device("cuda:1", world_size=2)


def test_processes_that_nobody_started_are_one_sentence(run, options, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(run), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the processes that WORLD_SIZE announces")
    assert "RANK" in said
    assert said.count("\n") == 1
    assert not (run / "eval").exists()


def test_weights_with_nan_give_exit_code_2_and_no_files(run, options, capsys):
    path = run / "checkpoints/epoch_1.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["visual.proj"][0, 0] = float("nan")
    torch.save(content, path)
    assert main([str(path), *options]) == 2
    assert "visual.proj holds 1 NaN" in capsys.readouterr().err
    assert not Path("eval_results").exists()


def test_a_second_call_does_nothing_again_but_force_does(run, options, caplog):
    assert main([str(run), *options]) == 0
    caplog.clear()
    assert main([str(run), *options]) == 0
    assert caplog.text.count("done before") == 2
    caplog.clear()
    assert main([str(run), *options, "--force"]) == 0
    assert "done before" not in caplog.text


def test_an_interruption_gives_exit_code_130_and_says_how_to_go_on(
    run, options, capsys, monkeypatch
):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_pgs.evaluation.runner.evaluate", interrupt)
    assert main([str(run), *options]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command continues\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("step", ["command.load_suite", "runner.evaluate"])
def test_a_signal_to_leave_gives_exit_code_85_and_says_how_to_go_on(
    run, options, capsys, monkeypatch, number, step
):
    # Who runs the tests in the background may have it ignored, and then it stays so.
    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(f"clip_pgs.evaluation.{step}", lambda *_, **__: signal.raise_signal(number))
    try:
        assert main([str(run), *options]) == 85
        written = capsys.readouterr().err
        assert written.endswith(f"stopped by {number.name}; the same command continues\n")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


# One process for both calls: importing clip_benchmark takes seconds.
CLIP_BENCHMARK = """
import json, sys
from clip_benchmark.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["clip_benchmark", *arguments]
    main()
"""


@pytest.mark.slow
def test_scores_equal_those_of_the_clip_benchmark_command(run, options, data_root):
    assert main([str(run), *options]) == 0
    tasks = {"six": "zeroshot_classification", "pairs": "zeroshot_retrieval"}
    common = ["eval", "--model", f"local-dir:{run / 'export'}", "--pretrained", "", "--no_amp"]
    common += ["--num_workers", "0", "--recall_k", "1", "5", "10", "--output", "{dataset}.json"]
    common += ["--dataset_root", f"{data_root}/{{dataset}}"]
    calls = [[*common, "--dataset", f"wds/{name}", "--task", task] for name, task in tasks.items()]
    command = [sys.executable, "-c", CLIP_BENCHMARK, json.dumps(calls)]
    subprocess.run(command, check=True, capture_output=True)
    for name, task in tasks.items():
        theirs = json.loads(Path(f"{name}.json").read_text())["metrics"]
        ours = json.loads((run / f"eval/{task}_{name}.json").read_text())["metrics"]
        assert ours == theirs


@pytest.mark.slow
def test_shell_command_hands_over_arguments_and_exit_code(run, options, dataset_list):
    dataset_list.write_text("pairs\nnot/here\n")
    venv_bin = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{venv_bin}:{os.environ['PATH']}"}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    done = subprocess.run(
        ["bash", ROOT / "clip-test.sh", run, *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    assert "tiny_run" in done.stdout
    assert "[1/2]" in done.stderr
    assert load_model(run).name in done.stdout


def test_results_tell_the_training_of_their_weights_after_the_run_trained_on(
    run, options, save_run, tmp_path
):
    shared = [*options[:-1], "--no-report", "--suite", "zeroshot-retrieval"]
    model = load_model(run).model
    sources = {"run": str(run), "file": str(run / "checkpoints/epoch_1.pt")}
    for samples in (100, 300):
        with torch.no_grad():
            model.logit_scale.add_(0.5)
        save_run(run, model)
        (run / "checkpoints/latest").write_text("epoch_1.pt\n")
        path = run / "checkpoints/epoch_1.pt"
        record = {"recipe": {"seed": 3}, "cost": {"samples": samples}, "metrics": {}}
        torch.save({**torch.load(path), "clip_pgs": record}, path)
        for name, source in sources.items():
            assert main([source, *shared, "--output", f"{name}_{samples}"]) == 0
    found = gather_runs([f"{name}_{samples}" for samples in (100, 300) for name in sources])
    assert [(each.training.samples, each.training.seed) for each in found] == [(100, 3), (300, 3)]
    # What an earlier version found is told its training where it is asked for again.
    result = Path("run_300/zeroshot_retrieval_pairs.json")
    content = json.loads(result.read_text())
    seconds = content["seconds"]
    del content["training"]
    result.write_text(json.dumps({**content, "seconds": seconds + 1}))
    assert main([sources["run"], *shared, "--output", "run_300"]) == 0
    content = json.loads(result.read_text())
    assert content["training"]["cost"] == {"samples": 300}
    assert content["seconds"] == seconds + 1
