"""scripts/gpu_figures.sh, tried on the CPU with a tiny model."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest
import torch
from PIL import Image

from clip_pgs.data.shards import write_shard
from support.scripts import ROOT, run


@pytest.fixture
def goods(tmp_path):
    """A folder with pictures for the study."""
    file = io.BytesIO()
    Image.new("RGB", (24, 32), "navy").save(file, "jpeg")
    for part in ("train", "test"):
        (tmp_path / "goods" / part).mkdir(parents=True)
        pairs = [
            (f"{n}", {"jpg": file.getvalue(), "txt": f"{n} shirts".encode()}) for n in range(9)
        ]
        write_shard(tmp_path / "goods" / part / "0.tar", pairs)
    return tmp_path / "goods"


@pytest.mark.slow
def test_one_command_fills_every_table(tmp_path, goods):
    out = tmp_path / "out"
    done = run(ROOT / "scripts/gpu_figures.sh", out, "--tiny", "--data", goods, cwd=tmp_path)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    records = {path.stem: json.loads(path.read_text()) for path in out.glob("[abcd]*.json")}
    assert sorted(records) == ["a", "b-compiled", "b-eager", "c", "d"]
    tables = (out / "tables.md").read_text()
    assert "not measured" not in tables
    for record in records.values():
        assert record["done"]
        assert record["facts"]["driver"] == "none"
        assert all(f"### {part}\n\n|" in tables for part in record["parts"])
    checks = [row for rows in records["a"]["parts"].values() for row in rows]
    assert {row["holds"] for row in checks} == {"yes", "needs a GPU"}
    assert len(records["d"]["parts"]) == 3


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module; its stages are to be replaced."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_figures

    yield gpu_figures
    for name in ("gpu_figures", "gpu_checks"):
        sys.modules.pop(name)


def stage_of(**parts):
    return (60.0, lambda sizes: iter(parts.items()))


@pytest.mark.slow
def test_a_stage_goes_on_with_the_parts_it_lacks(script, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    sizes = script.Sizes(tmp_path, tmp_path, device="cpu")
    monkeypatch.setitem(script.STAGES, "c", stage_of(one=lambda: [{"n": 1}], two=fail))
    script.run_stage("c", sizes)
    record = script.read_record(tmp_path / "c.json")
    assert not record["done"]
    assert record["failed"] == {"two": "out of memory"}
    monkeypatch.setitem(script.STAGES, "c", stage_of(one=fail, two=lambda: [{"n": 2}]))
    script.run_stage("c", sizes)
    record = script.read_record(tmp_path / "c.json")
    assert record["done"]
    assert record["parts"] == {"one": [{"n": 1}], "two": [{"n": 2}]}


def test_figures_of_another_machine_are_not_mixed(script, tmp_path, monkeypatch):
    monkeypatch.setitem(script.STAGES, "c", stage_of(one=lambda: [{"n": 1}]))
    script.run_stage("c", script.Sizes(tmp_path, tmp_path, device="cpu"))
    with pytest.raises(ValueError, match="fp32"):
        script.run_stage("c", script.Sizes(tmp_path, tmp_path, device="cpu", precision="fp32"))


@pytest.mark.parametrize("fact", ["device", "torch", "model", "code", "data"])
def test_done_figures_of_something_else_are_refused(script, tmp_path, monkeypatch, capsys, fact):
    monkeypatch.setattr(script, "STAGES", {"c": stage_of(one=lambda: [{"n": 1}])})
    options = [str(tmp_path), "--tiny", "--data", str(tmp_path / "none")]
    assert script.main(options) == 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert script.main(options) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == record
    record["facts"][fact] = "another"
    (tmp_path / "c.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert script.main(options) == 2
    printed = capsys.readouterr()
    assert f"c.json was measured with {fact} another" in printed.err
    assert "done" not in printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_is_one_sentence(script, tmp_path, capsys):
    assert script.main([str(tmp_path / "out")]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_data_that_grew_and_code_that_changed_are_facts(script, tmp_path, goods, monkeypatch):
    before = script.describe_data(goods)
    assert before.startswith("2 shards of ")
    (goods / "test" / "0.tar").rename(goods / "test" / "1.tar")
    assert script.describe_data(goods) == before
    (goods / "test" / "1.tar").unlink()
    assert script.describe_data(goods) != before
    digest = script.code_digest()
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(script, "__file__", str(tmp_path / "scripts" / "gpu_figures.py"))
    assert script.code_digest() != digest


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"facts": 1, "parts": {}, "failed": {}}'])
def test_damaged_figures_are_one_sentence(script, tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    assert script.main([str(tmp_path), "--tiny", "--stages", "c"]) == 2
    error = capsys.readouterr().err
    assert "a.json" in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "a.json").read_text() == text
    assert not (tmp_path / "tables.md").exists()


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_ended_and_keeps_what_it_has(script, tmp_path, monkeypatch):
    slow = stage_of(quick=lambda: [{"n": 1}], endless=lambda: time.sleep(600))
    monkeypatch.setitem(script.STAGES, "c", slow)
    script.run_in_child("c", script.Sizes(tmp_path, tmp_path, device="cpu"), 3.0)
    record = script.read_record(tmp_path / "c.json")
    assert list(record["parts"]) == ["quick"]
    assert "done" not in record
