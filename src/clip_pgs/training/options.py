# ruff: noqa: RUF009 - the calls make fields
"""The options of a training run: each is defined once, as a field of `TrainOptions`.

A field says its type, default, range, and what part it plays in a run; the class's text says what
it is for. The parser, `--help`, YAML configs, the checks and what a resumed run is compared with
follow from it. OpenCLIP's flags keep OpenCLIP's type, default and help: a field for one says that
this trainer obeys it, and what holds of its values here; without a field it is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from clip_pgs.common import MODEL_SCHEMAS, Pairs, check_choice, expand_home, find_config
from clip_pgs.files import read_json_object
from clip_pgs.integrations import is_mae_config
from clip_pgs.integrations.open_clip_options import (
    bundled_models,
    default_optimization,
    known_models,
    trainer_actions,
)
from clip_pgs.registry import MASK_SCHEDULES, explained_arguments, registered_names
from clip_pgs.training.config import config_arguments, nearest_names

RELEASED_MASKING = "pgs-released"

# A run that goes on with another value is another experiment under an old name.
IDENTITY = "identity"
# It alters the course of a run, which may be what its owner wants; a change is worth a warning.
RECIPE = "recipe"


@dataclass(frozen=True)
class Rule:
    """A range of numbers: its text, as the end of "must be", and whether a number is in it."""

    text: str
    holds: Callable[[float], bool]


AT_LEAST_0 = Rule(">= 0", lambda value: value >= 0)
AT_LEAST_1 = Rule(">= 1", lambda value: value >= 1)
AT_LEAST_2 = Rule(">= 2", lambda value: value >= 2)
ABOVE_0 = Rule("> 0", lambda value: value > 0)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_1 = Rule("in [0, 1)", lambda value: 0 <= value < 1)
# No clock counts further.
SECONDS = Rule("in [0, 10**8]", lambda value: 0 <= value <= 10**8)
WORKERS = Rule("in [0, 1024]", lambda value: 0 <= value <= 1024)
# numpy takes no other seed.
SEED = Rule("in [0, 2**32)", lambda value: 0 <= value < 2**32)

# Headings of `--help`, with what stands below them.
GENERAL = "Options"
IMAGE = "Masking of the image"
TEXT = "Masking of the text"
UNMASKED = "Unmasked tuning"
EVALUATION = "Evaluation in training"
SAVING = "Saving and resuming"
ENDING = "What ends a run"
RELEASED = "The authors' released code of CLIP-PGS"
_BELOW_HEADINGS = {
    UNMASKED: "A last phase without any masking, in the same run folder: after --epochs masked "
    "epochs the run goes on as a second run from its weights would, with a fresh optimizer, a "
    "linear warm-up and a cosine to 0 (FLIP, arXiv 2212.00794; GLIP, arXiv 2403.15837; CLIPF, "
    "arXiv 2412.16148).",
    EVALUATION: "Suites of clip-pgs test after an epoch, on rank 0 while the others wait; results "
    "go to eval/epoch_N in the run's folder, and their curves beside the others.",
    SAVING: "Beside the epochs' checkpoints. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save before they "
    "end a run; --resume latest goes on at the very step, with the same samples, masks and rates.",
    RELEASED: "Its command line, --force-patch-dropout F with these, means --masking pgs-released. "
    "Without these, --force-patch-dropout is OpenCLIP's.",
}


def _theirs(part: str = "", rule: Rule | None = None, *, is_basic: bool = False) -> Any:
    """Define a flag of OpenCLIP's that this trainer obeys."""
    metadata = {"is_theirs": True, "part": part, "rule": rule, "is_basic": is_basic}
    return field(metadata=metadata)


