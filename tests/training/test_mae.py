"""Masked autoencoders in the training loop: what they see, learn, keep and leave behind."""

import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clip_pgs import PatchInputs, create_masking
from clip_pgs.cli import main
from clip_pgs.data.caption_tables import list_images
from clip_pgs.evaluation.models import load_model, weights_digest
from clip_pgs.inspection.playground import Playground
from clip_pgs.integrations.open_clip import apply_masking, last_selection, set_masking_noise
from clip_pgs.integrations.open_clip.mae import (
    MaeModel,
    MeanOfRows,
    create_mae_masking,
    mae_config,
    mae_record,
)
from clip_pgs.masking.sampling import kept_patches
from clip_pgs.training.checks import check_options
from clip_pgs.training.options import parse_options
from clip_pgs.training.step import compute_gradients
from support.resuming import differences, last_checkpoint, run_with_stops
from support.runs import flags, pairs, run, write_model, write_shards

CONFIG = {
    "model_type": "vit_mae",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 32 images, some of them deeper, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deeper").mkdir()
    for number, (image, _) in enumerate(pairs(32)):
        image.save(folder / ("deeper" if number % 2 else ".") / f"{number:02d}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def mae_options(folder, images, **options):
    """Return the options of a run of two epochs of four steps."""
    given = {"train_data": images, "masking": "pgs", "mae_sign": "hide", "seed": 3, **options}
    return {"model": write_model(folder, name="mae", config=CONFIG), **given}


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16", "pure_fp16"])
def test_a_precision_of_weights_that_stay_as_they_are_is_refused(
    tmp_path, images, capsys, precision
):
    argv = flags(tmp_path, **mae_options(tmp_path, images), precision=precision)
    assert main(["mae", *argv]) == 2
    assert capsys.readouterr().err.startswith("error: --precision of a masked autoencoder")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "amp_bfloat16"])
def test_autocast_trains_an_autoencoder(tmp_path, images, precision):
    run(tmp_path, **mae_options(tmp_path, images, precision=precision, batch_size=16, epochs=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, **mae_options(folder, images, save_frequency=1))


def small_model(name="random", *, sign="keep", **options):
    """Return a masked model in train mode; the same call gives the same weights."""
    torch.manual_seed(0)
    config = mae_config(CONFIG, what="it")
    model = MaeModel(mae_record(config))
    apply_masking(model, create_mae_masking(name, config, sign=sign, **options))
    return model.train()


@pytest.mark.slow
def test_a_run_stopped_at_any_step_ends_as_the_one_that_nothing_stopped(tmp_path, trained, images):
    stopped = run_with_stops(tmp_path, (1, 6), **mae_options(tmp_path, images, save_frequency=1))
    whole = last_checkpoint(trained)
    assert whole["step"] == 8
    assert differences(whole, last_checkpoint(stopped)) == []
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert {line["mask_ratio_mean"] for line in lines} == {0.75}
    assert "scale" not in lines[0]


def test_a_link_to_nothing_and_a_pipe_are_skipped_and_counted(tmp_path, images):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "00.png").unlink()
    (folder / "00.png").symlink_to("nowhere.png")
    (folder / "02.png").unlink()
    os.mkfifo(folder / "02.png")
    (folder / "a_folder.png").mkdir()
    ended = run(tmp_path, **mae_options(tmp_path, folder, epochs=1))
    lines = [json.loads(line) for line in (ended / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped_samples"] == 2


def test_a_folder_goes_on_under_another_name_and_not_with_images_that_changed_places(
    tmp_path, images
):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    options = mae_options(tmp_path, folder, save_frequency=1)
    run(tmp_path, **options, epochs=1)
    options["train_data"] = folder.rename(tmp_path / "moved")
    assert last_checkpoint(run(tmp_path, **options, epochs=2, resume="latest"))["step"] == 8
    (tmp_path / "moved/00.png").rename(tmp_path / "moved/zz.png")
    with pytest.raises(ValueError, match="names and sizes"):
        run(tmp_path, **options, epochs=3, resume="latest")


def test_transformers_alone_opens_the_export_and_encodes_and_reconstructs_alike(trained):
    loaded = load_model(trained)
    picture, _ = next(pairs(1, seed=5))
    processor = transformers.AutoImageProcessor.from_pretrained(trained / "export")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], loaded.transform(picture), atol=1e-6, rtol=0)

    encoder = transformers.ViTMAEModel.from_pretrained(trained / "export", mask_ratio=0.0).eval()
    noise = torch.linspace(0, 1, 16)[None]
    with torch.no_grad():
        expected = encoder(pixels, noise=noise).last_hidden_state[:, 1:].mean(dim=1)
        torch.testing.assert_close(loaded.model.encode_image(pixels), expected)
    whole = transformers.ViTMAEForPreTraining.from_pretrained(trained / "export")
    assert whole.config.mask_ratio == 0.75
    assert whole(pixels, noise=noise).mask.tolist() == [[0.0] * 4 + [1.0] * 12]


