import hashlib
import json
import re
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clip_pgs.evaluation import load_model, weights_digest
from clip_pgs.evaluation.models import check_source
from clip_pgs.evaluation.results import model_name
from support.permissions import unreadable

BATCH = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture
def model_config(finished_run):
    return finished_run.parent / "tiny-eval-vit.json"


@pytest.fixture
def lone_checkpoint(finished_run, tmp_path):
    path = tmp_path / "epoch_7.pt"
    path.write_bytes((finished_run / "checkpoints/epoch_1.pt").read_bytes())
    return path


def test_run_export_and_checkpoint_give_the_same_model(finished_run):
    sources = [
        finished_run,
        finished_run / "export",
        f"local-dir:{finished_run / 'export'}",
        finished_run / "checkpoints/epoch_1.pt",
        finished_run / "export/open_clip_model.safetensors",
    ]
    models = [load_model(source) for source in sources]
    assert len({weights_digest(loaded.model) for loaded in models}) == 1
    features = [loaded.model.encode_image(BATCH) for loaded in models]
    assert all(torch.equal(feature, features[0]) for feature in features)


def test_a_run_that_trained_on_since_its_export_is_told(run, caplog):
    load_model(run)
    assert caplog.messages == []
    path = run / "checkpoints/epoch_2.pt"
    (run / "checkpoints/latest").write_text("epoch_2.pt\n")
    content = torch.load(run / "checkpoints/epoch_1.pt", weights_only=True)
    # The same weights.
    torch.save({**content, "epoch": 2}, path)
    load_model(run)
    assert caplog.messages == []
    content["state_dict"]["logit_scale"] += 1
    torch.save({**content, "epoch": 2}, path)
    for source in (run, run / "export"):
        load_model(source)
        (sentence,) = caplog.messages
        assert f"{path} is newer" in sentence
        assert f"`clip-pgs export {run.resolve()}`" in sentence
        caplog.clear()
    # As where the folder was copied: times tell nothing.
    weights = run / "export/open_clip_model.safetensors"
    weights.touch()
    load_model(run)
    assert f"{path} is newer" in caplog.text
    caplog.clear()
    save_file(content["state_dict"], weights)
    load_model(run)
    assert caplog.messages == []


def test_model_of_a_run_is_what_open_clip_opens_itself(finished_run):
    loaded = load_model(finished_run)
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{finished_run / 'export'}")
    assert not loaded.model.training
    assert torch.equal(loaded.model.encode_image(BATCH), plain.eval().encode_image(BATCH))


def test_lone_checkpoint_opens_with_a_model_config(lone_checkpoint, model_config, finished_run):
    loaded = load_model(lone_checkpoint, model_config=model_config)
    assert weights_digest(loaded.model) == weights_digest(load_model(finished_run).model)


@pytest.mark.parametrize("name", ["configs/models/demo_vit.json", "demo_vit"])
def test_a_model_config_of_the_package_is_found_from_any_folder(lone_checkpoint, monkeypatch, name):
    monkeypatch.chdir(lone_checkpoint.parent)
    check_source(lone_checkpoint.name, model_config=name)
    with pytest.raises(ValueError, match="model config configs/models/no_such"):
        check_source(lone_checkpoint.name, model_config="configs/models/no_such.json")


def test_weights_that_the_config_beside_them_describes_otherwise_are_told(
    finished_run, model_config, caplog
):
    weights = finished_run / "export/open_clip_model.safetensors"
    load_model(weights, model_config=model_config)
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith(f"{weights} was trained with other settings than those of tiny-eval-vit")
    assert "image_mean [0.5, 0.5, 0.5] -> [0.48" in said


def test_lone_checkpoint_opens_with_a_model_name(lone_checkpoint, finished_run):
    loaded = load_model(lone_checkpoint, model="tiny-eval-vit")
    assert weights_digest(loaded.model) == weights_digest(load_model(finished_run).model)


