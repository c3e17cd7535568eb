import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from clip_pgs.common import experiment_of
from clip_pgs.data.words import WordFrequencies, write_word_frequencies
from clip_pgs.masking.strategy import _REGISTRY
from clip_pgs.training.__main__ import main
from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.data_checks import training_files
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import IDENTITY, RECIPE, TrainOptions, names_of, parse_options
from clip_pgs.training.run_folder import (
    changed_options,
    default_name,
    describe_run,
    read_options_file,
    save_options,
)
from support.options import SYNTHETIC, VALID, write_model_config, write_shards

RUN = (*VALID, "--name", "demo", "--masking", "pgs", "--mask-ratio", "0.5")


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Return the folder of a run that has begun, below the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs" / "demo"
    folder.mkdir(parents=True)
    save_options(parse_options(RUN), folder)
    return folder


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u8d70", "\udcfc"])
def test_the_name_of_a_run_without_one_fits_into_a_folder_of_any_model(letter, tmp_path):
    options = parse_options(VALID)
    options.model = f"local-dir:/{100 * (7 * letter + '/')}tuned"
    name = default_name(options)
    assert "tuned-lr_" in name
    (tmp_path / name).mkdir()
    options.model = "ViT-B-16"
    assert "-model_ViT-B-16-lr_" in default_name(options)


def experiment_with(folder, **changes):
    """Return what a checkpoint keeps of a run's options, after some of them were set."""
    options = parse_options(RUN)
    for name, value in changes.items():
        setattr(options, name, value)
    save_options(options, folder)
    return experiment_of(read_options_file(folder)[0])


def test_a_checkpoint_tells_each_option_of_the_experiment_but_seed_and_places(tmp_path):
    plain = experiment_with(tmp_path)
    parts = {*names_of(IDENTITY), *names_of(RECIPE)} - {"seed"}
    others = {field.name for field in fields(TrainOptions)} - parts - {"train_data"}
    for name in parts - {"masking_options", "text_masking_options", "dataset_type"}:
        assert experiment_with(tmp_path, **{name: "another"}) != plain, name
    for name in others:
        assert experiment_with(tmp_path, **{name: None}) == plain, name
    for place in (tmp_path / "a", tmp_path / "other/b"):
        place.mkdir(parents=True)
        told = experiment_with(
            tmp_path,
            model=f"local-dir:{place}",
            pretrained=f"{place}/run/checkpoints/epoch_5.pt",
            train_data=f"{place}/data/train/0.tar",
        )
        assert told["model"] == "local-dir:"
        assert told["pretrained"] == "run/checkpoints/epoch_5.pt"
        assert told["train_data"] == "train/0.tar"


def test_a_checkpoint_tells_what_a_run_was_before_it_was_resumed_with_other_options(tmp_path):
    config = write_model_config(tmp_path / "vit_resumed.json")
    options = parse_options(["--model-config", config, *SYNTHETIC, "--masking", "pgs"])
    model = build_model(options, torch.device("cpu")).model

    def record_of(earlier, *, start=None, **changes):
        for name, value in changes.items():
            setattr(options, name, value)
        save_options(options, tmp_path)
        saved = read_options_file(tmp_path)[0]
        cpu = torch.device("cpu")
        facts = {"num_samples": 9, "saved": saved, "earlier": earlier, "start": start}
        told = describe_run(options, model, cpu, **facts)
        return {**told, "cost": {"steps": 7}}

    first = record_of({}, epochs=1)
    assert first["options"]["changes"] == record_of(first)["options"]["changes"] == []
    # By an earlier version: what it was is not known.
    assert "changes" not in record_of({"recipe": {}})["options"]
    resumed = record_of(first, epochs=3)
    assert resumed["options"]["changes"] == [[7, {"epochs": 1}]]
    assert record_of(resumed)["options"]["changes"] == [[7, {"epochs": 1}]]
    assert record_of({})["options"] == {**first["options"], "epochs": 3}
    # A branch of another run, which had its first steps in common.
    branch = record_of(first, seed=5)
    assert branch["options"]["changes"] == [[7, {"epochs": 1, "seed": 0}]]
    # Another trainer's checkpoint, or weights alone.
    foreign = record_of({}, start={}, resume="logs/else/export/weights.pt")
    assert foreign["options"]["changes"] == [[None, {"resume": "else/export/weights.pt"}]]
    # Saved as its own, they begin the run once more.
    again = record_of({}, start=foreign, resume="latest")
    assert again["options"]["changes"] == foreign["options"]["changes"]
    # Of which a batch is a part.
    together = record_of(branch, world_size=2)
    assert together["options"]["changes"][1:] == [[7, {"world_size": 1}]]