def _ours(
    default: Any, heading: str, metavar: str | None = None, part: str = "", **more: Any
) -> Any:
    """Define a flag of our own.

    Args:
        default: Its value where nobody gave one.
        heading: Where it stands in `--help`.
        metavar: What stands for its value there.
        part: IDENTITY, RECIPE or neither.
        **more: `rule`, the range of its numbers; `choices`, the names it takes; `is_basic`, whether
            `--help` shows it, and not only `--help-all`; `registered`, the package whose modules
            register what it names.
    """
    metadata = {"heading": heading, "metavar": metavar, "part": part, **more}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TrainOptions(argparse.Namespace):
    """Everything that a training run is told.

    It is a namespace by name, too, since `clip_pgs.data`, which lies below, reads its attributes.

    Args:
        config: options to start from, named like the flags; flags on the command line win; the name
            of a file of configs/train, such as demo, is found where there is no such file
        check_only: check every option, say what the run will cost, and leave; nothing is created
        trial: the same, with time and memory measured on the run's device by ten steps of each
            phase, and of a mask schedule's first and last ratio
        model: a model open_clip knows, or local-dir:FOLDER, or hf-hub:OWNER/NAME
        model_config: a model of your own, as an open_clip model config, or a masked autoencoder, as
            transformers' config of a ViT-MAE; its name is the file's
        masking: how patches are chosen; package.module:Class is a strategy of your own. On a ResNet
            or ConvNeXt it hides cells of 32 pixels, which regularizes and saves no FLOPs;
            saliency-crop and --train-image-size save them
        mask_ratio: share of patches dropped, in [0, 1); the most that an image drops where the
            count adapts, the average for cluster, a threshold of similarity for pgs-released; the
            papers use 0.5 and 0.75 for random, 0.5 for pgs (default: the strategy's, 0.5)
        mask_ratio_min: the least that an image drops, for pgs and cluster (CLIP-PGS-0.3: 0.3, with
            --mask-ratio 0.5); the share that every image drops for pgs-released
        masking_option: any other option of the strategy (--help-all lists them); can be repeated
        mask_schedule: how the mask ratio goes from --mask-ratio to --mask-ratio-end over the masked
            epochs: constant, linear or cosine
        mask_ratio_end: the mask ratio that a schedule ends at, in [0, 1)
        mask_schedule_steps: different ratios a schedule takes; each is one compiled graph with
            --torchcompile
        merge: average what is dropped in groups, each one more token: the cells of a grid
            (2x2: rows x columns), candidates (of pgs, with the transport plan's weights), or both
            (2x2+candidates)
        merge_counts: let attention weigh a merged token by the number of patches that it stands for
            (ToMe, arXiv 2210.09461)
        mae_sign: keep shows a masked autoencoder what the strategy keeps, hide lets it reconstruct
            that; --mask-ratio is the share that is hidden in either case
        pack_tokens: where images keep different numbers of patches, run all their patches as one
            sequence instead of padding images to the longest: on CUDA in half precision, at the
            price of one synchronization per step; on a CPU without --torchcompile (default: on a
            CPU, unless the model is tiny)
        train_image_size: side in pixels of the images of the masked epochs, where they are smaller
            than the model's, so that each costs less (RECLIP, arXiv 2304.06028); positions are
            interpolated, also with --masking none; unmasked epochs and evaluations see the
            model's size (default: the model's)
        fsdp: shard weights, gradients and the optimizer's state over the processes (FSDP2), for
            models that are too large for one device; with --precision fp32, amp_bf16 or
            pure_bf16
        loss_chunk: rows of the matrix of similarities that the loss holds at once, where the whole
            one of a large batch takes too much memory; value and gradients stay the same (default:
            all)
        text_masking: what stays of a training caption; package.module:function is one of your own
            (default: none, truncate with --text-tokens alone)
        caption_key: in shards, the field of the side-car .json that holds the caption, or a list of
            captions of which one is drawn each epoch; several fields are joined by commas (default:
            captions are .txt; of NAME.0.txt, NAME.1.txt, ... one is drawn each epoch)
        text_tokens: tokens of a training caption, start and end included; the model keeps its
            context length (CLIPF: 8)
        text_masking_option: options of the text masking (frequency: frequencies=FILE threshold=T
            fill=BOOL); can be repeated
        unmasked_epochs: epochs without masking after the masked ones (GLIP and CLIPF: 1)
        unmasked_lr: their highest learning rate (GLIP and CLIPF: 1e-5)
        unmasked_warmup: their warm-up in steps (default: a tenth of an epoch, as CLIPF's)
        unmasked_batch_size: their --batch-size, where whole images need more memory (CLIPF: 160
            instead of 896; default: --batch-size)
        unmasked_accum_freq: their --accum-freq (default: --accum-freq)
        eval_suite: zeroshot-classification, zeroshot-retrieval, linear-probe, robustness,
            compositionality or all (default: none)
        eval_datasets: its data sets, as clip-pgs test --datasets takes them
        eval_data_root: where they are, as clip-pgs test --data-root takes it
        eval_every: every N epochs, and after the last
        eval_inference_masking: encode their images through a masking, as clip-pgs test
            --inference-masking does, or run for this run's own (default: whole images)
        eval_inference_mask_ratio: its share of dropped patches
        save_every_steps: save checkpoints/step_N.pt every N optimizer steps (default: none)
        save_every_minutes: save one when the last is M minutes old (default: none)
        keep_checkpoints: keep the last K step_N.pt; those of epochs are kept as --save-frequency
            and --delete-previous-checkpoint say
        accept_changes: with --resume latest, go on although model, masking, data or seed are not
            the run's
        max_bad_steps: steps without a finite loss and gradient are skipped; N in a row end the run
        max_bad_share: largest share of samples that may be unusable; each is a line of
            skipped.jsonl in the run's folder
        data_timeout: seconds without a batch after which loading has failed; 0 waits for ever; with
            --workers 0, too, though not inside a decoder written in C
        hang_timeout: seconds after which a run in which nothing happens is ended by name of the
            process that hangs (0 waits for ever): in one place of a step, or without processor time
            in an evaluation, a save, or a step of one process on a CPU, which may otherwise take as
            long as they take
        target_mask_ratio: its similarity threshold
        min_mask_ratio: its share of dropped patches
        use_ed: its edges
        use_otn: its optimal-transport step
        masking_options: everything the strategy's constructor gets; what was not given is left to
            its defaults
        text_masking_options: the same of the text masking
        mae: the config of a masked autoencoder, where `model_config` is one's
        model_json: what `model_config` holds where it is another's
        given: names of the options that the user or the config set
        resume_instead: what a restarted run falls back on where it has no checkpoint yet
        distributed: whether there are several processes; `rank`, `local_rank` and `world_size` say
            which this is
        upstream: what OpenCLIP's parser knows beside these; read `openclip` instead
    """

    config: str | None = _ours(None, GENERAL, "NAME|FILE.yaml", is_basic=True)
    check_only: bool = _ours(False, GENERAL, is_basic=True)
    trial: bool = _ours(False, GENERAL, is_basic=True)
    model: str = _ours("", GENERAL, "NAME", IDENTITY, is_basic=True)
    model_config: str | None = _ours(None, GENERAL, "FILE.json", is_basic=True)
    masking: str = _ours("none", IMAGE, "NAME", IDENTITY, is_basic=True, registered="masking")
    mask_ratio: float | None = _ours(None, IMAGE, "F", is_basic=True)
    mask_ratio_min: float | None = _ours(None, IMAGE, "F", is_basic=True)
    masking_option: dict[str, Any] = _ours({}, IMAGE, "KEY=VALUE", is_basic=True)
    mask_schedule: str = _ours("constant", IMAGE, "NAME", IDENTITY, choices=MASK_SCHEDULES)
    mask_ratio_end: float | None = _ours(None, IMAGE, "F", IDENTITY, rule=BELOW_1)
    mask_schedule_steps: int = _ours(5, IMAGE, "N", IDENTITY, rule=AT_LEAST_2)
    merge: str = _ours("none", IMAGE, "GROUPS", IDENTITY)
    merge_counts: bool = _ours(False, IMAGE, part=IDENTITY)
    mae_sign: str = _ours("keep", IMAGE, "keep|hide", IDENTITY, choices=("keep", "hide"))
    pack_tokens: bool | None = _ours(None, IMAGE)
    train_image_size: int | None = _ours(None, IMAGE, "N", IDENTITY, rule=AT_LEAST_1)
    fsdp: bool = _ours(False, GENERAL)
    loss_chunk: int | None = _ours(None, GENERAL, "N", rule=AT_LEAST_1)
    text_masking: str = _ours("none", TEXT, "NAME", IDENTITY, is_basic=True, registered="data")
    caption_key: str | None = _ours(None, TEXT, "KEY", IDENTITY)
    text_tokens: int | None = _ours(None, TEXT, "N", IDENTITY, is_basic=True)
    text_masking_option: dict[str, Any] = _ours({}, TEXT, "KEY=VALUE")
    unmasked_epochs: int = _ours(0, UNMASKED, "N", RECIPE, rule=AT_LEAST_0, is_basic=True)
    unmasked_lr: float = _ours(1e-5, UNMASKED, "F", RECIPE, rule=ABOVE_0)
    unmasked_warmup: int | None = _ours(None, UNMASKED, "N", RECIPE, rule=AT_LEAST_0)
    unmasked_batch_size: int | None = _ours(None, UNMASKED, "N", RECIPE, rule=AT_LEAST_1)
    unmasked_accum_freq: int | None = _ours(None, UNMASKED, "N", RECIPE, rule=AT_LEAST_1)
    eval_suite: str | None = _ours(None, EVALUATION, "NAME", is_basic=True)
    eval_datasets: str = _ours("demo", EVALUATION, "demo|paper|FILE")
    eval_data_root: str | None = _ours(None, EVALUATION, "DIR")
    eval_every: int = _ours(1, EVALUATION, "N", rule=AT_LEAST_1)
    eval_inference_masking: str | None = _ours(None, EVALUATION, "NAME")
    eval_inference_mask_ratio: float | None = _ours(None, EVALUATION, "F", rule=BELOW_1)
    save_every_steps: int | None = _ours(None, SAVING, "N", rule=AT_LEAST_1)
    save_every_minutes: float | None = _ours(None, SAVING, "M", rule=ABOVE_0, is_basic=True)
    keep_checkpoints: int = _ours(3, SAVING, "K", rule=AT_LEAST_1)
    accept_changes: bool = _ours(False, SAVING)
    max_bad_steps: int = _ours(10, ENDING, "N", rule=AT_LEAST_1)
    max_bad_share: float = _ours(0.1, ENDING, "F", rule=SHARE)
    data_timeout: float = _ours(300.0, ENDING, "S", rule=SECONDS)
    # Before NCCL gives up, after ten minutes, with an error that names nobody.
    hang_timeout: float = _ours(480.0, ENDING, "S", rule=SECONDS)
    target_mask_ratio: float | None = _ours(None, RELEASED, "F")
    min_mask_ratio: float | None = _ours(None, RELEASED, "F")
    use_ed: bool = _ours(False, RELEASED)
    use_otn: bool = _ours(False, RELEASED)

    # OpenCLIP's: data.
    train_data: str | None = _theirs(is_basic=True)
    train_data_upsampling_factors: str | None = _theirs(IDENTITY)
    val_data: str | None = _theirs(is_basic=True)
    train_num_samples: int | None = _theirs(IDENTITY, AT_LEAST_1, is_basic=True)
    val_num_samples: int | None = _theirs(rule=AT_LEAST_1)
    dataset_type: str = _theirs(IDENTITY, is_basic=True)
    dataset_resampled: bool = _theirs(IDENTITY)
    csv_separator: str = _theirs()
    csv_img_key: str = _theirs(IDENTITY)
    csv_caption_key: str = _theirs(IDENTITY)
    imagenet_val: str | None = _theirs()
    imagenet_v2: str | None = _theirs()
    workers: int = _theirs(rule=WORKERS, is_basic=True)
    image_mean: list[float] | None = _theirs(RECIPE)
    image_std: list[float] | None = _theirs(RECIPE)
    image_interpolation: str | None = _theirs(RECIPE)
    image_resize_mode: str | None = _theirs(RECIPE)
    aug_cfg: dict[str, Any] = _theirs(RECIPE)
    # OpenCLIP's: model.
    pretrained: str = _theirs(IDENTITY, is_basic=True)
    pretrained_image: bool = _theirs(IDENTITY)
    cache_dir: str | None = _theirs()
    lock_image: bool = _theirs(RECIPE)
    lock_image_unlocked_groups: int = _theirs(RECIPE, AT_LEAST_0)
    lock_image_freeze_bn_stats: bool = _theirs(RECIPE)
    lock_text: bool = _theirs(RECIPE)
    lock_text_unlocked_layers: int = _theirs(RECIPE, AT_LEAST_0)
    lock_text_freeze_layer_norm: bool = _theirs(RECIPE)
    force_context_length: int | None = _theirs(IDENTITY, AT_LEAST_1)
    force_image_size: list[int] | None = _theirs(IDENTITY)
    force_quick_gelu: bool = _theirs(IDENTITY)
    force_patch_dropout: float | None = _theirs(IDENTITY, BELOW_1)
    force_custom_text: bool = _theirs(IDENTITY)
    grad_checkpointing: bool = _theirs()
    torchcompile: bool = _theirs()
    precision: str = _theirs(RECIPE, is_basic=True)
    # OpenCLIP's: loss.
    local_loss: bool = _theirs(RECIPE)
    gather_with_grad: bool = _theirs(RECIPE)
    siglip: bool = _theirs(IDENTITY)
    loss_dist_impl: str | None = _theirs(RECIPE)
    coca_caption_loss_weight: float = _theirs(RECIPE, AT_LEAST_0)
    coca_contrastive_loss_weight: float = _theirs(RECIPE, AT_LEAST_0)
    # OpenCLIP's: optimization.
    batch_size: int = _theirs(RECIPE, AT_LEAST_1, is_basic=True)
    accum_freq: int = _theirs(RECIPE, AT_LEAST_1, is_basic=True)
    epochs: int = _theirs(RECIPE, AT_LEAST_1, is_basic=True)
    epochs_cooldown: int | None = _theirs(RECIPE, AT_LEAST_1)
    lr: float = _theirs(RECIPE, ABOVE_0, is_basic=True)
    beta1: float | None = _theirs(RECIPE, BELOW_1)
    beta2: float | None = _theirs(RECIPE, BELOW_1)
    eps: float | None = _theirs(RECIPE, ABOVE_0)
    wd: float = _theirs(RECIPE, AT_LEAST_0)
    momentum: float | None = _theirs(RECIPE, BELOW_1)
    warmup: int = _theirs(RECIPE, AT_LEAST_0, is_basic=True)
    opt: str = _theirs(IDENTITY)
    skip_scheduler: bool = _theirs(RECIPE)
    lr_scheduler: str = _theirs(RECIPE)
    lr_cooldown_end: float = _theirs(RECIPE, AT_LEAST_0)
    lr_cooldown_power: float = _theirs(RECIPE, ABOVE_0)
    grad_clip_norm: float | None = _theirs(RECIPE, ABOVE_0)
    seed: int = _theirs(IDENTITY, SEED, is_basic=True)
    # OpenCLIP's: processes and devices.
    device: str = _theirs(is_basic=True)
    dist_url: str | None = _theirs()
    dist_backend: str | None = _theirs()
    no_set_device_rank: bool = _theirs()
    ddp_static_graph: bool = _theirs()
    use_bn_sync: bool = _theirs(RECIPE)
    # OpenCLIP's: run folder, logging, checkpoints.
    logs: str = _theirs(is_basic=True)
    log_local: bool = _theirs()
    name: str | None = _theirs(is_basic=True)
    debug: bool = _theirs()
    log_every_n_steps: int = _theirs(rule=AT_LEAST_1)
    report_to: str = _theirs(is_basic=True)
    wandb_notes: str = _theirs()
    wandb_project_name: str = _theirs()
    save_frequency: int = _theirs(rule=AT_LEAST_0)
    save_most_recent: bool = _theirs()
    delete_previous_checkpoint: bool = _theirs()
    zeroshot_frequency: int = _theirs(rule=AT_LEAST_0)
    val_frequency: int = _theirs(rule=AT_LEAST_0)
    resume: str | None = _theirs(is_basic=True)

    # What follows from these, and who this process is.
    masking_options: dict[str, Any] = field(default_factory=dict, metadata={"part": IDENTITY})
    text_masking_options: dict[str, Any] = field(default_factory=dict, metadata={"part": IDENTITY})
    mae: dict[str, Any] | None = field(default=None, metadata={"part": IDENTITY})
    model_json: dict[str, Any] | None = field(default=None, metadata={"part": IDENTITY})
    given: list[str] = field(default_factory=list)
    resume_instead: str | None = None
    distributed: bool = False
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    upstream: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def changes_tower(self) -> bool:
        """Whether images meet another image tower in training than in evaluation."""
        return self.masking != "none" or self.train_image_size is not None

    @property
    def report_targets(self) -> list[str]:
        """The names that `--report-to` joins by commas."""
        return [*filter(None, map(str.strip, self.report_to.split(",")))]

    @property
    def openclip(self) -> argparse.Namespace:
        """OpenCLIP's namespace with this run's values, for calls of OpenCLIP's functions."""
        process = ("model", "distributed", "rank", "local_rank", "world_size")
        names = [*process, *(f.name for f in fields(self) if is_theirs(f))]
        values = {name: getattr(self, name) for name in names}
        return argparse.Namespace(**{**self.upstream, "distill": False, **values})

    def values(self) -> dict[str, Any]:
        """Return every option by its name, in alphabetical order, as `params.txt` lists them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "upstream"}
        return dict(sorted((self.upstream | own).items()))


# Flags of OpenCLIP's that this trainer cannot obey; one that a newer OpenCLIP added cannot either.
REFUSED_FLAGS = {
    "--horovod": "start one process per device with torchrun instead",
    "--trace": "a traced model cannot be trained",
    "--torchscript": "masking needs the Python model; --torchcompile is supported",
    "--use-bnb-linear": "no layer here computes in 8 bits; use --precision",
    "--distill-model": "no loss here has a term for another model's outputs",
    "--distill-pretrained": "no loss here has a term for another model's outputs",
    "--remote-sync": "copy the run folder with a tool of your own",
    "--remote-sync-frequency": "copy the run folder with a tool of your own",
    "--remote-sync-protocol": "copy the run folder with a tool of your own",
    "--copy-codebase": "the run folder's env.json records the versions and the commit",
}

LR_SCHEDULERS = ("cosine", "const", "const-cooldown")
FSDP_PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16", "pure_bf16")
# An autoencoder's weights stay float32.
MAE_PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16")
REPORT_TARGETS = ("tensorboard", "wandb", "all")
SIGLIP_LOSS_IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")

# Beyond it floats pass over whole numbers.
_LARGEST = 2**53
# An empty text, as a shell makes of a variable that is not set, would mean none or this folder.
_PLACES = (
    "logs",
    "resume",
    "val_data",
    "imagenet_val",
    "imagenet_v2",
    "cache_dir",
    "eval_data_root",
)
# What file systems take.
_LONGEST_NAME = 255
_EXIT_CODES = """\
Exit codes: 0 done, 2 bad input, 85 told to leave by SIGTERM, SIGUSR1 or SIGHUP (a closed
terminal), and saved, 130 Ctrl-C, 1 anything else. --resume latest goes on after any of them.
"""
_BELOW_SHORT_HELP = f"""\
--help-all lists all options, those of each strategy and those of OpenCLIP's trainer.
{_EXIT_CODES}"""
# What `clip-pgs mae` is told before all else, and what it says of it in its own words.
_AUTOENCODER = "The masked autoencoder"
_OF_AUTOENCODERS = {
    "model_config": "transformers' config of a ViT-MAE; its name is the file's",
    "masking": "how the patches are chosen; package.module:Class is a strategy of your own",
    "mae_sign": "keep shows the autoencoder what the strategy keeps, hide lets it reconstruct that",
    "mask_ratio": "share of patches hidden, in [0, 1), with either sign (default: the config's "
    "mask_ratio)",
}
# What a masked autoencoder has no part for, or is not trained with here.
NOT_FOR_AUTOENCODERS = (
    "pretrained pretrained_image val_data imagenet_val imagenet_v2 siglip loss_chunk fsdp "
    "torchcompile grad_checkpointing use_bn_sync lock_image lock_text merge merge_counts "
    "pack_tokens mask_schedule unmasked_epochs text_masking text_masking_option text_tokens "
    "caption_key force_image_size force_context_length force_quick_gelu force_custom_text "
    "force_patch_dropout train_image_size eval_inference_masking"
)

# What a config's masking is told, and goes with it where the command line turns it off.
_OF_IMAGES = "mask_ratio mask_ratio_min masking_option mask_schedule mask_ratio_end"
_OF_IMAGES += " mask_schedule_steps merge merge_counts pack_tokens"
_OF_TEXTS = "text_tokens text_masking_option"
_TURNED_OFF = {"masking": {*_OF_IMAGES.split()}, "text_masking": {*_OF_TEXTS.split()}}


def is_theirs(option: Field) -> bool:
    """Return whether a field of `TrainOptions` is a flag of OpenCLIP's."""
    return bool(option.metadata.get("is_theirs"))


