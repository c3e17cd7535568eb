import csv
import json
import math
import shutil
import tarfile
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from clip_pgs.evaluation import evaluate, load_model, load_suite, weights_digest
from clip_pgs.evaluation.features import Encoder
from clip_pgs.evaluation.results import read_results
from clip_pgs.evaluation.suites import get_suite

classification = get_suite("zeroshot-classification")


@pytest.fixture
def eval_sets(dataset_list, data_root):
    return load_suite(datasets=str(dataset_list), data_root=str(data_root))


def test_classification_metrics_equal_those_counted_by_hand(color_model, eval_sets):
    result = evaluate(color_model, eval_sets[:1], workers=0)[0]
    assert result.samples == 12
    assert result.metrics["acc1"] == pytest.approx(9 / 12)
    # Right per class: 2/2, 2/2, 1/2, 2/2, 1/2, 1/2.
    assert result.metrics["mean_per_class_recall"] == pytest.approx(4.5 / 6)


def test_retrieval_metrics_equal_those_counted_by_hand(color_model, eval_sets):
    result = evaluate(color_model, eval_sets[1:], workers=0)[0]
    assert result.samples == 12
    # Images 0 and 1 are swapped; the two captions of every other image find it.
    assert result.metrics["image_retrieval_recall@1"] == pytest.approx(10 / 12)
    assert result.metrics["text_retrieval_recall@1"] == pytest.approx(10 / 12)
    assert {"image_retrieval_recall@5", "text_retrieval_recall@10"} <= result.metrics.keys()


def test_more_workers_than_shards_change_nothing(color_model, eval_sets):
    alone = evaluate(color_model, eval_sets, workers=0)
    crowded = evaluate(color_model, eval_sets, workers=4, batch_size=5)
    assert [r.metrics for r in crowded] == [r.metrics for r in alone]


def test_result_file_holds_numbers_and_their_origin(color_model, eval_sets, tmp_path):
    evaluate(color_model, eval_sets[:1], workers=0, output=tmp_path / "out")
    content = json.loads((tmp_path / "out/zeroshot_classification_six.json").read_text())
    assert content["model"] == "colors"
    assert content["dataset"] == "six"
    assert content["task"] == "zeroshot_classification"
    assert content["status"] == "done"
    assert content["metrics"]["acc1"] == 0.75
    assert content["samples"] == 12
    assert content["weights_digest"] == weights_digest(color_model.model)
    assert content["settings"] == {"device": "cpu", "amp": False, "batch_size": 64}
    assert content["versions"]["torch"] == version("torch")
    assert content["date"].endswith("+00:00")


