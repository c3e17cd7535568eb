"""Files of a stranger run no code and write nowhere but into the run's folder."""

import copy
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clip_pgs.data.__main__ import main as data
from clip_pgs.evaluation.__main__ import main as evaluation
from clip_pgs.evaluation.datasets import clean_name
from clip_pgs.inspection.__main__ import main as inspection
from clip_pgs.training.__main__ import main as training
from support.fuzzing import run_command, snapshot
from support.options import MODEL_CONFIG
from support.runs import COCA, flags, write_model

SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "1000", "--device", "cpu"]
VALID = ["--model", "ViT-B-32", *SYNTHETIC]


def refusal(main, argv, capsys):
    """Return the one sentence of a command that leaves with 2 and nothing behind."""
    code, error = run_command(main, argv, capsys)
    assert code == 2, error
    return error


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("lr: !!python/object/apply:os.system ['touch pwned']", "the tag 'tag:yaml.org,2002:pyth"),
        ("lr: !!python/name:os.system", "the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("name: &a run\nlogs: *a", "aliases are not taken"),
        ("lr: " + "[" * 5000, "run.yaml is not a plain YAML file"),
        ("name: 2001-99-99", "month must be in 1..12"),
        ("base: /dev/zero", "cannot read the config /dev/zero: it is no regular file"),
        ("base: large.yaml", "the config large.yaml is larger than 1048576 bytes"),
        ('base: "\\0"', "'base' takes the name of a config"),
        ('logs: "a\\0b"', "takes a text without null bytes"),
        ('name: "\\ud800"', "takes a text without null bytes and lone surrogates"),
        ("aug-cfg: {--resume: evil.pt}", "'aug-cfg': takes a mapping of names to values"),
        ("name: ../../x", "of at most 255 bytes, got '../../x'"),
        ("name: ..", "of at most 255 bytes, got '..'"),
        ("name: /x", "of at most 255 bytes, got '/x'"),
        ("resume: evil.pt", "which is no tensor or plain type; nothing in it was run"),
        ("resume: evil.pth", "it is damaged or no checkpoint"),
        ("pretrained: evil.pt", "which is no tensor or plain type; nothing in it was run"),
        ("train-data: 'pipe:touch pwned'", "runs no command from a config"),
        ("val-data: 'a.tar::PIPE:touch pwned'", "runs no command from a config"),
        ("train-data: '{pi,to}pe:touch pwned'", "runs no command from a config"),
        ("train-data: '\\pipe:touch pwned'", "runs no command from a config"),
    ],
)
def test_a_hostile_config_is_refused(capsys, line, part):
    Path("large.yaml").write_text("#" * (2**20 + 1))
    Path("run.yaml").write_text(f"model: ViT-B-32\n{line}\n")
    assert part in refusal(training, ["--config", "run.yaml", *SYNTHETIC], capsys)


def write_config(path, **changes):
    """Write a small model config with a tower changed, and return the path."""
    config = {**MODEL_CONFIG}
    for tower, options in changes.items():
        config[tower] = {**config[tower], **options}
    path.write_text(json.dumps(config))
    return str(path)


HOSTILE_MODELS = [
    ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs takes clean"),
    ("vision_cfg", {"timm_model_name": "hf-hub:a/b"}, "timm has no model 'hf-hub:a/b'"),
    ("vision_cfg", {"layers": 10**9}, "layers takes a whole number from 1 to 1000"),
    ("vision_cfg", {"width": 2**20}, "more than the"),
    ("vision_cfg", {"head_width": 0}, "head_width takes a whole number from 1"),
    ("vision_cfg", {"head_width": 5}, "open_clip cannot build"),
    ("vision_cfg", {"pool_type": "max"}, "open_clip cannot build"),
    ("vision_cfg", {"patch_size": 64}, "image_size [32, 32] is smaller than patch_size [64, 64]"),
    ("vision_cfg", {"depth": 3}, "has no option 'depth'"),
    ("text_cfg", {"vocab_size": 100}, "less than the 49408 tokens of OpenCLIP's tokenizer"),
]


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
def test_a_coca_whose_towers_give_no_tokens_is_told_the_switch(capsys, tower):
    config = copy.deepcopy(COCA)
    del config[tower]["output_tokens"]
    path = write_model(Path(), config=config)
    part = f"{tower}.output_tokens must be true with multimodal_cfg"
    assert part in refusal(training, ["--model-config", str(path), *SYNTHETIC], capsys)


def test_towers_that_give_tokens_without_a_decoder_are_told_the_switch(capsys):
    path = write_config(Path("clip.json"), vision_cfg={"output_tokens": True})
    part = "vision_cfg.output_tokens must be true with multimodal_cfg, and only with it"
    assert part in refusal(training, ["--model-config", path, *SYNTHETIC], capsys)


def test_a_decoder_that_is_shorter_than_its_captions_is_told_both_lengths(capsys):
    config = {**COCA, "multimodal_cfg": {**COCA["multimodal_cfg"], "context_length": 5}}
    path = write_model(Path(), config=config)
    # OpenCLIP's decoder predicts each token from those before it.
    part = f"that of text_cfg less one, {COCA['text_cfg']['context_length'] - 1}, got 5"
    assert part in refusal(training, ["--model-config", str(path), *SYNTHETIC], capsys)


