"""What every command promises of bad input."""

from support.fuzzing import run_command


def refusal(main, argv, capsys):
    """Return the one sentence of a command that leaves with 2 and nothing behind."""
    code, error = run_command(main, [str(word) for word in argv], capsys)
    assert code == 2, error
    return error
