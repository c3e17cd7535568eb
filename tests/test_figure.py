import numpy as np
import pytest
from PIL import Image

from clip_pgs.figure import Column, draw_figure

BLANK = Image.new("RGB", (224, 224))


def drawn(title, caption):
    return np.asarray(draw_figure([Column(title, [(BLANK, caption)])]))


@pytest.mark.parametrize(("one", "other"), [("é", "ü"), ("Straße", "Strañe"), ("кот", "рак")])
@pytest.mark.parametrize("place", ["title", "caption"])
def test_letters_that_are_none_of_ascii_are_told_apart(place, one, other):
    texts = {"title": "a", "caption": "a"}
    first, second = (drawn(**{**texts, place: text}) for text in (one, other))
    assert (first != second).any()
