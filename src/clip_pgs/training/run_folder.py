"""A run's folder: its name, what it remembers of its options, and who may go on in it.

`options.json` holds what a resumed run is compared with, the files of its data among it, and which
launch made it: torchrun's `--max-restarts` and Slurm's requeueing use a run's name again without
being told to, and nobody else may.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clip_pgs
from clip_pgs.checkpoint_reading import file_digest
from clip_pgs.common import (
    CODE_OF,
    as_plain,
    changed_values,
    changes_of,
    experiment_of,
    last_parts,
    without_texts,
)
from clip_pgs.data.text_masking import TEXT_MASKINGS
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    ENVIRONMENT_NAME,
    LOG_NAME,
    MAX_RUN_FILE_BYTES,
    MODEL_CONFIG_NAME,
    OPTIONS_NAME,
    PARAMS_NAME,
    read_json_object,
    write_json,
    write_text,
)
from clip_pgs.integrations.open_clip.model_config import changed_model
from clip_pgs.masking.strategy import masking_class
from clip_pgs.registry import own_code
from clip_pgs.tables import counted
from clip_pgs.training.build import is_on_cpu, model_digest
from clip_pgs.training.data_checks import (
    has_training_data,
    training_files,
    training_indexes,
    training_kind,
)
from clip_pgs.training.distributed import ProcessGroup, refuse_together
from clip_pgs.training.export import open_clip_config, tokenizer_source
from clip_pgs.training.loggers import BestEffort
from clip_pgs.training.options import (
    IDENTITY,
    RECIPE,
    UNMASKED,
    TrainOptions,
    names_below,
    names_of,
)
from clip_pgs.training.stop import LAUNCH_FOLDER

_logger = logging.getLogger(__name__)

_FILES, _INDEXES, _CONTENTS = "train_files", "train_indexes", "contents"
# Of a model's folder: its config, and what tokenizers read.
_READ_ENDINGS = (".json", ".txt", ".model")
_MAX_NAMED = 4
# What beside the options of the experiment must be the same in all processes.
_ALIKE = ("fsdp", "loss_chunk", "torchcompile", "ddp_static_graph", "resume")
_PACKAGES = ("open_clip_torch", "timm", "torchvision", "webdataset", "numpy")
_RESTARTS = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}
_LAUNCHES = {"torchrun": "TORCHELASTIC_RUN_ID", "slurm": "SLURM_JOB_ID"}

# What a checkpoint says of how its run was trained, as far as the run has such a part.
_DATA = ("train_data", "dataset_type", "dataset_resampled", "pretrained")
_RECORDED = (
    "epochs",
    "batch_size",
    "accum_freq",
    "lr",
    "lr_scheduler",
    "warmup",
    "wd",
    "opt",
    "precision",
    "siglip",
    "seed",
)
# Bytes of it in the name of a folder, of which file systems take 255.
_LONGEST_MODEL = 128
_MASK_SCHEDULE = ("mask_schedule", "mask_ratio_end", "mask_schedule_steps")
_MERGE = ("merge", "merge_counts")
_TEXT = ("text_masking", "text_tokens", "text_masking_options")


def default_name(options: TrainOptions) -> str:
    """Return the name of a run that was given none: date, model and recipe, as OpenCLIP's.

    Of a long model, such as the path of a folder, it has the end, which tells it best.
    """
    model = options.model.replace("/", "-").replace(":", "-")
    while len(os.fsencode(model)) > _LONGEST_MODEL:
        model = model[1:]
    parts = [
        datetime.now().strftime("%Y_%m_%d-%H_%M_%S"),
        f"model_{model}",
        f"lr_{options.lr}",
        f"b_{options.batch_size}",
        f"j_{options.workers}",
        f"p_{options.precision}",
    ]
    return "-".join(parts)


def run_folder(options: TrainOptions) -> Path | None:
    """Return the folder of a named run, None where it has no name yet or keeps nothing."""
    if options.name is None or not keeps_logs(options):
        return None
    return Path(options.logs) / options.name


def keeps_logs(options: TrainOptions) -> bool:
    """Return whether a run writes a folder at all (OpenCLIP: `--logs none` does not)."""
    return bool(options.logs) and options.logs.lower() != "none"


def holds_run(folder: Path) -> bool:
    """Return whether a training run has written into a folder, ours or OpenCLIP's."""
    return any((folder / name).exists() for name in (OPTIONS_NAME, LOG_NAME, CHECKPOINTS_NAME))


