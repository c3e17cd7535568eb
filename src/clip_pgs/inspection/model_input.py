"""How a model sees images, and how strategies are named: what `masks`, `kept` and `cost` share."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image

from clip_pgs.common import explained, find_config, literal
from clip_pgs.data.decoding import (
    IMAGE_FORMATS,
    check_aspect_ratio,
    check_resized,
    open_image,
    to_rgb,
)
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EXPORT_NAME,
    MODEL_CONFIG_NAME,
    list_folder,
    read_json_object,
)
from clip_pgs.masking import (
    MaskingStrategy,
    PatchInputs,
    create_masking,
    list_maskings,
    masking_options,
)
from clip_pgs.masking.strategy import masking_class, options_at, patch_grid, patch_sides

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SIDE = 2**14
# Some strategies compare every patch with every other.
MAX_PATCHES = 2**14


# Images


def image_endings() -> set[str]:
    """Return how the names of image files end, in lower case, each with its dot."""
    endings = Image.registered_extensions()
    return {ending for ending, name in endings.items() if name in IMAGE_FORMATS}


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """Return image files, a folder replaced by the images in it that are not hidden, by name.

    Raises:
        ValueError: If a file is not there, or a folder holds no image.
    """
    endings = image_endings()
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = [p for p in list_folder(path) if p.suffix.lower() in endings]
        if not any(p.is_file() for p in inside):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is no image: it is no regular file")
            place = "in the folder " if path.is_dir() else ""
            raise ValueError(f"there is no image {place}{path}")
        found += [p for p in inside if p.is_file()]
    return found


def read_image(image: Image.Image | Tensor | str | Path) -> Image.Image:
    """Return a picture as it is, or read out of a file or a tensor.

    Args:
        image: A picture, the path of a file, or a tensor of shape (3, H, W), float in [0, 1] or
            uint8.

    Raises:
        ValueError: If it is none of these, a file cannot be read, or a picture not at a usual cost.
    """
    if isinstance(image, (str, Path)):
        with explained(f"cannot read the image {image}"):
            return open_image(image)
    picture = _picture_of(image) if isinstance(image, Tensor) else image
    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"an image must be a PIL image, a path or a tensor, got {type(image).__name__}"
        )
    check_aspect_ratio(picture)
    return picture


def _picture_of(pixels: Tensor) -> Image.Image:
    is_bytes, is_float = pixels.dtype == torch.uint8, pixels.is_floating_point()
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel() or not (is_bytes or is_float):
        got = f"{tuple(pixels.shape)}, {pixels.dtype}"
        raise ValueError(f"an image must have shape (3, H, W), float or uint8, got {got}")
    low, high = pixels.min().item(), pixels.max().item()
    # Also of a NaN.
    if is_float and not 0 <= low <= high <= 1:
        raise ValueError(f"an image of floats must be in [0, 1], got {low:g} to {high:g}")
    picture: Image.Image = to_pil_image(pixels)
    return picture


@dataclass(frozen=True)
class ModelInput:
    """The images a vision transformer takes.

    Args:
        image_size: (height, width) in pixels.
        patch_size: (height, width) of a patch, dividing the image size.
        mean: Of each color channel, for images in [0, 1].
        std: Of each color channel.
        interpolation: "bicubic" or "bilinear", OpenCLIP's name.
        resize_mode: "shortest", "longest" or "squash", OpenCLIP's name: which side is brought to
            the input's, or both.
        fill_color: In [0, 255], what "longest" puts beside the image.

    Raises:
        ValueError: If the patches do not divide the image.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        if not 1 <= min(self.image_size) <= max(self.image_size) <= MAX_SIDE:
            raise ValueError(f"image_size must be in [1, {MAX_SIDE}], got {self.image_size}")
        rows, columns = self.grid_size
        if rows * columns > MAX_PATCHES:
            raise ValueError(f"an image can have {MAX_PATCHES} patches, got {rows * columns}")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return patch_grid(self.image_size, patch_sides(self.patch_size))

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image as OpenCLIP's own transform for evaluation does.

        Colors are those that training sees; see `clip_pgs.data.decoding.to_rgb`.

        Raises:
            ValueError: If it would take unusual memory; see `clip_pgs.data.decoding.check_resized`.
        """
        return self._fit(to_rgb(image))

    def crop_mask(self, mask: Image.Image) -> Image.Image:
        """Crop a mask as `crop` does its image, by the nearest pixels; what is beside it is 0."""
        return replace(self, fill_color=0)._fit(mask, InterpolationMode.NEAREST)

    def _fit(
        self, image: Image.Image, interpolation: InterpolationMode | None = None
    ) -> Image.Image:
        # It takes seconds to import.
        import open_clip

        transform = open_clip.image_transform(
            self.image_size,
            is_train=False,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            fill_color=self.fill_color,
        )
        check_resized(image, transform)
        # The last three are colors, tensor and normalization.
        for step in transform.transforms[:-3]:
            if interpolation is not None and hasattr(step, "interpolation"):
                step.interpolation = interpolation
            image = step(image)
        return image

    def normalize(self, crops: Sequence[Image.Image]) -> Tensor:
        """Return cropped images as the model receives them, shape (B, 3, H, W), float32."""
        pixels = torch.stack([pil_to_tensor(crop) for crop in crops]).float() / 255
        return normalize(pixels, list(self.mean), list(self.std))


def read_model_input(source: str) -> ModelInput:
    """Find out which images a model takes.

    Args:
        source: A run folder, a folder with `open_clip_config.json`, a checkpoint file, a model
            config (JSON), or the name of a model that open_clip knows.

    Raises:
        ValueError: If `source` is none of these, or its image tower has no patches.
    """
    # They import open_clip, which takes seconds.
    from clip_pgs.integrations.open_clip import patch_size
    from clip_pgs.integrations.open_clip.model_config import (
        build_image_tower,
        check_preprocessing,
    )

    model: Any
    if _checkpoint(source) is not None:
        model = load_model(source)
        preprocess = model.visual.preprocess_cfg
    else:
        config = read_config(source)
        preprocess = config.get("preprocess_cfg", {})
        check_preprocessing(preprocess, what=source)
        model = build_image_tower(config.get("model_cfg", config), source=source)
    with explained(f"{source} cannot be masked"):
        patch = patch_size(model)
    size = model.visual.image_size
    return ModelInput(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=patch,
        mean=tuple(preprocess.get("mean") or OPENAI_MEAN),
        std=tuple(preprocess.get("std") or OPENAI_STD),
        interpolation=preprocess.get("interpolation") or "bicubic",
        resize_mode=preprocess.get("resize_mode") or "shortest",
        fill_color=preprocess.get("fill_color") or 0,
    )


def load_model(source: str) -> nn.Module:
    """Load the model of a run, an export or a checkpoint, in eval mode, on the CPU.

    Args:
        source: A run folder, of which its export or else its newest checkpoint is read, an
            export's own folder, or a checkpoint file.

    Raises:
        ValueError: If there are no weights, or they cannot be read.
    """
    from clip_pgs.evaluation import load_model as load_any

    weights = _checkpoint(source) or _export_folder(Path(source))
    if weights is None or (weights.is_dir() and not any(weights.glob("open_clip_model.*"))):
        raise ValueError(f"{source} has no weights; a run, its export or a checkpoint has them")
    return load_any(weights).model


def _checkpoint(source: str) -> Path | None:
    """Return the checkpoint file that a source is, or that stands for a run without an export."""
    from clip_pgs.checkpoint_reading import newest_checkpoint

    path = Path(source)
    if path.is_dir() and _export_folder(path) is None:
        return newest_checkpoint(path / CHECKPOINTS_NAME)
    return path if path.is_file() and path.suffix != ".json" else None


def _export_folder(source: Path) -> Path | None:
    places = (source / EXPORT_NAME, source)
    return next((place for place in places if (place / MODEL_CONFIG_NAME).is_file()), None)


def read_config(source: str) -> dict[str, Any]:
    """Return the config of a folder, a JSON file or a model that open_clip knows.

    Raises:
        ValueError: If `source` is none of these.
    """
    # It takes seconds to import.
    import open_clip

    folder = _export_folder(Path(source))
    if folder is None and source in open_clip.list_models():
        return open_clip.get_model_config(source)
    path = folder / MODEL_CONFIG_NAME if folder else Path(find_config(source, "models"))
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(
            f"{source!r} is no run, no folder with {MODEL_CONFIG_NAME}, no checkpoint, no "
            "model config and no model that open_clip knows"
        )
    return read_json_object(path, what=f"the model config {path}")


# What a strategy looks at


@dataclass
class View:
    """How strategies see images, on the CPU.

    Args:
        model_input: Image size, patch size and normalization.
        model: An OpenCLIP model, also masked or wrapped, whose image tower gives embeddings and,
            in the place of a teacher, attention. It is copied where it is needed. None has
            strategies look at pixels alone.
        progress: Completed share of the masked training steps, in [0, 1].

    Raises:
        ValueError: If the progress is out of its range.
    """

    model_input: ModelInput = field(default_factory=ModelInput)
    model: nn.Module | None = None
    progress: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.progress <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {self.progress}")

    def needs_model(self, strategy: MaskingStrategy) -> bool:
        """Return whether a strategy reads more than pixels at this progress."""
        reads_tokens = "tokens" in strategy.requires and self.progress > 0
        return "attention" in strategy.requires or reads_tokens

    def inputs(self, pixels: Tensor, strategy: MaskingStrategy) -> PatchInputs:
        """Gather what a strategy may look at, without random numbers.

        Args:
            pixels: Images as the model receives them. Shape (B, 3, H, W).
            strategy: It alone decides what is computed.

        Raises:
            ValueError: If the strategy needs a model and there is none, or none that fits.
        """
        if not self.needs_model(strategy):
            return PatchInputs(pixels, self.model_input.patch_size, progress=self.progress)
        if self.model is None:
            raise ValueError(
                f"{type(strategy).__name__} looks at the attention of an image tower, or at patch "
                "embeddings above progress 0; give a trained model, as --model RUN does"
            )
        # open_clip takes seconds to import.
        from clip_pgs.integrations.apply import image_tower, tower_masking
        from clip_pgs.integrations.open_clip import apply_masking, set_masking_progress

        alone: Any = nn.Module()
        alone.visual = copy.deepcopy(image_tower(self.model)[0]).cpu().float().eval()
        apply_masking(alone, strategy)
        set_masking_progress(alone, self.progress)
        with torch.no_grad():
            return tower_masking(alone).inputs(pixels, alone.visual.embed_patches(pixels))


def read_view(args: argparse.Namespace, strategies: Iterable[MaskingStrategy]) -> View:
    """Return how these strategies see images; a model is loaded only if one of them needs it.

    Args:
        args: With model, image_size, patch_size and progress, as the command line has them.
        strategies: They decide whether the model is loaded.

    Raises:
        ValueError: If an option is wrong, or the model has no weights where they are needed.
    """
    own_input = ModelInput() if args.model is None else read_model_input(args.model)
    sizes = {"image_size": args.image_size, "patch_size": args.patch_size}
    given: dict[str, Any] = {name: (side, side) for name, side in sizes.items() if side is not None}
    view = View(replace(own_input, **given), progress=args.progress)
    if args.model is not None and any(map(view.needs_model, strategies)):
        if view.model_input != own_input:
            raise ValueError("the embeddings of --model go with its own image and patch size")
        view.model = load_model(args.model)
    return view


def seeded_noise(num_images: int, num_patches: int, *, seed: int) -> Tensor:
    """Return the random numbers of a seed, shape (B, N), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((num_images, num_patches), generator=generator)


