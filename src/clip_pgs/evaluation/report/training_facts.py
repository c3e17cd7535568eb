"""What is known of the training behind results.

A result tells how its weights were trained. Where it does not, as in tables and in results
of earlier versions, the checkpoint that it names does if it still holds the weights that were
scored; without a record in one, `options.json` and `metrics.jsonl` of the run say most of it,
and else there are blanks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from clip_pgs.common import (
    changes_of,
    experiment_of,
    history_of,
    last_parts,
    one_sentence,
)
from clip_pgs.evaluation.results import (
    DONE,
    Result,
    amount,
    epoch_folders,
    is_run,
    plain_record,
    run_of_weights,
)
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EVAL_NAME,
    EXIT_NAME,
    MAX_RUN_FILE_BYTES,
    METRICS_NAME,
    OPTIONS_NAME,
    read_json_lines,
    read_json_object,
)
from clip_pgs.integrations import is_mae_config
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

# After a command that scores anew: results tell where a set lay, and not which list named it.
SAME_DATA = "with the same --datasets and --data-root as before"


@dataclass(frozen=True)
class TrainingFacts:
    """A training run in facts; what is not known is "" or None.

    Attributes:
        architecture: Such as "ViT-B-16".
        data: The training data as the run names it, whole.
        masking: What the recipe masks, such as "pgs 0.5", "pgs 0.75 to 0.25" or "none"; one after
            the other where it was changed, or where epochs without masks follow.
        samples: Image-caption pairs seen.
        flops: Floating-point operations over all processes.
        seconds: Wall time.
        hardware: Such as "8 x NVIDIA H200".
        seed: Of the run.
        recipe: What any checkpoint tells of this experiment, but for the seed, as one text; ""
            where it is not known.
        options: All else that makes it this experiment, as far as it is known.
        history: How it began and what it had changed, as `clip_pgs.common.history_of` tells it.
    """

    architecture: str = ""
    data: str = ""
    masking: str = ""
    samples: float | None = None
    flops: float | None = None
    seconds: float | None = None
    hardware: str = ""
    seed: int | None = None
    recipe: str = field(default="", repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    history: tuple[str, ...] = ()

    def is_seed_of(self, other: TrainingFacts) -> bool:
        """Return whether this run and another differ in their seeds alone, as far as is known."""
        shared = self.options.keys() & other.options.keys()
        if "train_files" in shared:
            shared -= {"train_data"}
        return (
            bool(self.recipe)
            and self.recipe == other.recipe
            and self.seed != other.seed
            and all(self.options[name] == other.options[name] for name in shared)
        )

    @property
    def short_data(self) -> str:
        """The last two parts of where the data is, without the names of the shards."""
        parts = [part for part in re.split(r"[/\\]", self.data.split("::")[0]) if part]
        if parts and re.search(r"[{*]|\.tar$", parts[-1]):
            parts = parts[:-1] or parts
        return "/".join(parts[-2:])


def read_training_facts(
    run: Path | None, weights: str, *, digest: str = "", told: dict[str, Any] | None = None
) -> TrainingFacts:
    """Read what is known of the training behind some results.

    Args:
        run: The run that the results lie in, None if they lie in none.
        weights: Where the results say that the weights came from: a checkpoint file or a folder.
        digest: Of the weights that were scored; facts are those of no others. "" takes any.
        told: What the results themselves say of it.
    """
    if told:
        source = f"what is told of the training of {weights}"
        return _from_record(told, source, run or run_of_weights(weights))
    try:
        is_file = Path(weights).suffix == ".pt"
        is_gone = is_file and not Path(weights).is_file()
        holder = run or run_of_weights(weights)
        checkpoint = Path(weights) if is_file and not is_gone else None
        if checkpoint is None and holder is not None:
            # Here: results without their run take no torch.
            from clip_pgs.checkpoint_reading import newest_checkpoint

            checkpoint = newest_checkpoint(holder / CHECKPOINTS_NAME)
        if checkpoint is not None:
            facts = _of_checkpoint(checkpoint, digest, run=holder)
            if facts is not None:
                return facts
        elif run is not None and (run / OPTIONS_NAME).is_file():
            facts = _from_logs(run)
            # What the run spent until its end is not what a checkpoint before took.
            if is_gone:
                return replace(facts, samples=None, flops=None, seconds=None, recipe="")
            return facts
        elif holder is None or not (holder / OPTIONS_NAME).is_file():
            return TrainingFacts()
        logger.warning(
            "the training behind the results of %s is not told: the weights there are not those "
            "that were scored",
            one_sentence(weights or str(run)),
        )
    except OSError as error:
        # Results tell any path, also one that cannot be looked up here.
        _warn(weights, f"cannot be read ({error.strerror})")
    return TrainingFacts()


def _of_checkpoint(path: Path, digest: str, *, run: Path | None) -> TrainingFacts | None:
    """Return the facts of a checkpoint's weights; None where they have another digest."""
    from clip_pgs.checkpoint_reading import newest_checkpoint, read_checkpoint, weights_digest

    try:
        content = read_checkpoint(path, use_mmap=True)
    except ValueError:
        return TrainingFacts()
    record, facts = content.get("clip_pgs"), TrainingFacts()
    if isinstance(record, dict) and "recipe" in record:
        facts = _from_record(record, path, run)
    elif run is not None and (run / OPTIONS_NAME).is_file():
        # What a run's files say is of its end: an average beside its checkpoints took what?
        if newest_checkpoint(path.parent, is_checked=False) != path:
            logger.warning(
                "the training behind the results of %s is not told: the file has no record of it, "
                "and is not the newest checkpoint of its run",
                one_sentence(str(path)),
            )
            return TrainingFacts()
        facts = _from_logs(run)
    if not digest or facts == TrainingFacts():
        return facts
    # Models are scored in float32.
    weights = {
        name: weight.float() if weight.is_floating_point() else weight
        for name, weight in content["state_dict"].items()
    }
    return facts if weights_digest(weights) == digest else None


