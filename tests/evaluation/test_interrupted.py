import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest
import torch

from clip_pgs.evaluation import evaluate, load_suite
from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.datasets import check_presence
from support.encoding import count_images
from support.permissions import unreadable


@pytest.fixture
def sets(data_root, tmp_path):
    """A copy of the data sets in the working directory of the test."""
    return shutil.copytree(data_root, tmp_path / "sets")


@pytest.fixture
def six(sets, dataset_list):
    return load_suite("zeroshot-classification", datasets=str(dataset_list), data_root=str(sets))


@pytest.fixture
def score(color_model, six, tmp_path):
    """Return what evaluates and counts the images that the model saw."""

    def run(loaded=color_model, eval_sets=six, **options):
        seen = []
        encode = type(loaded.model).encode_image

        def count(pixels):
            seen.extend(pixels)
            return encode(loaded.model, pixels)

        loaded.model.encode_image = count
        results = evaluate(
            loaded, eval_sets, output=tmp_path / "out", workers=0, keep_features=False, **options
        )
        del loaded.model.encode_image
        return results, len(seen)

    run.eval_sets = six
    return run


class StopRequest(BaseException):
    """What a signal raises in a training run."""


def test_a_signal_ends_the_evaluation_and_a_later_call_measures_the_set(
    score, color_model, tmp_path, monkeypatch
):
    def leave(pixels):
        raise StopRequest

    with monkeypatch.context() as patch:
        patch.setitem(vars(color_model.model), "encode_image", leave)
        with pytest.raises(StopRequest):
            evaluate(color_model, score.eval_sets, workers=0, output=tmp_path / "out")
    assert not list(tmp_path.glob("out/*.json"))
    (result,), num_seen = score()
    assert (result.status, num_seen) == ("done", 12)


def test_a_set_that_failed_is_measured_by_a_later_call(score, color_model, tmp_path, monkeypatch):
    def fail(pixels):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(vars(color_model.model), "encode_image", fail)
        (result,) = evaluate(color_model, score.eval_sets, workers=0, output=tmp_path / "out")
    assert (result.status, result.error) == ("failed", "RuntimeError: out of memory")
    (result,), num_seen = score()
    assert (result.status, num_seen) == ("done", 12)


@pytest.mark.parametrize("name", ["zeroshot_classification_six.json", "results.csv", "errors.log"])
def test_a_file_that_cannot_be_read_or_written_does_not_end_the_evaluation(score, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    (result,), num_seen = score()
    assert num_seen == 12
    assert result.metrics["acc1"] == 0.75


def test_a_kept_result_of_another_shape_is_measured_anew(score, tmp_path):
    score()
    path = tmp_path / "out/zeroshot_classification_six.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": []}))
    (result,), num_seen = score()
    assert (result.status, num_seen) == ("done", 12)


def test_a_finished_result_is_kept(score):
    first, num_first = score()
    again, num_again = score()
    assert (num_first, num_again) == (12, 0)
    assert again == first


def test_force_redoes_a_finished_result(score):
    score()
    assert score(force=True)[1] == 12


def test_another_name_and_place_of_model_and_data_is_no_reason_to_redo(score, six, sets, tmp_path):
    score()
    moved = sets.rename(tmp_path / "moved")
    eval_sets = [replace(six[0], location=str(moved / "six"))]
    (result,), num_seen = score(eval_sets=eval_sets)
    assert num_seen == 0
    assert result.location == str(moved / "six")
    content = json.loads((tmp_path / "out/zeroshot_classification_six.json").read_text())
    assert content["location"] == str(moved / "six")


def test_a_result_tells_its_data_wherever_they_lie_and_a_kept_one_of_before_is_told_them(
    score, six, sets, tmp_path
):
    (first,), _ = score()
    assert len(first.data_digest) == 64
    path = tmp_path / "out/zeroshot_classification_six.json"
    content = json.loads(path.read_text())
    # As an earlier version wrote it.
    del content["data_digest"]
    path.write_text(json.dumps(content))
    shutil.copytree(sets, tmp_path / "copy")
    copied = [replace(six[0], location=str(tmp_path / "copy/six"))]
    (again,), num_seen = score(eval_sets=copied)
    assert (num_seen, again.data_digest) == (0, first.data_digest)
    assert json.loads(path.read_text())["data_digest"] == first.data_digest
    (tmp_path / "copy/six/zeroshot_classification_templates.txt").write_text("another {c}\n")
    (other,), _ = score(eval_sets=copied)
    assert other.data_digest != first.data_digest


def test_a_file_whose_time_of_change_counts_tells_no_data_apart(score, monkeypatch):
    monkeypatch.setattr("clip_pgs.evaluation.runner.WHOLE_FILE_BYTES", 1000)
    (result,), _ = score()
    assert (result.status, result.data_digest) == ("done", "")