def test_random_interpolation_is_exported_as_it_is_evaluated(tmp_path, images):
    options = mae_options(tmp_path, images, image_interpolation="random", epochs=1)
    trained = run(tmp_path, **options, save_frequency=1)
    processor = json.loads((trained / "export/preprocessor_config.json").read_text())
    assert processor["resample"] == Image.Resampling.BICUBIC
    checkpoint = load_model(trained / "checkpoints/epoch_1.pt")
    picture, _ = next(pairs(1, seed=5))
    assert torch.equal(load_model(trained).transform(picture), checkpoint.transform(picture))


def test_inspect_draws_the_patches_of_a_runs_images(trained, images, tmp_path, capsys):
    argv = ["inspect", "masks", str(images / "00.png"), "--model", str(trained), "--maskings"]
    drawn = []
    for progress in ("0", "1"):
        path = tmp_path / f"{progress}.png"
        assert main([*argv, "pgs", "--stages", "--progress", progress, "-o", str(path)]) == 0
        drawn.append(np.asarray(Image.open(path)))
    # The embeddings of the run's own encoder took over.
    assert not np.array_equal(*drawn)
    assert main([*argv, "attentive", "-o", str(tmp_path / "none.png")]) == 2
    assert "nothing trains an autoencoder's class token" in capsys.readouterr().err


def test_the_page_that_counts_operations_refuses_a_run_by_its_name(trained):
    with pytest.raises(ValueError, match=re.escape(f"inspect app cannot show {trained}: ")):
        Playground(str(trained))


def test_an_autoencoder_takes_no_masking_that_shows_another_number():
    model = small_model()
    for masked in (model, model.visual):
        with pytest.raises(ValueError, match="masked in pretraining alone"):
            apply_masking(masked, "random", mask_ratio=0.5)


def test_a_checkpoint_opens_like_the_export_and_text_is_refused(trained):
    loaded = load_model(trained / "checkpoints" / "epoch_2.pt")
    assert weights_digest(loaded.model) == weights_digest(load_model(trained).model)
    with pytest.raises(ValueError, match="has no text tower"):
        loaded.model.encode_text(loaded.tokenizer(["a cat"]))
    with pytest.raises(ValueError, match="masked in pretraining alone"):
        load_model(trained, inference_masking="pgs")


def test_a_checkpoint_by_the_names_of_an_older_transformers_is_scored_and_exported(
    trained, tmp_path
):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints/epoch_2.pt"
    content = torch.load(trained / "checkpoints/epoch_2.pt", weights_only=True)
    # As transformers 5.6 called its modules.
    older = {
        "vit.layers": "vit.encoder.layer",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    weights = {}
    for name, weight in content["state_dict"].items():
        for new, old in older.items():
            name = name.replace(new, old)
        weights[name] = weight
    if weights.keys() == content["state_dict"].keys():
        pytest.skip("this transformers has those names")
    torch.save({**content, "state_dict": weights}, path)
    digest = weights_digest(load_model(trained).model)
    assert weights_digest(load_model(path).model) == digest
    assert main(["export", str(tmp_path)]) == 0
    assert weights_digest(load_model(tmp_path).model) == digest
    exported = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "export")
    assert torch.equal(
        exported.vit.layernorm.weight, content["state_dict"]["visual.mae.vit.layernorm.weight"]
    )


