"""True captions, and nearly true ones."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from clip_pgs.data.world.captions import TASKS, caption, hard_negatives
from clip_pgs.data.world.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, Dice, make_scene

SCENES = [make_scene(f"test/{number}") for number in range(300)]
TEXTURE_WORDS = {
    "plain": ("plain",),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "with dots"),
    "checkered": ("checkered", "with checks"),
}


def describe(scene, **options):
    return caption(scene, Dice(scene.key, "caption"), **options)


def test_full_caption_states_every_attribute_of_every_object():
    for scene in SCENES:
        sentence = describe(scene, full=True)
        words = sentence.replace(",", "").split()
        for thing in scene.things:
            assert {thing.shape, thing.color, thing.size} <= set(words)
            assert any(word in sentence for word in TEXTURE_WORDS[thing.texture])
        assert BACKGROUNDS[scene.background].noun in sentence


def test_full_captions_of_different_scenes_differ():
    sentences = [describe(scene, full=True) for scene in SCENES]
    assert len(set(sentences)) > 0.98 * len(sentences)


def test_captions_vary_in_length_and_phrasing():
    sentences = [describe(scene) for scene in SCENES]
    lengths = {len(sentence.split()) for sentence in sentences}
    assert min(lengths) <= 3
    assert max(lengths) >= 14
    assert any(sentence.startswith("there is") for sentence in sentences)
    assert any(" with a" in sentence for sentence in sentences)


def test_captions_name_nothing_that_is_not_there():
    for scene in SCENES:
        words = set(describe(scene).replace(",", "").split())
        for attribute in ("shape", "color", "size"):
            absent = {getattr(thing, attribute) for other in SCENES for thing in other.things} - {
                getattr(thing, attribute) for thing in scene.things
            }
            assert not words & absent


def test_article_fits_the_word_after_it():
    for scene in SCENES:
        words = describe(scene).split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou")


@pytest.mark.parametrize(
    ("arrangement", "forth", "back"),
    [("above", "above", "below"), ("left", "to the left of", "to the right of")],
)
def test_relation_reads_true_from_either_side(arrangement, forth, back):
    found = 0
    for scene in SCENES:
        if scene.arrangement == arrangement and len(scene.things) == 2:
            sentence = describe(scene, full=True)
            first, second = (sentence.index(thing.shape) for thing in scene.things)
            assert (forth in sentence) == (first < second)
            assert (back in sentence) == (second < first)
            found += 1
    assert found > 5


def test_changing_one_attribute_changes_one_word():
    scene = next(scene for scene in SCENES if scene.things[0].color == "red")
    other = replace(scene, things=(replace(scene.things[0], color="blue"), *scene.things[1:]))
    before = describe(scene, full=True).split()
    after = caption(other, Dice(scene.key, "caption"), full=True).split()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert changed == [("red", "blue")]


ITEMS = {task: hard_negatives(task, 0, 200) for task in TASKS}
SAME_LENGTH = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
RELATIONS = {
    "above": lambda first, second: first.y < second.y,
    "below": lambda first, second: first.y > second.y,
    "to the left of": lambda first, second: first.x < second.x,
    "to the right of": lambda first, second: first.x > second.x,
}
PLACE_WORDS = {
    "left": lambda thing: thing.x < 0.5,
    "right": lambda thing: thing.x > 0.5,
    "top": lambda thing: thing.y < 0.5,
    "bottom": lambda thing: thing.y > 0.5,
    "center": lambda thing: abs(thing.x - 0.5) < 0.15 and abs(thing.y - 0.5) < 0.15,
}


def is_true(sentence, scene):
    """Judge a sentence by the objects of a scene, of which it may leave some out."""
    for name, about in BACKGROUNDS.items():
        if about.noun in sentence and name != scene.background:
            return False
    adjective, shape_word = "|".join((*COLORS, *SIZES, *TEXTURES)), "|".join(SHAPES)
    named = re.findall(rf"\ban? ((?:(?:{adjective}) )*)({shape_word})\b", sentence)
    assert len(named) == len(re.findall(rf"\b(?:{shape_word})\b", sentence))
    things = []
    for adjectives, shape in named:
        fitting = [
            thing
            for thing in scene.things
            if thing.shape == shape
            and set(adjectives.split()) <= {thing.color, thing.size, thing.texture}
        ]
        if not fitting:
            return False
        things += fitting
    for words, holds in RELATIONS.items():
        if f" {words} a" in sentence and not holds(*things):
            return False
    place = re.search(r"(?:in|at|on) the (top|bottom|left|right|center)( left| right)?", sentence)
    words = " ".join(filter(None, place.groups())).split() if place else []
    return all(PLACE_WORDS[word](things[0]) for word in words)


def words_of(sentence):
    """Return the words, with one form of the article."""
    words = sentence.replace(",", "").split()
    return ["a" if word == "an" else word for word in words]


def test_the_judge_of_these_tests_tells_true_from_false():
    scene = ITEMS["swap_obj"][0].sample.scene
    first, second = scene.things
    words = {"above": "above", "below": "below", "left": "to the left of"}
    relation = words.get(scene.arrangement, "to the right of")
    assert is_true(f"a {first.color} {first.shape} {relation} a {second.shape}", scene)
    assert not is_true(f"a {second.shape} {relation} a {first.color} {first.shape}", scene)
    assert not is_true(f"a {second.color} {first.shape}", scene)


@pytest.mark.parametrize("task", TASKS)
def test_captions_are_true_and_negatives_false(task):
    for item in ITEMS[task]:
        assert is_true(item.sample.caption, item.sample.scene), item
        assert not is_true(item.negative, item.sample.scene), item


@pytest.mark.parametrize("task", SAME_LENGTH)
def test_replacing_and_swapping_keep_the_number_of_words(task):
    for item in ITEMS[task]:
        assert len(words_of(item.sample.caption)) == len(words_of(item.negative))


@pytest.mark.parametrize("task", ["replace_obj", "replace_att", "replace_rel"])
def test_replacing_changes_one_word(task):
    for item in ITEMS[task]:
        pairs = zip(words_of(item.sample.caption), words_of(item.negative), strict=True)
        assert sum(first != second for first, second in pairs) == 1


@pytest.mark.parametrize("task", ["swap_obj", "swap_att"])
def test_swapping_moves_two_words_and_changes_none(task):
    for item in ITEMS[task]:
        true, false = words_of(item.sample.caption), words_of(item.negative)
        assert Counter(true) == Counter(false)
        assert sum(first != second for first, second in zip(true, false, strict=True)) == 2


def test_what_is_swapped_is_what_the_task_says():
    for task, swapped in (("swap_obj", set(SHAPES)), ("swap_att", {*COLORS, "striped", "dotted"})):
        for item in ITEMS[task]:
            true, false = words_of(item.sample.caption), words_of(item.negative)
            moved = {first for first, second in zip(true, false, strict=True) if first != second}
            assert moved <= swapped | {"checkered"}


@pytest.mark.parametrize(("task", "added"), [("add_att", 1), ("add_obj", 2)])
def test_adding_leaves_the_rest_as_it_is(task, added):
    for item in ITEMS[task]:
        true, false = Counter(words_of(item.sample.caption)), Counter(words_of(item.negative))
        assert not true - false
        assert added <= (false - true).total() <= 2 * added


@pytest.mark.parametrize("task", SAME_LENGTH)
def test_a_reader_that_does_not_look_is_at_chance(task):
    items = hard_negatives(task, 0, 600)
    read = CountVectorizer(ngram_range=(1, 3), binary=True, token_pattern=r"\w+")
    captions = [item.sample.caption for item in items]
    counts = read.fit_transform(captions + [item.negative for item in items]).toarray()
    # Half of the pairs the other way round, as a choice between two has no order.
    sign = np.where(np.arange(600) % 2, 1, -1)
    choices = (counts[:600].astype(int) - counts[600:]) * sign[:, None]
    model = LogisticRegression(fit_intercept=False, C=0.1)
    assert cross_val_score(model, choices, sign, cv=4).mean() < 0.57


def test_a_negative_names_no_color_that_vanishes_on_the_background():
    for items in ITEMS.values():
        for item in items:
            clashes = BACKGROUNDS[item.sample.scene.background].clashes
            assert not set(clashes) & set(words_of(item.negative))


def test_attributes_of_all_kinds_are_replaced_and_added():
    for task in ("replace_att", "add_att"):
        changed = set()
        for item in ITEMS[task]:
            changed |= set(words_of(item.negative)) - set(words_of(item.sample.caption))
        assert {"striped", "dotted", "checkered", "small", "large", *COLORS} <= changed


def test_items_of_a_larger_world_start_with_those_of_the_smaller_one():
    assert hard_negatives("add_obj", 0, 5) == ITEMS["add_obj"][:5]


def test_seeds_and_tasks_share_no_scene():
    scenes = Counter(item.sample.scene for items in ITEMS.values() for item in items)
    scenes.update(item.sample.scene for item in hard_negatives("add_obj", 1, 20))
    assert max(scenes.values()) == 1
