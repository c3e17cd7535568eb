"""Training streams whose samples a test can tell: a caption is a number, and so is its token."""

import torch
from torchvision import transforms

from clip_pgs.data.build import build_train_stream

AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


def tokenize(captions):
    """Return token 0, the number in the caption's first word, and two blanks; shape (B, 3)."""
    return torch.tensor([[int(caption.split()[0]), 0, 0] for caption in captions])


def open_stream(args, *, rank=0, world_size=1, transform=AUGMENT, on_skip=None):
    """Build the stream of `--train-data` in one process."""
    return build_train_stream(
        args,
        transform=transform,
        tokenize=tokenize,
        rank=rank,
        world_size=world_size,
        on_skip=on_skip,
    )


def read_from(stream, epoch=0, position=0):
    """Return the batches of an epoch from a position on."""
    stream.start_at(epoch, position)
    return list(stream)


def numbers(batches):
    """Return the numbers of the samples in their order."""
    return [number for _, texts in batches for number in texts[:, 0].tolist()]


def same(left, right):
    """Return whether batches are equal bit by bit."""
    return len(left) == len(right) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(left, right, strict=True)
    )


def with_options(args, **options):
    """Change options in place and return them."""
    vars(args).update(options)
    return args
