"""Image features of a data set, and how many images it took to get them."""

import tarfile

from PIL import Image

from clip_pgs.evaluation.features import Encoder


def make_encoder(loaded, folder=None, *, batch_size=5, amp=False):
    return Encoder(loaded, batch_size=batch_size, amp=amp, folder=folder)


def encode(loaded, eval_set, folder=None, *, split="test"):
    return make_encoder(loaded, folder).images(eval_set, split=split)


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


def images_of(folder):
    """Yield the pictures of a split, shard by shard."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    yield Image.open(tar.extractfile(member)).convert("RGB")
