"""The data sets that features are computed on."""

import pytest

from clip_pgs.evaluation import EvalSet


@pytest.fixture
def six(data_root):
    return EvalSet(
        "six", str(data_root / "six"), "zeroshot-classification", "zeroshot_classification"
    )


@pytest.fixture
def pairs(data_root):
    return EvalSet("pairs", str(data_root / "pairs"), "zeroshot-retrieval", "zeroshot_retrieval")
