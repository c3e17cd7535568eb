import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import parse_options
from support.options import SYNTHETIC, write_shards
from support.runs import MODEL, flags, write_model


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
    (warning,) = option_warnings(parse_options([*argv, str(source)]))
    assert warning.startswith("--pretrained has no effect on local-dir:")
    for forced, changed in (
        (["--force-quick-gelu"], "quick_gelu False -> True"),
        (["--force-context-length", "8"], "text_cfg.context_length 12 -> 8"),
        (["--image-std", "0.5", "0.5", "0.5"], "image_std [0.2"),
    ):
        (warning,) = option_warnings(parse_options([*argv[:-1], *forced]))
        assert warning.startswith(f"{' '.join(argv[:2])} was trained with other settings: ")
        assert changed in warning
    argv[:2] = ["--model-config", str(config)]
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {}}, weights)
    assert option_warnings(parse_options([*argv, str(weights)])) == []


def test_a_tag_goes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    fetched = []
    monkeypatch.setattr(
        "open_clip.factory.download_pretrained", lambda config, **_: fetched.append(config)
    )
    options = parse_options(["--model", "RN50", *SYNTHETIC, "--pretrained", "openai"])
    check_options(options)
    assert fetched[:1] == [open_clip.get_pretrained_cfg("RN50", "openai")]
    assert option_warnings(options) == []
    options.pretrained = "./openai"
    with pytest.raises(ValueError, match="folder that holds no checkpoint"):
        check_options(options)


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
