"""A demo world of a few images, and its shards."""

import tarfile

COUNTS = {"num_train": 24, "num_val": 8, "num_per_class": 3}
VARIANTS = ("shape_noise", "shape_blur", "shape_grey", "shape_outline", "shape_background")


def members(path):
    """Return {name: bytes} of a tar file."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}
