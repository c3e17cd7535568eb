"""CLIP training with patch masking: CLIP-PGS and its relatives, for OpenCLIP."""

from __future__ import annotations

import importlib
import io
import os
import sys

# Whoever checks types takes it as true. Python's own takes as long to import as all the rest here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from clip_pgs.masking import (
        MaskingStrategy,
        PatchInputs,
        PatchSelection,
        create_masking,
        list_maskings,
        pgs_scores,
        sinkhorn_plan,
        sobel_edges,
    )

__version__ = "0.1.0"

__all__ = [
    "MaskingStrategy",
    "PatchInputs",
    "PatchSelection",
    "__version__",
    "create_masking",
    "list_maskings",
    "pgs_scores",
    "sinkhorn_plan",
    "sobel_edges",
]


def _say_interrupted(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, traceback)


def _leave_working_directory() -> None:
    """Take the working directory off the path, where `python -m clip_pgs` puts it first.

    Its files would stand for modules of libraries; see `registry`, which imports those of a user.
    """
    try:
        here = os.getcwd()
    except OSError:
        return
    if sys.path[:1] in ([here], [""]) and not os.path.isdir(os.path.join(here, "clip_pgs")):
        del sys.path[0]


def _runs_as_module() -> bool:
    """Return whether this is `python -m clip_pgs...`, while Python looks for that module.

    Another package, run so, may import this one meanwhile, and stays as it is.
    """
    if sys.argv[:1] != ["-m"]:
        return False
    # "-mNAME" is one argument.
    name = next(iter(sys.orig_argv[-len(sys.argv) :]), "")
    name = name.partition("m")[2] if name.startswith("-") else name
    return name.partition(".")[0] == __name__


# A command imports this first, and what it needs before it can catch anything.
_AS_MODULE = _runs_as_module()
if _AS_MODULE or os.path.basename((sys.argv or [""])[0]) in ("clip-pgs", "download_cc12m.py"):
    sys.excepthook = _say_interrupted
    if _AS_MODULE:
        _leave_working_directory()
    # What the locale cannot show is escaped, as on stderr, and no error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def __getattr__(name: str) -> Any:
    # What needs torch, or open_clip on top, is imported when first asked for: a command that
    # refuses a wrong option has no seconds to lose.
    if name == "evaluation":
        return importlib.import_module("clip_pgs.evaluation")
    if name in __all__:
        return getattr(importlib.import_module("clip_pgs.masking"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