def test_lone_checkpoint_opens_with_the_folder_of_an_export(lone_checkpoint, finished_run):
    content = torch.load(lone_checkpoint, weights_only=True)
    for weight in content["state_dict"].values():
        weight += 1
    torch.save(content, lone_checkpoint)
    export = f"local-dir:{finished_run / 'export'}"
    loaded, exported = load_model(lone_checkpoint, model=export), load_model(export)
    assert check_source(str(lone_checkpoint), model=export)
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, content["state_dict"][name])
    assert str(loaded.transform) == str(exported.transform)
    texts = ["a red square", "two"]
    assert torch.equal(loaded.tokenizer(texts), exported.tokenizer(texts))


def test_checkpoint_of_a_run_on_the_folder_of_an_export_opens_from_its_recorded_parameters(
    lone_checkpoint, finished_run, tmp_path
):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    lone_checkpoint.rename(run / "checkpoints/epoch_7.pt")
    (run / "params.txt").write_text(f"model: local-dir:{finished_run / 'export'}\n")
    loaded = load_model(run / "checkpoints/epoch_7.pt")
    assert weights_digest(loaded.model) == weights_digest(load_model(finished_run).model)


def test_an_export_that_may_not_be_listed_is_told_as_that(run):
    weights = run / "export/open_clip_model.safetensors"
    with unreadable(run / "export"):
        (run / "export").chmod(0o111)
        with pytest.raises(PermissionError, match="export"):
            load_model(run)
    # As macOS leaves it on other disks.
    weights.rename(weights.with_name(f"._{weights.name}"))
    with pytest.raises(ValueError, match="no file of weights"):
        load_model(run)


def test_checkpoint_fills_borders_as_the_export_of_its_run_does(lone_checkpoint, run):
    path = run / "export/open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"] |= {"resize_mode": "longest", "fill_color": 255}
    path.write_text(json.dumps(config))
    content = torch.load(lone_checkpoint, weights_only=True)
    torch.save({**content, "clip_pgs": {"open_clip_config": config}}, lone_checkpoint)
    wide = Image.new("RGB", (40, 10))
    pixels_CHW = load_model(lone_checkpoint).transform(wide)
    assert pixels_CHW.max() > 0
    assert torch.equal(pixels_CHW, load_model(run).transform(wide))


def test_checkpoint_of_this_trainer_needs_nothing_beside_it(lone_checkpoint, finished_run):
    content = torch.load(lone_checkpoint, weights_only=True)
    config = json.loads((finished_run / "export/open_clip_config.json").read_text())
    torch.save({**content, "clip_pgs": {"open_clip_config": config}}, lone_checkpoint)
    loaded, of_run = load_model(lone_checkpoint), load_model(finished_run)
    assert weights_digest(loaded.model) == weights_digest(of_run.model)
    assert loaded.transform.transforms[-1].mean == of_run.transform.transforms[-1].mean


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"vision_cfg": {"head_width": 16}}, "vision_cfg.head_width 8 -> 16"),
        ({"text_cfg": {"heads": 1}}, "text_cfg.heads 2 -> 1"),
        ({"quick_gelu": True}, "quick_gelu False -> True"),
        ({"vision_cfg": {"image_size": [16, 16], "pool_type": "tok"}}, None),
    ],
)
def test_checkpoint_evaluated_as_a_model_that_computes_something_else_is_told_once(
    lone_checkpoint, model_config, tmp_path, caplog, monkeypatch, changed, told
):
    content = torch.load(lone_checkpoint, weights_only=True)
    config = json.loads(model_config.read_text())
    record = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bicubic"}}
    torch.save({**content, "clip_pgs": {"open_clip_config": record}}, lone_checkpoint)
    for key, value in changed.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    digest = hashlib.sha256(str(changed).encode()).hexdigest()[:8]
    other = tmp_path / f"other-{digest}.json"
    other.write_text(json.dumps(config))
    check_source(str(lone_checkpoint), model_config=other)
    load_model(lone_checkpoint)
    assert caplog.messages == []
    load_model(lone_checkpoint, model_config=other)
    assert [m.partition(": ")[2] for m in caplog.messages] == ([told] if told else [])
    if told:
        assert f"{lone_checkpoint} was trained" in caplog.text
        assert other.stem in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_model(lone_checkpoint, model_config=other)
    assert caplog.messages == []