def follow_restart(options: TrainOptions) -> None:
    """Let a run that its launcher started again go on from its last checkpoint.

    Args:
        options: `name` and `resume` are set where a launcher restarted this run.
    """
    if not keeps_logs(options):
        return
    name_file = _launch_name_file()
    is_begun = name_file is not None and name_file.is_file()
    if name_file is not None and is_begun and options.name is None:
        options.name = name_file.read_text(encoding="utf-8")
    folder = run_folder(options)
    if folder is None or not folder.is_dir():
        return
    if is_begun or _is_of_restarted_launch(folder):
        options.resume_instead = None if options.resume == "latest" else options.resume
        options.resume = "latest"


def _is_of_restarted_launch(folder: Path) -> bool:
    """Return whether the launch that made a run's folder is this one, restarted."""
    kinds = {kind for kind, name in _RESTARTS.items() if int(os.environ.get(name) or "0") > 0}
    if _launch_name_file() is not None:
        # It says more: of several machines torchrun counts a restart only where a process died,
        # and calls each launch alike.
        kinds.discard("torchrun")
    made_by, launch = read_options_file(folder)[0].get("launch"), _launch()
    return isinstance(made_by, dict) and any(
        kind in launch and made_by.get(kind) == launch[kind] for kind in kinds
    )


def note_launch(folder: Path) -> None:
    """Note on this machine which run its launch has begun, for `follow_restart`."""
    name_file = _launch_name_file()
    if name_file is not None:
        name_file.write_text(folder.name, encoding="utf-8")


def _launch() -> dict[str, str]:
    """Return what torchrun and Slurm call this launch; both keep it when they restart it."""
    return {kind: os.environ[name] for kind, name in _LAUNCHES.items() if name in os.environ}


def _launch_name_file() -> Path | None:
    """Return where later attempts of this launch find the run's name, if its launcher cares."""
    folder = os.environ.get(LAUNCH_FOLDER)
    return Path(folder) / "run_name" if folder else None


def write_run_files(
    options: TrainOptions, folder: Path, device: torch.device, *, files: Sequence[str]
) -> None:
    """Write what a run was started with: `options.json`, `params.txt`, `env.json`.

    Args:
        options: The run's.
        folder: Its folder.
        device: This process's device.
        files: The training data, file by file.

    Raises:
        OSError: If it cannot be written.
    """
    (folder / CHECKPOINTS_NAME).mkdir(parents=True, exist_ok=True)
    save_options(options, folder, files=files)
    note_launch(folder)
    lines = [f"{name}: {value}\n" for name, value in options.values().items()]
    write_text(folder / PARAMS_NAME, "".join(lines))
    _save_environment(folder, device=device, world_size=options.world_size)


class RunFiles:
    """What says how a run was started, kept to be written again where somebody removed it.

    Args:
        folder: The run's folder, in which `write_run_files` has written.
    """

    def __init__(self, folder: Path) -> None:
        self._effort = BestEffort("the run's folder")
        paths = (folder / name for name in (OPTIONS_NAME, PARAMS_NAME, ENVIRONMENT_NAME))
        self._contents = {path: path.read_text("utf-8", "surrogateescape") for path in paths}

    def restore(self) -> None:
        """Write what is missing; a resumed run is compared with it."""
        missing = [path for path in self._contents if not path.exists()]
        if not missing:
            return
        _logger.warning(
            "%s was removed under the run and is written again; what else the folder held is lost",
            " and ".join(map(str, missing)),
        )
        with self._effort:
            missing[0].parent.mkdir(parents=True, exist_ok=True)
            for path in missing:
                write_text(path, self._contents[path])


def taken_name(options: TrainOptions) -> str | None:
    """Say that another run has the name of this one, which does not continue it; else None."""
    folder = run_folder(options)
    if folder is None or options.resume == "latest" or not holds_run(folder):
        return None
    return f"run {folder} exists; use --resume latest to continue it or another --name"


def save_options(options: TrainOptions, folder: Path, *, files: Sequence[str] = ()) -> None:
    """Write the options that a resumed run is compared with to `folder/options.json`."""
    more = {_INDEXES: training_indexes(options), "launch": _launch()}
    write_json(folder / OPTIONS_NAME, {**options_to_compare(options, files=files), **more})