def _from_record(record: dict[str, Any], place: Path | str, run: Path | None) -> TrainingFacts:
    parts = {name: record.get(name, {}) for name in ("recipe", "data", "cost")}
    if not all(isinstance(part, dict) for part in parts.values()):
        _warn(place, "has a record of another shape")
        return TrainingFacts()
    recipe, data, cost = parts.values()
    by_place = {"text_masking_options": recipe.get("text_masking_options")}
    by_place |= {name: data.get(name) for name in ("train_data", "pretrained")}
    options = record.get("options")
    if not isinstance(options, dict) or not options:
        options = experiment_of({**by_place, **_options_of(run, recipe)})
    # A run stopped half way is another experiment than one that went to its end.
    same = {name: record.get(name) for name in ("masking", "masking_options", "open_clip_config")}
    same["model"] = experiment_of({"model": record.get("model")})["model"]
    same |= {name: part for name, part in data.items() if name not in by_place}
    same |= {n: part for n, part in recipe.items() if n not in ("seed", *by_place)}
    hardware = f"{record.get('world_size', 1)} x {record['device']}" if "device" in record else ""
    facts = _facts(record, data=data, spent=cost, recipe=recipe)
    return replace(
        facts,
        masking=_masking_of({**options, **recipe, **record}),
        hardware=hardware,
        recipe=_as_text([same, cost.get("steps")]),
        options=options,
        history=tuple(history_of(record)),
    )


