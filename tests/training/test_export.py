import json
import shutil
import subprocess
import sys

import huggingface_hub
import open_clip
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from clip_pgs.evaluation.datasets import clean_name
from clip_pgs.evaluation.models import load_model, weights_digest
from clip_pgs.evaluation.results import DONE, Result, write_result
from clip_pgs.tables import markdown_text
from clip_pgs.training import export, export_command
from clip_pgs.training.export import found_in_training
from support.disk import files_limited_to
from support.models import image_batch
from support.runs import MODEL, pairs, run, write_model


def features(model, tokenizer):
    images = torch.nn.functional.interpolate(image_batch(2), size=(32, 32))
    texts = tokenizer(["a red square", "a green square"])
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(texts)


def test_plain_open_clip_computes_the_same_features_bit_for_bit(finished_run):
    exported = f"local-dir:{finished_run / 'export'}"
    opened, _, preprocess = open_clip.create_model_and_transforms(exported)
    trained, _, expected_preprocess = open_clip.create_model_and_transforms(
        "tiny", pretrained=str(finished_run / "checkpoints" / "epoch_2.pt")
    )
    tokenizer = open_clip.get_tokenizer(exported)
    (image, _), *_ = pairs(1)
    assert torch.equal(preprocess(image), expected_preprocess(image))
    assert tokenizer("a red square").shape == (1, 12)
    for value, expected in zip(
        features(opened.eval(), tokenizer), features(trained.eval(), tokenizer), strict=True
    ):
        assert torch.equal(value, expected)


def test_an_export_holds_no_more_than_its_files(finished_run):
    assert sorted(path.name for path in (finished_run / "export").iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_the_model_card_states_data_masking_cost_and_metrics(finished_run, world):
    card = (finished_run / "export" / "README.md").read_text()
    for expected in (
        f"| train_data | {markdown_text(world.train_data)} |",
        "| masking | pgs |",
        "| masking option `mask_ratio_min` | 0.3 |",
        "| samples seen | 64 |",
        "| hardware | 1 x ",
    ):
        assert expected in card


def test_the_card_has_every_share_in_percent_and_no_license_that_nobody_gave(finished_run):
    card = (finished_run / "export" / "README.md").read_text()
    (*_, last) = (finished_run / "checkpoints" / "results.jsonl").read_text().splitlines()
    shares = {name: value for name, value in json.loads(last).items() if "_R@" in name}
    assert len(shares) == 6
    for name, value in shares.items():
        assert f"| {name} | {100 * value:.1f} % |" in card
    assert huggingface_hub.ModelCard(card).data.license is None
    assert "--license" in card


def test_the_card_has_the_scores_of_just_its_weights_and_the_license_for_the_hub(
    tmp_path, finished_run, finished_options
):
    folder = shutil.copytree(finished_run, tmp_path / "logs" / "run")
    digest = weights_digest(load_model(folder).model)
    facts = {"status": DONE, "samples": 4, "error": None, "seconds": 1.0, "location": "here"}
    facts |= {"task": "zeroshot_classification", "model": "tiny", "pretrained": str(folder)}
    odd = "a|b <img src=x>"
    for name, weights, through in (
        ("shape", digest, ""),
        (odd, digest, ""),
        ("masked", digest, "pgs 0.5"),
        ("stale", 64 * "0", ""),
    ):
        result = Result(
            suite="zeroshot-classification",
            dataset=name,
            metrics={"acc1": 0.57168, "acc5": 1.0},
            weights_digest=weights,
            inference_masking=through,
            **facts,
        )
        write_result(result, folder / "eval" / f"{clean_name(name)}.json")
    assert export_command.main([str(folder), "--license", "cc-by-4.0"]) == 0
    card = (folder / "export" / "README.md").read_text()
    metadata = huggingface_hub.ModelCard(card).data
    assert metadata.license == "cc-by-4.0"
    # A later export, as that of a run that trains on, keeps what was stated.
    assert export_command.main([str(folder)]) == 0
    assert (folder / "export" / "README.md").read_text() == card
    # So does that of a finished run which is resumed, where nothing is left to train.
    run(tmp_path, resume="latest", **finished_options)
    assert (folder / "export" / "README.md").read_text() == card
    assert "--license" not in card
    found = {one.dataset_name: one for one in metadata.eval_results}
    assert found.keys() == {"shape", "masked", odd}
    shape = found["shape"]
    assert (shape.task_type, shape.metric_type) == ("zero-shot-image-classification", "acc1")
    assert shape.metric_value == 57.2
    assert found["masked"].metric_name.endswith(", through pgs 0.5")
    assert f"| shape | {shape.metric_name} | 57.2 |" in card
    # One cell, and no markup.
    assert f"| a\\|b \\<img src=x\\> | {shape.metric_name} | 57.2 |" in card


@pytest.mark.slow
def test_the_command_says_where_the_export_is_and_nothing_else(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    command = [sys.executable, "-m", "clip_pgs.cli", "export", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"export: {folder}/export\n")


LEARNED = "clip-pgs test RUN --inference-masking run\n"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"masking": "cluster"}, "thresholds"),
        pytest.param({"masking": "attentive"}, "teacher", marks=pytest.mark.slow),
        pytest.param(
            {"masking": "pgs", "mask_ratio_min": 0.3, "masking_option": "mask_ratio_mean=0.4"},
            "thresholds",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"masking": "cluster", "masking_option": "threshold=0.5"}, None, marks=pytest.mark.slow
        ),
        ({"masking": "random"}, None),
    ],
    ids=["cluster", "attentive", "pgs with a mean", "cluster with a threshold", "random"],
)
def test_the_card_sends_to_the_run_for_what_the_masking_found_there(
    tmp_path, world, options, found
):
    folder = run(tmp_path, train_data=world.train_data, epochs=1, **options)
    card = (folder / "export" / "README.md").read_text()
    first = card.partition("through the same masking")[2].split("```")[1].removeprefix("bash\n")
    if found is None:
        assert first.startswith("clip-pgs test local-dir:")
        assert LEARNED not in card
    else:
        assert first == LEARNED
        assert f"What that learned, its {found}, is in the run's checkpoints" in card
        assert card.partition(LEARNED)[2].count("clip-pgs test local-dir:") == 1
        # What the command reads, and what the export alone cannot give.
        assert load_model(folder, inference_masking="run").masking.state
    assert export_command.main([str(folder)]) == 0
    again = (folder / "export" / "README.md").read_text()
    assert again.partition("## Scores")[0] == card.partition("## Scores")[0]


