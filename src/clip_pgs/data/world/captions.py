"""Say in English what is in a scene."""

from __future__ import annotations

from collections.abc import Collection

from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.scene import Scene, Thing
from clip_pgs.data.world.vocabulary import BACKGROUNDS, PLACES, RELATIONS, UNSEEN_BACKGROUNDS

_BACKGROUNDS = BACKGROUNDS | UNSEEN_BACKGROUNDS

# What a texture is called before the noun and after it.
_TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}


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
        about = _BACKGROUNDS[background]
        if dice.chance(0.25):
            return f"{about.noun} with {sentence}"
        sentence = f"{sentence} {about.phrase}"
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