def test_other_weights_under_the_same_name_are_scored_anew(score, color_model):
    score()
    color_model.model.colors.data = color_model.model.colors.data.roll(1, dims=0)
    (result,), num_seen = score()
    assert num_seen == 12
    assert result.metrics["acc1"] < 0.5


@pytest.mark.parametrize("part", ["class names", "labels"])
def test_other_data_under_the_same_name_and_size_is_scored_anew(score, sets, part):
    score()
    if part == "class names":
        names = "".join(f"number {number}\n" for number in (1, 0, 2, 3, 4, 5))
        (sets / "six/classnames.txt").write_text(names)
    else:
        for shard in sets.glob("six/test/*.tar"):
            flip_labels(shard)
    (result,), num_seen = score()
    assert num_seen == 12
    # All four images of the classes 0 and 1 were right, and are wrong now.
    assert result.metrics["acc1"] == pytest.approx(5 / 12)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("classnames.txt", "a\nb\n", "one of the 2 classes of classnames.txt, from 0, got 2"),
        ("classnames.txt", "a\n" * 5 + "b" * 10**6, "classnames.txt must have at most 2000"),
        ("zeroshot_classification_templates.txt", "{c}" + "b" * 10**6, "line 1 of .*templates.txt"),
        ("test/nshards.txt", "9" * 14, r"nshards.txt must hold a number from 1 to 999999999, got"),
    ],
)
def test_what_is_wrong_with_a_small_file_is_told_with_its_name(
    score, sets, name, content, complaint
):
    (sets / "six" / name).write_text(content)
    (result,), _ = score()
    assert result.status == "failed"
    assert re.search(complaint, result.error)


def flip_labels(shard):
    """Swap the classes 0 and 1 in place: name and size of the file stay."""
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        labels = [member for member in tar if member.name.endswith(".cls")]
    for member in labels:
        digit = content[member.offset_data : member.offset_data + 1]
        content[member.offset_data : member.offset_data + 1] = {b"0": b"1", b"1": b"0"}.get(
            bytes(digit), digit
        )
    shard.write_bytes(content)


def test_half_precision_does_not_pass_for_full(score):
    score()
    assert score(amp=True)[1] == 12


def tokenizer_from(first):
    """Return a tokenizer that counts colors from another number, and has one name for all."""
    return lambda texts: torch.tensor([[(first + int(text.split()[-1])) % 12] for text in texts])


def test_other_tokens_are_scored_anew(score, color_model):
    first, second = (replace(color_model, tokenizer=tokenizer_from(n)) for n in (0, 1))
    assert score(first)[0][0].metrics["acc1"] == 0.75
    assert score(first)[1] == 0
    (result,), num_seen = score(second)
    assert (num_seen, result.metrics["acc1"] < 0.5) == (12, True)


def test_a_suite_without_texts_is_kept_whatever_the_tokenizer(score, color_model, sets, tmp_path):
    path = tmp_path / "probed.txt"
    path.write_text("linear-probe: six\n")
    probed = load_suite("linear-probe", datasets=str(path), data_root=str(sets))
    assert score(eval_sets=probed)[1] == 36
    for tokenizer in (tokenizer_from(1), None):
        assert score(replace(color_model, tokenizer=tokenizer), probed)[1] == 0


def test_what_is_tokenized_at_random_is_scored_each_time(score, color_model):
    def drawn(texts):
        return torch.randint(12, (len(texts), 1))

    for _ in range(2):
        assert score(replace(color_model, tokenizer=drawn))[1] == 12


def test_a_set_whose_shards_may_not_be_listed_is_told_as_that(score, sets):
    with unreadable(sets / "six/test"):
        (sets / "six/test").chmod(0o111)
        (result,), _ = score()
        assert check_presence(score.eval_sets[0]).reason.endswith("Permission denied")
    assert result.status == "failed"
    assert result.error == f"PermissionError: {sets / 'six/test'}: Permission denied"


def test_a_set_that_is_gone_takes_no_finished_number_away(score, sets, tmp_path):
    score()
    shutil.rmtree(sets / "six")
    (result,), _ = score()
    assert result.status == "missing"
    content = json.loads((tmp_path / "out/zeroshot_classification_six.json").read_text())
    assert content["status"] == "done"
    assert content["metrics"]["acc1"] == 0.75