def test_checkpoint_evaluated_on_images_of_another_normalization_is_told(
    lone_checkpoint, model_config, finished_run, caplog
):
    content = torch.load(lone_checkpoint, weights_only=True)
    config = json.loads((finished_run / "export/open_clip_config.json").read_text())
    torch.save({**content, "clip_pgs": {"open_clip_config": config}}, lone_checkpoint)
    load_model(lone_checkpoint, model=f"local-dir:{finished_run / 'export'}")
    assert caplog.messages == []
    load_model(lone_checkpoint, model_config=model_config)
    (sentence,) = caplog.messages
    assert ": image_mean [0.5, 0.5, 0.5] -> [0.48" in sentence


@pytest.mark.parametrize(("resize_mode", "is_told"), [("longest", True), ("shortest", False)])
def test_checkpoint_evaluated_with_other_borders_is_told_where_it_has_them(
    lone_checkpoint, finished_run, tmp_path, caplog, resize_mode, is_told
):
    content = torch.load(lone_checkpoint, weights_only=True)
    export = shutil.copytree(finished_run / "export", tmp_path / "black")
    path = export / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"] |= {"resize_mode": resize_mode, "fill_color": 0}
    path.write_text(json.dumps(config))
    config["preprocess_cfg"] |= {"fill_color": 255}
    torch.save({**content, "clip_pgs": {"open_clip_config": config}}, lone_checkpoint)
    load_model(lone_checkpoint, model=f"local-dir:{export}")
    told = [message.partition(": ")[2] for message in caplog.messages]
    assert told == (["image_fill_color 255 -> 0"] if is_told else [])


@pytest.fixture
def open_clip_checkpoint(lone_checkpoint, model_config, tmp_path):
    """Return what puts the checkpoint of a run of OpenCLIP's trainer beside its params.txt."""

    def place(**params):
        path = tmp_path / "theirs/checkpoints/epoch_7.pt"
        path.parent.mkdir(parents=True)
        lone_checkpoint.rename(path)
        params = {"model": "tiny-eval-vit", "model_config": model_config, **params}
        lines = [f"{name}: {value}\n" for name, value in sorted(params.items())]
        path.parents[1].joinpath("params.txt").write_text("".join(lines))
        return path

    return place