def flag_of(name: str) -> str:
    """Return an option's flag: "--mask-ratio" for "mask_ratio"."""
    return f"--{name.replace('_', '-')}"


def names_of(part: str) -> list[str]:
    """Return the names of the options that play a part in a run: IDENTITY or RECIPE."""
    return [f.name for f in fields(TrainOptions) if f.metadata.get("part") == part]


def names_below(heading: str) -> list[str]:
    """Return the names of our options below a heading of `--help`."""
    return [f.name for f in fields(TrainOptions) if f.metadata.get("heading") == heading]


class _RefusedError(ValueError):
    """One sentence of the parser's own."""


class _Parser(argparse.ArgumentParser):
    """Raises one sentence instead of printing a usage text and leaving."""

    def error(self, message: str) -> NoReturn:
        raise _RefusedError(message)


def option_parser(
    *, is_short: bool = False, is_autoencoder: bool = False
) -> argparse.ArgumentParser:
    """Return the parser of all flags; what nobody gave is not in its namespace.

    Args:
        is_short: Whether its help shows only what most runs are told.
        is_autoencoder: Whether its help is that of `clip-pgs mae`.
    """
    what = "a CLIP model whose image tower sees only some patches of each image"
    if is_autoencoder:
        what = "a masked autoencoder on images alone; a strategy chooses what it is shown"
    parser = _Parser(
        prog="clip-pgs mae" if is_autoencoder else "clip-pgs train",
        usage="%(prog)s [CONFIG] [--nproc N] [options]",
        description=f"Train {what}.",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    hints, texts = get_type_hints(TrainOptions), explained_arguments(TrainOptions)
    ours = [f for f in fields(TrainOptions) if "heading" in f.metadata]
    groups: dict[str, Any] = {}
    first = _OF_AUTOENCODERS if is_autoencoder else {}
    hidden: list[str] = []
    if is_autoencoder:
        hidden = ["model", *NOT_FOR_AUTOENCODERS.split(), TEXT, UNMASKED, RELEASED]
    for option in sorted(ours, key=lambda option: option.name not in first):
        heading = _AUTOENCODER if option.name in first else option.metadata["heading"]
        if heading not in groups:
            below = None if is_short or heading in hidden else _BELOW_HEADINGS.get(heading)
            groups[heading] = parser.add_argument_group(heading, below)
        text = first.get(option.name) or texts.get(option.name, "")
        argument = _argument(option, hints[option.name], text)
        is_basic = option.name in first or option.metadata.get("is_basic")
        if option.name in hidden or heading in hidden or (is_short and not is_basic):
            argument["help"] = argparse.SUPPRESS
        groups[heading].add_argument(flag_of(option.name), **argument)
    add = groups[GENERAL].add_argument
    add(
        "--nproc",
        metavar="N",
        help="processes on this machine, which torchrun starts (default: NPROC_PER_NODE, or the "
        "number of its GPUs, or 1)",
    )
    add("-h", "--help", action="help", help="print what most runs need and leave")
    add("--help-all", action="help", help="print every option, those of each strategy, and leave")

    theirs = parser.add_argument_group(
        "OpenCLIP's options, with OpenCLIP's meaning",
        "Each switch also has a --no- form, which takes back what a config set.",
    )
    obeyed = {flag_of(f.name): f for f in fields(TrainOptions) if is_theirs(f)}
    by_model = default_optimization("ViT")
    for flag, original in trainer_actions().items():
        if flag == "--model":
            continue
        action = copy.copy(original)
        action.default = argparse.SUPPRESS
        action.help = argparse.SUPPRESS
        is_shown = flag in obeyed and obeyed[flag].name not in hidden
        if is_shown and (obeyed[flag].metadata["is_basic"] or not is_short):
            text = original.help or ""
            if original.default is None and action.dest in by_model:
                text += f" (default: OpenCLIP's for the model, {by_model[action.dest]:g} for a ViT)"
            action.help = _with_default(text, original.default)
        theirs._add_action(action)
        if action.nargs == 0:
            theirs.add_argument(
                f"--no-{flag[2:]}", dest=action.dest, action="store_false", help=argparse.SUPPRESS
            )
    return parser


def _with_default(text: str, value: Any) -> str:
    """Return a flag's help, which says the default if it has not done so."""
    if "(default: " in text:
        return text
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif value in (None, "", {}) or value is MISSING:
        value = "none"
    return f"{text} (default: {f'{value:g}' if isinstance(value, float) else value})".strip()


def help_text(*, is_short: bool, is_autoencoder: bool = False) -> str:
    """Return what `--help` or `--help-all` prints; the latter imports torch for the strategies."""
    text = option_parser(is_short=is_short, is_autoencoder=is_autoencoder).format_help()
    if is_short:
        return f"{text}\n{_BELOW_SHORT_HELP}"
    from clip_pgs.data.text_masking import TEXT_MASKINGS
    from clip_pgs.masking import describe_masking, list_maskings

    lines = ["", "Strategies (--masking NAME), with options (--masking-option KEY=VALUE):"]
    for declared in map(describe_masking, list_maskings()):
        lines += ["", *_wrapped(f"{declared.name}: keeps {declared.keeps} ({declared.paper})", 2)]
        for option in declared.options:
            # None stands for a value that depends on others, which the text says.
            has_default = option.default not in (None, inspect.Parameter.empty)
            default = f" (default: {option.default})" if has_default else ""
            lines += _wrapped(f"{option.name}: {option.help}{default}", 4)
    if not is_autoencoder:
        lines += ["", "Text maskings (--text-masking NAME) leave of a caption:", ""]
    for name in [] if is_autoencoder else TEXT_MASKINGS.names():
        declaration = TEXT_MASKINGS.declaration(name)
        needs = f", needs {declaration['needs']}" if declaration["needs"] else ""
        lines += _wrapped(f"{name}: {declaration['summary']} ({declaration['source']}{needs})", 2)
    return "\n".join([text.rstrip(), *lines, "", _EXIT_CODES])


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        98,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        break_on_hyphens=False,
    )


