"""What every fuzz shares: how many examples, and what counts as a refusal."""

import os
import signal
from pathlib import Path

from hypothesis import HealthCheck, settings

import clip_pgs
from clip_pgs.common import one_sentence

EXAMPLES = int(os.environ.get("BAD_INPUT_EXAMPLES", "0"))
OWN_CODE = str(Path(clip_pgs.__file__).parent)
SECONDS = 20


def fuzz(num_examples):
    """Return the settings of a fuzz: few and fixed examples, or BAD_INPUT_EXAMPLES new ones."""
    return settings(
        max_examples=EXAMPLES or num_examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def snapshot():
    """Return every file and folder below the working directory with its time and size."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size if path.is_file() else 0)
        for path in Path().rglob("*")
    }


class Watch:
    """Fails where a block takes long or, as it should not, leaves something behind."""

    forbids_files = True

    def __enter__(self):
        # There, other tests write at the same time.
        assert not Path("pyproject.toml").exists(), "the test needs a folder of its own"
        self._before = snapshot()
        signal.signal(signal.SIGALRM, _too_slow)
        signal.alarm(SECONDS)
        return self

    def __exit__(self, *_):
        signal.alarm(0)
        assert not self.forbids_files or snapshot() == self._before


def _too_slow(*_):
    raise AssertionError(f"no answer in {SECONDS} s")


def accepts(check, argv):
    """Return whether a check raises nothing; what it raises must be a sentence of our own."""
    try:
        with Watch():
            check(argv)
    except ValueError as error:
        assert_own_sentence(error)
        return False
    return True


def assert_own_sentence(error):
    """Refuse an error without words, or one that another library raised."""
    message = one_sentence(error)
    assert " " in message, repr(error)
    assert message.isprintable()
    assert len(message) < 2000
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    assert frame.tb_frame.f_code.co_filename.startswith(OWN_CODE), repr(error)


def run_command(main, argv, capsys):
    """Run a command; bad input must be one sentence, exit code 2, and nothing left behind.

    Returns:
        Its exit code, and its standard error.
    """
    capsys.readouterr()
    before = snapshot()
    with Watch() as watch:
        try:
            code = main(argv)
        except SystemExit as left:
            code = left.code
        watch.forbids_files = code == 2
    error = capsys.readouterr().err
    assert code in (0, 1, 2), (code, error)
    if code == 2:
        assert error.startswith("error: "), error
        assert (error.count("\n"), error[-1]) == (1, "\n"), error
        assert len(error) < 2000
    for path in sorted(snapshot().keys() - before.keys(), reverse=True):
        Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()
    return code, error
