"""What the checks of options say to a command line."""

import pytest

from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import parse_options

PGS = ("--masking", "pgs")


def refusal(*argv):
    """Return the one line by which a command line is refused."""
    args = parse_options(argv)
    with pytest.raises(ValueError, match=r".") as caught:
        check_options(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def accept(*argv):
    """Return the options of a command line that is accepted."""
    args = parse_options(argv)
    check_options(args)
    return args


def warnings_of(*argv):
    """Return what is said of a command line that is accepted."""
    return option_warnings(accept(*argv))