PUBLISHED = {
    "mean": (0.0, 0.0, 0.0),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, PUBLISHED),
        ({"image_mean": (0.1, 0.2, 0.3)}, {**PUBLISHED, "mean": (0.1, 0.2, 0.3)}),
        ({"image_resize_mode": "shortest"}, {**PUBLISHED, "resize_mode": "shortest"}),
    ],
)
def test_a_run_from_published_weights_sees_images_as_they_did(
    open_clip_checkpoint, monkeypatch, given, expected
):
    tags = {"some_tag": {"url": "", **PUBLISHED}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-eval-vit", tags)
    path = open_clip_checkpoint(pretrained="Some-Tag", **given)
    shown = load_model(path).model.visual.preprocess_cfg
    assert {name: shown[name] for name in PUBLISHED} == expected


def test_a_run_from_a_file_of_weights_keeps_open_clips_images(open_clip_checkpoint, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-eval-vit", {"tag": PUBLISHED})
    shown = load_model(open_clip_checkpoint(pretrained="/weights/tag.pt")).model.visual
    assert shown.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN


def test_a_context_length_of_the_run_is_the_tokenizers(open_clip_checkpoint, model_config):
    length = json.loads(model_config.read_text())["text_cfg"]["context_length"] - 3
    path = open_clip_checkpoint(force_context_length=length)
    content = torch.load(path, weights_only=True)
    for name in ("positional_embedding", "attn_mask"):
        if name in content["state_dict"]:
            content["state_dict"][name] = content["state_dict"][name][:length].clone()
    torch.save(content, path)
    loaded = load_model(path)
    tokens = loaded.tokenizer(["a red square"])
    assert tokens.shape == (1, length)
    assert loaded.model.encode_text(tokens).isfinite().all()


FLAGS = {"force_quick_gelu": True, "image_mean": [0.1, 0.2, 0.3]}


def test_a_named_model_that_is_the_runs_own_is_built_with_the_runs_flags(
    open_clip_checkpoint, caplog
):
    path = open_clip_checkpoint(**FLAGS)
    by_name, by_run = load_model(path, model="tiny-eval-vit"), load_model(path)
    assert by_name.transform.transforms[-1].mean == [0.1, 0.2, 0.3]
    assert torch.equal(by_name.model.encode_image(BATCH), by_run.model.encode_image(BATCH))
    assert caplog.messages == []


@pytest.mark.parametrize("how", ["model", "model_config"])
def test_an_architecture_with_other_settings_than_the_run_records_is_told(
    open_clip_checkpoint, model_config, tmp_path, caplog, how
):
    path = open_clip_checkpoint(**FLAGS)
    other = tmp_path / "other-name-of-tiny.json"
    other.write_text(model_config.read_text())
    check_source(str(path), model_config=other)
    load_model(path, **{how: other if how == "model_config" else other.stem})
    (sentence,) = caplog.messages
    assert f"{path} was trained with other settings than those of {other.stem}" in sentence
    assert "quick_gelu True -> False" in sentence
    assert "image_mean [0.1, 0.2, 0.3] -> [0.48" in sentence


def test_a_named_model_gets_around_damaged_parameters(open_clip_checkpoint, model_config):
    path = open_clip_checkpoint(image_mean="xyz")
    check_source(str(path), model_config=model_config)
    with pytest.raises(ValueError, match="image_mean takes"):
        load_model(path)
    assert load_model(path, model="tiny-eval-vit").model is not None


@pytest.mark.parametrize("source", ["export/open_clip_model.safetensors", "checkpoints/epoch_1.pt"])
def test_a_file_of_links_has_the_config_beside_the_link(finished_run, tmp_path, source):
    # As the Hub's cache keeps files.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    files = [finished_run / source, finished_run / "export/open_clip_config.json"]
    for number, file in enumerate(files):
        (blobs / f"{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / f"{number}")
    loaded = load_model(snapshot / files[0].name)
    assert weights_digest(loaded.model) == weights_digest(load_model(finished_run).model)


def test_a_link_to_a_checkpoint_has_the_config_of_its_run(finished_run, tmp_path):
    link = tmp_path / "best.pt"
    link.symlink_to(finished_run / "checkpoints/epoch_1.pt")
    assert tuple(load_model(link).transform.transforms[-1].mean) == (0.5, 0.5, 0.5)


def test_checkpoint_of_an_unfinished_run_opens_from_its_recorded_parameters(
    lone_checkpoint, model_config, tmp_path
):
    run = tmp_path / "unfinished"
    (run / "checkpoints").mkdir(parents=True)
    lone_checkpoint.rename(run / "checkpoints/epoch_7.pt")
    (run / "params.txt").write_text(
        f"force_image_size: [16]\nimage_mean: (0.1, 0.2, 0.3)\n"
        f"model: tiny-eval-vit\nmodel_config: {model_config}\n"
    )
    loaded = load_model(run / "checkpoints/epoch_7.pt")
    assert loaded.name == "unfinished_epoch_7"
    assert loaded.transform.transforms[-1].mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("model_config: 5", "model_config takes the name of a file, got 5"),
        ("model_config: [1]", "model_config takes the name of a file"),
        ("model_config: " + "a" * 5000, ""),
        ("model: " + "-" * 200_000 + "1", "model '---"),
        ("model: [1]", "model '[1]'"),
        ("force_image_size: abc", "force_image_size takes a size or two, got 'abc'"),
        ("force_image_size: -4", "force_image_size"),
        ("force_image_size: [16, 16, 16]", "force_image_size"),
        ("force_context_length: 1.5", "force_context_length takes a whole number, got 1.5"),
        ("force_quick_gelu: maybe", "force_quick_gelu takes true or false"),
        ("force_custom_text: 2", "force_custom_text"),
        ("image_mean: xyz", "image_mean takes 3 finite numbers, got 'xyz'"),
        ("image_std: (0.1, 0.2, 0)", "image_std"),
        ("image_interpolation: evil", "image_interpolation"),
        ("image_resize_mode: [1]", "image_resize_mode"),
    ],
    ids=lambda text: text[:24],
)
def test_parameters_that_are_none_are_refused_with_the_file(lone_checkpoint, tmp_path, line, part):
    (tmp_path / "checkpoints").mkdir()
    path = lone_checkpoint.rename(tmp_path / "checkpoints/epoch_7.pt")
    text = f"{line}\n" if line.startswith("model: ") else f"model: ViT-B-32\n{line}\n"
    (tmp_path / "params.txt").write_text(text)
    if not part:
        check_source(str(path))
        return
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        check_source(str(path))
    assert str(tmp_path / "params.txt") in str(caught.value)


def test_checkpoint_of_a_distributed_compiled_run_opens(lone_checkpoint, model_config):
    content = torch.load(lone_checkpoint, weights_only=True)
    state_dict = {f"module._orig_mod.{k}": v for k, v in content["state_dict"].items()}
    torch.save({"state_dict": state_dict}, lone_checkpoint)
    loaded = load_model(lone_checkpoint, model_config=model_config)
    assert loaded.model.state_dict().keys() == content["state_dict"].keys()


@pytest.mark.parametrize("name", ["epoch_7.ckpt", "epoch_7"])
def test_checkpoint_opens_whatever_its_name(lone_checkpoint, model_config, name):
    path = lone_checkpoint.rename(lone_checkpoint.with_name(name))
    assert load_model(path, model_config=model_config).name == "epoch_7"


def test_plain_weights_open_as_a_custom_text_model(lone_checkpoint, model_config):
    config = {**json.loads(model_config.read_text()), "custom_text": True}
    custom = lone_checkpoint.with_name("tiny-eval-custom-text.json")
    custom.write_text(json.dumps(config))
    plain = load_model(lone_checkpoint, model_config=model_config).model
    loaded = load_model(lone_checkpoint, model_config=custom).model
    assert torch.equal(loaded.encode_image(BATCH), plain.encode_image(BATCH))
    assert torch.equal(loaded.text.text_projection, plain.text_projection)


def test_checkpoint_of_a_siglip_run_keeps_its_bias(lone_checkpoint, model_config):
    content = torch.load(lone_checkpoint, weights_only=True)
    content["state_dict"]["logit_bias"] = torch.tensor(-10.0)
    torch.save(content, lone_checkpoint)
    assert load_model(lone_checkpoint, model_config=model_config).model.logit_bias == -10


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("nowhere/at-all", {}, "no run, export or checkpoint at nowhere/at-all"),
        ("a" * 5000, {}, "no run, export or checkpoint at aaa"),
        ("{tmp}", {}, "is no run and no export"),
        ("{tmp}/epoch_7.pt", {}, "architecture of .*epoch_7.pt is unknown; give --model NAME"),
        ("{tmp}/epoch_7.pt", {"model": "ViT-Z-99"}, "open_clip knows no model 'ViT-Z-99'"),
        ("{tmp}/epoch_7.pt", {"model": "local-dir:none"}, "no model 'local-dir:none'"),
        ("{tmp}/epoch_7.pt", {"model": "local-dir:" + "a" * 5000}, "no model 'local-dir:aaa"),
        ("{tmp}/epoch_7.pt", {"model": "hf-hub:a/b"}, "no model 'hf-hub:a/b'"),
        ("{tmp}/epoch_7.pt", {"model": "ViT-B-32"}, "does not fit ViT-B-32: "),
        ("{tmp}/epoch_7.pt", {"model_config": "none.json"}, "cannot read the model config"),
        ("ViT-B-32", {}, "needs published weights, --pretrained TAG"),
        ("ViT-B-32", {"pretrained": "no-tag"}, "needs published weights, --pretrained TAG"),
    ],
)
def test_source_that_cannot_be_opened_is_told_in_a_sentence(
    lone_checkpoint, tmp_path, source, options, sentence
):
    with pytest.raises(ValueError, match=sentence):
        load_model(source.format(tmp=tmp_path), **options)