def test_a_name_that_changes_the_tokenizer_is_refused_in_training_and_evaluation(capsys):
    path = write_config(Path("my_siglip.json"))
    for main, argv in (
        (training, ["--model-config", path, *SYNTHETIC]),
        (evaluation, ["weights.pt", "--model-config", path, "--data-root", "."]),
    ):
        assert "rename it for OpenCLIP's own tokenizer" in refusal(main, argv, capsys)


def test_a_timm_tower_of_another_size_is_refused_where_it_is_masked(capsys):
    config = {
        **json.loads(Path(write_config(Path("plain.json"))).read_text()),
        "vision_cfg": {
            "timm_model_name": "test_vit2",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
    }
    argv = ["--model-config", str(write_model(Path(), config=config)), *SYNTHETIC]
    part = "is made for images of 160 x 160, and its image_size is 64 x 64"
    assert part in refusal(training, [*argv, "--masking", "pgs"], capsys)


@pytest.mark.parametrize(("tower", "options", "part"), HOSTILE_MODELS)
def test_a_hostile_model_config_is_refused(capsys, tower, options, part):
    path = write_config(Path("hostile.json"), **{tower: options})
    assert part in refusal(training, ["--model-config", path, *SYNTHETIC], capsys)


def test_a_model_config_of_no_models_size_is_refused(capsys):
    path = write_config(Path("large.json"))
    Path(path).write_text(Path(path).read_text() + " " * 2**20)
    part = "is larger than 1048576 bytes"
    assert part in refusal(training, ["--model-config", path, *SYNTHETIC], capsys)


def test_a_tokenizer_that_brings_code_is_not_made(capsys):
    folder = Path("with_code")
    folder.mkdir()
    (folder / "tokenizer.py").write_text("open('pwned', 'w')\nclass T: pass\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenizer.T", None]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    text = {
        "hf_tokenizer_name": str(folder.absolute()),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    write_config(folder / "open_clip_config.json", text_cfg=text)
    (folder / "open_clip_model.safetensors").touch()
    own = write_config(Path("own.json"), text_cfg=text)
    short = [*SYNTHETIC, "--text-tokens", "8"]
    for main, argv in [
        (training, ["--model-config", own, *short]),
        (training, ["--model", f"local-dir:{folder}", *short]),
        (evaluation, [str(folder), "--data-root", "."]),
        (evaluation, ["weights.pt", "--model-config", own, "--data-root", "."]),
    ]:
        sentence = refusal(main, argv, capsys)
        assert "tokenizer_kwargs" in sentence or "model_cfg" in sentence
        assert not Path("pwned").exists()


def test_a_checkpoint_that_brings_code_is_not_scored(capsys):
    argv = ["evil.pt", "--model", "ViT-B-32", "--data-root", "."]
    assert "nothing in it was run" in refusal(evaluation, argv, capsys)


def test_names_of_data_sets_and_models_are_no_paths():
    for name in ("../../x", "/etc/x", "wds/../x"):
        assert "/" not in clean_name(name)


def write_hostile_shard(path, *, num_samples):
    """Write pairs under names that lead elsewhere, and links beside them."""
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 0, 0)).save(picture, "png")
            place = ["../", "/", "a/../../", "C:\\", "./"][number % 5]
            for suffix, content in [("png", picture.getvalue()), ("txt", b"a cat")]:
                member = tarfile.TarInfo(f"{place}escape{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for kind, suffix in [(tarfile.SYMTYPE, "txt"), (tarfile.LNKTYPE, "png")]:
            link = tarfile.TarInfo(f"link.{suffix}")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)


def test_members_that_lead_elsewhere_are_read_and_never_written(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write_hostile_shard(folder / "hostile.tar", num_samples=16)
    assert data(["check", str(folder / "hostile.tar")]) == 0
    assert "--train-num-samples 16" in capsys.readouterr().out
    options = {"train_data": folder / "hostile.tar", "epochs": 1, "report_to": "tensorboard"}
    assert training(flags(folder, **options)) == 0
    written = {path.relative_to(tmp_path).parts[:4] for path in tmp_path.rglob("*")}
    places = {parts for parts in written if parts[:3] != ("a", "b", "logs")}
    assert places == {("a",), ("a", "b"), ("a", "b", "hostile.tar"), ("a", "b", "tiny.json")}
    assert {parts[3] for parts in written if len(parts) == 4} == {"run"}


def test_no_name_in_a_shard_reaches_the_terminal_as_a_control_sequence(tmp_path, capsys):
    with tarfile.open(tmp_path / "\x1b[2J.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("\x1b[31mred\x07.txt"))
    assert data(["check", str(tmp_path / "*.tar")]) == 1
    said = capsys.readouterr()
    assert "\\x1b[31mred\\x07" in said.out
    assert not {"\x1b", "\x07"} & {*said.out, *said.err}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("training", [*VALID, "--name", b"../\xff\n", "--lr", "1"]),
        ("training", ["--config", "binary"]),
        ("evaluation", [b"\xff\n"]),
    ],
)
def test_a_process_says_one_sentence_and_leaves_with_2(module, arguments):
    before = snapshot()
    done = subprocess.run(
        [sys.executable, "-m", f"clip_pgs.{module}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert snapshot() == before


def test_sizes_beyond_any_image_are_refused(capsys):
    flags = ["masks", "photo.png", "-o", "out.png", "--image-size"]
    assert "image_size must be in [1, 16384]" in refusal(inspection, [*flags, "16000000"], capsys)