def test_changed_architecture_options_are_in_the_config(tmp_path, world):
    folder = run(
        tmp_path,
        train_data=world.train_data,
        epochs=1,
        siglip=True,
        force_image_size=48,
        force_context_length=10,
        force_quick_gelu=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    exported = f"local-dir:{folder / 'export'}"
    model = open_clip.create_model(exported)
    assert model.logit_bias is not None
    assert model.visual.image_size == (48, 48)
    assert list(model.visual.image_mean) == [0.5, 0.5, 0.5]
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert open_clip.get_tokenizer(exported)("a").shape == (1, 10)


def test_the_files_of_a_hugging_face_tokenizer_travel_along(tmp_path, world):
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "red": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(tmp_path / "words")
    text = {**MODEL["text_cfg"], "hf_tokenizer_name": str(tmp_path / "words"), "vocab_size": 3}
    model = write_model(tmp_path, name="worded", config={**MODEL, "text_cfg": text})
    folder = run(tmp_path, model=model, train_data=world.train_data, epochs=1)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'export'}")
    assert tokenizer("red blue")[0, :3].tolist() == [2, 0, 1]


def test_the_command_exports_the_latest_checkpoint_again(tmp_path, world):
    folder = run(tmp_path, train_data=world.train_data, epochs=1)
    before = (folder / "export" / "open_clip_model.safetensors").read_bytes()
    (folder / "export" / "open_clip_model.safetensors").unlink()
    assert export_command.main([str(folder)]) == 0
    assert (folder / "export" / "open_clip_model.safetensors").read_bytes() == before


def test_the_command_refuses_a_folder_without_checkpoints(tmp_path, capsys):
    assert export_command.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: '{tmp_path}' has no checkpoint to export\n"


def test_one_command_uploads_the_export(tmp_path, world, monkeypatch):
    folder = run(tmp_path, train_data=world.train_data, epochs=1)
    calls = []

    class Hub:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options["private"]))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert export_command.main([str(folder), "--push-to-hub", "me/tiny", "--private"]) == 0
    assert calls == [("create", "me/tiny", True), ("upload", "me/tiny", folder / "export")]
    card = (folder / "export" / "README.md").read_text()
    assert card.count('("hf-hub:me/tiny")') == 2
    assert "local-dir:" not in card


