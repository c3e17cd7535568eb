import pytest

from clip_pgs.training.checks import check_options, option_warnings
from clip_pgs.training.options import parse_options
from clip_pgs.training.run_folder import changed_options, save_options
from support.options import VALID, write_shards

RUN = (*VALID, "--name", "demo", "--masking", "pgs", "--mask-ratio", "0.5")


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Return the folder of a run that has begun, below the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs" / "demo"
    folder.mkdir(parents=True)
    save_options(parse_options(RUN), folder)
    return folder


def test_a_run_that_exists_is_refused_with_the_two_ways_out(demo):
    with pytest.raises(ValueError, match=r"run logs/demo exists; use --resume latest .* --name"):
        check_options(parse_options(RUN))


def test_a_run_of_open_clip_is_not_written_over(demo):
    (demo / "options.json").unlink()
    (demo / "out.log").touch()
    with pytest.raises(ValueError, match="exists"):
        check_options(parse_options(RUN))


def test_a_folder_that_holds_no_run_is_free(demo):
    (demo / "options.json").unlink()
    (demo / "notes.txt").touch()
    check_options(parse_options(RUN))


@pytest.mark.parametrize("path", ["logs", "logs/demo"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
    with pytest.raises(ValueError, match=f"{path} is a file"):
        check_options(parse_options(RUN))


def test_the_same_options_resume_without_a_warning(demo):
    args = parse_options([*RUN, "--resume", "latest", "--workers", "1", "--save-frequency", "3"])
    check_options(args)
    assert option_warnings(args) == []


@pytest.mark.parametrize(
    ("argv", "change"),
    [
        (["--seed", "1"], "seed 0 -> 1"),
        (["--model", "ViT-S-16"], "model 'ViT-B-16' -> 'ViT-S-16'"),
        (["--masking", "random"], "masking 'pgs' -> 'random'"),
        (["--mask-ratio", "0.25"], "masking_options {'mask_ratio': 0.5} -> {'mask_ratio': 0.25}"),
        (["--train-num-samples", "999"], "train_num_samples 1000 -> 999"),
        (["--siglip"], "siglip False -> True"),
    ],
)
def test_a_resumed_run_stays_the_same_experiment(demo, argv, change):
    args = parse_options([*RUN, "--resume", "latest", *argv])
    with pytest.raises(ValueError, match="cannot continue with other options") as caught:
        check_options(args)
    assert change in str(caught.value)


def test_other_data_is_named(demo, tmp_path):
    data = ["--train-data", write_shards(tmp_path / "train"), "--dataset-type", "auto"]
    args = parse_options([*RUN, "--resume", "latest", *data])
    names = [change.split()[0] for change in changed_options(args, demo)]
    assert names == ["train_data", "dataset_type"]


def test_another_recipe_resumes_with_a_warning(demo):
    args = parse_options([*RUN, "--resume", "latest", "--lr", "0.5", "--epochs", "40"])
    check_options(args)
    assert option_warnings(args) == [
        "run logs/demo continues with epochs 32 -> 40",
        "run logs/demo continues with lr 0.0005 -> 0.5",
    ]


def test_resuming_what_never_began_starts_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_options(parse_options([*RUN, "--resume", "latest"]))


def test_a_damaged_record_is_named(demo):
    (demo / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options\.json is not JSON"):
        check_options(parse_options([*RUN, "--resume", "latest"]))
