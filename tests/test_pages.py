"""README, docs/ and notebooks: code runs, commands parse, and links and names lead somewhere.

A comment `<!-- needs: NAME ... -->` above a block names modules without which it is skipped, and
folders of the demo that it reads.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_pgs.cli import COMMANDS
from clip_pgs.cli import main as cli_main
from clip_pgs.data.world.writing import write_world
from clip_pgs.integrations.open_clip import last_selection
from clip_pgs.study.plan import check_study, read_study
from clip_pgs.training.options import check_values, read_options
from support.hf_models import hf_model
from support.models import image_batch, small_clip, text_batch
from support.runs import run

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"(?:<!-- needs: ([^\n]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language):
    """Return page, needs and text of every fenced block in a language."""
    return [
        pytest.param(
            needs.split(),
            text,
            id=f"{page.stem}-{number}",
            marks=[pytest.mark.slow] if needs or "torch.compile" in text else [],
        )
        for page in PAGES
        for number, (needs, found, text) in enumerate(BLOCK.findall(page.read_text()))
        if found == language
    ]


# ------------------------------------------------------------------------------------------------
# Python
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Return the names that the pages take for granted, in a folder that has what they name."""
    import open_clip
    import transformers

    from clip_pgs.evaluation.suites import SUITES

    monkeypatch.setattr(SUITES, "_entries", dict(SUITES._entries))
    monkeypatch.setattr(open_clip, "create_model", lambda *_args, **_options: small_clip())
    hugging_face = classmethod(lambda model_class, _name: hf_model(model_class.__name__))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", hugging_face)
    compile_model = torch.compile
    # Inductor takes minutes, and the pages say nothing of it.
    monkeypatch.setattr(torch, "compile", lambda model: compile_model(model, backend="eager"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "train2017").mkdir()
    (tmp_path / "coco" / "train2017" / "7.jpg").write_bytes(b"a picture")
    notes = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": text} for text in ("a dog", "a cat")],
    }
    path = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps(notes))
    for color in ("red", "blue"):
        (tmp_path / "photos" / color).mkdir(parents=True)
        Image.new("RGB", (8, 8), color).save(tmp_path / "photos" / color / "1.JPG")
    (tmp_path / "photos" / "captions.csv").write_text("filepath,title\nred/1.JPG,it is red\n")
    return {
        "__name__": "page",
        "model": small_clip().train(),
        "step": 30,
        "total_steps": 120,
        "epochs": 1,
        "loader": torch.utils.data.DataLoader(
            list(zip(image_batch(8), text_batch(8), strict=True)), batch_size=4
        ),
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return a folder with what the demo leaves behind, of a smaller world and run."""
    folder = tmp_path_factory.mktemp("demo")
    write_world(folder / "data" / "demo", num_train=32, num_val=8, num_per_class=1)
    train_data = str(folder / "data" / "demo" / "train" / "00000.tar")
    run(folder, name="demo", train_data=train_data, epochs=1, warmup=1)
    return folder


@pytest.mark.parametrize(("needs", "text"), blocks("python"))
def test_every_python_block_runs(reader, request, needs, text):
    for need in needs:
        if "/" in need:
            Path(need).parent.mkdir()
            Path(need).symlink_to(request.getfixturevalue("demo") / need)
        elif importlib.util.find_spec(need) is None:
            pytest.skip(f"{need} is not installed")
    exec(text, reader)


def snippet(marker):
    """Return the first Python block of the pages that holds a text."""
    return next(block.values[1] for block in blocks("python") if marker in block.values[1])


def test_three_lines_mask_a_strangers_model(reader):
    text = snippet("apply_masking(model")
    assert len([line for line in text.splitlines() if line.strip()]) == 3
    exec(text, reader)
    model = reader["model"]
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 8)
    assert model.visual.masking.progress == 0.25


def test_the_core_snippet_gives_what_its_comment_says(reader):
    exec(snippet("import clip_pgs\n"), reader)
    selection = reader["selection"]
    assert selection.index.shape == selection.valid.shape == (8, 138)


def test_accumulated_parts_give_the_gradient_of_the_big_batch(reader, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda _self: None)
    torch.manual_seed(0)
    exec(snippet("features.append("), reader)
    accumulated = {name: each.grad for name, each in reader["model"].named_parameters()}
    from clip_pgs.integrations.open_clip import apply_masking, set_masking_noise

    whole = apply_masking(small_clip(), "pgs", mask_ratio=0.5).train()
    set_masking_noise(whole, torch.cat(reader["noise"]))
    reader["loss_of"](*whole(image_batch(8), text_batch(8))).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(accumulated[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_shards_of_coco_hold_each_picture_with_its_captions(reader):
    exec(snippet("captions_train2017"), reader)
    with tarfile.open("coco/00000.tar") as shard:
        assert shard.getnames() == ["7.jpg", "7.0.txt", "7.1.txt"]
        assert shard.extractfile("7.1.txt").read() == b"a cat"


def test_sets_of_ones_own_photographs_are_whole_and_hold_their_labels(reader, capsys):
    exec(snippet("def write_set"), reader)
    assert cli_main(["test", "sets", "--datasets", "my_sets.txt", "--data-root", "eval"]) == 0
    said = capsys.readouterr().out
    assert "zeroshot-classification  1 of 1 present" in said
    assert "zeroshot-retrieval  1 of 1 present" in said
    with tarfile.open("eval/things/test/0.tar") as shard:
        assert shard.getnames()[2:] == ["000001.jpg", "000001.cls"]
        assert shard.extractfile("000001.cls").read() == b"1"


def test_a_picture_with_several_rows_of_captions_is_one_sample_with_a_line_for_each(reader):
    with open("photos/captions.csv", "a") as table:
        table.write('blue/1.JPG,it is blue\nred/1.JPG,"red,\nnot blue"\n,\n./red/1.JPG,red\n')
    exec(snippet("def write_set"), reader)
    with tarfile.open("eval/captions/test/0.tar") as shard:
        names = ["000000.jpg", "000000.txt", "000001.jpg", "000001.txt"]
        assert shard.getnames() == names
        texts = [shard.extractfile(name).read().decode() for name in names[1::2]]
    assert texts == ["it is red\nred, not blue\nred", "it is blue"]


@pytest.mark.parametrize(("needs", "text"), blocks("yaml"))
def test_every_study_passes_its_checks(tmp_path, demo, monkeypatch, needs, text):
    monkeypatch.chdir(demo)
    (tmp_path / "train").symlink_to(ROOT / "configs" / "train")
    path = tmp_path / "study" / "page.yaml"
    path.parent.mkdir()
    path.write_text(text)
    study = read_study(path, root=tmp_path / "logs")
    assert check_study(study, are_data_needed=False).keys() == study.arms.keys()


# ------------------------------------------------------------------------------------------------
# Notebooks
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec("".join(cell["source"]), names)
            shown = "".join(line for each in cell["outputs"] for line in each.get("text", ()))
            (text, numbers), (shown_text, shown_numbers) = map(
                split_numbers, (said.getvalue(), shown)
            )
            assert text == shown_text
            assert numbers == pytest.approx(shown_numbers, rel=0.1, abs=0.1)


def split_numbers(text):
    """Return a text with each number replaced, and the numbers."""
    number = r"\d+(?:\.\d+)?"
    return re.sub(number, "N", text), [float(found) for found in re.findall(number, text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_small_and_shows_what_its_cells_gave(path):
    assert path.stat().st_size < 150_000
    cells = json.loads(path.read_text())["cells"]
    shown = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert all(shown)
    assert all(output["output_type"] != "error" for outputs in shown for output in outputs)


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------


class Parsed(Exception):  # noqa: N818 - a signal, not an error
    """A command line was parsed to its end."""


def commands():
    """Return the command lines of all bash blocks that start something of ours."""
    lines = []
    for block in blocks("bash"):
        for line in block.values[1].replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != ";"]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            ours = words[:1] == ["clip-pgs"] or words[:2] in (
                ["bash", "clip-train.sh"],
                ["bash", "clip-test.sh"],
            )
            script = words[:1] == ["python"] and re.match(r"scripts/|-m", words[1])
            is_usage = any(re.match(r"\$|\[", word) for word in words)
            if (ours or script) and not is_usage:
                lines.append(words)
    return [list(words) for words in dict.fromkeys(map(tuple, lines))]


def start(words):
    """Start a command line as its command does."""
    match words:
        case ["bash", "clip-train.sh", *rest]:
            return start(["clip-pgs", *(["train", *rest] if rest else ["demo"])])
        case ["bash", "clip-test.sh", *rest]:
            return start(["clip-pgs", "test", *rest])
        case ["clip-pgs", "train" | "mae", *rest] | ["python", "-m", "clip_pgs.training", *rest]:
            if rest and not rest[0].startswith("-"):
                rest = ["--config", *rest]
            if "--nproc" in rest:
                assert int(rest.pop(rest.index("--nproc") + 1)) > 0
                rest.remove("--nproc")
            check_values(read_options(rest))
            raise Parsed
        case ["clip-pgs", "test", *rest]:
            return start(["python", "-m", "clip_pgs.evaluation", *rest])
        case ["clip-pgs", command, *rest]:
            module, _, name = COMMANDS[command][0].partition(":")
            return getattr(importlib.import_module(module), name)(rest)
        case ["python", "-m", module, *rest] if module.startswith("clip_pgs"):
            if importlib.util.find_spec(f"{module}.__main__") is not None:
                module += ".__main__"
            return importlib.import_module(module).main(rest)
        case ["python", script, *rest] if script.startswith("scripts/"):
            sys.argv[:] = [script, *rest]
            return runpy.run_path(str(ROOT / script), run_name="__main__")
    raise Parsed


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **options):
        parse_args(self, *args, **options)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        start(words)


# ------------------------------------------------------------------------------------------------
# Links and names
# ------------------------------------------------------------------------------------------------


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page):
    roots = ROOT, ROOT / "src" / "clip_pgs"
    text = page.read_text()
    named = re.findall(r"`([a-z_]+/[A-Za-z0-9_/.]+\.(?:py|sh|yaml|txt))`", text)
    named += re.findall(r"\bconfigs/[\w/]+\.yaml", text)
    named = [name for name in named if "NAME" not in name]
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_every_file_of_the_tree_is_there():
    tree = PAGES[1].read_text().split("## Where things are")[1].split("```")[1]
    sources = {path.name for path in (ROOT / "src" / "clip_pgs").rglob("*")}
    named = re.findall(r"\w+\.py|\w+(?=/)", tree.split("src/clip_pgs/")[1].split("\ntests/")[0])
    assert len(named) > 10
    assert set(named) <= sources


def test_the_readme_is_short():
    assert len(README.read_text().split()) < 1200
