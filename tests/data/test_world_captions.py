from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from clip_pgs.data.world import caption, make_scene
from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.vocabulary import BACKGROUNDS

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
