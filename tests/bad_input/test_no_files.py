"""What lies in a folder under a file's name and is a pipe or a device is never opened."""

import json
import logging
import os
from types import SimpleNamespace

import pytest
from PIL import Image

from clip_pgs.data.decoding import read_image_file
from clip_pgs.data.shards import write_shard
from clip_pgs.data.tar import cache_paths, index_shard
from clip_pgs.data.world.writing import _is_complete
from clip_pgs.evaluation.datasets import read_metadata
from clip_pgs.evaluation.features import files_fingerprint
from clip_pgs.evaluation.models import load_model
from clip_pgs.evaluation.report.training_facts import read_training_facts
from clip_pgs.evaluation.results import read_results, write_result
from clip_pgs.files import append_line, read_json_object
from clip_pgs.inspection.cost.data import read_jpegs
from clip_pgs.study.record import missing_part, read_record
from clip_pgs.training.loggers import logging_to
from clip_pgs.training.stop import RunLock
from support.options import MODEL_CONFIG
from support.reports import make_result

# A pipe that is opened waits for whoever writes into it.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["pipe", "device"])
def put(request, tmp_path):
    """Put what is no file under a name into the test's folder."""

    def put(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return path

    return put


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("options.json", lambda path: read_json_object(path, what="it")),
        ("study.json", lambda path: read_record(path.parent)),
        ("a.png", read_image_file),
        ("classnames.txt", lambda path: read_metadata(str(path.parent), path.name)),
        ("0.tar", lambda path: files_fingerprint(path.parent, [path])),
        ("out.jsonl", lambda path: append_line(path, "{}")),
    ],
)
def test_it_is_refused_where_nothing_can_be_done_without_it(put, name, read):
    with pytest.raises((ValueError, OSError), match=r"is no (regular )?file"):
        read(put(name))


def test_a_report_leaves_it_out(put, tmp_path, caplog):
    put("a.json")
    write_result(make_result("good"), tmp_path / "good.json")
    assert [result.dataset for result in read_results(tmp_path)] == ["good"]
    assert "a.json: cannot read it: it is no regular file" in caplog.text


def test_a_run_whose_notes_are_none_counts_as_without(put, tmp_path):
    for name in ("exit.json", "options.json", "metrics.jsonl", "checkpoints/epoch_1.pt"):
        put(name)
    (tmp_path / "export").mkdir()
    assert "exit.json" in missing_part(tmp_path)
    assert read_training_facts(tmp_path, "").samples is None


def test_a_world_is_drawn_anew_and_an_index_made_anew(put, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put("world.json")
    assert not _is_complete(tmp_path, {})
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"", "txt": b"one"})])
    for path in cache_paths(str(tmp_path / "0.tar")):
        put(path.relative_to(tmp_path))
    assert len(index_shard(str(tmp_path / "0.tar"))) == 1


def test_an_export_without_a_file_of_weights_is_refused(put, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CONFIG}))
    put("open_clip_model.safetensors")
    with pytest.raises(ValueError, match="no file of weights"):
        load_model(str(tmp_path))


def test_a_folder_of_images_is_read_without_it(put, tmp_path):
    put("a.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    assert len(read_jpegs([tmp_path])) == 1


def test_a_run_whose_lock_is_none_is_held_without_a_name(put, tmp_path):
    put(".lock")
    with RunLock(tmp_path) as lock:
        lock.keep()


def test_a_run_writes_neither_lock_nor_log_through_a_link(tmp_path):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("precious")
    run.mkdir()
    for name in (".lock", "out.log"):
        (run / name).symlink_to(mine)
    options = SimpleNamespace(local_rank=0, rank=0, log_local=False, debug=False)
    with RunLock(run) as lock, logging_to(options, run):
        lock.keep()
        logging.getLogger().info("a line")
    assert mine.read_text() == "precious"
    assert "a line" in (run / "out.log").read_text()


def test_a_run_whose_log_is_none_goes_on(put, tmp_path, caplog):
    put("out.log")
    options = SimpleNamespace(local_rank=0, rank=0, log_local=False, debug=False)
    with logging_to(options, tmp_path):
        logging.getLogger().info("a line")
    assert "out.log cannot be written: it is no regular file; the run goes on" in caplog.text
