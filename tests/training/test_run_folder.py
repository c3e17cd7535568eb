import io
import json
import re
import shutil
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clip_pgs.common import experiment_of
from clip_pgs.data.shards import expand_shards
from clip_pgs.data.tar import index_shards
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
    describe_run,
    read_options_file,
    save_indexes,
    save_options,
)
from support.options import SYNTHETIC, VALID, write_model_config, write_shards
from support.runs import MODEL, flags, write_csv, write_model
from support.runs import write_shards as write_samples

RUN = (*VALID, "--name", "demo", "--masking", "pgs", "--mask-ratio", "0.5")


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Return the folder of a run that has begun, below the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs" / "demo"
    folder.mkdir(parents=True)
    save_options(parse_options(RUN), folder)
    return folder


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

    def record_of(earlier, *, is_fresh=True, **changes):
        for name, value in changes.items():
            setattr(options, name, value)
        save_options(options, tmp_path)
        saved = read_options_file(tmp_path)[0]
        cpu = torch.device("cpu")
        facts = {"num_samples": 9, "saved": saved, "earlier": earlier, "is_fresh": is_fresh}
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
    foreign = record_of({}, is_fresh=False, resume="logs/else/export/weights.pt")
    assert foreign["options"]["changes"] == [[None, {"resume": "else/export/weights.pt"}]]


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


def test_a_resume_from_a_file_outside_of_its_run_compares_the_record_in_it(
    finished_run, finished_options, tmp_path
):
    source = tmp_path / "e2.pt"
    shutil.copy(finished_run / "checkpoints" / "epoch_2.pt", source)

    def warnings(**changed):
        return option_warnings(parse_options(flags(tmp_path, **finished_options | changed)))

    assert warnings(resume=source) == []
    # On a CPU the default trains in fp32, which the record says.
    assert warnings(resume=source, precision="amp") == []
    vision = {**MODEL["vision_cfg"], "head_width": 32}
    model = write_model(tmp_path, name="heads", config={**MODEL, "vision_cfg": vision})
    other = {"model": model, "masking": "random", "mask_ratio_min": None, "seed": 5}
    other |= {"train_data": write_shards(tmp_path / "other"), "image_mean": [0.5] * 3}
    parts = {"text_tokens": 8, "unmasked_epochs": 1, "merge": "2x2"}
    (warning,) = warnings(resume=source, precision="bf16", **other, **parts)
    assert warning.startswith(f"--resume {source} goes on from a run with other options or data: ")
    for change in (
        "model 'tiny' -> 'heads'",
        "vision_cfg.head_width 16 -> 32",
        "image_mean [0.48",
        "masking 'pgs' -> 'random'",
        "masking_options {",
        "seed 0 -> 5",
        f"train_data '{finished_options['train_data']}' -> ",
        "precision 'fp32' -> 'bf16'",
        "text_masking 'none' -> 'truncate'",
        "merge 'none' -> '2x2'",
        "unmasked_epochs 0 -> 1",
    ):
        assert warning.count(change) == 1
    # What is beside the file tells more.
    (tmp_path / "options.json").write_text('{"seed": 3}')
    (tmp_path / "checkpoints").mkdir()
    moved = source.rename(tmp_path / "checkpoints" / source.name)
    assert warnings(resume=moved) == [
        f"--resume {moved} goes on from a run with other options or data: seed 3 -> 0"
    ]


@pytest.mark.parametrize("record", [7, {}, {"data": {}, "recipe": {}, "open_clip_config": {}}])
def test_a_record_that_is_none_is_not_compared(finished_options, tmp_path, record):
    source = tmp_path / "e.pt"
    torch.save({"epoch": 1, "state_dict": {"a": torch.zeros(1)}, "clip_pgs": record}, source)
    for flag in ("resume", "pretrained"):
        argv = flags(tmp_path, **finished_options, **{flag: source})
        assert option_warnings(parse_options(argv)) == []