def _options_of(run: Path | None, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `options.json` of a run whose recipe an earlier version's checkpoint tells."""
    try:
        if run is None or not (run / OPTIONS_NAME).is_file():
            return {}
        saved = read_json_object(run / OPTIONS_NAME, what="it", max_bytes=MAX_RUN_FILE_BYTES)
    except (OSError, ValueError):
        return {}
    # The run may have gone on otherwise since.
    return saved if all(saved.get(n, value) == value for n, value in recipe.items()) else {}


def _from_logs(run: Path) -> TrainingFacts:
    try:
        options = read_json_object(
            run / OPTIONS_NAME, what="its file", max_bytes=MAX_RUN_FILE_BYTES
        )
    except ValueError as error:
        _warn(run / OPTIONS_NAME, f"cannot be read ({error})")
        return TrainingFacts()
    told = [
        e for e in read_measurements(run / METRICS_NAME) if amount(e.get("samples")) is not None
    ]
    spent = told[-1] if told else {}
    facts = _facts(options, data=options, spent=spent, recipe=options)
    return replace(
        facts,
        masking=_masking_of(options),
        recipe=_as_text(["logs", spent.get("samples")]),
        options=experiment_of(options),
        history=tuple(history_of({**options, "data": options})),
    )


def _facts(
    choices: dict[str, Any], *, data: dict[str, Any], spent: dict[str, Any], recipe: dict[str, Any]
) -> TrainingFacts:
    shards = data.get("train_data") or data.get("dataset_type") or ""
    seed = recipe.get("seed")
    if spent.get("unmeasured_steps"):
        # Of a run that went on from OpenCLIP's, and is not to look cheap beside others.
        spent = {"samples": spent.get("samples")}
    return TrainingFacts(
        architecture=str(choices.get("model") or ""),
        data=" + ".join(map(str, shards)) if isinstance(shards, list) else str(shards),
        samples=amount(spent.get("samples")),
        flops=amount(spent.get("flops")),
        seconds=amount(spent.get("seconds")),
        seed=seed if isinstance(seed, int) else None,
    )


def _masking_of(choices: dict[str, Any]) -> str:
    """Name what a recipe masks, one after the other: before each change, now, and at the end."""
    maskings, unmasked = [_masking_name(choices)], choices.get("unmasked_epochs")
    for _, was in reversed(changes_of(choices)):
        # The model's config has the ratio of now.
        if "masking_options" in was:
            choices = {**choices, "open_clip_config": None}
        choices = {**choices, **was}
        maskings.insert(0, _masking_name(choices))
    names = [name for name, _ in groupby(maskings)]
    if isinstance(unmasked, int) and unmasked:
        names.append(f"{counted(unmasked, 'epoch')} unmasked")
    return ", then ".join(names)


def _masking_name(options: dict[str, Any]) -> str:
    """Name a masking with its ratio, and with every other option that was set."""
    chosen = _options_in(options, "masking_options")
    ratio, lowest = chosen.pop("mask_ratio", None), chosen.pop("mask_ratio_min", None)
    autoencoder = _autoencoder(options)
    if autoencoder is not None:
        ratio = autoencoder.get("mask_ratio") if ratio is None else ratio
        if options.get("mae_sign") == "hide":
            chosen["mae_sign"] = "hide"
    if options.get("merge", "none") != "none":
        chosen["merge"] = options["merge"]
    if options.get("merge_counts"):
        chosen["merge_counts"] = True
    if options.get("force_patch_dropout"):
        chosen["force_patch_dropout"] = options["force_patch_dropout"]
    parts = [str(options.get("masking") or "")]
    if ratio is not None:
        parts.append(f"{lowest}-{ratio}" if lowest is not None else f"{ratio}")
    schedule = options.get("mask_schedule") or "constant"
    if schedule != "constant":
        steps = options.get("mask_schedule_steps")
        parts.append(f"to {options.get('mask_ratio_end')} ({schedule}, {steps} levels)")
    parts += _pairs(chosen)
    if options.get("train_image_size"):
        parts.append(f"at {options['train_image_size']} pixels")
    if (options.get("text_masking") or "none") != "none":
        parts.append(f"+ text {options['text_masking']}")
        if options.get("text_tokens"):
            parts.append(f"{options['text_tokens']} tokens")
        parts += _pairs(_options_in(options, "text_masking_options"))
    return " ".join(parts)


def _autoencoder(options: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config of a masked autoencoder; None for any other model."""
    exported = options.get("open_clip_config")
    built = exported.get("model_cfg") if isinstance(exported, dict) else None
    # As it was given, it may leave the ratio to transformers.
    known: list[Any] = [c for c in (built, options.get("mae")) if is_mae_config(c)]
    return {name: value for config in known for name, value in config.items()} if known else None


def _options_in(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the options of a strategy, or what stands in their place."""
    chosen = options.get(name) or {}
    return dict(chosen) if isinstance(chosen, dict) else {"options": chosen}


def _pairs(options: dict[str, Any]) -> list[str]:
    """Return options as they are given, files without their folders."""
    return [
        f"{name}={last_parts(value, 1) if isinstance(value, str) else value}"
        for name, value in options.items()
    ]


def _as_text(recipe: Any) -> str:
    return json.dumps(recipe, sort_keys=True, default=str)


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's measurements."""
    found, num_odd = [], 0
    try:
        for entry in read_json_lines(path):
            if entry is None:
                num_odd += 1
            else:
                found.append(entry)
    except OSError as error:
        _warn(path, f"cannot be read ({error.strerror})")
        return []
    if num_odd:
        _warn(f"{counted(num_odd, 'line')} of {path}", "is no JSON object")
    return found


def are_newest(
    place: Path,
    run: Path | None,
    told: dict[str, Any],
    read: Callable[[Path], Iterable[Result]],
) -> bool:
    """Return whether results in a run are known as of its newest weights; warn where they are not.

    Args:
        place: Where the results lie.
        run: Their run, absolute; None if they lie in none.
        told: What they tell of the training.
        read: Reads the results of a folder.
    """
    newest = _newest_training(run) if run is not None and told else {}
    if run is None or not newest:
        return False
    if _is_of(newest, told):
        return True
    now, then = _samples_of(newest), _samples_of(told)
    if "recipe" not in newest and (now is None or then is None or now < then):
        # The end of the measurements may be lost.
        return False
    seen = ""
    if now is not None and then is not None and now != then:
        seen = f", which saw {now:,.0f} samples and not {then:,.0f}"
    try:
        is_done = read_json_object(run / EXIT_NAME, what="it").get("code") == 0
    except (OSError, ValueError):
        is_done = False
    shown = place if is_run(place) else place.parent
    commands = f"`clip-pgs test {shown}` {SAME_DATA} scores"
    if not is_done:
        commands = f"`clip-pgs export {shown}` and then `clip-pgs test {shown}` {SAME_DATA} score"
    epochs = [
        Path(shown, EVAL_NAME, folder.name)
        for folder in epoch_folders(run).values()
        if any(r.status == DONE and _is_of(newest, r.training) for r in read(folder))
    ]
    held = f", and {epochs[-1]} holds what they scored in training" if epochs else ""
    logger.warning(
        "the results in %s are not of the newest weights of %s%s; %s those%s",
        *map(one_sentence, (str(place), str(shown), seen, commands, held)),
    )
    return False


def _newest_training(run: Path) -> dict[str, Any]:
    """Return what a run's newest checkpoint says of it, or else its measurements; {} if nothing."""
    folder = run / CHECKPOINTS_NAME
    # A run that trains may remove a checkpoint meanwhile; damage is told where it does harm.
    with suppress(OSError, ValueError):
        newest = None
        if folder.is_dir():
            # Here: results without their run take no torch.
            from clip_pgs.checkpoint_reading import (
                named_latest,
                newest_checkpoint,
                read_checkpoint,
            )

            newest = named_latest(folder)
            if newest is None or not newest.is_file():
                newest = newest_checkpoint(folder, on_damage=lambda *_: None, is_checked=False)
        if newest is not None:
            return plain_record(read_checkpoint(newest, use_mmap=True).get("clip_pgs"))
        lines = [line for line in read_json_lines(run / METRICS_NAME) if line is not None]
        seen = [samples for line in lines if (samples := amount(line.get("samples"))) is not None]
        return {"cost": {"samples": seen[-1]}} if seen else {}
    return {}


def _is_of(newest: dict[str, Any], told: dict[str, Any]) -> bool:
    """Return whether results tell the training of a run's newest weights."""
    if "recipe" in newest:
        return _without_time(newest) == _without_time(told)
    # Measurements say how far the run went and no more.
    return _samples_of(newest) == _samples_of(told)


def _without_time(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its seconds: an evaluation in training is before its checkpoint."""
    cost = record.get("cost")
    return {**record, "cost": {**cost, "seconds": None} if isinstance(cost, dict) else cost}


def _samples_of(record: dict[str, Any]) -> float | None:
    cost = record.get("cost")
    return amount(cost.get("samples")) if isinstance(cost, dict) else None


def _warn(path: Path | str, what: str) -> None:
    logger.warning("left out %s: it %s", one_sentence(str(path)), one_sentence(what))
