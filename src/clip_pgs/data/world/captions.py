"""Say in English what is in a scene, and what is nearly true of it.

False captions follow SugarCrepe (https://arxiv.org/abs/2306.14610): each of its seven tasks
replaces, swaps or adds an object, an attribute or a relation. True and false captions come from one
grammar with one phrasing, and what is replaced is drawn from what could have stood there, so that a
model that reads without looking does no better than chance; the added word or object is longer by
nature, as in SugarCrepe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from clip_pgs.data.world.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    TEXTURES,
    UNSEEN_BACKGROUNDS,
    Dice,
    Sample,
    Scene,
    Thing,
    make_scene,
    scene_key,
)

# What a texture is called before the noun and after it.
_TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
# Nothing is called plain, which most things are, nor medium, which is hard to tell from large.
_TOLD_TEXTURES = tuple(name for name in TEXTURES if name != "plain")
_TOLD_SIZES = ("small", "large")
_OPPOSITES = {"above": "below", "below": "above", "left": "right", "right": "left"}


def caption(scene: Scene, dice: Dice, *, full: bool = False) -> str:
    """Describe a scene in one sentence.

    Args:
        scene: What to describe.
        dice: Source of the phrasing, and of what is left out.
        full: State every attribute of every object, where it is and the background. Otherwise
            some are left out at random, as people do; shapes seldom are, so that a caption often
            leaves nothing but the shape to tell two pictures apart.

    Returns:
        Lower-case English words without a full stop: 34 CLIP tokens at most, both ends counted,
        and no more than 32 in the world of the default counts and seed.
    """
    names = [_name(thing, dice, full=full) for thing in scene.things]
    says_where = full or dice.chance(0.25 if len(names) == 1 else 0.5)
    says_background = full or dice.chance(0.2)
    return make_sentence(
        names,
        arrangement=scene.arrangement if says_where else None,
        background=scene.background if says_background else None,
        dice=dice,
    )


def make_sentence(
    names: list[str], *, arrangement: str | None, background: str | None, dice: Dice
) -> str:
    """Make one sentence of the names of a scene's objects.

    Args:
        names: Noun phrases of one to three objects, in the order that `arrangement` is about.
        arrangement: As in `Scene`; None leaves out where the objects are.
        background: One of `BACKGROUNDS` or `UNSEEN_BACKGROUNDS`; None leaves it out.
        dice: Source of the phrasing. Equal dice phrase sentences of as many objects alike.
    """
    sentence = _arranged(names, arrangement, dice)
    if background is not None:
        about = (BACKGROUNDS | UNSEEN_BACKGROUNDS)[background]
        if dice.chance(0.25):
            return f"{about.noun} with {sentence}"
        sentence = f"{sentence} {about.preposition} {about.noun}"
    opening = dice.choice(("", "", "", "", "a picture of ", "a photo of ", "there is "))
    return opening + sentence


def name_thing(thing: Thing, said: Collection[str], *, puts_texture_last: bool = False) -> str:
    """Name an object: an article, some of its attributes and its shape.

    Args:
        thing: What to name.
        said: Which to say of "size", "texture", "color" and "shape"; without the latter it is
            "shape" itself.
        puts_texture_last: Say "star with dots" for "dotted star"; nothing is plain that way.
    """
    is_tail = puts_texture_last and "texture" in said
    words = []
    if "size" in said:
        words.append(thing.size)
    if "texture" in said and not is_tail:
        words.append(thing.texture)
    if "color" in said:
        words.append(thing.color)
    words.append(thing.shape if "shape" in said else "shape")
    if is_tail:
        words.append(_TEXTURE_TAILS[thing.texture])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _name(thing: Thing, dice: Dice, *, full: bool) -> str:
    """Name an object with what people might say of it."""
    says = {
        "size": full or dice.chance(0.15),
        "texture": full or dice.chance(0.05 if thing.texture == "plain" else 0.25),
        "color": full or dice.chance(0.45),
    }
    says["shape"] = full or not says["color"] or dice.chance(0.97)
    puts_texture_last = dice.chance(0.3) and thing.texture in _TEXTURE_TAILS
    said = [attribute for attribute, is_said in says.items() if is_said]
    return name_thing(thing, said, puts_texture_last=puts_texture_last)


def _arranged(names: list[str], arrangement: str | None, dice: Dice) -> str:
    """Join the names of objects, with where they are if there is an arrangement."""
    if arrangement is None:
        if len(names) == 1:
            return names[0]
        return f"{', '.join(names[:-1])} and {names[-1]}"
    if len(names) == 1:
        return f"{names[0]} {PLACES[arrangement][1]}"
    if len(names) == 2:
        forth, back = RELATIONS[arrangement]
        first, second = names
        if dice.chance(0.3):
            return f"{second} {back} {first}"
        return f"{first} {forth} {second}"
    between = f"{names[0]} between {names[1]} and {names[2]}"
    if dice.chance(0.3):
        return f"{names[1]}, {names[0]} and {names[2]} in a row {arrangement}"
    return between


class HardNegative(NamedTuple):
    """A scene with a true caption, and one that is wrong in one respect.

    Args:
        sample: The scene and its true caption.
        negative: A false caption.
    """

    sample: Sample
    negative: str


@dataclass(frozen=True)
class _Account:
    """What a caption says.

    Args:
        things: The objects it names.
        said: The attributes that it states of each, besides the shape.
        arrangement: Where they are, or None to leave it out.
    """

    things: tuple[Thing, ...]
    said: tuple[frozenset[str], ...]
    arrangement: str | None = None

    def names(self) -> list[str]:
        """Return the names of the objects, with what is said of them."""
        told = zip(self.things, self.said, strict=True)
        return [name_thing(thing, said | {"shape"}) for thing, said in told]

    def changed(self, number: int, **attributes: Any) -> _Account:
        """Return the account with other attributes of one object."""
        things = list(self.things)
        things[number] = replace(things[number], **attributes)
        return replace(self, things=tuple(things))

    def says(self, number: int, attribute: str, is_said: bool) -> _Account:
        """Return the account that states an attribute of one object, or leaves it out."""
        said = list(self.said)
        said[number] = said[number] | {attribute} if is_said else said[number] - {attribute}
        return replace(self, said=tuple(said))


# A task makes a true and a false account from a scene.
_Task = Callable[[Scene, Dice], tuple[_Account, _Account]]


def hard_negatives(task: str, seed: int, count: int) -> list[HardNegative]:
    """Return the items of a task.

    Args:
        task: One of `TASKS`.
        seed: Names the world.
        count: Number of items; a larger number starts with the smaller one's.
    """
    make = TASKS[task]
    items = []
    for position in range(count):
        key = f"{task}-{position:06d}"
        # An object's place among others needs two; the rest is asked of one as often as of two.
        needs_two = task in _TASKS_OF_TWO or position % 2 == 1
        scene = make_scene(scene_key(seed, key), num_things=2 if needs_two else 1)
        dice = Dice(scene.key, "negative")
        background = scene.background if dice.chance(0.2) else None
        true, false = (
            make_sentence(
                account.names(),
                arrangement=account.arrangement,
                background=background,
                dice=Dice(scene.key, "caption"),
            )
            for account in make(scene, dice)
        )
        items.append(HardNegative(Sample(key, scene, true), false))
    return items


def _tell(scene: Scene, dice: Dice, *, says_where: bool | None = None) -> _Account:
    """Draw what is said of a scene; None leaves open whether it is said where things are."""
    said = []
    for thing in scene.things:
        attributes = {"color"} if dice.chance(0.5) else set()
        if thing.texture in _TOLD_TEXTURES and dice.chance(0.25):
            attributes.add("texture")
        said.append(frozenset(attributes))
    if says_where is None:
        says_where = dice.chance(0.25 if len(said) == 1 else 0.5)
    return _Account(scene.things, tuple(said), scene.arrangement if says_where else None)


def _replace_object(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    true, number = _tell(scene, dice), _pick(scene, dice)
    return true, true.changed(number, shape=_absent(scene, "shape", SHAPES, dice))


def _replace_attribute(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    number = _pick(scene, dice)
    attribute = dice.choice(_attributes(scene, number, told=True))
    true = _tell(scene, dice).says(number, attribute, True)
    return true, true.changed(number, **{attribute: _other(scene, number, attribute, dice)})


def _replace_relation(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    true = _tell(scene, dice, says_where=True)
    return true, replace(true, arrangement=_OPPOSITES[scene.arrangement])


def _swap_objects(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    first, second = scene.things
    true = _tell(scene, dice)
    if true.arrangement is None:
        # Or else both captions would say the same.
        true = true.says(0, "color", True).says(1, "color", True)
    return true, true.changed(0, shape=second.shape).changed(1, shape=first.shape)


def _swap_attributes(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    first, second = scene.things
    textures = {first.texture, second.texture}
    can_swap_textures = len(textures) == 2 and textures <= set(_TOLD_TEXTURES)
    attribute = dice.choice(("color", "texture")) if can_swap_textures else "color"
    true = _tell(scene, dice).says(0, attribute, True).says(1, attribute, True)
    false = true.changed(0, **{attribute: getattr(second, attribute)})
    return true, false.changed(1, **{attribute: getattr(first, attribute)})


def _add_object(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    true = _tell(scene, dice, says_where=False)
    added = replace(
        scene.things[0],
        shape=_absent(scene, "shape", SHAPES, dice),
        color=_absent(scene, "color", _visible(scene), dice),
    )
    said = frozenset({"color"}) if dice.chance(0.5) else frozenset()
    place = dice.choice(range(len(scene.things) + 1))
    things = (*true.things[:place], added, *true.things[place:])
    return true, _Account(things, (*true.said[:place], said, *true.said[place:]))


def _add_attribute(scene: Scene, dice: Dice) -> tuple[_Account, _Account]:
    number = _pick(scene, dice)
    attribute = dice.choice(_attributes(scene, number, told=False))
    true = _tell(scene, dice).says(number, attribute, False)
    false = true.changed(number, **{attribute: _other(scene, number, attribute, dice)})
    return true, false.says(number, attribute, True)


TASKS: dict[str, _Task] = {
    "replace_obj": _replace_object,
    "replace_att": _replace_attribute,
    "replace_rel": _replace_relation,
    "swap_obj": _swap_objects,
    "swap_att": _swap_attributes,
    "add_obj": _add_object,
    "add_att": _add_attribute,
}


_TASKS_OF_TWO = ("replace_rel", "swap_obj", "swap_att")


def _pick(scene: Scene, dice: Dice) -> int:
    return dice.choice(range(len(scene.things)))


def _attributes(scene: Scene, number: int, *, told: bool) -> list[str]:
    """Return what an object can be given falsely; what is `told`, it can be given truly as well."""
    thing = scene.things[number]
    attributes = ["color"]
    if thing.texture in _TOLD_TEXTURES or not told:
        attributes.append("texture")
    # Two large objects do not fit, so that the size of one of two could be told unseen.
    if thing.size in _TOLD_SIZES and len(scene.things) == 1:
        attributes.append("size")
    return attributes


def _other(scene: Scene, number: int, attribute: str, dice: Dice) -> str:
    """Draw a value that an object does not have."""
    if attribute == "color":
        return _absent(scene, "color", _visible(scene), dice)
    options = _TOLD_TEXTURES if attribute == "texture" else _TOLD_SIZES
    own = getattr(scene.things[number], attribute)
    return dice.choice([name for name in options if name != own])


def _absent(scene: Scene, attribute: str, options: Sequence[str], dice: Dice) -> str:
    """Draw a value that no object of the scene has."""
    present = {getattr(thing, attribute) for thing in scene.things}
    return dice.choice([name for name in options if name not in present])


def _visible(scene: Scene) -> list[str]:
    """Return the colors that a scene on this background could hold."""
    return [name for name in COLORS if name not in BACKGROUNDS[scene.background].clashes]