def test_csv_gathers_the_results_of_earlier_calls_with_the_same_weights(
    color_model, eval_sets, tmp_path
):
    evaluate(color_model, eval_sets[:1], workers=0, output=tmp_path)
    evaluate(color_model, eval_sets[1:], workers=0, output=tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert float(rows["six"]["acc1"]) == 0.75
    assert rows["six"]["text_retrieval_recall@1"] == ""
    assert float(rows["pairs"]["text_retrieval_recall@1"]) == pytest.approx(10 / 12)

    color_model.model.colors.data += 0.01
    evaluate(color_model, eval_sets[1:], workers=0, output=tmp_path)
    with (tmp_path / "results.csv").open() as file:
        assert [row["dataset"] for row in csv.DictReader(file)] == ["pairs"]


def test_missing_and_damaged_sets_do_not_stop_the_rest(
    color_model, eval_sets, damaged_folder, tmp_path, caplog
):
    absent = classification.eval_set("food101", str(tmp_path / "absent"))
    damaged = classification.eval_set("damaged", str(damaged_folder))

    output = tmp_path / "out"
    results = evaluate(color_model, [absent, damaged, eval_sets[0]], workers=0, output=output)
    assert [result.status for result in results] == ["missing", "failed", "done"]
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("[1/3] zeroshot-classification food101: missing: " in line for line in warnings)
    assert any("[2/3] zeroshot-classification damaged: failed: " in line for line in warnings)
    assert str(tmp_path / "absent") in results[0].error
    assert "test/0.tar" in results[1].error
    assert "Traceback" in (output / "errors.log").read_text()
    with (output / "results.csv").open() as file:
        statuses = {row["dataset"]: row["status"] for row in csv.DictReader(file)}
    assert statuses == {"food101": "missing", "damaged": "failed", "six": "done"}


def test_nothing_is_written_through_a_link_in_the_folder_of_results(
    color_model, eval_sets, damaged_folder, tmp_path
):
    mine, output = tmp_path / "mine", tmp_path / "out"
    mine.write_text("precious")
    output.mkdir()
    for name in ("errors.log", "results.csv", "zeroshot_classification_six.json"):
        (output / name).symlink_to(mine)
    damaged = classification.eval_set("damaged", str(damaged_folder))
    results = evaluate(color_model, [damaged, eval_sets[0]], workers=0, output=output)
    assert [result.status for result in results] == ["failed", "done"]
    assert mine.read_text() == "precious"
    assert read_results(output) == results


def test_a_damaged_set_is_told_in_its_result_alone_where_no_files_are_kept(
    color_model, damaged_folder, caplog
):
    damaged = classification.eval_set("damaged", str(damaged_folder))
    (result,) = evaluate(color_model, [damaged], workers=0)
    assert (result.status, "test/0.tar" in result.error) == ("failed", True)
    assert "Traceback" not in caplog.text


def test_an_error_of_the_program_is_told_with_its_traceback_and_no_other(
    color_model, eval_sets, caplog, monkeypatch
):
    monkeypatch.setattr(Encoder, "images", lambda *_, **__: 1 / 0)
    (result,) = evaluate(color_model, eval_sets[:1], workers=0)
    assert result.status == "failed"
    assert "ZeroDivisionError" in caplog.text
    assert "another exception" not in caplog.text


def test_set_that_lacks_a_shard_is_missing(color_model, eval_sets, data_root, tmp_path):
    folder = tmp_path / "short"
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("3")
    (folder / "test/0.tar").write_bytes((data_root / "six/test/0.tar").read_bytes())
    short = classification.eval_set("short", str(folder))
    result = evaluate(color_model, [short], workers=0)[0]
    assert result.status == "missing"
    assert "test/1.tar" in result.error


def test_set_on_a_server_that_cannot_be_reached_is_missing(color_model, eval_sets):
    url = "http://127.0.0.1:9/wds_six"
    result = evaluate(color_model, [classification.eval_set("six", url)], workers=0)[0]
    assert result.status == "missing"
    assert url in result.error


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_before_scoring(
    color_model, eval_sets, tmp_path, value
):
    color_model.model.colors.data[3, 1] = value
    with pytest.raises(ValueError, match="colors holds 1 NaN or infinite"):
        evaluate(color_model, eval_sets, workers=0, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_stop_the_model(color_model, eval_sets, tmp_path):
    color_model.model.encode_image = lambda pixels: pixels.mean(dim=(2, 3)) / 0.0
    with pytest.raises(ValueError, match="features of colors on six are not finite"):
        evaluate(color_model, eval_sets, workers=0, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_knows_one_class_only_is_at_chance(color_model, eval_sets):
    color_model.model.encode_image = lambda pixels: color_model.model.colors[:1].expand(
        len(pixels), 3
    )
    metrics = evaluate(color_model, eval_sets[:1], workers=0)[0].metrics
    assert metrics["acc1"] == pytest.approx(1 / 6)
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 6)


def test_constant_features_are_at_chance_in_retrieval(color_model, eval_sets):
    color_model.model.encode_image = lambda pixels: torch.ones(len(pixels), 3)
    color_model.model.encode_text = lambda tokens: torch.ones(len(tokens), 3)
    metrics = evaluate(color_model, eval_sets[1:], workers=0)[0].metrics
    # The ten first of twelve, and of 24 texts, whichever these are.
    assert metrics["image_retrieval_recall@1"] == pytest.approx(1 / 12)
    assert metrics["image_retrieval_recall@10"] == pytest.approx(10 / 12)
    assert metrics["text_retrieval_recall@1"] == pytest.approx(1 / 12)


def test_metrics_do_not_depend_on_which_number_a_class_has(color_model, data_root, tmp_path):
    before = load_suite(
        "zeroshot-classification",
        datasets=write_list(tmp_path, "six"),
        data_root=str(data_root),
    )
    after = permuted_copy(data_root / "six", tmp_path / "permuted")
    first, second = (
        evaluate(color_model, sets, workers=0)[0].metrics
        for sets in (before, [replace(before[0], location=str(after))])
    )
    assert first == second


def write_list(folder, *lines):
    path = folder / "list.txt"
    path.write_text("\n".join(lines))
    return str(path)


def permuted_copy(source, target):
    """Give class `c` the number 5 - c, in the labels and in the list of names."""
    shutil.copytree(source, target)
    names = (source / "classnames.txt").read_text().splitlines()
    (target / "classnames.txt").write_text("\n".join(reversed(names)) + "\n")
    for shard in target.glob("test/*.tar"):
        content = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            offsets = [member.offset_data for member in tar if member.name.endswith(".cls")]
        for offset in offsets:
            content[offset] = ord("5") - (content[offset] - ord("0"))
        shard.write_bytes(content)
    return target


def test_model_is_left_in_its_own_mode(color_model, eval_sets):
    color_model.model.train()
    evaluate(color_model, eval_sets[:1], workers=0)
    assert color_model.model.training


def test_terminal_stays_free_of_progress(color_model, eval_sets, capfd):
    evaluate(color_model, eval_sets, workers=0)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err


def test_scores_equal_those_of_the_open_clip_model_itself(finished_run, eval_sets):
    loaded = load_model(finished_run)
    result = evaluate(loaded, eval_sets[:1], workers=0)[0]
    with torch.no_grad():
        per_class = [
            torch.nn.functional.normalize(
                loaded.model.encode_text(
                    loaded.tokenizer([f"a number {index}", f"the number {index}"])
                ),
                dim=-1,
            ).mean(dim=0)
            for index in range(6)
        ]
    text_CD = torch.nn.functional.normalize(torch.stack(per_class), dim=-1)
    num_right = 0
    for image, label in labelled_images(eval_sets[0].location):
        with torch.no_grad():
            image_D = loaded.model.encode_image(loaded.transform(image)[None])[0]
        num_right += int((text_CD @ image_D).argmax()) == label
    assert result.metrics["acc1"] == pytest.approx(num_right / 12)


def labelled_images(folder):
    import io
    import tarfile
    from pathlib import Path

    from PIL import Image

    for path in sorted(Path(folder, "test").glob("*.tar")):
        with tarfile.open(path) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        for name in contents:
            if name.endswith(".png"):
                label = int(contents[name.replace(".png", ".cls")])
                yield Image.open(io.BytesIO(contents[name])), label
