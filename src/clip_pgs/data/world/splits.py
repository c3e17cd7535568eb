"""Which scenes the world holds, split by split.

A sample's key names its split and is the source of all its random numbers, so that no two splits
share an image and that a larger training set starts with the smaller one. The robustness sets
alone show the scenes of another, in its order and with its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from clip_pgs.data.world.captions import caption
from clip_pgs.data.world.draw import (
    Drawing,
    draw_blurred,
    draw_gray,
    draw_noisy,
    draw_outlines,
    draw_scene,
    on_unseen_background,
)
from clip_pgs.data.world.scene import COLORS, SHAPES, Dice, Sample, Scene, make_scene, scene_key

SHOWN_BACKGROUNDS = ("beach", "night", "grass", "brick", "sunset", "wood")


@dataclass(frozen=True)
class EvalSet:
    """A set in clip_benchmark's layout: of classification, or of retrieval where it has no classes.

    Args:
        about: What it asks, in a few words.
        splits: Makes the samples of each split from the world's seed and a number of images per
            class.
        class_names: What its labels stand for.
        templates: Prompts with "{c}" for the class name.
        draw: Draws a scene of the set.
    """

    about: str
    splits: dict[str, Callable[[int, int], list[Sample]]]
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    draw: Callable[[Scene], Drawing] = draw_scene


def captioned(split: str, seed: int, start: int, stop: int) -> Iterator[Sample]:
    """Yield samples as people might caption them, from position `start` up to `stop`."""
    for position in range(start, stop):
        key = f"{split}-{position:06d}"
        scene = make_scene(scene_key(seed, key))
        yield Sample(key, scene, caption(scene, Dice(scene.key, "caption")))


def shown(seed: int) -> list[Sample]:
    """Return the six scenes for pictures: two objects each, on six backgrounds."""
    return [
        _sample(seed, f"scenes-{position:06d}", num_things=2, background=background)
        for position, background in enumerate(SHOWN_BACKGROUNDS)
    ]


def held_out(seed: int, count: int) -> list[Sample]:
    """Return scenes such as those of training, to measure what a masking keeps of the objects."""
    return [_sample(seed, f"foreground-{position:06d}") for position in range(count)]


def _sample(seed: int, key: str, *, label: int | None = None, **wanted: object) -> Sample:
    """Make up a scene with its full caption; see `make_scene` for what can be wanted."""
    scene = make_scene(scene_key(seed, key), **wanted)  # type: ignore[arg-type]
    return Sample(key, scene, _full_caption(scene), label)


def _full_caption(scene: Scene) -> str:
    return caption(scene, Dice(scene.key, "caption"), full=True)


def _retrieval(seed: int, num_per_class: int) -> list[Sample]:
    """Return scenes whose full captions all differ, six times `num_per_class` of them."""
    samples: dict[str, Sample] = {}
    position = 0
    while len(samples) < 6 * num_per_class:
        sample = _sample(seed, f"retrieval-{position:06d}")
        samples.setdefault(sample.caption, sample)
        position += 1
    return list(samples.values())


def _classified(
    attribute: str, names: Sequence[str], split: str, seed: int, num_per_class: int
) -> list[Sample]:
    """Return scenes with one object that is not small, its classes taking turns."""
    wanted = {"num_things": 1, "sizes": ("medium", "large")}
    return [
        _sample(
            seed,
            f"{attribute}_{split}-{position:06d}",
            label=position % len(names),
            **wanted,
            **{attribute: names[position % len(names)]},
        )
        for position in range(num_per_class * len(names))
    ]


def _on_unseen_backgrounds(seed: int, num_per_class: int) -> list[Sample]:
    """Return the test scenes of `shape`, each on a background that training never shows."""
    samples = []
    for sample in _classified("shape", SHAPES, "test", seed, num_per_class):
        scene = on_unseen_background(sample.scene)
        samples.append(replace(sample, scene=scene, caption=_full_caption(scene)))
    return samples


_SHAPE = EvalSet(
    "which shape",
    {split: partial(_classified, "shape", SHAPES, split) for split in ("test", "train")},
    class_names=SHAPES,
    templates=(
        "a {c}",
        "a picture of a {c}",
        *(f"a{'n' if color[0] in 'aeiou' else ''} {color} {{c}}" for color in COLORS),
    ),
)
_COLOR = EvalSet(
    "which color",
    {split: partial(_classified, "color", tuple(COLORS), split) for split in ("test", "train")},
    class_names=tuple(COLORS),
    templates=("a {c} shape", "a picture of a {c} shape", *(f"a {{c}} {s}" for s in SHAPES)),
)
_SHAPE_TEST = replace(_SHAPE, splits={"test": _SHAPE.splits["test"]})

EVAL_SETS = {
    "shape": _SHAPE,
    "color": _COLOR,
    "retrieval": EvalSet("which caption, which picture", {"test": _retrieval}),
    "shape_noise": replace(_SHAPE_TEST, about="which shape, under noise", draw=draw_noisy),
    "shape_blur": replace(_SHAPE_TEST, about="which shape, out of focus", draw=draw_blurred),
    "shape_grey": replace(_SHAPE_TEST, about="which shape, without colors", draw=draw_gray),
    "shape_outline": replace(_SHAPE_TEST, about="which shape, as an outline", draw=draw_outlines),
    "shape_background": replace(
        _SHAPE,
        about="which shape, on a background unlike those of training",
        splits={"test": _on_unseen_backgrounds},
    ),
}
