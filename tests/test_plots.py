import io

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from clip_pgs.plots import COLORS, legend_label, picture, plot_style, quiet_axis


def draw(form, title="t", **options):
    with plot_style():
        drawing = Figure(figsize=(2, 1))
        axes = drawing.subplots()
        axes.plot([0, 1], [0, 1], color=COLORS[0], label=legend_label("_a"))
        quiet_axis(axes)
        axes.set_title(title)
        assert [text.get_text() for text in axes.legend().get_texts()] == [" _a"]
        return picture(drawing, form, **options)


@pytest.mark.parametrize("form", ["svg", "png"])
def test_a_figure_is_the_same_file_every_time_whatever_the_users_settings(form):
    first = draw(form, mark="mine")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        assert draw(form, mark="mine") == first
        assert matplotlib.rcParams["font.size"] == 30
    assert b"mine" in first


def test_a_png_can_be_opened_and_an_svg_is_whole():
    assert Image.open(io.BytesIO(draw("png"))).format == "PNG"
    assert draw("svg").rstrip().endswith(b"</svg>")


def test_names_are_no_formulas_and_may_be_of_any_script(recwarn):
    assert draw("svg", title="$x^2$ \u4e2d <b>")
    assert not recwarn.list
