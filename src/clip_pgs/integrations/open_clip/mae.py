"""A ViT-MAE of Hugging Face where trainer and evaluation expect a model of OpenCLIP.

`MaeModel` reconstructs what a strategy hides while it is masked and in train mode, and encodes
whole images in eval mode: the feature is the mean of the encoder's patch tokens. Its files are
those that transformers reads and writes.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Generator, Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.utils import logging as hub_logging

from clip_pgs.checkpoint_reading import fit_weights, read_checkpoint
from clip_pgs.common import check_choice, explained, silenced
from clip_pgs.files import HF_CONFIG_NAME, read_json_object
from clip_pgs.integrations import MAE_TYPE, is_mae_config
from clip_pgs.integrations.mae import SIGNS, create_fitting_masking, patch_order
from clip_pgs.integrations.masked_tower import MaskedTower, PatchGrid, unwrap
from clip_pgs.integrations.open_clip.model_config import (
    IMAGE_SETTINGS,
    MAX_LAYERS,
    MISFITS,
    Rule,
    check_preprocessing,
    check_values,
    whole_number,
)
from clip_pgs.masking import MaskingStrategy, PatchInputs, PatchSelection
from clip_pgs.masking.merge import Merge
from clip_pgs.masking.sampling import draw_noise, kept_patches, mask_top

# As transformers names them.
MAE_WEIGHTS_NAME = "model.safetensors"
_WEIGHTS_NAMES = (MAE_WEIGHTS_NAME, "pytorch_model.bin")
_INDEX_ENDING = ".index.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
# What weights may be noted to be of; they are read as they are.
_DTYPES = ("float32", "float16", "bfloat16")

# Threads encode one after the other: transformers takes the ratio from the config alone.
_CONFIG_LOCK = threading.Lock()

_PREFIX = "visual.mae."
_MAX_SIZE = 2**16
_TOWERS = ("", "decoder_")
_LAYERS = "num_hidden_layers"
_SIZES = ("hidden_size", _LAYERS, "num_attention_heads", "intermediate_size")
# What transformers writes beside a model's options.
_NOTES = ("_name_or_path", "torch_dtype", "transformers_version")
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
# What a processor of transformers does that does not say otherwise, by the beginning of its name.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {
        "resample": _RESAMPLE["bilinear"],
        "do_center_crop": False,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
    "CLIP": {
        "resample": _RESAMPLE["bicubic"],
        "do_center_crop": True,
        "image_mean": OPENAI_DATASET_MEAN,
        "image_std": OPENAI_DATASET_STD,
    },
}
_OF_EVERY_PROCESSOR = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}


class MaeTower(nn.Module):
    """An autoencoder of which, called, the encoder turns whole images into features.

    Args:
        config: Of the autoencoder.
        preprocess: How images become pixels; see `open_clip.transform.PreprocessCfg`.

    Attributes:
        mae: transformers' model.
    """

    def __init__(self, config: ViTMAEConfig, preprocess: PreprocessCfg) -> None:
        super().__init__()
        self.image_size = preprocess.size
        self.image_mean, self.image_std = preprocess.mean, preprocess.std
        # OpenCLIP's towers have theirs under this name.
        self.preprocess_cfg = asdict(preprocess)
        self.mae: Any = ViTMAEForPreTraining(config)

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return self.mae.vit.embeddings.patch_embeddings.num_patches

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, 3, H, W): the mean of the patch tokens of each, shape (B, D)."""
        config = self.mae.config
        with _CONFIG_LOCK:
            mask_ratio, config.mask_ratio = config.mask_ratio, 0.0
            try:
                tokens = self.mae.vit(x, noise=self.raster_order(x)).last_hidden_state
            finally:
                config.mask_ratio = mask_ratio
        return tokens[:, 1:].mean(dim=1)

    def raster_order(self, x: Tensor) -> Tensor:
        """Return ascending numbers in [0, 1) for each patch of each image, (B, N)."""
        return (torch.arange(self.num_patches, device=x.device) / self.num_patches).repeat(
            len(x), 1
        )