def test_the_card_says_what_was_hidden(trained):
    card = (trained / "export" / "README.md").read_text()
    assert "to reconstruct the patches that `pgs` keeps" in " ".join(card.split())
    assert "library_name: transformers" in card
    assert "| masking option `mask_ratio` | 0.75 |" in card


@pytest.mark.parametrize("name", ["random", "pgs", "colormae", "grid"])
def test_the_signs_show_what_the_strategy_keeps_and_all_else(name):
    pixels, noise = torch.randn(5, 3, 32, 32), torch.rand(5, 16)

    def shown(sign):
        model = small_model(name, sign=sign)
        set_masking_noise(model, noise)
        model(pixels)
        return kept_patches(last_selection(model), 16)

    def kept(ratio):
        strategy = create_masking(name, mask_ratio=ratio)
        return kept_patches(strategy(PatchInputs(pixels, 8, noise=noise)), 16)

    assert torch.equal(shown("keep"), kept(0.75))
    assert torch.equal(shown("hide"), ~kept(0.25))
    assert (shown("keep").sum(dim=1) == 4).all()


def test_the_loss_is_that_of_transformers_on_the_patches_that_are_hidden():
    model, pixels = small_model("pgs"), torch.randn(3, 3, 32, 32)
    losses = model(pixels)["reconstruction_loss"]
    hidden = ~kept_patches(last_selection(model), 16)
    output = model.visual.mae(pixels, noise=hidden.float() + torch.linspace(0, 0.5, 16))
    assert torch.equal(output.mask == 1, hidden)
    torch.testing.assert_close(losses, output.loss.expand(3))


def test_threads_may_share_an_autoencoder_that_encodes():
    model, pixels = small_model().eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode_image(pixels)

    @torch.no_grad()
    def encode(_):
        return [model.encode_image(pixels) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        found = [features for several in pool.map(encode, range(4)) for features in several]
    assert all(torch.equal(features, expected) for features in found)
    assert model.visual.mae.config.mask_ratio == 0.75


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    pixels, noise = torch.randn(6, 3, 32, 32), torch.rand(6, 16)

    def gradients(size):
        model, given = small_model(), noise.split(size)
        batches = [(part, torch.zeros(size, 1)) for part in pixels.split(size)]
        losses = compute_gradients(
            model,
            batches,
            MeanOfRows(),
            before_forward=lambda i: set_masking_noise(model, given[i]),
        )
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return losses["loss"], found

    torch.testing.assert_close(gradients(3), gradients(6))


@pytest.mark.slow
def test_it_learns(tmp_path, images):
    folder = run(tmp_path, **mae_options(tmp_path, images, epochs=12, lr=5e-3, masking="random"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"masking": "none"}, "--masking none hides nothing"),
        ({"masking": "attentive"}, "nothing trains an autoencoder's class token"),
        ({"mask_ratio": 0.99}, "must leave some of 16 patches to show"),
        ({"mask_ratio": 0.0}, "must leave some of 16 patches to show and some to hide"),
        ({"merge": "2x2"}, "--merge cannot go with the masked autoencoder"),
        ({"unmasked_epochs": 1}, "--unmasked-epochs cannot go with"),
        ({"siglip": True}, "--siglip cannot go with"),
        ({"image_resize_mode": "longest"}, "--image-resize-mode longest"),
    ],
)
def test_what_an_autoencoder_cannot_take_is_refused(tmp_path, images, changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_options(parse_options(flags(tmp_path, **mae_options(tmp_path, images, **changed))))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"hidden_size": 33}, "hidden_size must be a multiple of 4 and of the 2"),
        ({"patch_size": 7}, "patch_size must divide image_size 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers takes a whole number"),
        ({"hiden_size": 8}, "has no option 'hiden_size'"),
        ({"num_channels": 1}, "num_channels takes 3"),
        ({"return_dict": False}, "return_dict takes true"),
        ({"dtype": "save"}, "dtype takes float32"),
        ({"mask_ratio": 1.0}, r"mask_ratio takes a number in \[0, 1\), got 1.0"),
        ({"initializer_range": math.inf}, "initializer_range takes a finite number, got inf"),
        ({"hidden_act": "no"}, "transformers cannot build the model"),
    ],
)
def test_a_config_that_makes_no_autoencoder_is_refused(tmp_path, images, changed, sentence):
    options = mae_options(tmp_path, images)
    write_model(tmp_path, name="mae", config={**CONFIG, **changed})
    with pytest.raises(ValueError, match=sentence):
        check_options(parse_options(flags(tmp_path, **options)))


