"""Tiny training runs: a model of our own, data written on the spot, options from flags."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from clip_pgs.training.checks import check_options
from clip_pgs.training.options import parse_options
from clip_pgs.training.trainer import train

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "head_width": 16,
        "layers": 2,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
COCA = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {
        **MODEL["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**MODEL["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {
        # The least that OpenCLIP can train: the decoder never sees the last token.
        "context_length": 11,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
COLOURS = ("red", "green", "blue", "yellow")
_RGB = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 50, 220),
    "yellow": (230, 220, 40),
}


def write_model(folder, *, name="tiny", config=MODEL):
    """Write a model config and return its path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def pairs(num_samples, *, seed=0):
    """Yield (image, caption): a coloured square on noise, and its colour."""
    generator = np.random.default_rng(seed)
    for number in range(num_samples):
        colour = COLOURS[number % len(COLOURS)]
        pixels = generator.integers(0, 90, (32, 32, 3), dtype=np.uint8)
        top, left = generator.integers(0, 16, 2)
        pixels[top : top + 16, left : left + 16] = _RGB[colour]
        yield Image.fromarray(pixels), f"a {colour} square, number {number}"


def write_shards(folder, *, num_shards=2, samples_per_shard=16, seed=0):
    """Write webdataset shards with `sizes.json` and return their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = list(pairs(num_shards * samples_per_shard, seed=seed))
    sizes = {}
    for shard in range(num_shards):
        name = f"{shard:05d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            for number in range(samples_per_shard):
                image, caption = everything[shard * samples_per_shard + number]
                encoded = io.BytesIO()
                image.save(encoded, "png")
                _add(tar, f"{number:05d}.png", encoded.getvalue())
                _add(tar, f"{number:05d}.txt", caption.encode())
        sizes[name] = samples_per_shard
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return f"{folder}/{{00000..{num_shards - 1:05d}}}.tar"


def _add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_csv(folder, *, num_samples=16):
    """Write images and a table of them and return the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["filepath\ttitle"]
    for number, (image, caption) in enumerate(pairs(num_samples)):
        image.save(folder / f"{number}.png")
        lines.append(f"{folder / f'{number}.png'}\t{caption}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def flags(folder, *, model=None, **options):
    """Return the command line of a tiny run; an option set to None is left out.

    Args:
        folder: Holds the model config and the logs.
        model: Path of a model config; the tiny one is written where there is none.
        **options: Changed flags, with underscores; True is a switch.
    """
    given = {
        "model_config": model or write_model(folder),
        "logs": folder / "logs",
        "name": "run",
        "batch_size": 8,
        "epochs": 2,
        "warmup": 2,
        "lr": 1e-3,
        "workers": 0,
        "log_every_n_steps": 1,
        "device": "cpu",
        **options,
    }
    argv = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name.replace('_', '-')}")
        if value is not True:
            argv += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return argv


def run(folder, *, evaluate=None, **options):
    """Train as the command line would and return the run's folder."""
    args = parse_options(flags(folder, **options))
    check_options(args)
    return train(args, evaluate=evaluate)


_HOLD = """
import sys, time
from pathlib import Path
from clip_pgs.training.stop import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold a run's folder."""
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
