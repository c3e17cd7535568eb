"""Which scenes the world holds, split by split.

A sample's key names its split and is the source of all its random numbers, so that no two splits
share an image and that a larger training set starts with the smaller one. The robustness sets
alone show the scenes of another, in its order and with its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from clip_pgs.data.world.captions import caption
from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.draw import Drawing, draw_scene
from clip_pgs.data.world.scene import Scene, make_scene
from clip_pgs.data.world.variants import (
    draw_blurred,
    draw_grey,
    draw_noisy,
    draw_outlines,
    on_unseen_background,
)
from clip_pgs.data.world.vocabulary import COLORS, SCENE_VERSION, SHAPES

SHOWN_BACKGROUNDS = ("beach", "night", "grass", "brick", "sunset", "wood")


@dataclass(frozen=True)
class Sample:
    """A scene and what is said of it.

    Args:
        key: Name within the world, such as "train-000017".
        scene: What to draw.
        caption: One sentence.
        label: Index of its class, in classification sets.
    """

    key: str
    scene: Scene
    caption: str
    label: int | None = None


@dataclass(frozen=True)
class EvalSet:
    """A set in clip_benchmark's layout.

    Args:
        about: What it asks, in a few words.
        task: "classification" or "retrieval".
        class_names: None for retrieval.
        templates: Prompts with "{c}" for the class name; None for retrieval.
        splits: Makes the samples of each split from the world's seed and a number of images per
            class.
        draw: Draws a scene of the set.
    """

    about: str
    task: str
    class_names: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    splits: dict[str, Callable[[int, int], list[Sample]]]
    draw: Callable[[Scene], Drawing] = draw_scene


def captioned(split: str, seed: int, start: int, stop: int) -> Iterator[Sample]:
    """Yield samples as people might caption them, from position `start` up to `stop`."""
    for position in range(start, stop):
        key = f"{split}-{position:06d}"
        scene = make_scene(scene_key(seed, key))
        yield Sample(key, scene, caption(scene, Dice(scene.key, "caption")))


def shown(seed: int) -> Iterator[Sample]:
    """Yield the six scenes for pictures: two objects each, on six backgrounds."""
    for position, background in enumerate(SHOWN_BACKGROUNDS):
        key = f"scenes-{position:06d}"
        scene = make_scene(scene_key(seed, key), num_things=2, background=background)
        yield Sample(key, scene, caption(scene, Dice(scene.key, "caption"), full=True))


def held_out(seed: int, count: int) -> Iterator[Sample]:
    """Yield scenes such as those of training, to measure what a masking keeps of the objects."""
    for position in range(count):
        key = f"foreground-{position:06d}"
        scene = make_scene(scene_key(seed, key))
        yield Sample(key, scene, caption(scene, Dice(scene.key, "caption"), full=True))


def _retrieval(seed: int, num_per_class: int) -> list[Sample]:
    """Return scenes whose full captions all differ, six times `num_per_class` of them."""
    samples: dict[str, Sample] = {}
    position = 0
    while len(samples) < 6 * num_per_class:
        key = f"retrieval-{position:06d}"
        scene = make_scene(scene_key(seed, key))
        sentence = caption(scene, Dice(scene.key, "caption"), full=True)
        samples.setdefault(sentence, Sample(key, scene, sentence))
        position += 1
    return list(samples.values())


def _classified(
    attribute: str, names: Sequence[str], split: str
) -> Callable[[int, int], list[Sample]]:
    """Return a maker of scenes with one object that is not small, its classes taking turns."""

    def make(seed: int, num_per_class: int) -> list[Sample]:
        samples = []
        for position in range(num_per_class * len(names)):
            key = f"{attribute}_{split}-{position:06d}"
            label = position % len(names)
            scene = make_scene(
                scene_key(seed, key),
                num_things=1,
                sizes=("medium", "large"),
                **{attribute: names[label]},
            )
            sentence = caption(scene, Dice(scene.key, "caption"), full=True)
            samples.append(Sample(key, scene, sentence, label))
        return samples

    return make


def scene_key(seed: int, key: str) -> str:
    """Return what a sample's random numbers come from: the seed of its world and its own key."""
    return f"world {SCENE_VERSION}/seed {seed}/{key}"


def _on_unseen_backgrounds(seed: int, num_per_class: int) -> list[Sample]:
    """Return the test scenes of `shape`, each on a background that training never shows."""
    samples = []
    for sample in _SHAPE.splits["test"](seed, num_per_class):
        scene = on_unseen_background(sample.scene)
        sentence = caption(scene, Dice(scene.key, "caption"), full=True)
        samples.append(replace(sample, scene=scene, caption=sentence))
    return samples


_SHAPE = EvalSet(
    about="which shape",
    task="classification",
    class_names=SHAPES,
    templates=(
        "a {c}",
        "a picture of a {c}",
        *(f"a{'n' if color[0] in 'aeiou' else ''} {color} {{c}}" for color in COLORS),
    ),
    splits={split: _classified("shape", SHAPES, split) for split in ("test", "train")},
)
_SHAPE_TEST = replace(_SHAPE, splits={"test": _SHAPE.splits["test"]})

EVAL_SETS = {
    "shape": _SHAPE,
    "color": EvalSet(
        about="which color",
        task="classification",
        class_names=tuple(COLORS),
        templates=("a {c} shape", "a picture of a {c} shape", *(f"a {{c}} {s}" for s in SHAPES)),
        splits={split: _classified("color", tuple(COLORS), split) for split in ("test", "train")},
    ),
    "retrieval": EvalSet(
        about="which caption, which picture",
        task="retrieval",
        class_names=None,
        templates=None,
        splits={"test": _retrieval},
    ),
    "shape_noise": replace(_SHAPE_TEST, about="which shape, under noise", draw=draw_noisy),
    "shape_blur": replace(_SHAPE_TEST, about="which shape, out of focus", draw=draw_blurred),
    "shape_grey": replace(_SHAPE_TEST, about="which shape, without colors", draw=draw_grey),
    "shape_outline": replace(_SHAPE_TEST, about="which shape, as an outline", draw=draw_outlines),
    "shape_background": replace(
        _SHAPE,
        about="which shape, on a background unlike those of training",
        splits={"test": _on_unseen_backgrounds},
    ),
}
