"""Everything here leans on details of OpenCLIP that it does not promise to keep."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import open_clip.factory
import open_clip.tokenizer
from open_clip.tokenizer import get_reduction_mask_fn, syntax_mask_tokenize
from torch import Tensor, nn

from clip_pgs.checkpoint_reading import check_kinds
from clip_pgs.common import explained
from clip_pgs.integrations.open_clip.model_config import MISFITS


@contextlib.contextmanager
def weights_read_by(
    read: Callable[[str], dict[str, Tensor]], explain: Callable[[nn.Module, str, Exception], str]
) -> Iterator[None]:
    """Let open_clip read the weights of its models with a function of ours.

    What it then does to them, such as resizing position embeddings, stays its own.

    Args:
        read: From a file's path to its state dict.
        explain: From a model, the path and what loading raised to one sentence.

    Raises:
        ValueError: If the weights do not fit, as `explain` says it, or are no floats where the
            model has floats.
    """
    factory = open_clip.factory
    load, read_theirs = factory.load_checkpoint, factory.load_state_dict

    def load_or_explain(model: nn.Module, path: str, **options: Any) -> Any:
        def read_fitting(path: str, **_: Any) -> dict[str, Tensor]:
            weights = read(str(path))
            # torch would copy them into floats in silence.
            with explained(f"{path} does not fit"):
                check_kinds(weights, model)
            return weights

        factory.load_state_dict = read_fitting
        try:
            return load(model, path, **options)
        # Assertions, too: open_clip's of a position embedding's width.
        except MISFITS as error:
            raise ValueError(explain(model, str(path), error)) from error

    factory.load_checkpoint = load_or_explain
    factory.load_state_dict = lambda path, **_: read(str(path))
    try:
        yield
    finally:
        factory.load_checkpoint, factory.load_state_dict = load, read_theirs


@contextlib.contextmanager
def no_foreign_code() -> Iterator[None]:
    """Keep transformers from running, or asking to run, the code of a tokenizer or model.

    open_clip opens both by names out of configs and checkpoints, and hands `trust_remote_code` on.

    Raises:
        ValueError: In place of running code.
    """
    try:
        from transformers import dynamic_module_utils as dynamic
    except ImportError:
        yield
        return

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("the tokenizer or text tower that it names holds code, which is never run")

    # It asks as long as there is time for an answer; then it raises; what it trusts, it imports.
    changed = {
        "TIME_OUT_REMOTE_CODE": 0,
        "_raise_timeout_error": refuse,
        "get_class_in_module": refuse,
    }
    kept = {name: getattr(dynamic, name) for name in changed if hasattr(dynamic, name)}
    for name in kept:
        setattr(dynamic, name, changed[name])
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(dynamic, name, value)


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Keep open_clip from warning of a model whose weights are meant to be random."""

    def is_else(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(is_else)
    try:
        yield
    finally:
        root.removeFilter(is_else)


def text_reduction(name: str) -> Callable[..., Tensor]:
    """Return OpenCLIP's function that tokenizes captions and shortens them to a budget.

    Args:
        name: OpenCLIP's: "simple", "random", "shuffle" or "syntax".
    """
    return _reduce_by_syntax if name == "syntax" else get_reduction_mask_fn(name)


def _reduce_by_syntax(texts: list[str], **options: Any) -> Tensor:
    # The first call in a process would try to download nltk's data.
    open_clip.tokenizer._nltk_init = True
    return syntax_mask_tokenize(texts, **options)