class MaskedMaeTower(MaskedTower, MaeTower):
    """An autoencoder that, called in train mode, reconstructs what its masking does not keep."""

    plain_class = MaeTower
    supported = "ViT-MAE of transformers"
    takes_smaller_images = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss of a batch of images (B, 3, H, W), once for each: shape (B,).

        Where the masking is not active, they are encoded, as by a plain tower.
        """
        if not self.masking.is_active(training=self.training):
            return MaeTower.forward(self, x)
        self.check_images(x)
        selection = self.masking.select(x, self.embed_patches(x))
        # The model takes the patches with the lowest numbers, here in raster order.
        is_shown_BN = kept_patches(selection, self.num_patches)
        return self.mae(x, noise=self.raster_order(x) - is_shown_BN.float()).loss.expand(len(x))

    @staticmethod
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse what does not show the model as many patches as it takes."""
        # Whoever holds the tower alone looks at what a strategy chooses.
        if not isinstance(unwrap(model), (MaeModel, MaeTower)):
            return
        if not isinstance(strategy, MaeMasking) or merge is not None:
            raise ValueError(
                "a masked autoencoder is masked in pretraining alone, and without merging; its "
                "features are those of whole images"
            )

    @staticmethod
    def attention_refusal(tower: Any) -> str | None:
        """Return why there is no attention to read."""
        return "nothing trains an autoencoder's class token"

    @staticmethod
    def patch_grid(tower: Any) -> PatchGrid:
        """Return how an autoencoder cuts its images."""
        config = tower.mae.config
        side = config.image_size // config.patch_size
        return PatchGrid((side, side), (config.patch_size, config.patch_size))

    @staticmethod
    def patch_weight(tower: Any) -> Tensor:
        """Return the weight that meets the pixels first."""
        return tower.mae.vit.embeddings.patch_embeddings.projection.weight

    @torch.no_grad()
    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings without positions, shape (B, N, D)."""
        return self.mae.vit.embeddings.patch_embeddings(pixels)


class MaeModel(nn.Module):
    """A masked autoencoder with the methods of an OpenCLIP model that has no text tower.

    Args:
        record: What `mae_record` returned.

    Attributes:
        visual: The autoencoder.
        preprocess: How images become pixels.
        resized_side: Shorter side of an image before it is cropped to the model's, where that is
            not the same.
        record: As given.

    Raises:
        ValueError: If transformers cannot build it.
    """

    # What a loss of OpenCLIP's would be scaled by.
    logit_scale = None
    logit_bias = None

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__()
        config = ViTMAEConfig(**record["model_cfg"])
        side: Any = config.image_size
        self.record = record
        self.preprocess = PreprocessCfg(size=(side, side), **record["preprocess_cfg"])
        self.resized_side: int | None = None
        with explained("transformers cannot build the model", *MISFITS, KeyError):
            self.visual = MaeTower(config, self.preprocess)

    def forward(self, image: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Reconstruct what is hidden of images (B, 3, H, W), while masked and in train mode.

        Returns:
            "reconstruction_loss", the mean over the batch, for each image: shape (B,).
        """
        return {"reconstruction_loss": self.visual(image)}

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, H, W), shape (B, D)."""
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        """Raise a `ValueError`: there is no text tower."""
        raise ValueError("a masked autoencoder has no text tower; linear-probe can score it")

    def transform(self, *, is_train: bool, **options: Any) -> Callable:
        """Return what turns a picture into pixels; see `open_clip.image_transform_v2`."""
        transform: Any = image_transform_v2(self.preprocess, is_train=is_train, **options)
        if self.resized_side is not None and not is_train:
            transform.transforms[0].size = self.resized_side
        return transform


class MeanOfRows(nn.Module):
    """The loss of `MaeModel`, which makes it itself."""

    def forward(self, reconstruction_loss: Tensor, output_dict: bool = True) -> dict[str, Tensor]:
        """Return the mean of the images' losses (B,), by its name."""
        return {"reconstruction_loss": reconstruction_loss.mean()}


