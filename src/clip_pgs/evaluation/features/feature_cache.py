"""Features of one model, kept by the content that they come from."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_pgs.common import one_sentence
from clip_pgs.evaluation.features.fingerprints import (
    content_digest,
    model_fingerprint,
    transform_description,
)
from clip_pgs.evaluation.models.models import LoadedModel

logger = logging.getLogger(__name__)

_PACKAGES = ("open_clip_torch", "torch", "torchvision", "pillow")


@dataclass(frozen=True)
class Entry:
    """What is kept under a key.

    Attributes:
        tensors: Features and labels, by name, on the CPU.
        texts: Lists of texts that belong to them, by name.
    """

    tensors: dict[str, Tensor]
    texts: dict[str, list[list[str]]] = field(default_factory=dict)


class FeatureCache:
    """Features of one model, in memory and, where a folder is given, in files.

    A key is a digest of the weights, the architecture, the transform, the data, the precision,
    the device type and the versions of the packages at work: a path takes no part in it, so that
    another checkpoint under an old name finds nothing.

    Args:
        loaded: The model. Make another cache once its weights have changed.
        folder: Where the files go; None keeps features in memory alone.
    """

    def __init__(self, loaded: LoadedModel, *, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._model = model_fingerprint(loaded.model)
        self._transform = transform_description(loaded.transform)
        self._entries: dict[str, Entry] = {}

    def key(self, kind: str, data: str, *, device: torch.device, amp: bool) -> str:
        """Return the key of some features.

        Args:
            kind: Such as "images".
            data: A digest of what is encoded, or a name that tells it apart within this cache.
            device: Where the model is.
            amp: Whether it runs in half precision.
        """
        parts = [kind, data, self._model, self._transform, device.type, amp]
        parts += [version(package) for package in _PACKAGES]
        return content_digest(parts)

    def get(self, key: str) -> Entry | None:
        """Return what is kept under a key, or None; a damaged file counts as none."""
        if key not in self._entries and self.folder is not None:
            path = self._path(key)
            if path.is_file():
                try:
                    self._entries[key] = _read(path, key)
                # Whatever is in the file, they can be computed again.
                except Exception as error:
                    logger.warning(
                        "ignored the damaged features in %s: %s", path, one_sentence(error)
                    )
        return self._entries.get(key)

    def put(self, key: str, entry: Entry, *, is_known: bool = True) -> None:
        """Keep features under a key.

        Args:
            key: From `key`.
            entry: What to keep.
            is_known: Whether the key stands for the content of the data; features of others stay
                in memory, as do those of a transform that cannot be described.
        """
        self._entries[key] = entry
        if self.folder is not None and is_known and self._transform is not None:
            try:
                self._write(self._path(key), key, entry)
            except (OSError, SafetensorError) as error:
                logger.warning(
                    "the features cannot be kept in %s: %s", self.folder, one_sentence(error)
                )

    def forget(self) -> None:
        """Let go of the image features in memory; files and class features stay."""
        self._entries = {
            key: entry for key, entry in self._entries.items() if "images" not in entry.tensors
        }

    def _write(self, path: Path, key: str, entry: Entry) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same features at this moment.
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        notes = {"key": key, "texts": json.dumps(entry.texts)}
        tensors = {name: tensor.contiguous() for name, tensor in entry.tensors.items()}
        try:
            save_file(tensors, unfinished, metadata=notes)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def _read(path: Path, key: str) -> Entry:
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        if notes.get("key") != key:
            raise ValueError("it was written for other features")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    entry = Entry(tensors, json.loads(notes["texts"]))
    rows = [*tensors.values(), *entry.texts.values()]
    if tensors["images"].ndim != 2 or any(len(row) != len(tensors["images"]) for row in rows):
        raise ValueError("its rows are not those of images")
    return entry