@pytest.mark.parametrize("name", ["weights.pt", "open_clip_model.safetensors"])
def test_a_resume_from_weights_alone_says_that_it_begins_anew(
    finished_run, finished_options, tmp_path, name
):
    source = tmp_path / name
    weights = {"state_dict": {"a": torch.zeros(1)}}
    save_file(weights["state_dict"], source) if source.suffix == ".safetensors" else torch.save(
        weights, source
    )
    options = {**finished_options, "resume": source}
    (warning,) = option_warnings(parse_options(flags(tmp_path, **options)))
    assert "at step 0, with a fresh optimizer and warmup" in warning
    assert f"--pretrained {source} is" in warning
    # Of weights that are only evaluated there is nothing to say, and one's own run has a place.
    for changed in ({"train_data": None}, {"resume": finished_run}):
        sentences = option_warnings(parse_options(flags(tmp_path, **options | changed)))
        assert not any("step 0" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("tower", "changed"),
    [
        ("vision_cfg", {"head_width": 32}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}),
        ("text_cfg", {"heads": 1}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"hf_tokenizer_name": "a/b"}),
    ],
)
def test_weights_of_a_model_that_computes_something_else_are_told(
    finished_run, tmp_path, tower, changed
):
    config = {**MODEL, tower: {**MODEL[tower], **changed}}
    (key,) = changed
    model = write_model(tmp_path, name=f"other-{key}", config=config)
    argv = ["--model-config", str(model), *SYNTHETIC, "--pretrained", str(finished_run)]
    (warning,) = option_warnings(parse_options(argv))
    assert f"other settings: {tower}.{key} " in warning
    assert warning.count(" -> ") == 1


def test_weights_of_a_model_that_is_only_written_otherwise_are_not_told(finished_run, tmp_path):
    vision = {**MODEL["vision_cfg"], "image_size": [32, 32], "patch_size": [8, 8]}
    vision |= {"pool_type": "tok", "mlp_ratio": 4, "patch_dropout": 0.5, "act_kwargs": {}}
    text = {**MODEL["text_cfg"], "pool_type": "argmax"}
    config = {**MODEL, "vision_cfg": vision, "text_cfg": text, "quick_gelu": False}
    config |= {"custom_text": True, "init_logit_scale": 3}
    model = write_model(tmp_path, name="written", config=config)
    argv = ["--model-config", str(model), *SYNTHETIC, "--pretrained", str(finished_run)]
    assert option_warnings(parse_options(argv)) == []
    (warning,) = option_warnings(parse_options([*argv, "--force-image-size", "64"]))
    assert warning.endswith("was trained with other settings: vision_cfg.image_size 32 -> 64")


def test_no_weights_are_compared_where_none_are_named(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(finished_run)
    model = write_model(tmp_path, name="none-named", config={**MODEL, "quick_gelu": True})
    assert option_warnings(parse_options(["--model-config", str(model), *SYNTHETIC])) == []


def test_no_checkpoint_is_hashed_for_a_warning(
    finished_run, finished_options, tmp_path, monkeypatch
):
    hashed = []
    monkeypatch.setattr("clip_pgs.checkpoint_reading.file_digest", hashed.append)
    for flag in ("resume", "pretrained"):
        argv = flags(tmp_path, **finished_options, **{flag: finished_run})
        option_warnings(parse_options(argv))
    assert hashed == []


def test_weights_that_were_trained_on_other_images_are_told(finished_run, tmp_path):
    config = next(finished_run.parent.parent.rglob("tiny.json"))
    argv = ["--model-config", str(config), *SYNTHETIC, "--pretrained"]
    exported = finished_run / "export" / "open_clip_model.safetensors"
    for source in (exported, finished_run, finished_run / "checkpoints" / "epoch_2.pt"):
        for same in ([], ["--force-image-size", "32", "32"]):
            assert option_warnings(parse_options([*argv, str(source), *same])) == []
        other = ["--force-quick-gelu", "--image-std", "0.5", "0.5", "0.5"]
        (warning,) = option_warnings(parse_options([*argv, str(source), *other]))
        assert warning.startswith(f"--pretrained {source} was trained with other settings: ")
        assert "quick_gelu False -> True, image_std [0.2" in warning
    # An export brings weights of its own.
    argv[:2] = ["--model", f"local-dir:{finished_run / 'export'}"]
    (warning,) = option_warnings(parse_options([*argv, str(source), *other]))
    assert warning.startswith("--pretrained has no effect on local-dir:")
    argv[:2] = ["--model-config", str(config)]
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {}}, weights)
    assert option_warnings(parse_options([*argv, str(weights)])) == []


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