@pytest.mark.parametrize("harm", ["out of memory", "out of memory at half", "a damaged file"])
def test_a_failing_redo_takes_no_finished_number_away(
    score, color_model, sets, tmp_path, monkeypatch, harm
):
    def fail(pixels):
        raise RuntimeError("out of memory")

    score()
    kept = {path: path.read_bytes() for path in tmp_path.glob("out/*")}
    options = {"amp": True} if "half" in harm else {"force": True}
    if "memory" in harm:
        monkeypatch.setitem(vars(color_model.model), "encode_image", fail)
    else:
        (sets / "six/classnames.txt").write_text("a\n\nb\n")
    output = tmp_path / "out"
    (result,) = evaluate(
        color_model, score.eval_sets, output=output, workers=0, keep_features=False, **options
    )
    assert result.status == "failed"
    assert (output / "errors.log").is_file()
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("harm", ["missing", "failed"])
def test_weights_without_a_number_take_that_of_earlier_ones_away_from_nobody(
    score, color_model, sets, tmp_path, harm
):
    score()
    path, aside = (
        tmp_path / f"out/zeroshot_classification_six{ending}.json" for ending in ("", "@unscored")
    )
    finished = path.read_bytes()
    color_model.model.colors.data = color_model.model.colors.data.roll(1, dims=0)
    (sets / "six").rename(sets / "kept")
    if harm == "failed":
        shutil.copytree(sets / "kept", sets / "six")
        (sets / "six/classnames.txt").write_text("a\nb\n")
    for _ in range(2):
        (result,), _ = score()
        assert result.status == harm
        assert path.read_bytes() == finished
        assert json.loads(aside.read_text())["status"] == harm
        assert f",{harm}," in (tmp_path / "out/results.csv").read_text()
    shutil.rmtree(sets / "six", ignore_errors=True)
    (sets / "kept").rename(sets / "six")
    (result,), _ = score()
    assert json.loads(path.read_text())["metrics"] == result.metrics
    assert not aside.exists()


def test_results_and_features_of_older_rules_are_made_anew(color_model, six, tmp_path, monkeypatch):
    def num_seen(**options):
        counts = count_images(color_model)
        evaluate(color_model, six, output=tmp_path / "out", workers=0, **options)
        return sum(counts)

    with monkeypatch.context() as patch:
        for module in ("features", "runner"):
            patch.setattr(f"clip_pgs.evaluation.{module}.RULES", 3)
        assert num_seen() == 12
        assert num_seen(force=True) == 0
    assert num_seen() == 12
    assert num_seen(force=True) == 0


def test_a_damaged_result_file_is_written_anew(score, tmp_path):
    score()
    path = tmp_path / "out/zeroshot_classification_six.json"
    path.write_text(path.read_text()[:40])
    assert score()[1] == 12
    assert json.loads(path.read_text())["status"] == "done"


def test_suites_share_the_images_they_have_in_common(score, sets, tmp_path):
    lines = ["six", "robustness: six", "linear-probe: six"]
    path = tmp_path / "shared.txt"
    path.write_text("\n".join(lines))
    results, num_seen = score(eval_sets=load_suite(datasets=str(path), data_root=str(sets)))
    assert [result.status for result in results] == ["done"] * 3
    assert num_seen == 12 + 24  # test once, train once


def test_a_class_list_is_encoded_once_for_all_sets_that_have_it(score, color_model, sets, tmp_path):
    shutil.copytree(sets / "six", sets / "six_too")
    path = tmp_path / "shared.txt"
    path.write_text("six\nsix_too\nrobustness: six\n")
    texts = []
    encode = color_model.model.encode_text
    color_model.model.encode_text = lambda tokens: texts.extend(tokens) or encode(tokens)
    score(eval_sets=load_suite(datasets=str(path), data_root=str(sets)))
    # Two templates say the same to this tokenizer: it reads the last word.
    assert len(texts) == 6


STALL_AT_PAIRS = """
import sys, time
from clip_pgs.evaluation import suites
from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.datasets import check_presence
get = suites.SUITES.get
def stall(name):
    if name == "zeroshot-retrieval":
        time.sleep(600)
    return get(name)
suites.SUITES.get = stall
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_evaluation_continues_where_it_stopped(
    finished_run, sets, dataset_list, tmp_path, caplog
):
    output = tmp_path / "killed"
    arguments = [str(finished_run), "--datasets", str(dataset_list), "--data-root", str(sets)]
    arguments += ["--output", str(output), "--workers", "0", "--no-report"]
    process = subprocess.Popen([sys.executable, "-c", STALL_AT_PAIRS, *arguments])
    first, second = (
        output / f"{stem}.json"
        for stem in ("zeroshot_classification_six", "zeroshot_retrieval_pairs")
    )
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.is_file()
    assert not second.is_file()
    written = first.stat().st_mtime_ns

    assert main(arguments) == 0
    assert first.stat().st_mtime_ns == written
    assert json.loads(second.read_text())["status"] == "done"
    assert "six: done before" in caplog.text
