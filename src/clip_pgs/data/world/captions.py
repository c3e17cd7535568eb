"""Say in English what is in a scene."""

from __future__ import annotations

from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.scene import Scene, Thing
from clip_pgs.data.world.vocabulary import BACKGROUNDS, PLACES, RELATIONS

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
    sentence = _arranged(names, scene.arrangement if says_where else None, dice)
    if says_background:
        background = BACKGROUNDS[scene.background]
        if dice.chance(0.25):
            return f"{background.noun} with {sentence}"
        sentence = f"{sentence} {background.phrase}"
    opening = dice.choice(("", "", "", "", "a picture of ", "a photo of ", "there is "))
    return opening + sentence


def _name(thing: Thing, dice: Dice, *, full: bool) -> str:
    """Name an object: an article, its attributes and its shape."""
    says_size = full or dice.chance(0.15)
    says_texture = full or dice.chance(0.05 if thing.texture == "plain" else 0.25)
    says_color = full or dice.chance(0.45)
    says_shape = full or not says_color or dice.chance(0.97)
    puts_texture_last = dice.chance(0.3) and thing.texture in _TEXTURE_TAILS
    words = []
    if says_size:
        words.append(thing.size)
    if says_texture and not puts_texture_last:
        words.append(thing.texture)
    if says_color:
        words.append(thing.color)
    words.append(thing.shape if says_shape else "shape")
    if says_texture and puts_texture_last:
        words.append(_TEXTURE_TAILS[thing.texture])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _arranged(names: list[str], arrangement: str | None, dice: Dice) -> str:
    """Join the names of a scene's objects; no arrangement means not to say where they are."""
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
