"""What a result depends on, as one digest: an equal one need not be computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_pgs.evaluation.datasets.datasets import EvalSet, read_metadata
from clip_pgs.evaluation.datasets.presence import local_files
from clip_pgs.evaluation.features.fingerprints import (
    content_digest,
    files_fingerprint,
    model_fingerprint,
    transform_description,
)
from clip_pgs.evaluation.models.models import LoadedModel

# Raise it when a suite's rules change, or what a result tells, so that older ones are redone.
_RULES = 2
_REMOTE_FILES = ("classnames.txt", "zeroshot_classification_templates.txt")


class Identity:
    """Digests of what the results of one model depend on.

    They cover weights, architecture, transform, tokenizer, precision, task and data, and neither
    names nor paths. Of a data set on a server they cover the address and the small files.

    Args:
        loaded: The model.
        amp: Whether it runs in half precision.
    """

    def __init__(self, loaded: LoadedModel, *, amp: bool) -> None:
        transform = transform_description(loaded.transform)
        self._model = [
            _RULES,
            model_fingerprint(loaded.model),
            transform,
            _tokenizer_description(loaded.tokenizer),
            amp,
        ]
        self._is_known = transform is not None

    def of(self, eval_set: EvalSet) -> str:
        """Return the digest of a data set's result, or "" if the transform cannot be described.

        Args:
            eval_set: A data set that passes `presence.require`.

        Raises:
            OSError: If a file cannot be read.
        """
        if not self._is_known:
            return ""
        parts = [*self._model, eval_set.task, eval_set.splits, _describe_data(eval_set)]
        return content_digest(parts)


def _describe_data(eval_set: EvalSet) -> list[str | None]:
    location = eval_set.location
    if "://" not in location:
        return [files_fingerprint(Path(location), local_files(eval_set))]
    names = (*_REMOTE_FILES, *(f"{split}/nshards.txt" for split in eval_set.splits))
    return [location, *(read_metadata(location, name) for name in names)]


def _tokenizer_description(tokenizer: Callable[..., Any]) -> str:
    name = getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)
    attributes = {
        key: value
        for key, value in sorted(getattr(tokenizer, "__dict__", {}).items())
        if isinstance(value, (bool, int, str))
    }
    return f"{name} {attributes}"
