"""`scripts/download_cc12m.py` against a small Hub of our own on the loopback."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from clip_pgs.files import folder_lock

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_cc12m.py"
REPO = "/datasets/pixparse/cc12m-wds"


class Hub(ThreadingHTTPServer):
    """Serves files the way the Hub does, and remembers which were asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.served = dict(files)
        self.fetched: list[str] = []
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        self.listing: list[object] | bytes | None = None
        self.empty_pages = 0
        self.next_link: str | None = None
        self.endless_pause: float | None = None
        self.is_moved = False
        self.num_whole = 0
        self.seconds_a_byte = 0.0
        self.status = 200

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of those who leave before the end."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.tokens.append(self.headers["Authorization"])
        if self.path.startswith(f"/api{REPO}/tree/main"):
            page = int(self.path.partition("?page=")[2] or 0)
            if page < self.server.empty_pages:
                link = f'<{self.server.endpoint}/api{REPO}/tree/main?page={page + 1}>; rel="next"'
                self._answer(b"[]", {"Content-Type": "application/json", "Link": link})
                return
            listing = self.server.listing
            if listing is None:
                listing = [entry(name, data) for name, data in self.server.files.items()]
            if not isinstance(listing, bytes):
                listing = json.dumps(listing).encode()
            headers = {"Content-Type": "application/json"}
            if self.server.next_link is not None:
                headers["Link"] = f'<{self.server.next_link}>; rel="next"'
            self._answer(listing, headers)
        else:
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
        is_redirect = self.server.is_moved and "?moved" not in self.path
        if self.server.endless_pause is not None or is_redirect:
            self.close_connection = True
            self.send_response(302 if is_redirect else 200)
            self.send_header("Location", f"{self.path}?moved")
            self.end_headers()
            # Until the other side has enough, and no test fills a disk.
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(bytes(2**16))
                    time.sleep(self.server.endless_pause or 0)
                else:
                    self.server.num_whole += 1
            return
        self._answer(content, headers)

    def _answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(self.server.status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET" and not self.server.seconds_a_byte:
            self.wfile.write(content)
        elif self.command == "GET":
            # Until the other side has enough.
            with contextlib.suppress(OSError):
                for number in range(len(content)):
                    self.wfile.write(content[number : number + 1])
                    time.sleep(self.server.seconds_a_byte)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def entry(name: str, content: bytes, **other: object) -> dict[str, object]:
    """Return what the Hub's list says of a file."""
    lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": "0" * 40,
        "lfs": lfs,
        **other,
    }


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
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("download_cc12m", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def download(script, hub, monkeypatch, capsys):
    """Run the command, and return its exit code and what it printed."""
    monkeypatch.setattr(script, "HfApi", partial(HfApi, endpoint=hub.endpoint))
    monkeypatch.setattr(script, "RETRY_SECONDS", 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def run(*arguments):
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code
        output = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=output.out, stderr=output.err)

    return run


def assert_refused(done, *, code: int = 2) -> None:
    """Assert that bad input ended it in one sentence."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr[:-1].isprintable()


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_a_dry_run_says_what_it_would_fetch_and_fetches_nothing(hub, download, tmp_path):
    done = download(tmp_path / "cc12m", "--dry-run")
    total = sum(len(content) for name, content in hub.files.items() if name.endswith(".tar"))
    assert done.returncode == 0, done.stderr
    assert f"would fetch 4 shards, {total / 1e9:.2f} GB" in done.stdout
    assert not (tmp_path / "cc12m").exists()
    assert hub.fetched == []


def test_it_fetches_every_shard_and_counts_the_pairs(hub, download, tmp_path):
    done = download(tmp_path)
    assert done.returncode == 0, done.stderr
    assert shard_files(tmp_path) == {
        name: content for name, content in hub.files.items() if name.endswith(".tar")
    }
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes == {f"cc12m-train-{number:04d}.tar": number + 1 for number in range(4)}
    assert "10 pairs" in done.stdout.splitlines()[-1]


def test_it_continues_with_what_is_missing_or_has_the_wrong_size(hub, download, tmp_path):
    first, second, third = (f"cc12m-train-{number:04d}.tar" for number in range(3))
    assert download(tmp_path, "--shards", "0-2").returncode == 0
    (tmp_path / first).write_bytes(hub.files[first][:-1])
    (tmp_path / third).unlink()
    hub.fetched.clear()
    done = download(tmp_path, "--shards", "0-2")
    assert done.returncode == 0, done.stderr
    assert sorted(hub.fetched) == [first, third]
    assert shard_files(tmp_path) == {name: hub.files[name] for name in (first, second, third)}


def test_verify_finds_a_shard_of_the_right_size_with_other_content(hub, download, tmp_path):
    name = "cc12m-train-0001.tar"
    assert download(tmp_path, "--shards", "0,1").returncode == 0
    (tmp_path / name).write_bytes(bytes(len(hub.files[name])))
    assert "fetch 0 shards" in download(tmp_path, "--shards", "0,1", "--dry-run").stdout
    done = download(tmp_path, "--shards", "0,1", "--verify")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_a_shard_that_arrives_damaged_is_removed(hub, download, tmp_path):
    name = "cc12m-train-0000.tar"
    hub.served[name] = bytes(len(hub.files[name]))
    done = download(tmp_path, "--shards", "0")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {name} arrived damaged and was removed; the same command continues\n"
    )
    assert shard_files(tmp_path) == {}


def test_a_shard_that_cannot_be_fetched_ends_it_with_one_sentence(hub, download, tmp_path):
    del hub.served["cc12m-train-0002.tar"]
    done = download(tmp_path, "--workers", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cc12m-train-0002.tar could not be fetched: ")
    assert done.stderr.count("\n") == 1


def test_a_shard_that_has_no_end_is_given_up_at_its_listed_size(hub, download, tmp_path):
    hub.endless_pause = 0.0
    done = download(tmp_path, "--shards", "0")
    assert_refused(done, code=1)
    assert "cc12m-train-0000.tar arrived damaged and was removed" in done.stderr
    assert hub.fetched == ["cc12m-train-0000.tar"]
    assert [path.name for path in tmp_path.rglob("*")] == []


def test_a_redirect_that_has_no_end_is_followed_and_not_read(hub, download, tmp_path):
    hub.is_moved = True
    done = download(tmp_path, "--shards", "0-1")
    assert done.returncode == 0, done.stderr
    assert len(shard_files(tmp_path)) == 2
    assert hub.num_whole == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_a_signal_leaves_no_partial_shard(hub, tmp_path, number, code):
    hub.endless_pause = 0.05
    hub.listing = [entry("cc12m-train-0000.tar", b"", size=2**26)]
    # What a shell starts in the background ignores Ctrl-C, and hands that on.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path],
            env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(number, before)
    with process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".*.tar.*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.count("\n")) == (code, 1), stderr
    assert [path.name for path in tmp_path.rglob("*")] == []


def test_it_asks_the_hub_for_nothing_but_the_list_and_the_shards(
    hub, download, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    agents = str(tmp_path / "agents.json")
    monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", agents, raising=False)
    assert download(tmp_path / "cc12m").returncode == 0
    shards = [f"{REPO}/resolve/main/cc12m-train-{number:04d}.tar" for number in range(4)]
    assert sorted(hub.asked) == [f"/api{REPO}/tree/main", *shards]


def test_a_token_goes_to_the_hub_and_not_where_its_list_leads(hub, download, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.next_link = f"{hub.endpoint.replace('127.0.0.1', 'localhost')}/api{REPO}/tree/main?page=1"
    assert_refused(download(tmp_path / "cc12m"))
    assert hub.tokens == ["Bearer hf_mine", None]


def test_a_list_that_leads_back_to_itself_is_left_at_once(hub, download, tmp_path):
    hub.next_link = f"{hub.endpoint}/api{REPO}/tree/main"
    done = download(tmp_path / "cc12m")
    assert_refused(done)
    assert "in a circle" in done.stderr
    assert len(hub.asked) == 1


def test_shards_that_the_disk_has_no_room_for_are_refused(hub, download, tmp_path):
    hub.listing = [entry("a-train-0001.tar", b"", size=10**30)]
    done = download(tmp_path / "cc12m")
    assert_refused(done)
    assert "GB free" in done.stderr
    assert (hub.fetched, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.slow
def test_without_a_network_it_says_so_in_one_sentence(hub, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "cc12m"],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_refused(done, code=1)
    assert hub.endpoint in done.stderr
    assert not (tmp_path / "cc12m").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--shards", "a-b"),
        ("--shards", "7-9"),
        ("--shards", "5-3"),
        ("--shards", ""),
        ("--shards", ","),
        ("--shards", "4-99999999999"),
        ("--shards", "9" * 5000),
        ("--workers", "0"),
        ("--workers", "1000000"),
        ("--workers", "many"),
    ],
)
def test_bad_input_ends_with_code_2_and_creates_nothing(download, tmp_path, flag, value):
    done = download(tmp_path / "cc12m", flag, value)
    assert_refused(done)
    assert flag in done.stderr or f"has no shard {value}" in done.stderr
    assert not (tmp_path / "cc12m").exists()


def test_a_long_range_takes_the_shards_that_there_are(hub, download, tmp_path):
    done = download(tmp_path, "--shards", "2-99999999999")
    assert done.returncode == 0, done.stderr
    assert list(shard_files(tmp_path)) == ["cc12m-train-0002.tar", "cc12m-train-0003.tar"]


def test_a_file_in_the_place_of_the_folder_is_refused(hub, download, tmp_path):
    (tmp_path / "cc12m").write_text("mine")
    assert_refused(download(tmp_path / "cc12m"))
    assert (tmp_path / "cc12m").read_text() == "mine"
    assert hub.fetched == []


@pytest.mark.parametrize(
    "name",
    [
        "../x-train-0001.tar",
        "sub/../../x-train-0001.tar",
        "{outside}/x-train-0001.tar",
        "..\\x-train-0001.tar",
        "C:\\x-train-0001.tar",
        "x\x1b[2J-train-0001.tar",
        "x-train-0001.tar\n",
        ".-train-0001.tar",
        "-train-0001.tar",
        "x-train-٣.tar",
    ],
)
def test_a_listed_name_that_leads_elsewhere_touches_nothing(hub, download, tmp_path, name):
    outside = tmp_path / "x-train-0001.tar"
    outside.write_text("mine")
    hub.listing = [entry(name.format(outside=tmp_path), make_shard(1))]
    hub.listing += [entry(known, data) for known, data in hub.files.items()]
    assert_refused(download(tmp_path / "cc12m"))
    assert outside.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [outside.name]
    assert hub.fetched == []


@pytest.mark.parametrize(
    "listing",
    [
        [entry("a-train-0001.tar", b"", size=None)],
        [entry("a-train-0001.tar", b"", size=-1)],
        [entry("a-train-0001.tar", b"", size="12")],
        [{"type": "directory", "path": "a-train-0001.tar", "oid": "0" * 40}],
        [entry("a-train-0001.tar", b"x"), entry("A-train-0001.tar", b"x")],
        [entry(f"{number}.txt", b"") for number in range(30)],
        [entry(f"{'n' * 300}-train-0001.tar", b"x")],
    ],
)
def test_an_odd_list_of_files_is_refused(script, hub, download, tmp_path, monkeypatch, listing):
    monkeypatch.setattr(script, "MAX_LISTED", 20)
    hub.listing = listing
    assert_refused(download(tmp_path / "cc12m"))
    assert not (tmp_path / "cc12m").exists()


@pytest.mark.parametrize("pages", [3, 50])
def test_a_list_of_several_pages_is_read_to_its_end_or_to_a_bound(
    script, hub, download, tmp_path, monkeypatch, pages
):
    monkeypatch.setattr(script, "MAX_PAGES", 4)
    hub.empty_pages = pages
    done = download(tmp_path / "cc12m", "--dry-run")
    if pages == 3:
        assert (done.returncode, done.stderr) == (0, "")
        assert "4 shards" in done.stdout
    else:
        assert_refused(done)
        assert not (tmp_path / "cc12m").exists()


def test_a_list_that_comes_byte_by_byte_or_is_too_long_is_given_up(
    script, hub, download, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "MAX_ANSWER_BYTES", 1000)
    hub.listing = b" " * 2000 + b"[]"
    done = download(tmp_path / "cc12m")
    assert_refused(done)
    assert "lists its files in more than 1,000 bytes" in done.stderr
    monkeypatch.setattr(script, "LIST_SECONDS", 0.3)
    hub.listing, hub.seconds_a_byte = b" " * 100 + b"[]", 0.1
    done = download(tmp_path / "cc12m")
    assert_refused(done, code=1)
    assert "its answer took more than 0.3 seconds" in done.stderr


def test_a_hub_that_fails_is_told_at_once(hub, download, tmp_path):
    hub.status, hub.listing = 500, b"<html>out of order</html>"
    done = download(tmp_path / "cc12m")
    assert_refused(done, code=1)
    assert "500" in done.stderr


@pytest.mark.parametrize(
    "listing",
    [
        *(b"<html>sign in</html>", b"{}", b"[1]", b"1", b'[{"type": "file"}]', b"[" * 100_000),
        b'[{"type": "file", "path": "a-train-0001.tar", "size": ' + b"9" * 5000 + b"}]",
    ],
)
def test_what_is_no_list_of_files_is_told_in_one_sentence(hub, download, tmp_path, listing):
    hub.listing = listing
    done = download(tmp_path / "cc12m")
    assert done.returncode in (1, 2)
    assert_refused(done, code=done.returncode)
    assert "pixparse/cc12m-wds" in done.stderr
    assert not (tmp_path / "cc12m").exists()


@pytest.mark.parametrize(("num_pairs", "arguments"), [(30, []), (1, ["--verify"])])
def test_a_shard_that_is_fetched_anew_is_counted_anew(
    hub, download, tmp_path, num_pairs, arguments
):
    name = "cc12m-train-0001.tar"
    assert download(tmp_path).returncode == 0
    # Archives end in blocks of zeros: with one pair fewer it has the length of the old one.
    hub.files[name] = hub.served[name] = make_shard(num_pairs).ljust(len(hub.files[name]), b"\0")
    done = download(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "sizes.json").read_text())[name] == num_pairs


def test_a_count_goes_before_its_shard_is_replaced(hub, download, tmp_path):
    name = "cc12m-train-0001.tar"
    assert download(tmp_path).returncode == 0
    hub.files[name] = make_shard(30)
    del hub.served[name]
    assert download(tmp_path).returncode == 1
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sorted(sizes) == [f"cc12m-train-{number:04d}.tar" for number in (0, 2, 3)]


@pytest.mark.parametrize(
    "content", [b"", b"<html>sign in</html>", b"version https://git-lfs", bytes(10240)]
)
def test_a_shard_without_pairs_is_named_and_the_others_are_counted(
    hub, download, tmp_path, content
):
    name = "cc12m-train-0002.tar"
    hub.files[name] = hub.served[name] = content
    for _ in range(2):
        done = download(tmp_path)
        assert_refused(done, code=1)
        assert name in done.stderr
        assert len(json.loads((tmp_path / "sizes.json").read_text())) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"3",
        b"{",
        b"\xff",
        b'{"cc12m-train-0001.tar": "many"}',
        b'{"cc12m-train-0001.tar": -1}',
        b'{"cc12m-train-0001.tar": 1.5}',
        b'{"cc12m-train-0001.tar": null}',
        b'{"cc12m-train-0001.tar": 1e400}',
        b'{"cc12m-train-0001.tar": 1' + b"0" * 50 + b"}",
        b'{"cc12m-train-0001.tar": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_an_odd_sizes_file_is_named_before_anything_is_fetched(hub, download, tmp_path, content):
    (tmp_path / "sizes.json").write_bytes(content)
    done = download(tmp_path)
    assert_refused(done)
    assert "sizes.json" in done.stderr
    assert (tmp_path / "sizes.json").read_bytes() == content
    assert hub.fetched == []


def test_a_second_process_does_not_fetch_into_the_same_folder(hub, download, tmp_path):
    with folder_lock(tmp_path, on_busy=lambda: None):
        done = download(tmp_path)
    assert_refused(done, code=2)
    assert "another process fetches shards into this folder" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert download(tmp_path).returncode == 0