def options_to_compare(options: TrainOptions, *, files: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `changed_options` and `changed_recipe` compare other options with.

    Args:
        options: The run's.
        files: The training data, file by file.
    """
    names = (*names_of(IDENTITY), *names_of(RECIPE), "train_data")
    saved = {name: as_plain(getattr(options, name)) for name in names}
    return {**saved, _FILES: list(files), _CONTENTS: named_contents(options)}


def save_indexes(options: TrainOptions, folder: Path) -> None:
    """Add to `folder/options.json` what the shards hold, which is known once they are indexed."""
    saved, _ = read_options_file(folder)
    indexes = training_indexes(options)
    if saved and saved.get(_INDEXES) != indexes:
        write_json(folder / OPTIONS_NAME, {**saved, _INDEXES: indexes})


def read_options_file(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return the `options.json` of a run's folder, and what is wrong with it, None for nothing."""
    path = folder / OPTIONS_NAME
    if not path.exists():
        return {}, f"{path} is not there" if holds_run(folder) else None
    try:
        return read_json_object(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES), None
    except ValueError as error:
        return {}, str(error)


def named_contents(options: TrainOptions) -> list[str]:
    """Return digests of what table, model and maskings are read from, file by file.

    Weights are left out: a run that goes on has its own. So are pictures, of which names and sizes
    are compared, and shards, of which their indexes are, too: a table that is only sorted anew
    keeps both.

    Raises:
        OSError: If a file cannot be read.
    """
    files: dict[str, Path] = {}
    if has_training_data(options) and training_kind(options) == "csv":
        path = Path(options.train_data or "")
        files[f"train_data {path.name}"] = path
    for name, value in options.text_masking_options.items():
        if isinstance(value, str):
            files[f"text_masking_option {name}"] = Path(value)
    if options.model.startswith("local-dir:"):
        for path in sorted(Path(options.model.removeprefix("local-dir:")).iterdir()):
            if path.suffix in _READ_ENDINGS:
                files[f"model {path.name}"] = path
    # os.path: a text that is too long is the name of no file.
    found = {name: file_digest(path)[:12] for name, path in files.items() if os.path.isfile(path)}
    if options.model.startswith("hf-hub:"):
        found["model config"] = model_digest(options)
    # Of the module that defines it, from wherever a package offers it.
    if ":" in options.masking:
        found[f"{CODE_OF} masking"] = own_code(masking_class(options.masking).__module__)
    if ":" in options.text_masking:
        text_masking: Any = TEXT_MASKINGS.get(options.text_masking)
        found[f"{CODE_OF} text_masking"] = own_code(text_masking.__module__)
    return [f"{name}: {digest}" for name, digest in found.items()]


def changed_options(
    options: TrainOptions, saved: Mapping[str, Any], *, files: Sequence[str] | None = ()
) -> list[str]:
    """Return the changes that make it another experiment, such as "seed 0 -> 1".

    Args:
        options: The run's.
        saved: What `read_options_file` found in the run's folder.
        files: The training data, file by file: its name, without the folder, comes first; None
            leaves the data out.
    """
    contents, kept = named_contents(options), saved.get(_CONTENTS)
    lists = (contents, kept if isinstance(kept, list) else [])
    told, told_before = ({str(each).rpartition(": ")[0] for each in some} for some in lists)
    now = {name: getattr(options, name) for name in names_of(IDENTITY)}
    before, now = (_without_places(values, told & told_before) for values in (saved, now))
    changes = changed_values(before, now)
    if isinstance(kept, list) and not any(str(each).startswith(CODE_OF) for each in kept):
        # A run of an earlier version, which did not keep it.
        contents = [each for each in contents if not each.startswith(CODE_OF)]
    for key, what, after in ((_CONTENTS, "", contents), (_FILES, "train_data ", files)):
        # A run of an earlier version has none, as one without data.
        if isinstance(earlier := saved.get(key), list) and after is not None:
            changes += [what + change for change in _changed_files(list(map(str, earlier)), after)]
    if files is not None and not isinstance(saved.get(_FILES), list):
        # A run of an earlier version, which kept the pattern alone.
        changes += _changes(options, saved, ["train_data"])
    if files is not None and saved.get(_FILES) == list(files):
        changes += _changed_indexes(options, saved.get(_INDEXES), files)
    return changes


def _without_places(values: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Return options without where the files lie of which the content is compared.

    Of weights, which only a run that begins reads, the name is compared.

    Args:
        values: Options by name.
        named: What is compared by its content, as `named_contents` names it.
    """
    values = without_texts(values, named)
    if f"model {MODEL_CONFIG_NAME}" in named:
        values.pop("model", None)
    if isinstance(weights := values.get("pretrained"), str):
        values["pretrained"] = Path(weights).name
    return values


def _changed_files(saved: Sequence[str], now: Sequence[str]) -> list[str]:
    gone, new = Counter(saved) - Counter(now), Counter(now) - Counter(saved)
    changes = [f"{file} is gone" for file in gone.elements()]
    changes += [f"{file} is new" for file in new.elements()]
    if not changes and list(saved) != list(now):
        changes = ["its files in another order"]
    if len(changes) > _MAX_NAMED:
        changes = [*changes[:_MAX_NAMED], f"and {counted(len(changes) - _MAX_NAMED, 'file')} more"]
    return changes


def _changed_indexes(options: TrainOptions, saved: Any, files: Sequence[str]) -> list[str]:
    """Return which shards of the names and sizes of before hold other pairs."""
    # A run of an earlier version has none, and shards that are read as streams have no index.
    if not isinstance(saved, list) or len(saved) != len(files) or not any(saved):
        return []
    before, now = (
        [
            f"train_data {file.partition(': ')[0]}: list of members {digest}"
            for file, digest, is_known in zip(files, digests, saved, strict=True)
            if is_known
        ]
        for digests in (saved, training_indexes(options, make=True))
    )
    return _changed_files(before, now)


def changed_recipe(options: TrainOptions, saved: Mapping[str, Any]) -> list[str]:
    """Return the changes of schedule, batch, precision and the like, such as "lr 0.1 -> 0.2"."""
    return _changes(options, saved, names_of(RECIPE))


def changed_record(options: TrainOptions, record: Mapping[str, Any]) -> list[str]:
    """Return the changes of model, options and data, as far as a checkpoint's record tells them.

    Args:
        options: The run's.
        record: From `describe_run`.
    """
    data, recipe = record.get("data"), record.get("recipe")
    if not (isinstance(data, dict) and isinstance(recipe, dict)):
        return []
    # A record leaves out the parts that its run does not have.
    parts = (*_MASK_SCHEDULE, *_MERGE, *_TEXT, "train_image_size", "mae_sign")
    defaults = {n: getattr(TrainOptions, n, {}) for n in (*parts, *names_below(UNMASKED))}
    saved = {**defaults, **record, **data, **recipe}
    # It says in which precision the run trained.
    if (saved.get("precision"), options.precision) == ("fp32", "amp") and is_on_cpu(options):
        del saved["precision"]
    names = [*names_of(IDENTITY), *names_of(RECIPE)]
    names += ["train_data"] if has_training_data(options) else []
    now = {name: getattr(options, name) for name in names}
    named = [f"model {MODEL_CONFIG_NAME}"] if options.model.startswith("local-dir:") else []
    model = changed_model(record.get("open_clip_config"), open_clip_config(options))
    return model + changed_values(_without_places(saved, named), _without_places(now, named))


def check_alike(options: TrainOptions, group: ProcessGroup) -> None:
    """Refuse processes of several machines that were started for different runs.

    Raises:
        BadInputError: On each of them, with the first process that is not as process 0 is.
    """
    files = training_files(options) if has_training_data(options) else []
    own = {name: getattr(options, name) for name in _ALIKE}
    # A run that is scored in training was named by each process.
    own |= {} if options.eval_suite is not None else {"name": options.name}
    is_first = options.rank == 0
    first = group.broadcast({**options_to_compare(options, files=files), **own} if is_first else {})
    changes = []
    if not is_first:
        changes = changed_options(options, first, files=files or None)
        changes += changed_recipe(options, first) + changed_values(first, own)
    refuse_together(
        group,
        ", ".join(changes),
        "process {} was started otherwise than process 0: {}; start the same command, with the "
        "same data, on every machine",
    )


def _changes(options: TrainOptions, saved: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return changed_values(saved, {name: getattr(options, name) for name in names})


def describe_run(
    options: TrainOptions,
    model: nn.Module,
    device: torch.device,
    *,
    num_samples: int | None,
    saved: Mapping[str, Any] | None = None,
    earlier: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint says of its run: enough to export and describe it, in plain types.

    Args:
        options: The run's, with `world_size`.
        model: The plain model.
        device: This process's device.
        num_samples: Samples of an epoch.
        saved: Its `options.json`.
        earlier: The record of the checkpoint that it goes on from.
        start: That of the file that it begins with, if not from random weights: as `earlier`, or
            of one that had not begun either.
    """
    experiment = experiment_of(saved or {})
    earlier_options = (earlier or {}).get("options")
    if isinstance(earlier_options, dict):
        was = {
            name: value
            for name, value in earlier_options.items()
            # Where the data lies may change; its files may not.
            if name in experiment and value != experiment[name] and name != "train_data"
        }
        seed = ((earlier or {}).get("recipe") or {}).get("seed")
        was |= {"seed": seed} if seed not in (None, options.seed) else {}
        # Of which a batch, and without --gather-with-grad a gradient, are made.
        size = (earlier or {}).get("world_size")
        was |= {"world_size": size} if size not in (None, options.world_size) else {}
        changes = [list(change) for change in changes_of(earlier_options)]
        changes += [[(earlier or {}).get("cost", {}).get("steps"), was]] if was else []
        experiment["changes"] = changes
    elif saved and not earlier:
        # What another trainer's checkpoint, or weights alone, were trained with is not known.
        origin = [[None, {"resume": last_parts(str(options.resume), 3)}]]
        kept = [list(change) for change in changes_of((start or {}).get("options"))]
        experiment["changes"] = [] if start is None else kept or origin
    recipe = [
        *(_MASK_SCHEDULE if options.mask_schedule != "constant" else ()),
        *(_MERGE if options.merge != "none" else ()),
        *(("train_image_size",) if options.train_image_size is not None else ()),
        *(_TEXT if options.text_masking != "none" else ()),
        *(("mae_sign",) if options.mae is not None else ()),
        *_RECORDED,
        *(names_below(UNMASKED) if options.unmasked_epochs > 0 else ()),
    ]
    data = {name: getattr(options, name) for name in _DATA}
    return {
        "version": clip_pgs.__version__,
        "model": options.model,
        "open_clip_config": open_clip_config(options, model),
        "tokenizer": tokenizer_source(options),
        "masking": options.masking,
        "masking_options": as_plain(options.masking_options),
        "text_masking": options.text_masking,
        "data": as_plain({**data, "samples per epoch": num_samples}),
        "recipe": as_plain({name: getattr(options, name) for name in recipe}),
        "options": as_plain(experiment),
        "device": device_name(device),
        "world_size": options.world_size,
    }


def warn_of_changes(options: TrainOptions, record: dict[str, Any], *, is_ordered: bool) -> None:
    """Log what another number of processes or batch size changes for a run that goes on.

    Args:
        options: The run's, with `world_size`.
        record: Of the checkpoint that it goes on from.
        is_ordered: Whether the order of the samples is the same for any of them.
    """
    earlier = {**record.get("recipe", {}), "world_size": record.get("world_size")}
    is_ordered = is_ordered and earlier.get("seed") in (None, options.seed)
    names = ("batch_size", "accum_freq", "world_size")
    now = {name: getattr(options, name) for name in names}
    before = {name: earlier.get(name) or value for name, value in now.items()}
    changes = [
        f"{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name]
    ]
    if not changes:
        return
    is_same = math.prod(before.values()) == math.prod(now.values())
    gradients = ""
    if before["world_size"] != now["world_size"] and _follows_own_samples_alone(options):
        factor = before["world_size"] / now["world_size"]
        gradients = (
            f"; without --gather-with-grad, gradients of the contrastive loss are {factor:.3g} "
            "times as large from here on, and the optimizer's averages follow"
        )
    _logger.warning(
        "The run goes on with %s: from the same number of samples, %s, in %s steps%s",
        ", ".join(changes),
        "in the order that they had" if is_ordered else "in another order",
        "the same" if is_same else "other",
        gradients,
    )


def _follows_own_samples_alone(options: TrainOptions) -> bool:
    """Return whether a process's gradient is that of its own samples' features alone.

    Of OpenCLIP's loss over the batch of all; DDP then takes the mean over the processes.
    With --local-loss a process has a share of that loss alone, a larger one of fewer processes.
    """
    has_own = options.gather_with_grad or options.local_loss or options.siglip or options.mae
    return not has_own


def _save_environment(folder: Path, *, device: torch.device, world_size: int) -> None:
    """Write `env.json`; a resumed run keeps its earlier launches under "earlier_launches"."""
    path = folder / ENVIRONMENT_NAME
    earlier: list[dict[str, Any]] = []
    if path.is_file():
        try:
            before = read_json_object(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
            earlier = [*before.pop("earlier_launches", []), before]
        except (ValueError, TypeError) as error:
            _logger.warning("%s; it begins anew", error)
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "clip_pgs": clip_pgs.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": device_name(device),
        "world_size": world_size,
        "earlier_launches": earlier,
    }
    write_json(path, content)


def device_name(device: torch.device) -> str:
    """Return what people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} ({counted(torch.get_num_threads(), 'thread')})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this package's own checkout, None where it is installed elsewhere."""
    package = Path(clip_pgs.__file__).resolve().parent
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = answer.splitlines()
    # An environment inside someone else's repository must not pass for ours.
    return commit if Path(top).resolve() / "src" / "clip_pgs" == package else None
