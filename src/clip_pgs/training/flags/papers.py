"""Which paper each image masking comes from, and unmasked tuning: the words of `--help`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

IMAGE_MASKING_PAPERS = {
    "none": "CLIP, arXiv 2103.00020",
    "random": "FLIP, arXiv 2212.00794",
    "gaussian": "GLIP, arXiv 2403.15837",
    "grid": "CLIPA, arXiv 2305.07017",
    "block": "CLIPA, arXiv 2305.07017",
    "cluster": "E-CLIP, arXiv 2405.08815",
    "attentive": "A-CLIP, arXiv 2212.08653",
    "pgs": "CLIP-PGS, arXiv 2503.17080",
    "pgs-released": "CLIP-PGS as its authors' released code computes it, arXiv 2503.17080",
}

UNMASKED_TUNING_PAPERS = "FLIP, arXiv 2212.00794; GLIP, arXiv 2403.15837; CLIPF, arXiv 2412.16148"


def describe(names: Iterable[str], meanings: Mapping[str, str]) -> str:
    """Return names with what the table says of them; a name of one's own stands alone."""
    return "; ".join(f"{name}: {meanings[name]}" if name in meanings else name for name in names)