def test_a_run_that_exists_is_refused_with_the_two_ways_out(demo):
    with pytest.raises(ValueError, match=r"run logs/demo exists; use --resume latest .* --name"):
        check_options(parse_options(RUN))


def test_who_asks_for_the_cost_of_a_run_that_exists_hears_both(demo, capsys):
    assert main([*RUN, "--check-only"]) == 2
    said = capsys.readouterr()
    assert "parameters" in said.out
    assert "valid but for the name" in said.out
    assert said.err.startswith("error: run logs/demo exists; ")


def test_a_run_of_open_clip_is_not_written_over(demo):
    (demo / "options.json").unlink()
    (demo / "out.log").touch()
    with pytest.raises(ValueError, match="exists"):
        check_options(parse_options(RUN))


def test_a_folder_that_holds_no_run_is_free(demo):
    (demo / "options.json").unlink()
    (demo / "notes.txt").touch()
    check_options(parse_options(RUN))


def test_a_name_that_the_locale_does_not_know_is_refused(demo, monkeypatch):
    args = parse_options([*VALID, "--name", "caf\u00e9"])
    check_options(args)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    with pytest.raises(ValueError, match=r"caf\u00e9 must have a name in ASCII .* PYTHONUTF8=1"):
        check_options(args)


@pytest.mark.parametrize("path", ["logs", "logs/demo"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
    with pytest.raises(ValueError, match="--logs: cannot write logs/demo"):
        check_options(parse_options(RUN))


def test_the_same_options_resume_without_a_warning(demo):
    args = parse_options([*RUN, "--resume", "latest", "--workers", "1", "--save-frequency", "3"])
    check_options(args)
    assert option_warnings(args) == []


@pytest.mark.parametrize("place", ["masks", "eval", "eval/epoch_1"])
def test_a_run_is_not_resumed_that_would_write_through_a_link(demo, tmp_path, place):
    (tmp_path / "mine").mkdir()
    (demo / place).parent.mkdir(exist_ok=True)
    (demo / place).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"demo/{place} is a link to a folder"):
        check_options(parse_options([*RUN, "--resume", "latest"]))


def test_where_a_link_leads_checkpoints_is_told(demo, tmp_path):
    (demo / "checkpoints").symlink_to(tmp_path / "disk")
    args = parse_options([*RUN, "--resume", "latest"])
    check_options(args)
    (sentence,) = option_warnings(args)
    assert "demo/checkpoints is a link: checkpoints are written" in sentence
    assert str(tmp_path / "disk") in sentence


@pytest.mark.parametrize(
    ("argv", "change"),
    [
        (["--seed", "1"], "seed 0 -> 1"),
        (["--model", "ViT-S-16"], "model 'ViT-B-16' -> 'ViT-S-16'"),
        (["--masking", "random"], "masking 'pgs' -> 'random'"),
        (["--mask-ratio", "0.25"], "masking_options {'mask_ratio': 0.5} -> {'mask_ratio': 0.25}"),
        (["--merge", "2x2"], "merge 'none' -> '2x2'"),
        (["--merge", "2x2", "--merge-counts"], "merge_counts False -> True"),
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
    files = training_files(args)
    changes = changed_options(args, read_options_file(demo)[0], files=files)
    names = list(dict.fromkeys(change.split()[0] for change in changes))
    assert names == ["dataset_type", "train_data"]


def test_other_words_under_the_same_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ["--text-masking", "frequency", "--text-masking-option", "frequencies=words.json"]
    argv = [*RUN, *text, "--text-tokens", "8", "--resume", "latest"]
    words = WordFrequencies({"a": 9, "red": 3}, num_words=12, num_captions=6, min_count=1)
    write_word_frequencies(words, tmp_path / "words.json")
    (tmp_path / "logs/demo").mkdir(parents=True)
    save_options(parse_options(argv), tmp_path / "logs/demo")
    check_options(parse_options(argv))
    words.counts["red"] = 2
    write_word_frequencies(words, tmp_path / "words.json")
    with pytest.raises(
        ValueError, match=r"\(text_masking_option frequencies: \w+ is gone, .* is new\); use"
    ):
        check_options(parse_options(argv))
    check_options(parse_options([*argv, "--accept-changes"]))


@pytest.fixture
def own_masking(tmp_path, monkeypatch):
    """The file of the masking in docs/own_strategy.md, outside the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = (Path(__file__).parents[2] / "docs/own_strategy.md").read_text(encoding="utf-8")
    path = tmp_path / "bright.py"
    path.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    yield path
    sys.modules.pop("bright")
    _REGISTRY._entries.pop("bright")


def begin(folder, masking):
    """Begin a run with a masking in `folder`, and return the arguments that go on with it."""
    argv = [*VALID, "--name", "demo", "--masking", masking, "--resume", "latest"]
    folder.mkdir(parents=True)
    save_options(parse_options(argv), folder)
    check_options(parse_options(argv))
    return argv


def test_other_code_of_a_masking_of_ones_own_is_refused(own_masking, tmp_path):
    folder = tmp_path / "logs/demo"
    argv = begin(folder, "bright:BrightMasking")
    own_masking.write_text(f"{own_masking.read_text()}# other\n")
    with pytest.raises(
        ValueError, match=r"\(code of masking: \w+ is gone, code of .* is new\); use"
    ):
        check_options(parse_options(argv))
    check_options(parse_options([*argv, "--accept-changes"]))
    saved = json.loads((folder / "options.json").read_text())
    # A run of before has no code of its own and goes on.
    saved["contents"] = []
    (folder / "options.json").write_text(json.dumps(saved))
    check_options(parse_options(argv))


def test_other_code_of_a_masking_that_a_package_offers_is_refused(own_masking, tmp_path):
    package = tmp_path / "offers"
    package.mkdir()
    (package / "__init__.py").write_text("from bright import BrightMasking\n")
    argv = begin(tmp_path / "logs/demo", "offers:BrightMasking")
    own_masking.write_text(f"{own_masking.read_text()}# other\n")
    with pytest.raises(ValueError, match=r"code of masking: \w+ is gone"):
        check_options(parse_options(argv))
    sys.modules.pop("offers")


def test_a_resume_from_a_run_of_other_options_and_data_warns_of_each(demo, tmp_path):
    checkpoint = demo / "checkpoints" / "epoch_1.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    data = ["--train-data", write_shards(tmp_path / "train"), "--dataset-type", "auto"]
    argv = [*VALID, *data, "--name", "other", "--masking", "random", "--seed", "7"]
    argv += ["--image-mean", "0.5", "0.5", "0.5"]
    (warning,) = (
        sentence
        for sentence in option_warnings(parse_options([*argv, "--resume", str(checkpoint)]))
        if "other options or data" in sentence
    )
    changes = ("masking 'pgs' -> 'random'", "seed 0 -> 7", "image_mean None -> [0.5, 0.5, 0.5]")
    for change in (*changes, "train_data 00000.tar"):
        assert change in warning


def test_what_lies_in_a_models_folder_is_compared_but_for_its_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    names = ["open_clip_config.json", "vocab.json", "merges.txt"]
    for name in (*names, "open_clip_model.safetensors", "README.md"):
        (folder / name).write_text("{}")
    options = parse_options(["--model", f"local-dir:{folder}", *SYNTHETIC])
    save_options(options, tmp_path)
    (folder / "README.md").write_text("Scores.")
    (folder / "open_clip_model.safetensors").write_text("Others.")
    saved, _ = read_options_file(tmp_path)
    assert changed_options(options, saved) == []
    # Wherever it lies.
    folder = folder.rename(tmp_path / "moved")
    options = parse_options(["--model", f"local-dir:{folder}", *SYNTHETIC])
    assert changed_options(options, saved) == []
    assert changed_options(parse_options(["--model", "ViT-B-32", *SYNTHETIC]), saved) != []
    (folder / "vocab.json").write_text('{"a": 1}')
    (folder / "merges.txt").unlink()
    (folder / "added_tokens.json").write_text("[]")
    changed = changed_options(options, saved)
    assert [(change.split()[1], change.split()[-1]) for change in changed] == [
        ("merges.txt:", "gone"),
        ("vocab.json:", "gone"),
        ("added_tokens.json:", "new"),
        ("vocab.json:", "new"),
    ]


def test_files_are_the_same_by_what_they_hold_and_weights_by_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("else").mkdir()
    words, other = (
        WordFrequencies({"a": n}, num_words=n, num_captions=9, min_count=1) for n in (2, 3)
    )
    for path, content in (("words.json", words), ("else/words.json", words), ("other.json", other)):
        write_word_frequencies(content, Path(path))

    def options(frequencies, weights):
        text = [
            "--text-masking",
            "frequency",
            "--text-masking-option",
            f"frequencies={frequencies}",
        ]
        return parse_options([*VALID, *text, "--pretrained", weights])

    save_options(options("words.json", "pre.pt"), tmp_path)
    saved, _ = read_options_file(tmp_path)
    assert changed_options(options("else/words.json", "./else/pre.pt"), saved) == []
    (gone, new) = changed_options(options("other.json", "pre.pt"), saved)
    assert gone.startswith("text_masking_option frequencies: ")
    assert new.startswith("text_masking_option frequencies: ")
    assert changed_options(options("words.json", "openai"), saved) == [
        "pretrained 'pre.pt' -> 'openai'"
    ]


def test_a_model_of_the_hub_that_became_another_is_named(tmp_path, monkeypatch):
    config = {"embed_dim": 8}
    monkeypatch.setattr("clip_pgs.training.build.read_model_config", lambda options: config)
    options = parse_options(["--model", "hf-hub:a/b", *SYNTHETIC])
    save_options(options, tmp_path)
    saved, _ = read_options_file(tmp_path)
    assert changed_options(options, saved) == []
    config["embed_dim"] = 16
    assert changed_options(options, saved)[0].startswith("model config: ")


def test_a_run_of_before_has_no_digests_and_goes_on(demo):
    saved = json.loads((demo / "options.json").read_text())
    assert saved.pop("contents") == []
    (demo / "options.json").write_text(json.dumps(saved))
    check_options(parse_options([*RUN, "--resume", "latest"]))


def test_a_change_that_was_accepted_is_told_at_the_start(demo):
    argv = [*RUN, "--resume", "latest", "--masking", "random", "--accept-changes"]
    assert "run logs/demo continues with masking 'pgs' -> 'random'" in option_warnings(
        parse_options(argv)
    )


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


@pytest.mark.parametrize("left", ["export", "exit.json"])
@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/epoch_2.pt"])
def test_a_run_that_is_done_is_not_trained_again_where_its_checkpoints_are_gone(demo, gone, left):
    (demo / gone).parent.mkdir(exist_ok=True)
    (demo / left).write_text('{"code": 0}')
    with pytest.raises(ValueError, match=r"run logs/demo is done, .* --name, or remove logs/demo"):
        check_options(parse_options([*RUN, "--resume", "latest"]))
    assert not (demo / "out.log").exists()


SAVED = "2026-11-29,10:00:00 | INFO | Saved step_8.pt (epoch 0, step 8): held the run for 0.001 s\n"


@pytest.mark.parametrize(
    ("files", "steps"),
    [
        # The whole folder is removed; the checkpoints in it; all that is in it.
        ({"metrics.jsonl": '{"step": 6}\n'}, "after 7 steps"),
        ({"checkpoints/latest": "step_8.pt", "metrics.jsonl": '{"step": 9}\n'}, "after 10 steps"),
        ({"checkpoints/latest": "step_8.pt"}, "saved"),
        ({"checkpoints/results.jsonl": "", "out.log": SAVED}, "after 8 steps"),
        ({"checkpoints/results.jsonl": "", "out-0": SAVED}, "after 8 steps"),
        ({"checkpoints/renamed.pt": "", "out.log": SAVED}, "after 8 steps"),
    ],
)
def test_a_run_that_had_saved_does_not_begin_anew_where_its_checkpoints_are_gone(
    demo, capsys, files, steps
):
    for name, text in files.items():
        (demo / name).parent.mkdir(exist_ok=True)
        (demo / name).write_text(text)
    before = sorted(demo.rglob("*"))
    for also in ([], ["--check-only"]):
        assert main([*RUN, "--resume", "latest", *also]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert "run logs/demo had saved" in sentence
        assert steps in sentence
        assert "or remove logs/demo to begin anew" in sentence
    assert sorted(demo.rglob("*")) == before


@pytest.mark.parametrize("content", ['{"code": 85}', '{"code": 1}', "["])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(demo, content):
    (demo / "checkpoints").mkdir()
    (demo / "metrics.jsonl").write_text('{"step": 0}')
    (demo / "exit.json").write_text(content)
    check_options(parse_options([*RUN, "--resume", "latest"]))


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_damaged_record_is_named_and_stops_nothing(demo, content):
    (demo / "options.json").write_text(content)
    args = parse_options([*RUN, "--resume", "latest"])
    check_options(args)
    (sentence,) = option_warnings(args)
    assert "options.json" in sentence


def test_the_record_of_a_run_is_read_once_by_each_who_asks(demo, monkeypatch):
    reads = []

    def read(path, **options):
        reads.append(path.name)
        return json.loads(path.read_text())

    monkeypatch.setattr("clip_pgs.training.run_folder.read_json_object", read)
    args = parse_options([*RUN, "--resume", "latest", "--lr", "0.5"])
    check_options(args)
    assert reads == ["options.json"]
    assert len(option_warnings(args)) == 1
    assert reads == ["options.json"] * 2


def test_a_missing_record_of_a_run_is_named(demo):
    (demo / "options.json").unlink()
    args = parse_options([*RUN, "--resume", "latest", "--masking", "random", "--seed", "5"])
    assert option_warnings(args) == []
    (demo / "checkpoints").mkdir()
    (sentence,) = option_warnings(args)
    assert "options.json is not there; no option is compared" in sentence