def fit_strategy(
    strategy: MaskingStrategy, batches: Iterable[PatchInputs], *, progress: float
) -> MaskingStrategy:
    """Return a strategy fitted to images, where it is one that training would calibrate.

    Args:
        strategy: It stays as it is.
        batches: The images with their noise; it is fitted to the mean over all batches.
        progress: That of the batches.
    """
    fitted = copy.deepcopy(strategy)
    if fitted.needs_calibration(progress):
        for inputs in batches:
            fitted.calibrate(inputs)
    return fitted


# Strategies by name


@dataclass(frozen=True)
class StrategySpec:
    """A strategy to be built, at any mask ratio.

    Args:
        title: What it is called in figures and tables.
        name: Of the strategy.
        options: Of its constructor; they win over the ratios that `build` is given.
    """

    title: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(
        self, *, mask_ratio: float | None = None, mask_ratio_min: float | None = None
    ) -> MaskingStrategy:
        """Build the strategy with `options_at` these ratios.

        Raises:
            ValueError: If the name or an option is unknown, of the wrong type or out of its range.
        """
        options = options_at(self.name, self.options, mask_ratio, mask_ratio_min)
        return create_masking(self.name, **options)


def parse_spec(text: str) -> StrategySpec:
    """Read NAME or NAME:KEY=VALUE,KEY=VALUE; a NAME may be package.module:Class.

    Values are Python literals, or true, false and none in any case; anything else is text.

    Raises:
        ValueError: If an option is no KEY=VALUE.
    """
    name, _, tail = text.partition(":")
    attribute, _, rest = tail.partition(":")
    # Once created, a class of one's own may be known by the name of its module.
    is_known = name in list_maskings() and masking_class(name).__module__ != name
    if attribute.isidentifier() and not is_known:
        name, tail = f"{name}:{attribute}", rest
    options = {}
    for pair in tail.split(",") if tail else ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"options are written as {name}:KEY=VALUE,KEY=VALUE, got {text!r}")
        options[key.replace("-", "_")] = literal(value)
    return StrategySpec(text, name, options)


def parse_specs(texts: Iterable[str], **ratios: float | None) -> list[StrategySpec]:
    """Read several strategies and build each once, so that errors come early.

    Args:
        texts: See `parse_spec`.
        **ratios: `mask_ratio` and `mask_ratio_min`, as `StrategySpec.build` takes them; one that
            is given must be an option of at least one of the strategies.

    Raises:
        ValueError: If one is wrong or given twice, or a ratio has no effect on any.
    """
    specs = [parse_spec(text) for text in texts]
    titles = [spec.title for spec in specs]
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"masking {title} is given twice")
    for option, ratio in ratios.items():
        if ratio is not None and not any(option in masking_options(s.name) for s in specs):
            raise ValueError(f"{option} has no effect on {', '.join(titles)}")
    for spec in specs:
        spec.build(**ratios)
    return specs