def _argument(option: Field, hint: Any, text: str) -> dict[str, Any]:
    """Return what argparse is told of one of our flags."""
    metadata, default = option.metadata, option.default
    if "registered" in metadata:
        text = f"{', '.join(registered_names(metadata['registered']))}: {text}"
    # A dictionary's default is made by a factory.
    text = _with_default(text, option.default)
    argument: dict[str, Any] = {"help": text.replace("%", "%%")}
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    if kinds == [bool]:
        return {**argument, "action": argparse.BooleanOptionalAction}
    argument["metavar"] = metadata["metavar"]
    if get_origin(hint) is dict:
        return {**argument, "nargs": "+", "action": Pairs}
    if "choices" in metadata:
        return {**argument, "choices": list(metadata["choices"])}
    if kinds != [str]:
        return {**argument, "type": _or_none(kinds[0]) if default is None else kinds[0]}
    return argument


def _or_none(kind: type) -> Callable[[str], Any]:
    """Return a reader of numbers that takes "none" too, which takes back what a config set."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__
    return read


def parse_options(argv: Sequence[str]) -> TrainOptions:
    """Parse the command line of a training run, and the config it names.

    With `--model-config`, that model is registered in open_clip and `model` is its name.

    Args:
        argv: Arguments without the program's name.

    Raises:
        ValueError: If an option is unknown, abbreviated, refused or malformed, or if the model
            is not named or not known.
        SystemExit: For `--help` and `--help-all`.
    """
    options = read_options(argv)
    register_model_config(options)
    return options


def read_options(argv: Sequence[str], *, is_autoencoder: bool = False) -> TrainOptions:
    """Do what `parse_options` does without torch, which is everything but the model config."""
    for flag in ("--help", "-h", "--help-all"):
        if flag in argv:
            text = help_text(is_short=flag != "--help-all", is_autoencoder=is_autoencoder)
            sys.stdout.write(text)
            raise SystemExit(0)
    if sum(token.partition("=")[0] == "--config" for token in argv) > 1:
        raise ValueError("two configs are given; one starts from another with a line base: OTHER")
    parser = option_parser()
    said = _parse(parser, argv)
    typed = set(said)
    if "config" in said:
        configured = config_arguments(said["config"], parser, said)
        said = _parse(parser, [*configured, *argv])

    if "nproc" in said:
        raise ValueError(
            "--nproc is for `clip-pgs train`, which starts processes; the demo, and a process "
            "that a launcher started, trains alone"
        )
    obeyed = {f.name for f in fields(TrainOptions) if is_theirs(f)}
    upstream = {action.dest: action.default for action in trainer_actions().values()}
    for name in sorted(said.keys() & upstream.keys() - obeyed - {"model"}):
        if said[name] is not False:
            reason = REFUSED_FLAGS.get(flag_of(name), "this version of OpenCLIP added it after us")
            raise ValueError(f"{flag_of(name)} is not supported: {reason}")
        del said[name]
    for switch, names in _TURNED_OFF.items():
        if switch in typed and said[switch] == "none":
            # What a config says of its own masking is not said of this one.
            said = {name: value for name, value in said.items() if name not in names - typed}
    # What is None, or a switch that is off, is as if nobody had said it; a ratio of 0 is said.
    said = {name: value for name, value in said.items() if value is not None and value != {}}
    given = {name for name, value in said.items() if value is not False}
    if "model_config" in said:
        said["model_config"] = find_config(said["model_config"], "models")
    said["model"] = choose_model(said.get("model"), said.get("model_config"))
    if "model_config" in said:
        content = _read_model(said["model_config"])
        said["mae" if is_mae_config(content) else "model_json"] = content
    theirs = {name: said.get(name, upstream[name]) for name in obeyed}
    if "timm" not in theirs["opt"]:
        defaults = default_optimization(said["model"])
        theirs |= {name: value for name, value in defaults.items() if theirs[name] is None}
    options = TrainOptions(**{**theirs, **said, "upstream": {**upstream, **theirs}})

    released: dict[str, Any] = {}
    if released_flags(options):
        released = _released_options(options, is_named="masking" in said)
        options.masking, options.force_patch_dropout = RELEASED_MASKING, None
        given = (given | {"masking"}) - {"force_patch_dropout"}
    if "text_masking" not in said and options.text_tokens is not None:
        options.text_masking = "truncate"
    if options.masking != "none":
        options.masking_options = _constructor_options(options, released)
    options.text_masking_options = dict(options.text_masking_option)
    options.given = sorted(given - {"check_only", "trial", "config"})
    return options


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return what a command line says, by the names of the options."""
    for token in argv:
        # argparse would take it for the end of the options, and then lose it.
        if token.partition("=")[0] == "--" or token.partition("=")[2] == "--":
            raise ValueError(f"'--' is no value, got {token!r}")
    try:
        said, rest = parser.parse_known_args(list(map(expand_home, argv)))
    except _RefusedError:
        raise
    except (ValueError, SyntaxError):
        # The only flag whose values OpenCLIP takes apart without a message of its own.
        raise ValueError("--aug-cfg takes KEY=VALUE pairs, such as 'scale=(0.5, 1.0)'") from None
    for flag in (token.partition("=")[0] for token in rest):
        if flag.startswith("--") and " " not in flag:
            known = [flag for action in parser._actions for flag in action.option_strings]
            near = nearest_names(flag, known)
            raise ValueError(f"unknown option {flag} (no abbreviations); {near}")
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
    return vars(said)


