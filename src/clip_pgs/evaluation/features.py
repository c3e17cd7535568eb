"""Image and text features of one model, computed once and shared by every suite.

What is kept goes by content. A key is a digest of the weights, the architecture, the transform, the
data, the precision, the device type, the number of the rules, the versions of the packages at work,
and the mask if images are encoded through one: a path takes no part in it, so that another
checkpoint under an old name finds nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_pgs import checkpoint_reading
from clip_pgs.common import one_sentence
from clip_pgs.evaluation.datasets import MAX_TEXT, EvalSet, count_shards, is_remote, list_shards
from clip_pgs.evaluation.masked_inference import Place
from clip_pgs.evaluation.models import LoadedModel, weights_digest
from clip_pgs.evaluation.samples import Reading, open_pictures, open_samples
from clip_pgs.files import file_state, regular_file
from clip_pgs.integrations.open_clip import num_patches, set_masking_noise
from clip_pgs.integrations.open_clip.flops import count_image_flops
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

# Raise it when a suite's rules change, how pictures are read, or what a result tells: results and
# features from before are then made anew.
RULES = 4
# Files above this size are sampled: reading all of ImageNet would take as long as encoding it.
WHOLE_FILE_BYTES = 256 * 2**20
_BLOCK_BYTES, _NUM_BLOCKS = 2**20, 64
# That are tokenized and encoded at once: more than ImageNet has, whose 80 templates make 80,000.
_MAX_PROMPTS = 2**17
# Of the pictures that tell transforms apart: one wide and one tall, to be made smaller and larger.
_PROBE_SIZES = ((500, 200), (30, 50))
# Tokenizers differ in capitals, spaces, signs, entities, foreign letters, and where a text ends.
_PROBE_TEXTS = (
    "A photo of  THREE Red-Billed Birds,\tflying (fast)!",
    "it isn't &amp; wasn't: 50% of 1,234.50 @ #7, a_b <b>c</b> ... \u201cquoted\u201d",
    "na\u00efve cafe\u0301 \ufb01ne Stra\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u65e5\u672c\u8a9e \u0645\u0631\u062d\u0628\u0627 \U0001f600 \uff21\uff22",
    string.printable,
    " ".join(f"zebra {number}" for number in range(150)),
    "number 7",
)
# How often each is asked for: what draws random numbers gives the same now and then.
_NUM_ASKED = 8
_PACKAGES = ("open_clip_torch", "torch", "torchvision", "pillow")


class NonFiniteFeaturesError(ValueError):
    """A model gave a NaN or an infinity; metrics would turn it into a plausible number."""


@dataclass(frozen=True)
class Features:
    """The images of one split, encoded.

    Attributes:
        images: What the image tower returns, not normalized. Shape (N, D), float32, on the CPU.
        labels: Class of each image, shape (N,), int64, or which classes it shows, shape (N, C);
            None for images with captions.
        captions: The captions of each image, or None.
        digests: Of each image with captions what tells it from others; None where none was kept.
    """

    images: Tensor
    labels: Tensor | None = None
    captions: list[list[str]] | None = None
    digests: list[str] | None = None


def _without_blank_captions(features: Features, name: str) -> Features:
    """Leave out captions that name nothing, and say so: clip_benchmark scores them."""
    if features.captions is None:
        return features
    captions = [list(filter(str.strip, texts)) for texts in features.captions]
    num_blank = sum(map(len, features.captions)) - sum(map(len, captions))
    if num_blank == 0:
        return features
    logger.warning(
        "%s leaves out %s, which clip_benchmark scores as any other",
        name,
        counted(num_blank, "blank caption"),
    )
    return replace(features, captions=captions)


class Encoder:
    """Encodes pictures and texts with one model, and keeps what it encoded.

    Args:
        loaded: The model; it is encoded with in eval mode, where it is, and left in its own mode.
            Make another encoder once its weights have changed.
        batch_size: Images per step, >= 1.
        workers: Processes that read images, >= 0.
        amp: Whether to use half precision.
        folder: Where image features are kept for later calls; None keeps them in memory alone.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_size: int = 64,
        workers: int = 0,
        amp: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.loaded = loaded
        self.device = next(loaded.model.parameters()).device
        self.reading = Reading(loaded.transform, batch_size, workers)
        self.amp = amp
        self.cache = FeatureCache(loaded, device=self.device, amp=amp, folder=folder)
        self._classes: dict[tuple[str, ...], Tensor] = {}

    def images(self, eval_set: EvalSet, *, split: str = "test") -> Features:
        """Encode the images of a split, or find them in the cache.

        Args:
            eval_set: The data set; its suite makes no difference.
            split: "test" or "train".

        Raises:
            FileNotFoundError: If the data set or the split is not there.
            DamagedDataError: If a file of it is not as it should be.
            NonFiniteFeaturesError: If a feature is not finite.
            ValueError: If the suite of the set does not declare that it reads the split.
        """
        if split not in eval_set.splits:
            # Whether its data are those of an earlier call would not be asked.
            raise ValueError(
                f"the suite {eval_set.suite} must declare the split {split!r}, which it reads, got "
                f"splits={eval_set.splits}"
            )
        location = eval_set.location
        num_shards = count_shards(location, split)
        data = data_fingerprint(location, split)
        key = self.cache.key("images", data or f"{location} {split}")

        def encode() -> Features:
            title = eval_set.name if split == "test" else f"{eval_set.name} ({split})"
            samples = open_samples(
                location, split, self.reading, num_shards=num_shards, title=title
            )
            targets: list[Any] = []
            digests: list[str] = []

            def pixels() -> Iterator[tuple[Tensor, Sequence[Place]]]:
                for pixels_BCHW, target, places in samples:
                    targets.append(target)
                    if not isinstance(target, Tensor):
                        digests.extend(map(_pixels_digest, pixels_BCHW))
                    yield pixels_BCHW, places

            images_ND = self._encode_images(pixels(), title)
            if isinstance(targets[0], Tensor):
                return Features(images_ND, labels=torch.cat(targets))
            captions = list(itertools.chain.from_iterable(targets))
            return Features(images_ND, captions=captions, digests=digests)

        features = self.cache.get_or_make(key, encode, is_known=data is not None)
        return _without_blank_captions(features, eval_set.name)

    def pictures(self, paths: Sequence[Path], folder: Path) -> Tensor:
        """Encode picture files, or find them in the cache.

        Args:
            paths: The files.
            folder: That they are in.

        Returns:
            Features, not normalized, shape (N, D), float32, on the CPU.

        Raises:
            DamagedDataError: If a file cannot be decoded.
            NonFiniteFeaturesError: If a feature is not finite.
        """
        key = self.cache.key("caption pairs", files_fingerprint(folder, paths))

        def encode() -> Features:
            names = iter(path.name for path in paths)
            batches = (
                (pixels_BCHW, [(name,) for name in itertools.islice(names, len(pixels_BCHW))])
                for pixels_BCHW in open_pictures(paths, self.reading, title=folder.name)
            )
            return Features(self._encode_images(batches, f"the images in {folder.name}"))

        return self.cache.get_or_make(key, encode).images

    def texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Encode texts; those that the tokenizer cannot tell apart get the very same feature.

        Args:
            texts: At least one.
            batch_size: Texts per step, >= 1.

        Returns:
            Features, not normalized, shape (num_texts, D), float32, on the CPU.

        Raises:
            NonFiniteFeaturesError: If a feature is not finite.
        """
        # In another row of a batch the same text comes out a rounding error different.
        tokens = self.loaded.tokenizer([text[:MAX_TEXT] for text in texts])
        tokens_UL, inverse = torch.unique(tokens, dim=0, return_inverse=True)
        with self._inference() as model:
            features = [
                model.encode_text(batch_BL.to(self.device)).float().cpu()
                for batch_BL in tokens_UL.split(batch_size)
            ]
        features_UD = torch.cat(features)
        self._check(features_UD, "texts")
        return features_UD[inverse]

    def classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Encode classes as clip_benchmark does: the mean of a class's normalized prompts.

        Args:
            names: Of the C classes; the same list is encoded once.
            templates: Prompts with a `{c}` for the name.

        Returns:
            Features of length 1, shape (C, D), float32, on the CPU.

        Raises:
            NonFiniteFeaturesError: If a feature is not finite.
        """
        key = (*names, "", *templates)
        if key not in self._classes:
            means, step = [], max(1, _MAX_PROMPTS // len(templates))
            for start in range(0, len(names), step):
                some = names[start : start + step]
                # Replaced, not formatted: a template reaches no format spec or attribute.
                prompts = [template.replace("{c}", name) for name in some for template in templates]
                prompts_PD = normalize(self.texts(prompts), dim=-1)
                means.append(prompts_PD.unflatten(0, (len(some), len(templates))).mean(dim=1))
            self._classes[key] = normalize(torch.cat(means), dim=-1)
        return self._classes[key]

    def flops_per_image(self) -> float | None:
        """Return the operations of encoding an image, mask included; see `count_image_flops`.

        A warning tells where they cannot be counted, as on a GPU without memory.
        """
        try:
            with self._inference(is_masked=True) as model:
                return count_image_flops(model)
        except RuntimeError as error:
            said = "the operations per image of %s cannot be counted: %s"
            logger.warning(said, self.loaded.name, one_sentence(error))
            return None

    def _encode_images(
        self, batches: Iterable[tuple[Tensor, Sequence[Place]]], title: str
    ) -> Tensor:
        masking, features = self.loaded.masking, []
        with self._inference(is_masked=True) as model:
            for pixels_BCHW, places in batches:
                if masking is not None:
                    noise_BN = masking.noise(places, num_patches=num_patches(model))
                    set_masking_noise(model, noise_BN.to(self.device))
                features.append(model.encode_image(pixels_BCHW.to(self.device)).float().cpu())
        features_ND = torch.cat(features)
        self._check(features_ND, title)
        return features_ND

    def _check(self, features_ND: Tensor, data: str) -> None:
        num_bad = int((~torch.isfinite(features_ND)).any(dim=1).sum())
        if num_bad:
            raise NonFiniteFeaturesError(
                f"the features of {self.loaded.name} on {data} are not finite: {num_bad} of "
                f"{len(features_ND)} hold a NaN or an infinity"
            )

    @contextlib.contextmanager
    def _inference(self, *, is_masked: bool = False) -> Iterator[Any]:
        model, masking = self.loaded.model, self.loaded.masking
        was_training = model.training
        model.eval()
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        try:
            with (
                masking.applied(model) if is_masked and masking else contextlib.nullcontext(),
                torch.no_grad(),
                torch.autocast(self.device.type, enabled=self.amp),
            ):
                yield model
        finally:
            model.train(was_training)


class FeatureCache:
    """Features of one model, in memory and, where a folder is given, in files.

    Args:
        loaded: The model.
        device: Where it is.
        amp: Whether it runs in half precision.
        folder: Where the files go; None keeps features in memory alone.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: torch.device,
        amp: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.transform = transform_description(loaded.transform)
        self.fingerprint = model_fingerprint(loaded.model)
        self._model = [RULES, self.fingerprint, self.transform, device.type, amp]
        self._model += [version(package) for package in _PACKAGES]
        if loaded.masking is not None:
            self._model.append(loaded.masking.description())
        self._kept: dict[str, Features] = {}

    def key(self, kind: str, data: str) -> str:
        """Return the key of some features.

        Args:
            kind: Such as "images".
            data: A digest of what is encoded, or a name that tells it apart within this cache.
        """
        return content_digest([kind, data, *self._model])

    def get_or_make(
        self, key: str, make: Callable[[], Features], *, is_known: bool = True
    ) -> Features:
        """Return what is kept under a key, else make it and keep it.

        Args:
            key: From `key`.
            make: Computes the features; a damaged file of them counts as none.
            is_known: Whether the key stands for the content of the data; features of others stay
                in memory, as do those of a transform that cannot be described.
        """
        if key in self._kept:
            return self._kept[key]
        path = None
        if self.folder is not None and is_known and self.transform is not None:
            path = self.folder / f"{key}.safetensors"
        features = None
        if path is not None and path.is_file():
            try:
                features = _read_features(path, key)
            # Whatever is in the file, they can be computed again.
            except Exception as error:
                logger.warning("ignored the damaged features in %s: %s", path, one_sentence(error))
        if features is None:
            features = make()
            try:
                if path is not None:
                    _write_features(path, key, features)
            except (OSError, SafetensorError) as error:
                logger.warning("features cannot be kept in %s: %s", self.folder, error)
        self._kept[key] = features
        return features

    def forget(self) -> None:
        """Let go of the features in memory; files stay."""
        self._kept.clear()


def _read_features(path: Path, key: str) -> Features:
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        if notes.get("key") != key:
            raise ValueError("it was written for other features")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    features = Features(tensors["images"], tensors.get("labels"), **json.loads(notes["texts"]))
    rows = [column for column in vars(features).values() if column is not None]
    if features.images.ndim != 2 or any(len(column) != len(features.images) for column in rows):
        raise ValueError("its rows are not those of images")
    return features


def _write_features(path: Path, key: str, features: Features) -> None:
    kept = {"captions": features.captions, "digests": features.digests}
    texts = {name: texts for name, texts in kept.items() if texts is not None}
    tensors = {"images": features.images.contiguous()}
    if features.labels is not None:
        tensors["labels"] = features.labels.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may write the same features at this moment.
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        unfinished.unlink(missing_ok=True)
        save_file(tensors, unfinished, metadata={"key": key, "texts": json.dumps(texts)})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def content_digest(content: Any) -> str:
    """Return the SHA-256 of lists, dicts and plain values, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of all that makes a model's features.

    Two models with the same weights may still differ, in an activation, in the pooling or in an
    attention mask: so the classes of the modules, their plain attributes, and the buffers that no
    checkpoint holds count too.

    Args:
        model: The model to be scored.

    Returns:
        64 hexadecimal digits.
    """
    saved = model.state_dict()
    unsaved = {name: value for name, value in model.named_buffers() if name not in saved}
    lines = [weights_digest(model), checkpoint_reading.weights_digest(unsaved)]
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {plain}")
    return _digest_of(lines)


def transform_description(transform: Callable[[Any], Any]) -> str | None:
    """Describe an image transform by its printed form, and by what it makes of two pictures.

    Args:
        transform: Such as torchvision's `Compose`.

    Returns:
        A text that is equal for equal transforms of any process, or None if nothing tells one from
        another: it draws random numbers, cannot take the pictures, or is printed as a lambda is.
    """
    text = re.sub(r"<function ([\w.]+) at 0x[0-9a-fA-F]+>", r"\1", repr(transform))
    if "at 0x" in text or "<lambda>" in text:
        return None
    # Of all values, and of edges.
    probes = [
        Image.frombytes("RGB", size, bytes(n * n // 7 % 256 for n in range(3 * math.prod(size))))
        for size in _PROBE_SIZES
    ]
    try:
        # Printed forms leave out what they please: a function's code, the color of a border.
        made = _settled(lambda: [_pixels_digest(transform(probe.copy())) for probe in probes])
    # Whatever it raises, images will show it in a sentence.
    except Exception:
        return None
    return None if made is None else f"{text} {made}"


def tokenizer_description(tokenizer: Callable[..., Any]) -> str | None:
    """Describe a tokenizer by its plain attributes, and by the tokens that it makes of some texts.

    Args:
        tokenizer: As `LoadedModel` has it.

    Returns:
        A text that is equal for equal tokenizers of any process, or None if nothing tells one from
        another: it draws random numbers, or can take none of the texts.
    """

    def tokens_of(text: str) -> Any:
        try:
            return tokenizer([text]).tolist()
        # One of one's own may take texts of its kind alone.
        except Exception:
            return None

    name = getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)
    attributes = {
        key: value
        for key, value in sorted(getattr(tokenizer, "__dict__", {}).items())
        if isinstance(value, (bool, int, str))
    }
    # A vocabulary and what cleans texts are no plain attributes.
    made = _settled(lambda: [tokens_of(text) for text in _PROBE_TEXTS])
    return f"{name} {attributes} {content_digest(made)}" if made and any(made) else None


def _settled(make: Callable[[], list[Any]]) -> list[Any] | None:
    """Return what something makes, None where it makes something else now and then."""
    made = [make() for _ in range(_NUM_ASKED)]
    return made[0] if made == made[:1] * _NUM_ASKED else None


def data_fingerprint(location: str, split: str) -> str | None:
    """Return a digest of the shards of a split of a data set; see `files_fingerprint`.

    Args:
        location: Folder or URL of the data set.
        split: "test" or "train".

    Returns:
        64 hexadecimal digits, the same wherever the folder lies, or None for a URL, of whose
        content nothing is known.

    Raises:
        OSError: If a file is not there or cannot be read.
    """
    if is_remote(location):
        return None
    folder = Path(location)
    paths = [*list_shards(location, split), folder / split / "nshards.txt"]
    return files_fingerprint(folder, [*paths, *folder.glob("dataset_type.txt")])


def files_fingerprint(folder: Path, paths: Iterable[Path]) -> str:
    """Return a digest of some files: their names, sizes and bytes.

    Of a file above 256 MiB, 64 blocks of 1 MiB and the time of its last change stand for all.

    Args:
        folder: What the names are relative to.
        paths: The files, in any order.

    Raises:
        OSError: If a file cannot be read.
    """
    lines = []
    for path in sorted(paths):
        status = path.stat()
        digest = _file_digest(path.resolve(), file_state(status))
        lines.append(f"{path.relative_to(folder).as_posix()} {status.st_size} {digest}")
    return _digest_of(lines)


# One call reads a data set for several suites; a file that changes has another state.
@functools.lru_cache(maxsize=65536)
def _file_digest(path: Path, state: tuple[int, int, int]) -> str:
    digest = hashlib.sha256()
    size, mtime_ns, _ = state
    with regular_file(path).open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        else:
            digest.update(str(mtime_ns).encode())
            for number in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _pixels_digest(pixels_CHW: Tensor) -> str:
    # Features of equal images differ by rounding, or by the mask.
    return hashlib.sha256(pixels_CHW.float().contiguous().numpy().data).hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
