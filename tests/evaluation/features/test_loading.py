import io
import sys

import pytest

from clip_pgs.evaluation import evaluate, load_suite
from clip_pgs.evaluation.features.loading import estimate_images


@pytest.mark.parametrize(
    ("name", "split", "num_images"), [("six", "train", 24), ("six", "test", 12)]
)
def test_number_of_images_is_known_before_they_are_read(data_root, name, split, num_images):
    assert estimate_images(str(data_root / name), split) == num_images


def test_number_of_images_is_left_open_where_nothing_tells(tmp_path, data_root):
    assert estimate_images("https://example.org/six", "test") is None
    assert estimate_images(str(data_root / "pairs"), "train") is None
    (tmp_path / "test").mkdir()
    (tmp_path / "test/0.tar").write_bytes(b"no tar at all" * 100)
    assert estimate_images(str(tmp_path), "test") is None


def test_bar_on_a_terminal_shows_how_many_are_left(
    color_model, data_root, dataset_list, monkeypatch
):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    eval_sets = load_suite(datasets=str(dataset_list), data_root=str(data_root))
    evaluate(color_model, eval_sets[:1], workers=0)
    assert "six" in terminal.getvalue()
    assert "/12 " in terminal.getvalue()
