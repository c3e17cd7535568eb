"""`scripts/download_cc12m.py` as a process, against a small Hub of our own on the loopback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_cc12m.py"
REPO = "/datasets/pixparse/cc12m-wds"


class Hub(ThreadingHTTPServer):
    """Serves files the way the Hub does, and remembers which were asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.served = dict(files)
        self.fetched: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        if self.path.startswith(f"/api{REPO}/tree/main"):
            listing = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": "0" * 40,
                    "lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 130},
                }
                for name, content in self.server.files.items()
            ]
            self._answer(json.dumps(listing).encode(), {"Content-Type": "application/json"})
        else:
            self._serve_file()

    def do_HEAD(self) -> None:
        self._serve_file()

    def _serve_file(self) -> None:
        name = self.path.removeprefix(f"{REPO}/resolve/main/").partition("?")[0]
        content = self.server.served.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.command == "GET":
            self.server.fetched.append(name)
        headers = {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": "1" * 40}
        self._answer(content, headers)

    def _answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_shard(num_pairs: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(num_pairs):
            for suffix in ("jpg", "txt", "json"):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = 10
                tar.addfile(member, io.BytesIO(b"0123456789"))
    return buffer.getvalue()


@pytest.fixture
def hub():
    files = {f"cc12m-train-{number:04d}.tar": make_shard(number + 1) for number in range(4)}
    files["README.md"] = b"not a shard"
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def download(hub: Hub, *arguments: str | Path, **environment: str):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_a_dry_run_says_what_it_would_fetch_and_fetches_nothing(hub, tmp_path):
    done = download(hub, tmp_path / "cc12m", "--dry-run")
    total = sum(len(content) for name, content in hub.files.items() if name.endswith(".tar"))
    assert done.returncode == 0, done.stderr
    assert f"would fetch 4 shards, {total / 1e9:.2f} GB" in done.stdout
    assert not (tmp_path / "cc12m").exists()
    assert hub.fetched == []


def test_it_fetches_every_shard_and_counts_the_pairs(hub, tmp_path):
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert shard_files(tmp_path) == {
        name: content for name, content in hub.files.items() if name.endswith(".tar")
    }
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes == {f"cc12m-train-{number:04d}.tar": number + 1 for number in range(4)}
    assert "10 pairs" in done.stdout.splitlines()[-1]


def test_it_continues_with_what_is_missing_or_has_the_wrong_size(hub, tmp_path):
    first, second, third = (f"cc12m-train-{number:04d}.tar" for number in range(3))
    assert download(hub, tmp_path, "--shards", "0-2").returncode == 0
    (tmp_path / first).write_bytes(hub.files[first][:-1])
    (tmp_path / third).unlink()
    hub.fetched.clear()
    done = download(hub, tmp_path, "--shards", "0-2")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.fetched) == [first, third]
    assert shard_files(tmp_path) == {name: hub.files[name] for name in (first, second, third)}


def test_verify_finds_a_shard_of_the_right_size_with_other_content(hub, tmp_path):
    name = "cc12m-train-0001.tar"
    assert download(hub, tmp_path, "--shards", "0,1").returncode == 0
    (tmp_path / name).write_bytes(bytes(len(hub.files[name])))
    assert "fetch 0 shards" in download(hub, tmp_path, "--shards", "0,1", "--dry-run").stdout
    done = download(hub, tmp_path, "--shards", "0,1", "--verify")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_a_shard_that_arrives_damaged_is_removed(hub, tmp_path):
    name = "cc12m-train-0000.tar"
    hub.served[name] = bytes(len(hub.files[name]))
    done = download(hub, tmp_path, "--shards", "0")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {name} arrived damaged and was removed; the same command continues\n"
    )
    assert shard_files(tmp_path) == {}


def test_a_shard_that_cannot_be_fetched_ends_it_with_one_sentence(hub, tmp_path):
    del hub.served["cc12m-train-0002.tar"]
    done = download(hub, tmp_path, "--workers", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cc12m-train-0002.tar could not be fetched: ")
    assert done.stderr.count("\n") == 1


def test_without_a_network_it_says_so_in_one_sentence(hub, tmp_path):
    done = download(hub, tmp_path / "cc12m", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {hub.endpoint} did not list pixparse/cc12m-wds: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "cc12m").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shards", "a-b"], "error: --shards must look like 0-9 or 0-9,20, got 'a-b'\n"),
        (["--shards", "7-9"], "error: pixparse/cc12m-wds has no shard 7-9\n"),
        (["--workers", "0"], "error: --workers must be at least 1, got 0\n"),
    ],
)
def test_bad_input_ends_with_code_2_and_creates_nothing(hub, tmp_path, arguments, sentence):
    done = download(hub, tmp_path / "cc12m", *arguments)
    assert (done.returncode, done.stderr) == (2, sentence)
    assert not (tmp_path / "cc12m").exists()
