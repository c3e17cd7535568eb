"""How a model receives an image: its size, its patches and its normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from clip_pgs.data.decoding import to_rgb
from clip_pgs.masking.strategy import patch_grid, patch_sides

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SIDE = 2**14
# Some strategies compare every patch with every other.
MAX_PATCHES = 2**14
CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True)
class ModelInput:
    """The images a vision transformer takes.

    Args:
        image_size: (height, width) in pixels.
        patch_size: (height, width) of a patch, dividing the image size.
        mean: Of each colour channel, for images in [0, 1].
        std: Of each colour channel.

    Raises:
        ValueError: If the patches do not divide the image.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def __post_init__(self) -> None:
        if not 1 <= min(self.image_size) <= max(self.image_size) <= MAX_SIDE:
            raise ValueError(f"image_size must be in [1, {MAX_SIDE}], got {self.image_size}")
        rows, columns = patch_grid(self.image_size, patch_sides(self.patch_size))
        if rows * columns > MAX_PATCHES:
            raise ValueError(f"an image can have {MAX_PATCHES} patches, got {rows * columns}")

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize an image until it covers the input, bilinear, and cut out the centre.

        Colours are those that training sees; see `clip_pgs.data.decoding.to_rgb`.
        """
        height, width = self.image_size
        return ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.BILINEAR)

    def normalise(self, crops: Sequence[Image.Image]) -> Tensor:
        """Return cropped images as the model receives them, shape (B, 3, H, W), float32."""
        pixels = torch.stack([pil_to_tensor(crop) for crop in crops]).float() / 255
        return normalize(pixels, list(self.mean), list(self.std))


def read_model_input(source: str) -> ModelInput:
    """Find out which images a model takes.

    Args:
        source: A run folder, a folder with `open_clip_config.json`, a model config (JSON), or the
            name of a model that open_clip knows.

    Raises:
        ValueError: If `source` is none of these, or its image tower has no patches.
    """
    # They import open_clip, which takes seconds.
    from clip_pgs.integrations.open_clip.model_config import (
        check_preprocessing,
        check_vision_config,
    )

    config = _read_config(source)
    model_config = config.get("model_cfg", config)
    preprocess = config.get("preprocess_cfg", {})
    vision = model_config.get("vision_cfg") if isinstance(model_config, dict) else None
    if not isinstance(vision, dict):
        raise ValueError(f"{source} is no model config: it has no vision_cfg")
    check_vision_config(vision, what=source)
    check_preprocessing(preprocess, what=source)
    # open_clip builds a ResNet from a list of layers.
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"the image tower of {source} is not open_clip's VisionTransformer")
    if "timm_model_name" in vision:
        image_size, patch_size = _timm_sizes(source, vision)
    else:
        image_size = _pair(vision.get("image_size", 224))
        patch_size = _pair(vision.get("patch_size", 16))
    return ModelInput(
        image_size=image_size,
        patch_size=patch_size,
        mean=tuple(preprocess.get("mean") or OPENAI_MEAN),
        std=tuple(preprocess.get("std") or OPENAI_STD),
    )


def load_model(source: str) -> nn.Module:
    """Load the model that a run has exported, in eval mode, on the CPU.

    Args:
        source: A run folder, or an export's own.

    Raises:
        ValueError: If there is no export with weights.
    """
    import open_clip

    folder = export_folder(Path(source)) if Path(source).is_dir() else None
    if folder is None or not any(folder.glob("open_clip_model.*")):
        raise ValueError(
            f"{source} has no weights to look at; "
            "`python -m clip_pgs.training.export RUN` exports those of a run"
        )
    try:
        return open_clip.create_model(f"local-dir:{folder}").eval()
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the model in {folder}: {reason}") from None


def export_folder(source: Path) -> Path | None:
    """Return the folder with the config of a run or of an export, None where there is none."""
    places = (source / "export", source)
    return next((place for place in places if (place / CONFIG_FILE).is_file()), None)


def _timm_sizes(source: str, vision: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return image and patch size of a timm tower, whose config names it and no more."""
    from clip_pgs.integrations.open_clip import patch_size
    from clip_pgs.integrations.open_clip.model_config import build_on_meta

    config = {"embed_dim": 1, "vision_cfg": vision, "text_cfg": {}}
    model = build_on_meta(config, name=f"the image tower of {source}", with_text=False)
    return _pair(model.visual.image_size), patch_size(model)


def _read_config(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_dir():
        folder = export_folder(path)
        if folder is None:
            raise ValueError(f"{source} holds neither export/{CONFIG_FILE} nor {CONFIG_FILE}")
        path = folder / CONFIG_FILE
    elif path.suffix != ".json":
        return _known_config(source)
    from clip_pgs.integrations.open_clip.model_config import read_json_object

    return read_json_object(path, what=f"the model config {path}")


def _known_config(name: str) -> dict[str, Any]:
    # It takes seconds to import, and only this lookup needs it.
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(
            f"{name!r} is not a run folder, a model config or a model that open_clip knows"
        )
    return open_clip.get_model_config(name)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