def choose_model(model: str | None, model_config: str | None) -> str:
    """Return the model's name, which is that of the file for a config of the user's own.

    OpenCLIP's trainer takes RN50 where nothing is named, and passes over a broken config file.

    Args:
        model: The value of `--model`, or None.
        model_config: The value of `--model-config`, or None.

    Raises:
        ValueError: If both are missing or disagree, the model is unknown, or the file takes the
            name of a model of open_clip.
    """
    if model_config is not None:
        path, what = Path(model_config), f"--model-config {model_config}"
        if model not in (None, path.stem):
            raise ValueError(
                f"--model {model} and {what} name two models; leave out --model or give "
                f"--model {path.stem}"
            )
        if path.suffix != ".json":
            raise ValueError(f"--model-config must end in .json, got {model_config}")
        if path.stem in bundled_models():
            raise ValueError(f"{what} has the name of a model of open_clip; rename the file")
        return path.stem
    if model is None:
        raise ValueError("no model is named; give --model NAME or --model-config FILE.json")
    if not model.startswith(MODEL_SCHEMAS) and model not in known_models():
        near = nearest_names(model, known_models(), lists="open_clip.list_models()")
        raise ValueError(
            f"open_clip knows no model {model!r} ({near}); a config of your own goes "
            "after --model-config"
        )
    return model