def test_a_run_goes_on_without_the_weights_that_it_began_with(tmp_path, finished_run):
    config = next(finished_run.parent.parent.rglob("tiny.json"))
    folder = shutil.copytree(finished_run, tmp_path / "logs" / "run")
    weights = shutil.copy(folder / "checkpoints" / "epoch_1.pt", tmp_path / "start.pt")
    argv = ["--model-config", str(config), *SYNTHETIC, "--logs", str(tmp_path / "logs")]
    argv += ["--pretrained", str(weights), "--accept-changes", "--epochs", "3", "--name"]
    check_options(parse_options([*argv, "run", "--resume", "latest"]))
    Path(weights).unlink()
    check_options(parse_options([*argv, "run", "--resume", "latest"]))
    # Not one that begins.
    for other in (["other"], ["other", "--resume", "latest"]):
        with pytest.raises(ValueError, match=r"start\.pt' is neither a file nor a tag"):
            check_options(parse_options([*argv, *other]))


def test_weights_of_a_run_are_those_of_its_export_where_nothing_else_is_left(
    tmp_path, finished_run
):
    config = next(finished_run.parent.parent.rglob("tiny.json"))
    folder = shutil.copytree(finished_run, tmp_path / "run")
    # As a study leaves it.
    shutil.rmtree(folder / "checkpoints")
    argv = ["--model-config", str(config), *SYNTHETIC, "--pretrained"]
    for source in (folder, folder / "export"):
        check_options(parse_options([*argv, str(source)]))
    with pytest.raises(ValueError, match="weights alone, which --pretrained takes"):
        check_options(parse_options([*argv[:-1], "--resume", str(folder / "export")]))
    (folder / "export" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        check_options(parse_options([*argv, str(folder)]))


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


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that checks a run on shards which resumes, given the pattern of now."""
    monkeypatch.chdir(tmp_path)
    samples(tmp_path / "train", num_shards=3)
    first = parse_options(resumed("train/*.tar")[:-2])
    (tmp_path / "logs" / "demo").mkdir(parents=True)
    save_options(first, tmp_path / "logs" / "demo", files=training_files(first))
    return lambda pattern="train/*.tar": check_options(parse_options(resumed(pattern)))


def samples(folder, **options):
    write_samples(folder, samples_per_shard=2, **options)
    (folder / "sizes.json").unlink()


def resumed(data):
    argv = ["--model", "ViT-B-16", "--warmup", "2", "--name", "demo", "--batch-size", "2"]
    return [*argv, "--train-data", str(data), "--resume", "latest"]


def remove(folder):
    (folder / "00001.tar").unlink()


def add(folder):
    shutil.copy(folder / "00001.tar", folder / "00001b.tar")


def grow(folder):
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes() + bytes(512))


def miscount(folder):
    (folder / "sizes.json").write_text('{"00001.tar": 1}')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, "00001.tar: 10240 bytes, 2 samples is gone"),
        (add, "00001b.tar: 10240 bytes, 2 samples is new"),
        (grow, "00001.tar: 10752 bytes, 2 samples is new"),
        (miscount, "00001.tar: 10240 bytes, 1 samples is new"),
    ],
)
def test_other_shards_below_a_pattern_are_refused_by_name(trained, tmp_path, change, words):
    trained()
    change(tmp_path / "train")
    with pytest.raises(ValueError, match="--accept-changes") as refused:
        trained()
    assert words in str(refused.value)


@pytest.mark.parametrize("has_sizes", [False, True])
def test_a_shard_of_other_pairs_but_the_same_size_is_refused_by_name(
    trained, tmp_path, has_sizes, monkeypatch
):
    shards = sorted((tmp_path / "train").glob("*.tar"))
    if has_sizes:
        sizes = {shard.name: 2 for shard in shards}
        (tmp_path / "train" / "sizes.json").write_text(json.dumps(sizes))
    # As in a new process, which has indexed nothing before its stream does.
    monkeypatch.setattr("clip_pgs.data.tar._counted", {})
    options = parse_options(resumed("train/*.tar")[:-2])
    folder = tmp_path / "logs" / "demo"
    save_options(options, folder, files=training_files(options))
    index_shards(expand_shards("train/*.tar"))
    save_indexes(options, folder)
    trained()

    content = shards[1].read_bytes()
    for other in (other_names(content), longer_caption(content)):
        assert len(other) == len(content)
        shards[1].write_bytes(other)
        with pytest.raises(ValueError, match="--accept-changes") as refused:
            trained()
        assert "train_data 00001.tar: list of members " in str(refused.value)
        assert "00000.tar" not in str(refused.value)
    shards[1].write_bytes(content)
    trained()
    saved = json.loads((folder / "options.json").read_text())
    # A run of before has no digests and goes on.
    del saved["train_indexes"]
    (folder / "options.json").write_text(json.dumps(saved))
    shards[1].write_bytes(other)
    trained()


def rewritten(content, change):
    """Return an archive with each member changed."""
    file = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=file, mode="w") as new,
    ):
        for member in old:
            data = change(member, old.extractfile(member).read())
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return file.getvalue()


def other_names(content):
    def change(member, data):
        member.name = f"x{member.name[1:]}"
        return data

    return rewritten(content, change)


def longer_caption(content):
    return rewritten(content, lambda m, data: data + b"s" * m.name.endswith(".txt"))


@pytest.mark.parametrize("pattern", ["train/{00000..00002}.tar", "{}/train/*.tar", "moved/*.tar"])
def test_the_same_shards_are_accepted_wherever_they_lie(trained, tmp_path, pattern):
    shutil.copytree(tmp_path / "train", tmp_path / "moved")
    trained(pattern.replace("{}", str(tmp_path)))


def test_the_same_shards_in_another_order_are_refused(trained):
    with pytest.raises(ValueError, match="another order"):
        trained("train/00001.tar::train/00000.tar::train/00002.tar")


@pytest.fixture
def trained_table(tmp_path, monkeypatch):
    """The table of a run that began in the working folder."""
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "pairs")
    first = parse_options(resumed(table)[:-2])
    (tmp_path / "logs" / "demo").mkdir(parents=True)
    save_options(first, tmp_path / "logs" / "demo", files=training_files(first))
    return table


def test_a_table_with_another_row_is_refused(trained_table, tmp_path):
    check_options(parse_options(resumed("pairs/pairs.csv")))
    rows = trained_table.read_text()
    trained_table.write_text(f"{rows}{tmp_path}/pairs/0.png\tred\n")
    with pytest.raises(ValueError, match=r"16 samples is gone, .* 17 samples is new"):
        check_options(parse_options(resumed(trained_table)))


def test_a_table_in_another_order_is_refused(trained_table):
    head, *rows = trained_table.read_text().splitlines(keepends=True)
    trained_table.write_text("".join([head, *reversed(rows)]))
    with pytest.raises(ValueError, match=r"\(train_data pairs.csv: \w+ is gone, .* is new\)"):
        check_options(parse_options(resumed(trained_table)))


def test_a_run_of_before_that_kept_the_pattern_alone_goes_on(trained, tmp_path):
    path = tmp_path / "logs" / "demo" / "options.json"
    saved = json.loads(path.read_text())
    del saved["train_files"]
    path.write_text(json.dumps(saved))
    trained()
    with pytest.raises(ValueError, match="train_data 'train"):
        trained("train/{00000..00001}.tar")
