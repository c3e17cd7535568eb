"""Masked inference: images encoded through a mask, for a score of their own.

A model that was trained through a mask has seldom seen a whole image. Scored through a mask it is
another model than unmasked: its features, its results and its rows stay apart. Texts are encoded
as ever.

The random numbers of an image are keyed by a seed and by its place in its set: shard and number
within, or the file's name. Batch size, processes and order change no mask.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clip_pgs
from clip_pgs.checkpoint_reading import newest_checkpoint, read_checkpoint
from clip_pgs.common import CODE_OF_MASKING, experiment_of, explained, is_first_process
from clip_pgs.data.order import stable_seed
from clip_pgs.evaluation.results import amount, run_of_weights
from clip_pgs.files import CHECKPOINTS_NAME, MAX_RUN_FILE_BYTES, OPTIONS_NAME, read_json_object
from clip_pgs.integrations.open_clip import (
    load_masking_state,
    masked_inference,
    set_masking_progress,
)
from clip_pgs.masking import create_masking, describe_masking, masking_options
from clip_pgs.masking.calibration import CalibratedMasking
from clip_pgs.masking.merge import Merge
from clip_pgs.masking.schedule import scheduled_ratio
from clip_pgs.masking.strategy import masking_class
from clip_pgs.registry import OWN_MODULES, is_installed, own_code

# What stands for the strategy that a model was trained with.
AS_TRAINED = "run"

_logger = logging.getLogger(__name__)

Place = tuple[int | str, ...]  # of an image in its set


@dataclass(frozen=True)
class InferenceMasking:
    """How images are masked before they are encoded.

    Attributes:
        name: A strategy, or "package.module:Class".
        options: Its options; those that are not given have its defaults.
        progress: Completed share of the masked training steps, in [0, 1].
        merge: Groups of dropped patches that become tokens, as `apply_masking` takes it.
        merge_counts: The same.
        state: What training found, as `masking_state` returned it: a teacher, thresholds. Without
            it a strategy has its defaults, and a teacher the weights of the model.
        seed: Of the random numbers.

    Raises:
        ValueError: If there is no such strategy, or an option is wrong.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: float = 1.0
    merge: str = "none"
    merge_counts: bool = False
    state: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        create_masking(self.name, **self.options)
        Merge.parse(self.merge, counts=self.merge_counts)

    @property
    def label(self) -> str:
        """The strategy, its ratio and what else is not its default, such as "pgs 0.5"."""
        strategy = create_masking(self.name, **self.options)
        ratio = getattr(strategy, "mask_ratio", None)
        bounds = dict.fromkeys([getattr(strategy, "mask_ratio_min", ratio), ratio])
        ratios = [] if ratio is None else ["-".join(f"{bound:g}" for bound in bounds)]
        aliases, defaults = describe_masking(self.name).aliases, masking_options(self.name)
        others = {aliases.get(name, name): value for name, value in self.options.items()}
        changed = [
            f"{name}={value}"
            for name, value in sorted(others.items())
            if name not in ("mask_ratio", "mask_ratio_min") and value != defaults[name]
        ]
        changed += [f"merge={self.merge}"] if self.merge != "none" else []
        changed += ["merge_counts=True"] if self.merge_counts else []
        return " ".join([self.name, *ratios, *changed, *(["as trained"] if self.state else [])])

    @property
    def file_ending(self) -> str:
        """The label as the end of a file's name."""
        return "@" + "".join(c if c.isalnum() or c in ".=-+" else "_" for c in self.label)

    def description(self) -> str:
        """Return a text that is equal where equal images get equal masks."""
        # The code of a strategy outside of this package has no version here.
        code = own_code(masking_class(self.name).__module__) or clip_pgs.__version__
        parts = [self.label, code, self.progress, self.seed, _digest(self.state)]
        return json.dumps(parts, default=str)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Mask a model in eval mode inside a `with` block; see `masked_inference`.

        Raises:
            ValueError: If its image tower cannot be masked so.
        """
        merging = {"merge": self.merge, "merge_counts": self.merge_counts}
        with masked_inference(model, self.name, **merging, **self.options):
            load_masking_state(model, self.state)
            set_masking_progress(model, self.progress)
            yield

    def noise(self, places: Sequence[Place], *, num_patches: int) -> Tensor:
        """Return the random numbers of images, shape (B, N), float32, in [0, 1), on the CPU.

        Args:
            places: Of each image in its set.
            num_patches: N.
        """
        generator = torch.Generator()
        rows = []
        for place in places:
            generator.manual_seed(stable_seed(self.seed, "inference masks", *place))
            rows.append(torch.rand(num_patches, generator=generator))
        return torch.stack(rows)


def choose_masking(
    name: str | None, options: Mapping[str, Any] | None = None, *, weights: str
) -> InferenceMasking | None:
    """Return the masking that a user asks for; None where nothing is masked.

    Args:
        name: A strategy; "run" for the one that the weights were trained with, at the ratio they
            were trained with last; None for none.
        options: Options of the strategy, and `merge` and `merge_counts` as `apply_masking` takes
            them; beside "run" they take the place of the run's, and what its training found is
            not used.
        weights: Where the weights lie: a checkpoint, an export, or a name. A checkpoint of this
            trainer, or the newest of the run, tells how far training had come; otherwise it counts
            as finished.

    Raises:
        ValueError: If there is no such strategy, an option is wrong, nothing tells what the
            weights were trained with, or "run" stands for code that nobody but the files names.
    """
    if name is None and not options:
        return None
    told, checkpoint = _read_training(weights)
    if name == AS_TRAINED:
        _check_meant(str(told.get("masking")), weights)
    state = checkpoint.get("masking_state") or {}
    masking = masking_of(
        name, options, told=told, weights=weights, progress=_progress(told, checkpoint), state=state
    )
    if name == AS_TRAINED and masking is not None and is_first_process():
        _tell_differences(masking, told, weights, lacks_state=not (options or state))
    return masking


def masking_of(
    name: str | None,
    options: Mapping[str, Any] | None,
    *,
    told: Mapping[str, Any],
    weights: str,
    progress: float,
    state: Mapping[str, Any],
) -> InferenceMasking | None:
    """Return the masking that a user asks for, where what is known of the training is given.

    Args:
        name: As for `choose_masking`.
        options: The same.
        told: The options of the training by name, as far as they are known.
        weights: What to call the model in messages.
        progress: Completed share of the masked training, in [0, 1].
        state: What the masking of the training found, as `masking_state` returns it.

    Raises:
        ValueError: As `choose_masking` does.
    """
    options, is_changed = dict(options or {}), bool(options)
    if name is None:
        if options:
            raise ValueError(f"{', '.join(options)} of masked inference needs a masking's name")
        return None
    is_own = name == AS_TRAINED and not is_changed
    if name == AS_TRAINED:
        if not isinstance(told.get("masking"), str):
            raise ValueError(
                f"nothing tells what {weights} was trained with: it is no checkpoint of this "
                "trainer and lies in no run; name a masking instead"
            )
        name = told["masking"]
        # A damaged record can hold anything.
        with explained(f"what {weights} was trained with cannot be read", TypeError, LookupError):
            trained = _trained_options(told, progress)
        if options.get("merge") == "none":
            trained.pop("merge_counts", None)
        options = {**trained, **options}
    merging = {key: options.pop(key) for key in ("merge", "merge_counts") if key in options}
    if not isinstance(merging.get("merge", ""), str):
        raise ValueError(f"merge takes a name, got {merging['merge']!r}")
    masking = InferenceMasking(name, options, progress, state=state if is_own else {}, **merging)
    return None if create_masking(name, **options).keeps_all else masking


def _tell_differences(
    masking: InferenceMasking, told: Mapping[str, Any], weights: str, *, lacks_state: bool
) -> None:
    """Warn where a masking is not what it was in training."""
    code, experiment = own_code(masking_class(masking.name).__module__), told.get("options")
    trained = experiment.get(CODE_OF_MASKING) if isinstance(experiment, dict) else None
    # That of a notebook has no digest, and runs of earlier versions kept none.
    if code and trained and code != trained:
        _logger.warning(
            "The code of %s is no longer that which %s was trained with: images are masked as it "
            "is now",
            masking.name,
            weights,
        )
    if not lacks_state:
        return
    strategy = create_masking(masking.name, **masking.options)
    if "attention" in strategy.requires or getattr(strategy, "is_calibrated_in_training", False):
        _logger.warning(
            "No checkpoint tells what %s found when %s was trained: it has its defaults",
            masking.name,
            weights,
        )


def _read_training(weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the choices of the training behind some weights, and a checkpoint of it; or blanks."""
    run = run_of_weights(weights)
    path: Path | None = Path(weights)
    if path is not None and not path.is_file():
        path = None if run is None else newest_checkpoint(run / CHECKPOINTS_NAME)
    checkpoint = {} if path is None else read_checkpoint(path, use_mmap=True)
    options: dict[str, Any] = {}
    if run is not None and (run / OPTIONS_NAME).is_file():
        path = run / OPTIONS_NAME
        options = read_json_object(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
    record = checkpoint.get("clip_pgs")
    told = {**options, "options": experiment_of(options)}
    if isinstance(record, dict) and "masking" in record:
        parts = (record.get("recipe"), record.get("data"), record)
        told = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
    return told, checkpoint


def _check_meant(masking: str, weights: str) -> None:
    """Refuse a masking of one's own that files alone name, unless the user means its module.

    They may be a stranger's, and what lies beside them, too.
    """
    module, is_own, _ = masking.partition(":")
    named = os.environ.get(OWN_MODULES, "").split(",")
    # Python's own modules hold no masking, and importing one may open a browser.
    is_found = module.partition(".")[0] not in sys.stdlib_module_names and is_installed(module)
    if is_own and not (module and (is_found or module in named)):
        raise ValueError(
            f"{weights} says that it was trained with {masking}, code outside of this package; if "
            f"that is meant, name it in place of {AS_TRAINED}, or have its folder in PYTHONPATH"
        )


def _progress(told: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> float:
    """Return the completed share of the masked epochs of a checkpoint; 1.0 where unknown."""
    epochs, samples = (amount(told.get(name)) for name in ("epochs", "samples per epoch"))
    epoch, position = (amount(checkpoint.get(name)) for name in ("epoch", "position"))
    if epoch is None or not epochs:
        return 1.0
    part = position / samples if position and samples else 0.0
    return min((epoch + part) / epochs, 1.0)


def _trained_options(told: Mapping[str, Any], progress: float) -> dict[str, Any]:
    """Return a strategy's options as training had them at a point, schedule included."""
    options = dict(told.get("masking_options") or {})
    merging = {key: told[key] for key in ("merge", "merge_counts") if key in told}
    kind = told.get("mask_schedule") or "constant"
    if kind == "constant":
        return options | merging
    strategy = create_masking(told["masking"], **options)
    levels, end = told["mask_schedule_steps"], told["mask_ratio_end"]
    strategy.set_mask_ratio(
        scheduled_ratio(strategy.mask_ratio, end, progress=progress, kind=kind, num_levels=levels)
    )
    names = [name for name in ("mask_ratio", "mask_ratio_min") if hasattr(strategy, name)]
    reached = {name: getattr(strategy, name) for name in names}
    if options.get("mask_ratio_mean") is not None and isinstance(strategy, CalibratedMasking):
        reached["mask_ratio_mean"] = strategy.mean_ratio()
    return {**options, **merging, **reached}


def _digest(state: Any) -> str:
    """Return a digest of tensors and plain types."""
    if isinstance(state, Mapping):
        state = {name: _digest(value) for name, value in sorted(state.items())}
    if isinstance(state, Tensor):
        raw = state.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    return json.dumps(state)
