"""A study of two arms and two seeds on a few pictures, run once."""

import pytest

from support.studies import write_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study that was not run, in its folder."""
    monkeypatch.chdir(tmp_path)
    return write_study(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A study that was stopped half way by SIGTERM, went on and was finished; do not change it."""
    files = write_study(tmp_path_factory.mktemp("finished"))
    first = files.start()
    line = ""
    while "[1/4]" not in line:
        line = first.stdout.readline()
        assert line, first.stderr.read()
    first.terminate()
    first.communicate(timeout=300)
    trained = sorted(path.parent.name for path in files.study.glob("*/seed_*/export"))
    return files, (first.returncode, trained), files.run("--jobs", 2)