def _read_model(model_config: str) -> dict[str, Any] | None:
    """Return what a model config holds; None where it is none, which is said when it is used."""
    with contextlib.suppress(ValueError):
        return read_json_object(Path(model_config), what="it")
    return None


def register_model_config(options: TrainOptions) -> None:
    """Make open_clip know the model of `--model-config`, if there is one of its kind.

    Raises:
        ValueError: If the file is no model config.
    """
    if options.model_config is None or options.mae is not None:
        return
    import open_clip

    from clip_pgs.integrations.open_clip.model_config import check_model_config, check_model_name

    path, what = Path(options.model_config), f"--model-config {options.model_config}"
    config = read_json_object(path, what=what)
    check_model_config(config, what=what)
    check_model_name(config, path)
    open_clip.add_model_config(path.resolve())


def check_values(options: TrainOptions) -> None:
    """Refuse what can be told to be wrong without torch: numbers out of range, unknown names.

    Args:
        options: From `read_options` or `parse_options`.

    Raises:
        ValueError: With one sentence, for the first thing that is wrong.
    """
    _check_ranges(options)
    for option in fields(TrainOptions):
        registered, name = option.metadata.get("registered"), getattr(options, option.name)
        if registered is not None and ":" not in name:
            check_choice(name, registered_names(registered), name=flag_of(option.name))
    check_choice(options.lr_scheduler, LR_SCHEDULERS, name="--lr-scheduler")
    if options.siglip and options.loss_dist_impl is not None:
        check_choice(options.loss_dist_impl, SIGLIP_LOSS_IMPLEMENTATIONS, name="--loss-dist-impl")
    for target in options.report_targets:
        check_choice(target, REPORT_TARGETS, name="--report-to, names joined by commas,")
    for place in _PLACES:
        if getattr(options, place) == "":
            raise ValueError(f"{flag_of(place)} must name something, got an empty text")
    name = options.name
    text = "run" if name is None else name
    # In a locale without them, letters beyond ASCII are surrogates here, one a byte.
    with contextlib.suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    is_path = text in ("", ".", "..") or "/" in text or "\\" in text
    if is_path or not text.isprintable() or len(text.encode()) > _LONGEST_NAME:
        raise ValueError(
            "--name must be one folder name of printable characters, without separators and of at "
            f"most {_LONGEST_NAME} bytes, got {name!r}"
        )
    if "://" in (options.resume or ""):
        raise ValueError(f"--resume takes a file or a folder, and no URL, got {options.resume!r}")
    if options.mae is not None:
        check_choice(options.precision, MAE_PRECISIONS, name="--precision of a masked autoencoder")
    if options.fsdp:
        check_choice(options.precision, FSDP_PRECISIONS, name="--precision with --fsdp")
        for name, cause in (
            ("torchcompile", options.torchcompile),
            ("opt", options.opt != "adamw"),
        ):
            if cause:
                raise ValueError(f"--fsdp cannot go with {flag_of(name)} {getattr(options, name)}")
    if options.resume == "latest" and name is None:
        raise ValueError("--resume latest needs the --name of the run to continue")