class MaeMasking(MaskingStrategy):
    """Keeps what a strategy keeps, or what it drops; always as many patches.

    Where the strategy keeps another number, random patches fill up or fall out.

    Args:
        strategy: Chooses the patches.
        sign: "keep" shows the autoencoder what the strategy keeps, "hide" all else.
        num_shown: Patches that it is shown.
    """

    def __init__(self, strategy: MaskingStrategy, *, sign: str, num_shown: int) -> None:
        super().__init__()
        check_choice(sign, SIGNS, name="sign")
        self.strategy = strategy
        self.sign = sign
        self.num_shown = num_shown
        self.requires = strategy.requires  # type: ignore[misc]

    def state(self) -> dict[str, float | list[float]]:
        """Return what the strategy found."""
        return self.strategy.state()

    def load_state(self, state: Mapping[str, float | list[float]]) -> None:
        """Restore what `state` returned."""
        self.strategy.load_state(state)

    def needs_calibration(self, progress: float) -> bool:
        """Return whether the strategy does."""
        return self.strategy.needs_calibration(progress)

    def calibrate(
        self, inputs: PatchInputs, *, average: Callable[[float], float] | None = None
    ) -> bool | None:
        """Fit the strategy to a batch."""
        return self.strategy.calibrate(inputs, average=average)

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Choose the patches to show."""
        inputs = replace(inputs, noise=draw_noise(inputs, generator))
        order_BN = patch_order(self.strategy, inputs, sign=self.sign)
        return mask_top(order_BN, num_mask=inputs.num_patches - self.num_shown)


def create_mae_masking(
    name: str, config: Mapping[str, Any], *, sign: str = "keep", **options: Any
) -> MaeMasking:
    """Build the strategy of an autoencoder.

    Args:
        name: A registered strategy, or "package.module:Class".
        config: The autoencoder's, from `mae_config`: its `mask_ratio` is the share that is hidden,
            of which a strategy hides, or with "hide" keeps, as much.
        sign: See `MaeMasking`.
        **options: The strategy's other options.

    Raises:
        ValueError: If there is no such strategy, it keeps everything, or an option is wrong.
    """
    num_patches, num_shown = _counts(config)
    counts = {"num_patches": num_patches, "num_shown": num_shown}
    strategy = create_fitting_masking(name, **counts, sign=sign, **options)
    if strategy.keeps_all:
        raise ValueError(f"--masking {name} hides nothing from an autoencoder; take random, say")
    return MaeMasking(strategy, sign=sign, num_shown=num_shown)


def _counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many patches an image has, and how many of them the model is shown."""
    num_patches = (config["image_size"] // config["patch_size"]) ** 2
    return num_patches, int(num_patches * (1 - config["mask_ratio"]))


# ------------------------------------------------------------------------------------------------
# Configs and files
# ------------------------------------------------------------------------------------------------


def mae_config(
    content: Mapping[str, Any], *, what: str, mask_ratio: float | None = None
) -> dict[str, Any]:
    """Return the whole config of an autoencoder, checked.

    Args:
        content: As in transformers' config.json; what is not there has transformers' default.
        what: What to call it in messages.
        mask_ratio: Takes the place of its own.

    Raises:
        ValueError: If it is none, has an unknown option, or a size or ratio is out of its range.
    """
    if not is_mae_config(content):
        raise ValueError(f"{what} must have the model_type {MAE_TYPE}")
    sizes = [f"{tower}{size}" for tower in _TOWERS for size in _SIZES]
    finite: Rule = (lambda v: not isinstance(v, float) or math.isfinite(v), "a finite number")
    rules: dict[str, Rule] = {
        **dict.fromkeys((*ViTMAEConfig().to_dict(), *_NOTES), finite),
        **dict.fromkeys(("image_size", "patch_size", *sizes), whole_number(1, _MAX_SIZE)),
        **dict.fromkeys([f"{tower}{_LAYERS}" for tower in _TOWERS], whole_number(1, MAX_LAYERS)),
        **dict.fromkeys(("dtype", "torch_dtype"), (_DTYPES.__contains__, " or ".join(_DTYPES))),
        "num_channels": (lambda v: v == 3, "3"),
        # An encoder of whole images says 0.
        "mask_ratio": (lambda v: isinstance(v, (int, float)) and 0 <= v < 1, "a number in [0, 1)"),
        "return_dict": (lambda v: v is True, "true"),
    }
    needed = ("image_size", "patch_size", "num_channels", "mask_ratio", *sizes)
    check_values(rules, content, what=what, never_null=needed)
    written = {**content, "architectures": ["ViTMAEForPreTraining"], "return_dict": True}
    # Also what transformers' own checks of types raise, which is no ValueError.
    with explained(what, Exception):
        config = ViTMAEConfig(**written).to_dict()
    config["mask_ratio"] = config["mask_ratio"] if mask_ratio is None else mask_ratio
    if config["image_size"] % config["patch_size"]:
        raise ValueError(
            f"{what}: patch_size must divide image_size {config['image_size']}, "
            f"got {config['patch_size']}"
        )
    for tower in _TOWERS:
        width, heads = config[f"{tower}hidden_size"], config[f"{tower}num_attention_heads"]
        # Positions are sines and cosines of rows and columns.
        if width % heads or width % 4:
            raise ValueError(
                f"{what}: {tower}hidden_size must be a multiple of 4 and of the {heads} "
                f"{tower}num_attention_heads, got {width}"
            )
    return config


def check_hidden_share(config: Mapping[str, Any], *, what: str) -> None:
    """Refuse to train an autoencoder, of a config from `mae_config`, that is shown all or none.

    Raises:
        ValueError: If it is.
    """
    num_patches, num_shown = _counts(config)
    if not 0 < num_shown < num_patches:
        raise ValueError(
            f"{what}: a mask ratio must leave some of {num_patches} patches to show and "
            f"some to hide, got {config['mask_ratio']}"
        )


def mae_record(config: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Return what rebuilds an autoencoder, as plain types.

    Args:
        config: From `mae_config`.
        **given: Of `IMAGE_SETTINGS`: mean and deviation ("std") of the pixels' three colors, how
            images are resized ("bicubic" or "bilinear"; "shortest", and cropped, or "squash"). None
            is OpenCLIP's default.
    """
    known = PreprocessCfg(**{name: value for name, value in given.items() if value is not None})
    preprocess = {name: getattr(known, name) for name in IMAGE_SETTINGS}
    return json.loads(json.dumps({"model_cfg": dict(config), "preprocess_cfg": preprocess}))


def hub_configs(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what transformers reads of an autoencoder beside its weights, by the files' names.

    Args:
        record: From `mae_record`.

    Raises:
        ValueError: If transformers cannot prepare images as the record says.
    """
    side, preprocess = record["model_cfg"]["image_size"], record["preprocess_cfg"]
    if preprocess["resize_mode"] == "longest":
        raise ValueError(
            "--image-resize-mode longest pads images, as no processor of transformers would for "
            "the export of an autoencoder; take shortest or squash"
        )
    is_cropped = preprocess["resize_mode"] == "shortest"
    square = {"height": side, "width": side}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if is_cropped else square,
        # "random" is for training alone: OpenCLIP evaluates by bicubic then.
        "resample": _RESAMPLE.get(preprocess["interpolation"], _RESAMPLE["bicubic"]),
        "do_center_crop": is_cropped,
        "crop_size": square,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }
    return {HF_CONFIG_NAME: record["model_cfg"], PREPROCESSOR_NAME: processor}


def hub_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a `MaeModel` by transformers' names."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}


def load_mae(folder: Path) -> MaeModel:
    """Open an export of an autoencoder, or what any version of transformers wrote of a ViT-MAE.

    Of an encoder alone (`ViTMAEModel`) the model has no decoder and only encodes.

    Raises:
        ValueError: If a file is missing or damaged, or the weights do not fit.
    """
    file, path = folder / HF_CONFIG_NAME, folder / PREPROCESSOR_NAME
    config = read_json_object(file, what=str(file))
    preprocess: dict[str, Any] = {}
    resized_side: int | None = None
    if path.is_file():
        side = mae_config(config, what=str(folder))["image_size"]
        preprocess, resized_side = _read_processor(path, side=side)
    record = {"model_cfg": config, "preprocess_cfg": preprocess}
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        weights |= read_checkpoint(path)["state_dict"]
    model = build_mae(record, weights, what=str(folder))
    model.resized_side = resized_side
    return model


def _read_processor(path: Path, *, side: int) -> tuple[dict[str, Any], int | None]:
    """Return how a processor of transformers prepares images; refuse what cannot be done alike.

    Args:
        path: Its file.
        side: Of the model's images.

    Returns:
        OpenCLIP's settings, and the shorter side before the crop where it is not the model's.
    """
    given = {k: v for k, v in read_json_object(path, what=str(path)).items() if v is not None}
    # What transformers takes for a ViT-MAE without a name.
    name = "ViTImageProcessor"
    for key in ("feature_extractor_type", "image_processor_type"):
        name = str(given.get(key, name))
    found = re.fullmatch(r"(ViT|CLIP)(ImageProcessor(Fast|Pil)?|FeatureExtractor)", name)
    if found is None:
        known = "ViTImageProcessor or CLIPImageProcessor"
        raise ValueError(f"{path}: image_processor_type takes {known}, got {name!r}")
    said = {**_OF_EVERY_PROCESSOR, **_PROCESSORS[found[1]], **given}
    is_cropped = said["do_center_crop"]
    square = {"height": side, "width": side}
    resized: Any = said.setdefault("size", side)
    if found[1] == "CLIP" and not isinstance(resized, dict):
        resized = {"shortest_edge": resized}
    edge = resized.get("shortest_edge") if isinstance(resized, dict) and len(resized) == 1 else None
    is_edge_good = bool(is_cropped) and type(edge) is int and side <= edge <= _MAX_SIZE
    switch: Rule = (lambda v: isinstance(v, bool), "true or false")
    rules: dict[str, Rule] = {
        # What else a processor may do to an image.
        **dict.fromkeys([k for k in said if k.startswith("do_")], (lambda v: not v, "false")),
        **dict.fromkeys(("do_rescale", "do_normalize", "do_center_crop"), switch),
        # Other modes become RGB in any case.
        "do_convert_rgb": switch,
        "do_resize": (lambda v: v is True, "true"),
        "size": (
            lambda v: is_edge_good or v in (side, square),
            f"the model's {side} x {side}, or a shortest_edge of as much with do_center_crop",
        ),
        "resample": (lambda v: v in _RESAMPLE.values(), "2 (bilinear) or 3 (bicubic)"),
        "rescale_factor": (lambda v: type(v) in (int, float) and 0 < v < math.inf, "a number > 0"),
    }
    if is_cropped:
        said.setdefault("crop_size", side)
        rules["crop_size"] = (lambda v: v in (side, square), f"the model's {side} x {side}")
    check_values(rules, {key: said.get(key) for key in rules}, what=str(path))
    colors = {"mean": said["image_mean"], "std": said["image_std"]}
    check_preprocessing(colors, what=str(path))
    # OpenCLIP's pixels lie in [0, 1] before their mean and deviation are taken out.
    scale = 255 * said["rescale_factor"] if said["do_rescale"] else 255.0
    if not said["do_normalize"]:
        colors = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    preprocess: dict[str, Any] = {k: [v / scale for v in color] for k, color in colors.items()}
    preprocess["interpolation"] = next(n for n, c in _RESAMPLE.items() if c == said["resample"])
    preprocess["resize_mode"] = "shortest" if is_edge_good else "squash"
    return preprocess, edge if is_edge_good and edge != side else None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would read: one, or those of an index."""
    for name in _WEIGHTS_NAMES:
        index = folder / f"{name}{_INDEX_ENDING}"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json_object(index, what=str(index)).get("weight_map")
            files = list(shards.values()) if isinstance(shards, dict) else []
            if not files or any(Path(str(file)).name != file for file in files):
                raise ValueError(f"{index} must have a weight_map that names files beside it")
            return [folder / file for file in sorted(set(files))]
    names = " or ".join(_WEIGHTS_NAMES)
    raise ValueError(f"{folder} holds no weights: no {names}, whole or as shards with an index")


def build_mae(
    record: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, what: str
) -> MaeModel:
    """Build an autoencoder with weights.

    Args:
        record: As from `mae_record`, but a stranger's.
        state_dict: Of a `MaeModel` or a ViT-MAE, as any version of transformers names its weights.
        what: What to call the file in messages.

    Raises:
        ValueError: If the record is none, or the weights do not fit.
    """
    preprocess = record.get("preprocess_cfg", {})
    check_preprocessing(preprocess, what=what)
    config = mae_config(record["model_cfg"], what=what)
    given = {name: preprocess.get(name) for name in IMAGE_SETTINGS}
    with torch.device("meta"):
        model = MaeModel(mae_record(config, **given))
    with explained(f"{what} does not fit its config", *MISFITS):
        _load_weights(model.visual.mae, hub_weights(state_dict))
    return model


def _load_weights(mae: Any, given: Mapping[str, Tensor]) -> None:
    """Give weights to a model on the meta device, which loses a decoder that they do not have."""
    if not any(name.startswith("decoder.") for name in given):
        mae.decoder = None
    model = mae.vit if mae.decoder is None else mae
    for name, weight in given.items():
        if not weight.is_floating_point():
            kinds = f"{weight.dtype} in the file, float32 in the model"
            raise ValueError(f"{name} is {kinds}".replace("torch.", ""))
    # Before memory is taken: no number has less than two bytes.
    num_needed = sum(weight.numel() for weight in model.state_dict().values())
    parts = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in given.values()}
    if num_needed > (num_bytes := sum(parts.values())):
        raise ValueError(
            f"it needs {num_needed:,} numbers, and the weights have {num_bytes:,} bytes"
        )
    # transformers renames what its earlier versions wrote.
    with silenced(logging.WARNING), _no_progress_bar():
        loaded, found = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(given),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    weights = {n: t for n, t in loaded.state_dict().items() if n not in found["missing_keys"]}
    weights |= {name: torch.empty(0) for name in found["unexpected_keys"]}
    weights |= {name: torch.empty(shape) for name, shape, _ in found["mismatched_keys"]}
    weights = fit_weights(weights, model)
    if num_needed != sum(weight.numel() for weight in given.values()):
        raise ValueError("it has a weight twice, by names of two versions of transformers")
    # Copies: the file may be mapped into memory.
    copies = {
        name: weight.clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }
    model.load_state_dict(copies, assign=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    is_on = hub_logging.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_on:
            hub_logging.enable_progress_bar()


def no_tokens(texts: list[str]) -> Tensor:
    """Return one token for each of B captions, which nobody reads: shape (B, 1)."""
    return torch.zeros(len(texts), 1, dtype=torch.int64)