@pytest.mark.parametrize("source", ["checkpoints/epoch_1.pt", "export", "."])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_integers_in_place_of_floats_are_not_scored(run, source, dtype):
    checkpoint = run / "checkpoints/epoch_1.pt"
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["visual.proj"] = content["state_dict"]["visual.proj"].to(dtype)
    torch.save(content, checkpoint)
    checkpoint.with_name("SHA256SUMS").unlink(missing_ok=True)
    save_file(content["state_dict"], run / "export/open_clip_model.safetensors")
    said = rf"visual\.proj is {str(dtype)[6:]} in the file, float32 in the model"
    with pytest.raises(ValueError, match=said):
        load_model(run / source)


def test_position_embedding_is_never_resized(lone_checkpoint, finished_run, tmp_path):
    config = json.loads((finished_run.parent / "tiny-eval-vit.json").read_text())
    config["vision_cfg"]["image_size"] = 32
    wrong_config = tmp_path / "tiny-eval-vit-32.json"
    wrong_config.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"visual\.positional_embedding has shape \(5, 16\)"):
        load_model(lone_checkpoint, model_config=wrong_config)


def test_checkpoint_that_would_run_code_is_refused(tmp_path, model_config):
    class Harmful:
        def __reduce__(self):
            return (print, ("harm",))

    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "harmful.pt", model_config=model_config)


