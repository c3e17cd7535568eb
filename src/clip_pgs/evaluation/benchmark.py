"""The packages that evaluation needs, and what clip_benchmark 1.6.2 does not declare of them."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version

_MODULES = ("clip_benchmark.datasets.builder", "webdataset", "requests", "sklearn")


def check_installation() -> None:
    """Check that clip_benchmark can run here.

    Raises:
        ValueError: If a package is missing, or numpy is too new for clip_benchmark.
    """
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"evaluation needs the package {error.name}; install clip-pgs with its extra 'eval'"
            ) from error
    numpy_version = version("numpy")
    if tuple(int(part) for part in numpy_version.split(".")[:2]) >= (2, 4):
        raise ValueError(
            f"clip_benchmark cannot compute accuracies with numpy {numpy_version}; "
            "install 'numpy<2.4'"
        )


def default_workers() -> int:
    """Return how many processes read images by default."""
    return min(4, os.cpu_count() or 1)