def test_a_lower_bound_gives_way_to_the_share_that_is_kept():
    # By itself `cluster` drops 0.3 of the patches and more; to hide 0.75 it has to keep as much.
    strategy = small_model("cluster", sign="hide").visual.masking.strategy.strategy
    assert (strategy.mask_ratio, strategy.mask_ratio_min) == (0.25, 0.25)


def test_the_config_of_the_docs_takes_a_folder_and_shards(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (images, write_shards(tmp_path, num_shards=1)):
        argv = ["mae", "mae_tiny", "--train-data", str(data), "--batch-size", "8", "--check-only"]
        with pytest.raises(SystemExit, match=r"^0$"):
            main(argv)


def test_clip_takes_no_folder_of_images_and_no_sign(tmp_path, images):
    with pytest.raises(ValueError, match=r"is a folder, .*clip-pgs mae"):
        check_options(parse_options(flags(tmp_path, train_data=images)))
    with pytest.raises(ValueError, match="--mae-sign needs"):
        check_options(parse_options(flags(tmp_path, train_data=images, mae_sign="hide")))


@pytest.mark.parametrize("mae", [{}, {"masking": "pgs", "mae_sign": "hide"}])
def test_a_folder_of_shards_is_told_with_the_pattern_that_names_them(tmp_path, mae):
    pattern = write_shards(tmp_path / "i2d", num_shards=2)
    (tmp_path / "i2d" / "0_stats.json").write_text("{}")
    folder, written = str(tmp_path / "i2d"), f"write '{tmp_path}/i2d/*.tar'"
    options = mae_options(tmp_path, folder, **mae) if mae else {"train_data": folder}
    with pytest.raises(ValueError, match=f"is a folder; .*{re.escape(written)}"):
        check_options(parse_options(flags(tmp_path, **options)))
    assert pattern.startswith(f"{folder}/")


def test_the_command_refuses_what_is_no_autoencoder_with_exit_code_2(tmp_path, images, capsys):
    assert main(["mae", *flags(tmp_path, train_data=images)]) == 2
    assert "clip-pgs mae trains a masked autoencoder, and tiny is none" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["all", "zeroshot-classification"])
def test_a_suite_that_encodes_texts_is_refused_before_the_run(tmp_path, images, suite, capsys):
    options = mae_options(tmp_path, images, eval_suite=suite)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["mae", *flags(tmp_path, **options)])
    assert "encodes texts, and a masked autoencoder has no text tower" in capsys.readouterr().err


def test_a_folder_has_the_images_behind_links_and_no_hidden_ones(tmp_path, images):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    shutil.copytree(images, folder / "a")
    shutil.copytree(images, elsewhere)
    names = sorted(os.path.relpath(path, images) for path in images.rglob("*.png"))
    (folder / "a" / f"._{names[0]}").write_bytes(b"\0\5\26\7")
    shutil.copytree(images, folder / ".cache")
    (folder / "b").symlink_to("../elsewhere")
    (folder / "c").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    found = [os.path.relpath(path, folder) for path in list_images(folder).images]
    assert found == [f"{place}/{name}" for place in "ab" for name in names]


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.jpg"):
        check_options(parse_options(flags(tmp_path, **mae_options(tmp_path, tmp_path / "empty"))))


def test_images_that_come_or_go_are_noticed_by_a_run_that_goes_on(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (image, _) in enumerate(pairs(16)):
        image.save(folder / f"{number}.png")
    options = mae_options(tmp_path, folder, epochs=1)
    run(tmp_path, **options)
    Image.new("RGB", (32, 32)).save(folder / "one_more.png")
    with pytest.raises(
        ValueError, match=r"train_data images: .* samples is gone, .* 17 samples is new"
    ):
        check_options(parse_options(flags(tmp_path, resume="latest", **options)))
