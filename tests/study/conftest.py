"""A study of two arms on a few pictures, run once."""

import contextlib
import io

import pytest

from clip_pgs.study.__main__ import main
from support.studies import write_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study that was not run, in its folder."""
    monkeypatch.chdir(tmp_path)
    return write_study(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A study of seed 1, stopped after a run by SIGTERM and then finished; do not change it."""
    files = write_study(tmp_path_factory.mktemp("finished"))
    files.change(seeds=[1])
    first = files.start()
    line = ""
    while "[1/2]" not in line:
        line = first.stdout.readline()
        assert line, first.stderr.read()
    first.terminate()
    first.communicate(timeout=300)
    trained = sorted(path.parent.name for path in files.study.glob("*/seed_*/export"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        code = main(files.argv())
    return files, (first.returncode, trained), (code, out.getvalue())
