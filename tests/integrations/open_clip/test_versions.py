"""Only an open_clip whose inner parts we know is worked with."""

import os
import subprocess
import sys

import pytest

from clip_pgs.integrations import check_versions


def test_the_installed_open_clip_is_one_we_know():
    check_versions()


@pytest.mark.parametrize("version", ["3.2.0", "4.0.0", "4.0.0.dev0"])
def test_another_open_clip_is_refused(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ValueError, match=rf"open_clip_torch>=3\.3,<4, found {version}"):
        check_versions()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model", "ViT-B-16", "--dataset-type", "synthetic"],
        ["test", "no-such-run"],
        ["inspect", "cost", "--model", "ViT-B-16"],
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_open_clip_4_in_one_sentence_before_they_import_it(tmp_path, command):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip/__init__.py").write_text('raise RuntimeError("imported")')
    info = tmp_path / "open_clip_torch-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: open_clip_torch\nVersion: 4.0.0\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "clip_pgs.cli", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == "error: clip-pgs needs open_clip_torch>=3.3,<4, found 4.0.0\n"
    assert (done.returncode, done.stdout) == (2, "")
