"""Scenes as plain data, and the dice they are rolled with."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from clip_pgs.data.world.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Dice,
    make_scene,
)

SCENES = [make_scene(f"test/{number}") for number in range(600)]


def test_equal_keys_give_equal_scenes():
    assert make_scene("test/7") == make_scene("test/7")


def test_every_word_of_the_vocabulary_is_used():
    things = [thing for scene in SCENES for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.texture for thing in things} == set(TEXTURES)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    assert Counter(len(scene.things) for scene in SCENES).keys() == {1, 2, 3}


def test_things_stay_inside_the_image():
    for scene in SCENES:
        for thing in scene.things:
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius


def test_things_do_not_touch():
    for scene in SCENES:
        for first, second in combinations(scene.things, 2):
            distance = ((first.x - second.x) ** 2 + (first.y - second.y) ** 2) ** 0.5
            assert distance > first.radius + second.radius


def test_things_of_a_scene_differ_in_shape_and_color():
    for scene in SCENES:
        assert len({thing.shape for thing in scene.things}) == len(scene.things)
        assert len({thing.color for thing in scene.things}) == len(scene.things)


def test_no_thing_has_a_color_that_vanishes_on_the_background():
    for scene in SCENES:
        clashes = BACKGROUNDS[scene.background].clashes
        assert not set(clashes) & {thing.color for thing in scene.things}


def test_relation_of_a_pair_is_true():
    is_true = {
        "above": lambda first, second: first.y < second.y,
        "below": lambda first, second: first.y > second.y,
        "left": lambda first, second: first.x < second.x,
        "right": lambda first, second: first.x > second.x,
    }
    for scene in SCENES:
        if len(scene.things) == 2:
            assert is_true[scene.arrangement](*scene.things)


def test_first_of_three_lies_between_the_others():
    for scene in SCENES:
        if len(scene.things) == 3:
            axis = "x" if scene.arrangement == "across" else "y"
            middle, before, after = (getattr(thing, axis) for thing in scene.things)
            assert before < middle < after


def test_place_of_a_single_thing_is_true():
    for scene in SCENES:
        if len(scene.things) == 1:
            (column, row), _ = PLACES[scene.arrangement]
            (thing,) = scene.things
            for position, third in ((thing.x, column), (thing.y, row)):
                assert (position - 0.5) * (third - 1) > 0 or abs(position - 0.5) < 0.13


def test_what_is_asked_for_is_in_the_scene():
    scene = make_scene(
        "test", num_things=2, shape="star", color="pink", background="grass", sizes=("small",)
    )
    assert len(scene.things) == 2
    assert (scene.things[0].shape, scene.things[0].color) == ("star", "pink")
    assert scene.background == "grass"
    assert {thing.size for thing in scene.things} == {"small"}


def test_color_that_vanishes_on_the_asked_background_is_refused():
    with pytest.raises(ValueError, match="green cannot be seen on grass"):
        make_scene("test", color="green", background="grass")


def test_sizes_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match="3 objects of size large do not fit"):
        make_scene("test", num_things=3, sizes=("large",))


def test_dice_with_equal_keys_roll_equal_numbers():
    first, again, other = Dice("a", 1), Dice("a", 1), Dice("a", 2)
    rolls = [[dice.uniform() for _ in range(200)] for dice in (first, again, other)]
    assert rolls[0] == rolls[1]
    assert rolls[0] != rolls[2]


def test_dice_roll_evenly():
    dice = Dice("even")
    rolls = [dice.uniform(2, 4) for _ in range(4000)]
    assert 2 <= min(rolls) < 2.01
    assert 3.99 < max(rolls) < 4
    assert np.mean(rolls) == pytest.approx(3, abs=0.05)
    noise = dice.noise("field", 64, 64)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.03)