@pytest.mark.parametrize("name", ["../..", "a/b/c", "a b/c", "", "a" * 200, "https://x/y"])
def test_a_repository_of_no_such_name_is_refused_before_any_work(tmp_path, capsys, name):
    # A run that is not there would be complained of next.
    assert export_command.main([str(tmp_path / "no"), f"--push-to-hub={name}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --push-to-hub takes OWNER/NAME, got {name!r}: ")
    assert said.count("\n") == 1


def test_an_export_that_goes_nowhere_cannot_be_private(tmp_path, capsys):
    assert export_command.main([str(tmp_path), "--private"]) == 2
    assert capsys.readouterr().err.startswith("error: --private ")


@pytest.mark.parametrize(
    "stated",
    [
        {"license": ["mit", "apache-2.0"]},
        {"license": "other", "license_name": "ours-1.0", "license_link": "https://x.org/ours"},
        {"license": 2.0},
    ],
)
def test_a_later_export_keeps_the_license_of_an_edited_card_in_any_shape(
    tmp_path, finished_run, finished_options, stated
):
    folder = shutil.copytree(finished_run, tmp_path / "logs" / "run")
    path = folder / "export" / "README.md"
    edited = huggingface_hub.ModelCard.load(path)
    for name, value in stated.items():
        setattr(edited.data, name, value)
    edited.save(path)
    assert export_command.main([str(folder)]) == 0
    run(tmp_path, resume="latest", **finished_options)
    card = huggingface_hub.ModelCard.load(path)
    assert {name: card.data.get(name) for name in stated} == stated
    for value in stated.values():
        for name in value if isinstance(value, list) else [value]:
            assert str(name) in card.text
    # What the command names stands alone, and a license goes where it is taken out of the card.
    assert export_command.main([str(folder), "--license", "mit"]) == 0
    card = huggingface_hub.ModelCard.load(path)
    assert (card.data.license, card.data.get("license_name")) == ("mit", None)
    path.write_text(path.read_text("utf-8").replace("license: mit\n", ""), "utf-8")
    assert export_command.main([str(folder)]) == 0
    assert huggingface_hub.ModelCard.load(path).data.license is None


@pytest.mark.parametrize("metadata", ["license: {a: b}", "license: [[mit]]", "license: 'a"])
def test_a_license_that_an_export_does_not_keep_is_told(tmp_path, finished_run, caplog, metadata):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    path = folder / "export" / "README.md"
    path.write_text(f"---\n{metadata}\n---\n# A model\n", "utf-8")
    assert export_command.main([str(folder)]) == 0
    (said,) = [text for text in caplog.messages if "not kept" in text]
    assert str(path) in said
    assert huggingface_hub.ModelCard.load(path).data.license is None


def test_a_damaged_result_is_told_once_where_an_export_is_scored(
    tmp_path, finished_run, caplog, monkeypatch
):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "cut.json").write_text('{"weights_')
    monkeypatch.setattr("clip_pgs.launch.evaluate", lambda argv: 0)
    assert export_command.main([str(folder), "--suite", "all"]) == 0
    assert caplog.text.count("cut.json") == 1


@pytest.mark.parametrize("name", ["", "mit\nlibrary_name: x", "<b>", "a b"])
def test_a_license_of_no_such_name_is_refused_before_any_work(tmp_path, capsys, name):
    assert export_command.main([str(tmp_path / "no"), "--license", name]) == 2
    said = capsys.readouterr().err
    assert "--license" in said
    assert repr(name) in said


def test_an_upload_that_fails_is_one_sentence_and_the_export_stays(
    tmp_path, finished_run, monkeypatch, capsys
):
    class Hub:
        def create_repo(self, repo_id, **options):
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    folder = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(folder / "export")
    assert export_command.main([str(folder), "--push-to-hub", "me/tiny"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: the upload failed: no route; the export is in {folder}/export"
    )
    load_model(folder / "export")


def test_files_of_the_users_own_stay_in_an_export(tmp_path, finished_run):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "export" / "notes.txt").write_text("mine")
    (folder / "export" / "link").symlink_to("nowhere")
    (folder / "export" / "plots").mkdir()
    (folder / "export" / "plots" / "a.txt").write_text("mine")
    (folder / "export" / "README.md").write_text("old")
    assert export_command.main([str(folder)]) == 0
    assert (folder / "export" / "notes.txt").read_text() == "mine"
    assert (folder / "export" / "plots" / "a.txt").read_text() == "mine"
    assert str((folder / "export" / "link").readlink()) == "nowhere"
    assert (folder / "export" / "README.md").read_text() != "old"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_stays_and_is_named(tmp_path, finished_run, capsys, kind):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "export").rename(tmp_path / "elsewhere")
    if kind == "file":
        (folder / "export").write_text("mine")
    else:
        (folder / "export").symlink_to(tmp_path / "elsewhere")
    before = sorted(folder.rglob("*"))
    assert export_command.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {folder}/export: it is no folder of its own\n"
    assert sorted(folder.rglob("*")) == before


