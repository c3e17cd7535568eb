"""Where the masking core meets other libraries; what is told of them here takes no torch."""

from typing import Any

# What the config of transformers' ViT-MAE says of itself.
MAE_TYPE = "vit_mae"


def is_mae_config(config: Any) -> bool:
    """Return whether a model's config, whatever was read, is that of a masked autoencoder."""
    return isinstance(config, dict) and config.get("model_type") == MAE_TYPE


def check_versions() -> None:
    """Refuse an open_clip this package was not written for, before any of it is imported.

    Raises:
        ValueError: If its version is outside >=3.3,<4.
    """
    # It takes as long as the rest of `clip-pgs --help`, which needs none of it.
    from importlib import metadata

    try:
        found = metadata.version("open_clip_torch")
    except metadata.PackageNotFoundError:
        # Missing, or a checkout on Python's path, whose version we cannot know.
        return
    major, minor = (int(part) for part in found.split(".")[:2])
    if not (3, 3) <= (major, minor) < (4, 0):
        raise ValueError(f"clip-pgs needs open_clip_torch>=3.3,<4, found {found}")