def _check_ranges(options: TrainOptions) -> None:
    for option in fields(TrainOptions):
        rule, value = option.metadata.get("rule"), getattr(options, option.name)
        if rule is None or value is None or (abs(value) <= _LARGEST and rule.holds(value)):
            continue
        text = "at most 2**53" if rule.holds(value) else rule.text
        if isinstance(value, float) and not math.isfinite(value):
            text = f"a finite number {rule.text}"
        raise ValueError(f"{flag_of(option.name)} must be {text}, got {value}")
    for flag, values in (("--image-mean", options.image_mean), ("--image-std", options.image_std)):
        if values is not None and not (len(values) == 3 and all(map(math.isfinite, values))):
            raise ValueError(f"{flag} takes 3 finite numbers, got {values}")
    if options.image_std is not None and min(options.image_std) <= 0:
        raise ValueError(f"--image-std must be > 0, got {options.image_std}")
    size = options.force_image_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(f"--force-image-size takes 1 or 2 sizes >= 1, got {size}")


def _constructor_options(options: TrainOptions, released: dict[str, Any]) -> dict[str, Any]:
    """Merge the masking flags; what was not given is left to the constructor's default."""
    ratios = {name: getattr(options, name) for name in ("mask_ratio", "mask_ratio_min")}
    by_flag = {name: value for name, value in ratios.items() if value is not None} | released
    for name in by_flag.keys() & options.masking_option.keys():
        raise ValueError(f"{name} is given as a flag and as --masking-option; keep one")
    return {**by_flag, **options.masking_option}


