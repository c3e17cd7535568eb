"""Which papers unmasked tuning comes from, and the words of `--help`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

UNMASKED_TUNING_PAPERS = "FLIP, arXiv 2212.00794; GLIP, arXiv 2403.15837; CLIPF, arXiv 2412.16148"


def describe(names: Iterable[str], meanings: Mapping[str, str]) -> str:
    """Return names with what the table says of them; a name of one's own stands alone."""
    return "; ".join(f"{name}: {meanings[name]}" if name in meanings else name for name in names)
