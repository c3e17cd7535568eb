"""Image features of a data set, and how many images it took to get them."""

import torch

from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.features import image_features

CPU = torch.device("cpu")


def encode(loaded, eval_set, *, cache=None, split="test", batch_size=5):
    return image_features(
        loaded,
        eval_set,
        split=split,
        device=CPU,
        batch_size=batch_size,
        workers=0,
        amp=False,
        cache=cache or FeatureCache(loaded),
    )


def count_images(loaded):
    """Count the images that a model encodes from now on."""
    counts = []
    encode_image = loaded.model.encode_image

    def counted(pixels, *args, **kwargs):
        counts.append(len(pixels))
        return encode_image(pixels, *args, **kwargs)

    # Not among the plain attributes that make a model's fingerprint.
    loaded.model.__dict__["encode_image"] = counted
    return counts