def released_flags(options: TrainOptions) -> list[str]:
    """Return the flags that are given of those that the authors' released code alone has."""
    names = names_below(RELEASED)
    return [flag_of(name) for name in names if getattr(options, name) not in (None, False)]


def _released_options(options: TrainOptions, *, is_named: bool) -> dict[str, Any]:
    """Return the options of `pgs-released` that a command line of the released code means.

    There `--force-patch-dropout F` is the share of patches drawn as candidates,
    `--target-mask-ratio` a threshold on their similarity to the others, `--min-mask-ratio` the
    share that is dropped, and the switches turn its two steps on.

    Args:
        options: With at least one of `released_flags`.
        is_named: Whether `--masking` was given, too.

    Raises:
        ValueError: If the flags are mixed with those of another strategy, or one is missing
            without which the released code masks nothing.
    """
    flags = ", ".join(released_flags(options))
    if is_named and options.masking != RELEASED_MASKING:
        raise ValueError(
            f"{flags} are flags of CLIP-PGS's released code, which is --masking "
            f"{RELEASED_MASKING}; got --masking {options.masking}"
        )
    for name in ("mask_ratio", "mask_ratio_min"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{flag_of(name)} goes with --masking NAME; beside {flags} the released code "
                "takes --min-mask-ratio"
            )
    needed = (options.force_patch_dropout, options.target_mask_ratio, options.min_mask_ratio)
    if None in needed:
        raise ValueError(
            f"beside {flags} the released code needs all of --force-patch-dropout, "
            "--target-mask-ratio and --min-mask-ratio (its scripts: 0.05, 0.5, and 0.3 or 0.5)"
        )
    return {
        "mask_ratio": options.target_mask_ratio,
        "mask_ratio_min": options.min_mask_ratio,
        "candidate_ratio": options.force_patch_dropout,
        "edges": options.use_ed,
        "transport": options.use_otn,
        "num_epochs": options.epochs,
    }
