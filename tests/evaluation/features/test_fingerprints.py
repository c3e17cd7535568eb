import json
import shutil

from clip_pgs.evaluation import load_model
from clip_pgs.evaluation.features.fingerprints import data_fingerprint, transform_description


def test_data_that_moved_are_the_same_data(six, tmp_path):
    shutil.copytree(six.location, tmp_path / "elsewhere")
    assert data_fingerprint(str(tmp_path / "elsewhere"), "test") == data_fingerprint(
        six.location, "test"
    )


def test_transform_of_open_clip_is_described_without_addresses(finished_run):
    first, again = load_model(finished_run).transform, load_model(finished_run).transform
    description = transform_description(first)
    assert description == transform_description(again)
    assert "Normalize" in description
    assert "0x" not in description


def test_large_files_are_told_apart_by_a_sample_of_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_pgs.evaluation.features.fingerprints._WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("clip_pgs.evaluation.features.fingerprints._BLOCK_BYTES", 16)
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        (folder / "test").mkdir(parents=True)
        (folder / "test/nshards.txt").write_text("1")
        (folder / "test/0.tar").write_bytes(bytes(4000) + bytes([number]))
        found.append(data_fingerprint(str(folder), "test"))
    assert found[0] != found[1]


def test_nothing_is_known_of_data_on_a_server():
    assert data_fingerprint("https://example.org/wds_six", "test") is None


def test_changed_captions_change_the_data(data_root, tmp_path):
    folder = tmp_path / "sugar_crepe"
    shutil.copytree(data_root / "sugar_crepe", folder)
    before = data_fingerprint(str(folder), "add_att")
    items = json.loads((folder / "add_att.json").read_text())
    items["0"]["caption"] = "it is 9"
    (folder / "add_att.json").write_text(json.dumps(items))
    assert data_fingerprint(str(folder), "add_att") != before