def test_damaged_checkpoint_is_told_in_a_sentence(lone_checkpoint, model_config):
    lone_checkpoint.write_bytes(lone_checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(lone_checkpoint, model_config=model_config)


def test_run_without_export_is_pointed_to_its_checkpoint(lone_checkpoint, tmp_path):
    run = tmp_path / "running"
    (run / "checkpoints").mkdir(parents=True)
    lone_checkpoint.rename(run / "checkpoints/epoch_7.pt")
    with pytest.raises(ValueError, match=r"has no export yet.*epoch_7\.pt"):
        load_model(run)


def test_digest_changes_with_one_weight(finished_run):
    model = load_model(finished_run).model
    before = weights_digest(model)
    with torch.no_grad():
        model.logit_scale += 1e-6
    assert weights_digest(model) != before


def test_names_of_models_are_short(finished_run):
    assert model_name(str(finished_run)) == "tiny_run"
    assert model_name(str(finished_run / "export")) == "tiny_run"
    assert model_name(str(finished_run / "checkpoints/epoch_1.pt")) == "tiny_run_epoch_1"
    assert model_name("hf-hub:someone/some-model") == "some-model"
    assert model_name("ViT-B-32", pretrained="openai") == "ViT-B-32_openai"


def test_weights_that_changed_on_the_disk_are_not_scored(lone_checkpoint, model_config):
    raw = bytearray(lone_checkpoint.read_bytes())
    digest = hashlib.sha256(raw).hexdigest()
    lone_checkpoint.with_name("SHA256SUMS").write_text(f"{digest}  {lone_checkpoint.name}\n")
    load_model(lone_checkpoint, model_config=model_config)
    raw[len(raw) // 2] ^= 1
    lone_checkpoint.write_bytes(raw)
    with pytest.raises(ValueError, match="is damaged: its checksum is not the one in SHA256SUMS"):
        load_model(lone_checkpoint, model_config=model_config)
