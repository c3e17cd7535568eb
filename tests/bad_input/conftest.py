"""A folder to look for files in, and no way out of it: no network, little memory."""

import os
import pickle
import resource
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from support import runs
from support.options import write_model_config, write_shards

EXTRA_MEMORY = 8 * 2**30


class RunsCode:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with the files that the strategies name."""
    folder = tmp_path_factory.mktemp("bad_input")
    before = Path.cwd()
    os.chdir(folder)
    write_shards(folder / "folder")
    for name in ("train.tar", "train0.tar", "train1.tar", "empty"):
        Path(name).touch()
    Path("binary").write_bytes(bytes(range(256)))
    Path("pairs.csv").write_text("filepath\ttitle\n" + "a.png\ta cat\n" * 8)
    Path("words.json").write_text("{}")
    Path("list.txt").write_text("wds/shape\n")
    Path("run.yaml").write_text("model: ViT-B-32\n")
    Path("masks").mkdir()
    Image.new("RGB", (40, 30)).save("photo.png")
    Image.new("L", (40, 30), 1).save("masks/photo.png")
    Path("good.csv").write_text("filepath,title\nphoto.png,a cat\n")
    write_model_config(folder / "tiny.json")
    torch.save({"a": torch.zeros(1)}, "weights.pt")
    torch.save({"state_dict": RunsCode()}, "evil.pt")
    Path("evil.pth").write_bytes(pickle.dumps(RunsCode()))
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def _no_network_little_memory(monkeypatch):
    """A connection, or terabytes, are errors that no command turns into a sentence."""

    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status = Path("/proc/self/status").read_text()
    size_kb = int(status.partition("VmSize:")[2].split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_kb * 1024 + EXTRA_MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that went to its end, at `logs/run` in a folder that has its data, too."""
    folder = tmp_path_factory.mktemp("trained")
    runs.run(folder, epochs=1, train_data=runs.write_shards(folder / "data"))
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of it, in which the command is called."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
