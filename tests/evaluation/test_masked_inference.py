"""Evaluation through a mask: what it computes, and that it stays apart from the unmasked one."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from clip_pgs.checkpoint_reading import file_digest
from clip_pgs.common import experiment_of
from clip_pgs.evaluation import evaluate, load_model
from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.features import Encoder
from clip_pgs.evaluation.masked_inference import choose_masking
from clip_pgs.evaluation.results import read_results, telling_once
from clip_pgs.evaluation.suites import get_suite
from clip_pgs.integrations.open_clip import (
    apply_masking,
    last_selection,
    set_masking_noise,
    set_masking_progress,
)
from clip_pgs.masking import create_masking
from clip_pgs.masking.strategy import _REGISTRY
from clip_pgs.registry import OWN_MODULES
from support.encoding import count_images, encode, images_of
from support.images import make_inputs

PGS = {"inference_masking": "pgs", "inference_options": {"mask_ratio": 0.5}}
RANDOM = {"inference_masking": "random", "inference_options": {"mask_ratio": 0.5}}


@pytest.fixture
def six(data_root):
    return get_suite("zeroshot-classification").eval_set("six", str(data_root / "six"))


@pytest.fixture
def add_att(data_root):
    folder = data_root / "sugar_crepe"
    return get_suite("compositionality").eval_set("sugar_crepe/add_att", str(folder))


def say_trained_with(run, masking, options, **more):
    """Write what training leaves: the options, and a record in the checkpoint."""
    said = {"masking": masking, "masking_options": options}
    (run / "options.json").write_text(json.dumps({**said, **more}))
    path = run / "checkpoints/epoch_1.pt"
    content = torch.load(path, weights_only=True)
    record = {**said, "recipe": {"epochs": 4, **more}, "data": {}}
    torch.save({**content, "clip_pgs": record}, path)
    return path


def results_in(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_features_are_those_of_a_model_masked_in_eval_mode_with_the_same_noise(
    finished_run, six, data_root
):
    loaded = load_model(finished_run, **PGS)
    features = encode(loaded, six)
    noise_BN = loaded.masking.noise(
        [(shard, place) for shard in range(2) for place in range(6)], num_patches=4
    )
    model = apply_masking(load_model(finished_run).model, "pgs", mask_ratio=0.5, when="always")
    set_masking_progress(model, 1.0)
    set_masking_noise(model, noise_BN)
    images = [loaded.transform(image) for image in images_of(data_root / "six/test")]
    with torch.no_grad():
        expected = model.encode_image(torch.stack(images))
    assert last_selection(model).index.shape == (12, 2)
    torch.testing.assert_close(features.images, expected)
    assert not torch.allclose(features.images, encode(load_model(finished_run), six).images)


def test_the_options_of_a_run_of_many_shards_are_read(tmp_path):
    shards = [f"{number:05d}.tar: 300000000 bytes, 10000 samples" for number in range(40_000)]
    said = {"masking": "random", "masking_options": {}, "train_files": shards}
    (tmp_path / "options.json").write_text(json.dumps(said))
    (tmp_path / "checkpoints").mkdir()
    masking = choose_masking("run", weights=str(tmp_path / "checkpoints/epoch_1.pt"))
    assert masking.name == "random"


OWN = """\
from clip_pgs.masking.strategy import register_masking
from clip_pgs.masking.baselines import RandomMasking
@register_masking('beside-it', keeps='some', paper='none')
class Own(RandomMasking):
    '''Keep a random subset.

    Args:
        mask_ratio: Share.
    '''
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module with a masking in the working directory, which is not on the path."""
    path = tmp_path / "beside_it.py"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv(OWN_MODULES, raising=False)
    yield path
    sys.modules.pop("beside_it", None)
    _REGISTRY._entries.pop("beside-it", None)


@pytest.mark.parametrize("has_record", [True, False])
def test_a_masking_beside_the_files_of_a_stranger_is_run_where_the_user_says_so_alone(
    tmp_path, finished_run, monkeypatch, has_record, own_module
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    path = say_trained_with(run, "beside_it:Own", {})
    if not has_record:
        content = torch.load(path, weights_only=True)
        torch.save({name: part for name, part in content.items() if name != "clip_pgs"}, path)
    # As it is once a suite of one's own was found in the working directory.
    for places in ([*sys.path], [*sys.path, ""]):
        monkeypatch.setattr(sys, "path", places)
        with pytest.raises(ValueError, match="trained with beside_it:Own, code outside of this"):
            choose_masking("run", weights=str(path))
        assert "beside_it" not in sys.modules
        assert sys.path == places
    if has_record:
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setenv(OWN_MODULES, "beside_it")
    assert choose_masking("run", weights=str(path)).name == "beside_it:Own"


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_masking_that_the_user_names_is_taken_whatever_the_files_name(
    tmp_path, finished_run, own_module, is_alone
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    path = say_trained_with(run, "beside_it:Own", {"mask_ratio": 0.25})
    for options in (None, {"mask_ratio": 0.75}):
        source = shutil.copy(path, tmp_path / "alone.pt") if is_alone else run / "export"
        masking = choose_masking("random", options, weights=str(source))
        assert masking.label == f"random {(options or {}).get('mask_ratio', 0.5)}"
        # One epoch of four.
        assert masking.progress == 0.25
    assert "beside_it" not in sys.modules
    assert load_model(run).masking is None
    assert "beside_it" not in sys.modules
    model = {"model": "tiny-eval-vit"} if is_alone else {}
    named = load_model(source if is_alone else run, inference_masking="beside_it:Own", **model)
    assert named.masking.label == "beside_it:Own 0.5"


def test_the_masking_of_a_checkpoint_outside_of_its_run_is_taken_from_the_path(
    tmp_path, finished_run, own_module, monkeypatch
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    path = say_trained_with(run, "beside_it:Own", {"mask_ratio": 0.25})
    alone = shutil.copy(path, tmp_path / "alone.pt")
    with pytest.raises(ValueError, match="trained with beside_it:Own, code outside of this"):
        choose_masking("run", weights=str(alone))
    assert "beside_it" not in sys.modules
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_masking("run", weights=str(alone)).label == "beside_it:Own 0.25"


@pytest.mark.parametrize("has_record", [True, False])
def test_run_says_where_the_code_of_its_masking_is_another_than_it_was(
    tmp_path, finished_run, own_module, monkeypatch, caplog, has_record
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    path = say_trained_with(run, "beside_it:Own", {})
    options = {"masking": "beside_it:Own", "masking_options": {}}
    options["contents"] = [f"code of masking: {file_digest(own_module)[:12]}"]
    (run / "options.json").write_text(json.dumps(options))
    content = torch.load(path, weights_only=True)
    content["clip_pgs"]["options"] = experiment_of(options)
    if not has_record:
        del content["clip_pgs"]
    torch.save(content, path)
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_masking("run", weights=str(path)).name == "beside_it:Own"
    assert caplog.text == ""
    own_module.write_text(f"{own_module.read_text()}# changed\n")
    choose_masking("beside_it:Own", weights=str(path))
    assert caplog.text == ""
    with telling_once():
        for _ in range(2):
            choose_masking("run", weights=str(path))
    (message,) = caplog.messages
    assert message.startswith(f"The code of beside_it:Own is no longer that which {path} was")


def test_a_masking_without_a_module_is_no_code_that_was_meant(tmp_path, finished_run, monkeypatch):
    path = say_trained_with(shutil.copytree(finished_run, tmp_path / "run"), ":Own", {})
    monkeypatch.delenv(OWN_MODULES, raising=False)
    with pytest.raises(ValueError, match="trained with :Own, code outside of this package"):
        choose_masking("run", weights=str(path))


def test_a_ratio_of_0_gives_the_features_of_whole_images(finished_run, six, add_att):
    masked = load_model(
        finished_run, inference_masking="pgs", inference_options={"mask_ratio": 0.0}
    )
    whole = encode(load_model(finished_run), six).images
    torch.testing.assert_close(encode(masked, six).images, whole, atol=1e-5, rtol=1e-5)


def test_masks_do_not_depend_on_batch_size_processes_or_order(finished_run, six):
    loaded = load_model(finished_run, **RANDOM)
    expected = Encoder(loaded, batch_size=12).images(six)
    for batch_size, workers in ((5, 0), (4, 2)):
        encoder = Encoder(loaded, batch_size=batch_size, workers=workers)
        features = encoder.images(six)
        # Two processes read a shard each, by turns.
        order = sorted(range(12), key=lambda row: features.images[row].tolist())
        other = sorted(range(12), key=lambda row: expected.images[row].tolist())
        torch.testing.assert_close(features.images[order], expected.images[other])
        assert features.labels[order].tolist() == expected.labels[other].tolist()


def test_another_seed_masks_otherwise(finished_run):
    masking = load_model(finished_run, **RANDOM).masking
    noise_BN = masking.noise([(0, 0), (0, 1), ("a.png",)], num_patches=4)
    assert noise_BN.shape == (3, 4)
    assert len(noise_BN.flatten().unique()) == 12
    other = type(masking)("random", seed=1).noise([(0, 0)], num_patches=4)
    assert not torch.equal(other, noise_BN[:1])
    assert torch.equal(masking.noise([(0, 1)], num_patches=4), noise_BN[1:2])


def test_the_model_is_a_plain_one_before_and_after(finished_run, six, tmp_path):
    loaded, plain = load_model(finished_run, **PGS), load_model(finished_run)
    evaluate(loaded, [six], output=tmp_path, workers=0)
    assert type(loaded.model.visual) is type(plain.model.visual)
    assert list(loaded.model.state_dict()) == list(plain.model.state_dict())
    assert "masking" not in dict(loaded.model.visual.named_modules())


def test_unmasked_results_stay_done_and_nothing_of_either_is_computed_twice(
    finished_run, six, add_att, tmp_path
):
    sets = [six, add_att]
    plain = load_model(finished_run)
    before = evaluate(plain, sets, output=tmp_path, workers=0)
    masked = load_model(finished_run, **PGS)
    through = evaluate(masked, sets, output=tmp_path, workers=0)
    assert [r.inference_masking for r in (*before, *through)] == ["", "", "pgs 0.5", "pgs 0.5"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "compositionality_sugar_crepe-add_att.json",
        "compositionality_sugar_crepe-add_att@pgs_0.5.json",
        "zeroshot_classification_six.json",
        "zeroshot_classification_six@pgs_0.5.json",
    ]
    for loaded, results in ((plain, before), (masked, through)):
        counts = count_images(loaded)
        assert evaluate(loaded, sets, output=tmp_path, workers=0) == results
        assert counts == []


def test_results_of_before_masks_were_told_are_found_and_equal(finished_run, six, tmp_path):
    loaded = load_model(finished_run)
    (result,) = evaluate(loaded, [six], output=tmp_path, workers=0)
    path = tmp_path / "zeroshot_classification_six.json"
    content = json.loads(path.read_text())
    for name in ("inference_masking", "flops_per_image"):
        del content[name]
    path.write_text(json.dumps(content))
    counts = count_images(loaded)
    assert evaluate(loaded, [six], output=tmp_path, workers=0) == [result]
    assert counts == []


def test_the_cache_never_gives_features_of_another_mask(finished_run, six, tmp_path):
    found = [
        encode(load_model(finished_run, **how), six, tmp_path).images
        for how in ({}, PGS, RANDOM, {**PGS, "inference_options": {"mask_ratio": 0.75}})
    ]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    for number, features_ND in enumerate(found):
        assert not any(torch.equal(features_ND, other) for other in found[:number])


def test_flops_per_image_fall_with_the_mask(finished_run, six):
    flops = {}
    for ratio in (0.0, 0.5):
        how = {"inference_masking": "random", "inference_options": {"mask_ratio": ratio}}
        (result,) = evaluate(load_model(finished_run, **how), [six], workers=0)
        flops[ratio] = result.flops_per_image
    (plain,) = evaluate(load_model(finished_run), [six], workers=0)

    # Width 16, one block with an MLP of four times that, 4 patches of 8 x 8 x 3 and a class token.
    def of_tokens(num):
        return 2 * num * 16 * (4 * 16 + 2 * 4 * 16) + 2 * 2 * num * num * 16

    patches, projection = 2 * 4 * 8 * 8 * 3 * 16, 2 * 16 * 8
    assert plain.flops_per_image == patches + of_tokens(5) + projection
    assert flops[0.5] < 0.75 * plain.flops_per_image
    assert flops[0.5] >= patches + projection


def test_a_model_without_memory_for_an_image_fails_set_by_set_and_takes_no_count_away(
    finished_run, six, tmp_path, monkeypatch, caplog
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    loaded = load_model(finished_run)
    with monkeypatch.context() as patch:
        patch.setitem(vars(loaded.model.visual), "forward", fail)
        (failed,) = evaluate(loaded, [six], workers=0)
    assert (failed.status, failed.flops_per_image) == ("failed", None)
    assert "CUDA out of memory" in failed.error
    assert "the operations per image of tiny_run cannot be counted: CUDA out of m" in caplog.text
    (scored,) = evaluate(loaded, [six], workers=0, output=tmp_path)
    assert scored.flops_per_image > 0
    monkeypatch.setattr("clip_pgs.evaluation.features.count_image_flops", fail)
    assert evaluate(loaded, [six], workers=0, output=tmp_path) == [scored]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_command_keeps_masked_and_unmasked_apart_in_table_csv_and_report(run, options, capsys):
    assert main([str(run), *options]) == 0
    page = capsys.readouterr().out
    assert "through" not in page
    assert "FLOP per image" in page
    mask = ["--inference-masking", "pgs", "--inference-mask-ratio", "0.5"]
    assert main([str(run), *options[:-1], *mask]) == 0
    assert "through pgs 0.5, " in capsys.readouterr().out
    rows = results_in(run / "eval")
    assert sorted((row["dataset"], row["inference_masking"]) for row in rows) == [
        ("pairs", ""),
        ("pairs", "pgs 0.5"),
        ("six", ""),
        ("six", "pgs 0.5"),
    ]
    report = results_in(run / "eval/report")
    models = {(row["model"], row["inference_masking"]) for row in report if row["kind"] == "run"}
    assert models == {("tiny_run", ""), ("tiny_run, through pgs 0.5", "pgs 0.5")}
    by_model = {row["model"]: row for row in report if row["kind"] == "run"}
    assert len({float(row["flops_per_image"]) for row in by_model.values()}) == 2
    for name in ("report.md", "report.html"):
        assert "run, through pgs 0.5" in (run / "eval/report" / name).read_text()


def test_many_options_on_a_set_of_a_long_name_have_a_file(finished_run, data_root, tmp_path):
    retrieval = get_suite("zeroshot-retrieval")
    eval_set = retrieval.eval_set("long" * 37, str(data_root / "pairs"))
    names = ("edge_protection", "edge_weight", "temperature", "random_images", "random_share")
    for value in (0.123, 0.125):
        given = {"inference_masking": "pgs", "inference_options": dict.fromkeys(names, value)}
        for is_kept in (False, True):
            loaded = load_model(finished_run, **given)
            seen = count_images(loaded)
            (result,) = evaluate(loaded, [eval_set], workers=0, output=tmp_path)
            assert (result.status, bool(seen)) == ("done", not is_kept)
    assert len(read_results(tmp_path)) == 2


def test_run_means_the_masking_of_training_with_another_ratio_if_given(run):
    path = say_trained_with(run, "pgs", {"mask_ratio": 0.75, "edges": False})
    for source in (run, path, run / "export"):
        masking = load_model(source, inference_masking="run").masking
        assert masking.label == "pgs 0.75 edges=False"
        # One epoch of four.
        assert masking.progress == 0.25
    given = {"inference_masking": "run", "inference_options": {"mask_ratio": 0.5}}
    assert load_model(run, **given).masking.label == "pgs 0.5 edges=False"


def test_run_means_the_ratio_that_a_schedule_had_reached(run):
    schedule = {"mask_schedule": "linear", "mask_ratio_end": 0.0, "mask_schedule_steps": 5}
    path = say_trained_with(run, "random", {"mask_ratio": 0.8}, **schedule)
    assert load_model(path, inference_masking="run").masking.label == "random 0.6"


ADAPTIVE = {"mask_ratio": 0.5, "mask_ratio_min": 0.3}


@pytest.mark.parametrize("end", [0.3, 0.75, 0.0])
@pytest.mark.parametrize(
    ("masking", "options"),
    [
        ("pgs", {**ADAPTIVE, "mask_ratio_mean": 0.4}),
        ("pgs", {**ADAPTIVE, "mask_ratio_mean": 0.5}),
        ("pgs-released", ADAPTIVE),
        ("cluster", {}),
    ],
)
def test_run_masks_as_training_did_at_the_end_of_a_schedule(run, masking, options, end):
    schedule = {"mask_schedule": "linear", "mask_ratio_end": end, "mask_schedule_steps": 5}
    path = say_trained_with(run, masking, options, epochs=1, **schedule)
    trained, inputs = create_masking(masking, **options), make_inputs(8)
    trained.set_mask_ratio(end)
    if trained.needs_calibration(0.0):
        trained.calibrate(inputs)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "masking_state": {"strategy": trained.state()}}, path)
    found = choose_masking("run", weights=str(path))
    evaluated = create_masking(masking, **found.options)
    evaluated.load_state(found.state["strategy"])
    kept = [
        strategy(inputs, generator=torch.Generator().manual_seed(0))
        for strategy in (trained, evaluated)
    ]
    assert torch.equal(kept[0].index, kept[1].index)


def test_run_merges_as_training_did_unless_told_otherwise(run, six):
    path = say_trained_with(run, "random", {"mask_ratio": 0.5}, merge="2x2", merge_counts=True)
    merged = load_model(path, inference_masking="run")
    assert merged.masking.label == "random 0.5 merge=2x2 merge_counts=True"
    given = {"inference_options": {"merge": "none"}}
    dropped = load_model(path, inference_masking="run", **given)
    assert dropped.masking.label == "random 0.5"
    model = load_model(path).model
    apply_masking(model, "random", mask_ratio=0.5, merge="2x2", merge_counts=True, when="always")
    places = [(shard, place) for shard in range(2) for place in range(6)]
    set_masking_noise(model, merged.masking.noise(places, num_patches=4))
    images = [merged.transform(image) for image in images_of(Path(six.location) / "test")]
    with torch.no_grad():
        expected = model.encode_image(torch.stack(images))
    torch.testing.assert_close(encode(merged, six).images, expected)
    assert not torch.allclose(encode(dropped, six).images, expected)


def test_run_of_a_model_trained_on_whole_images_masks_nothing(run):
    say_trained_with(run, "none", {})
    assert load_model(run, inference_masking="run").masking is None


def test_a_finished_run_counts_as_finished(run):
    assert load_model(run, **PGS).masking.progress == 1.0


def test_attentive_takes_the_teacher_of_training_else_the_weights(run, six, caplog):
    path = say_trained_with(run, "attentive", {"mask_ratio": 0.5})
    own = load_model(path, inference_masking="run")
    assert own.masking.label == "attentive 0.5"
    assert "No checkpoint tells what attentive found" in caplog.text
    caplog.clear()
    teacher = {
        name.removeprefix("visual."): torch.randn(weight.shape)
        for name, weight in own.model.state_dict().items()
        if name.startswith("visual.")
    }
    content = torch.load(path, weights_only=True)
    torch.save({**content, "masking_state": {"teacher": teacher}}, path)
    trained = load_model(path, inference_masking="run")
    assert trained.masking.label == "attentive 0.5 as trained"
    assert "No checkpoint" not in caplog.text
    assert not torch.equal(encode(own, six).images, encode(trained, six).images)


def test_a_strategy_of_ones_own_is_taken_by_its_import_path(run, six, monkeypatch):
    Path("dim.py").write_text(
        "from clip_pgs.masking import FixedRatioMasking, register_masking\n"
        "from clip_pgs.masking.sampling import patchify, select_top\n\n\n"
        "@register_masking('dim', keeps='the darkest', paper='none', random=False)\n"
        "class DimMasking(FixedRatioMasking):\n"
        "    def forward(self, inputs, *, generator=None):\n"
        "        patches_BNF = patchify(inputs.pixels.float(), inputs.patch_size)\n"
        "        scores_BN = -patches_BNF.mean(dim=2)\n"
        "        return select_top(scores_BN, num_keep=self.num_keep(inputs))\n"
    )
    monkeypatch.syspath_prepend(".")
    loaded = load_model(run, inference_masking="dim:DimMasking")
    assert loaded.masking.label == "dim:DimMasking 0.5"
    (result,) = evaluate(loaded, [six], output="out", workers=0)
    assert result.status == "done"
    assert Path("out/zeroshot_classification_six@dim_DimMasking_0.5.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--inference-masking", "run"], "nothing tells what"),
        (["--inference-masking", "pqs"], "unknown masking 'pqs'"),
        (["--inference-masking", "pgs", "--inference-mask-ratio", "1"], "mask_ratio must be in"),
        (["--inference-mask-ratio", "0.5"], "needs --inference-masking"),
        (["--inference-masking", "pgs", "--inference-merge", "two"], "merge must be none"),
        (["--inference-masking", "pgs", "--inference-merge-counts"], "merge_counts needs merge"),
        (["--inference-masking", "random", "--inference-masking-option", "edges=0"], "edges"),
    ],
)
def test_bad_input_gives_exit_code_2_one_sentence_and_no_files(
    run, options, capsys, arguments, sentence
):
    before = sorted(Path().rglob("*"))
    assert main([str(run), *options, *arguments]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("module", ["antigravity", "idlelib.idle"])
def test_a_checkpoint_cannot_have_a_module_of_python_imported(run, module):
    path = say_trained_with(run, f"{module}:fly", {})
    lone = shutil.copy(path, "lone.pt")
    for source in (lone, path):
        with pytest.raises(ValueError, match=f"{module}:fly"):
            load_model(source, model="tiny-eval-vit", inference_masking="run")
        assert module not in sys.modules