def test_damaged_checkpoints_are_named(tmp_path, finished_run, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    assert export_command.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: no checkpoint is whole: checkpoint '{folder}/checkpoints/")
    assert said.count("\n") == 1


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_an_export_is_not_replaced_by_an_older_checkpoints(tmp_path, finished_run, capsys, damage):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    latest = (folder / "checkpoints/latest").read_text().strip()
    damage(folder / "checkpoints" / latest)
    before = {path: path.read_bytes() for path in (folder / "export").iterdir()}
    assert export_command.main([str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"checkpoints/{latest} is " in said
    assert f"remove {folder}/export to export epoch_1.pt" in said
    assert {path: path.read_bytes() for path in (folder / "export").iterdir()} == before
    shutil.rmtree(folder / "export")
    assert export_command.main([str(folder)]) == 0


def test_a_checkpoint_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no record"):
        export.write_export({"state_dict": {}, "name": "x"}, tmp_path / "export", found=None)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, value):
    weights = {"visual.proj": torch.tensor([0.0, value])}
    content = {"state_dict": weights, "clip_pgs": {}}
    with pytest.raises(ValueError, match=r"not exported: state_dict/visual\.proj holds 1 NaN"):
        export.write_export(content, tmp_path / "export", found=None)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_written_leaves_the_one_before(tmp_path, finished_run, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (folder / "export").iterdir()}
    with files_limited_to(1_000_000):
        assert export_command.main([str(folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the export cannot be written: open_clip_model.safetensors")
    assert {path.name: path.read_bytes() for path in (folder / "export").iterdir()} == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in finished_run.iterdir()
    )


def test_what_a_killed_export_left_counts_as_none_and_is_replaced(tmp_path, finished_run):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "export").rename(folder / ".export.unfinished")
    (folder / ".export.unfinished" / "open_clip_model.safetensors").write_bytes(b"half")
    assert export_command.main([str(folder)]) == 0
    assert not (folder / ".export.unfinished").exists()
    name = "open_clip_model.safetensors"
    assert (folder / "export" / name).read_bytes() == (finished_run / "export" / name).read_bytes()


def test_the_config_is_plain_json(finished_run):
    config = json.loads((finished_run / "export" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"] == MODEL["vision_cfg"]


def vision(**changes):
    """Return what changes the image tower in a checkpoint's model config."""

    def change(content):
        content["clip_pgs"]["open_clip_config"]["model_cfg"]["vision_cfg"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["clip_pgs"].pop("cost"), "no clip_pgs/cost"),
        (lambda content: content["clip_pgs"].pop("masking"), "no clip_pgs/masking"),
        (lambda content: content.update(clip_pgs=[1]), "clip_pgs holds list"),
        (lambda content: content["clip_pgs"]["cost"].update(steps="7"), "'7' of steps"),
        (lambda content: content["clip_pgs"]["cost"].pop("flops"), "flops"),
        (lambda content: content["clip_pgs"].update(recipe=3), "clip_pgs/recipe holds int"),
        (lambda content: content["clip_pgs"].update(open_clip_config={}), "model_cfg"),
        (vision(image_size=torch.tensor(32)), "Tensor is not JSON"),
        (vision(patch_size=torch.float16), "dtype is not JSON"),
        (lambda content: content["clip_pgs"].update(tokenizer=["a"]), "tokenizer"),
        (lambda content: content["clip_pgs"].update(tokenizer="/nonexistent"), "'/nonexistent'"),
    ],
)
def test_an_odd_record_is_named_and_nothing_is_written(
    tmp_path, finished_run, capsys, change, words
):
    content = torch.load(finished_run / "checkpoints" / "epoch_2.pt", weights_only=True)
    change(content)
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "epoch_2.pt")
    assert export_command.main([str(tmp_path)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "epoch_2.pt" in sentence
    assert words in sentence
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_without_a_name_is_exported(tmp_path, finished_run):
    content = torch.load(finished_run / "checkpoints" / "epoch_2.pt", weights_only=True)
    del content["name"]
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "epoch_2.pt")
    assert export_command.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (None, None),
        (7, None),
        ({"strategy": {"thresholds": []}}, None),
        ({"strategy": {"thresholds": [0.5]}}, "thresholds"),
        # Of a strategy of one's own.
        ({"strategy": {"mean": torch.zeros(3)}}, "thresholds"),
        ({"strategy": {"count": 0.0}}, "thresholds"),
        ({"teacher": {"weight": torch.zeros(2)}}, "teacher"),
        ({"teacher": torch.zeros(2), "strategy": 1}, "teacher"),
    ],
)
def test_what_a_masking_found_is_told_whatever_a_checkpoint_holds(state, found):
    assert found_in_training({"masking_state": state}) == found
