import pytest
import torch

from clip_pgs import create_masking
from support.images import make_inputs


def test_it_keeps_the_patches_with_the_highest_attention():
    attention = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.0, 0.2], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    inputs = make_inputs(grid_size=(2, 3), attention=attention)
    selection = create_masking("attentive", mask_ratio=0.5)(inputs)
    assert selection.index.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert selection.valid is None


def test_noise_decides_between_equal_attentions_and_nowhere_else():
    attention = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.0]])
    kept = set()
    for seed in range(40):
        noise = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed))
        inputs = make_inputs(1, grid_size=(2, 3), attention=attention, noise=noise)
        index = create_masking("attentive", mask_ratio=0.5)(inputs).index[0].tolist()
        assert index[0] == 0
        assert 5 not in index
        kept.add(tuple(index[1:]))
    assert kept == {(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)}


def test_whole_cells_stay_as_in_the_released_code():
    attention = torch.rand(3, 196, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(3, grid_size=(14, 14), attention=attention)
    index = create_masking("attentive", mask_ratio=0.5, cell=2)(inputs).index
    assert index.shape == (3, 100)
    for row, scores in zip(index.tolist(), attention, strict=True):
        pooled = torch.nn.functional.avg_pool2d(scores.reshape(1, 14, 14), 2).flatten()
        cells = pooled.topk(25).indices.tolist()
        expected = [p for p in range(196) if p // 14 // 2 * 7 + p % 14 // 2 in cells]
        assert row == expected


def test_cells_that_do_not_fit_the_grid_are_refused():
    inputs = make_inputs(1, grid_size=(7, 6), attention=torch.rand(1, 42))
    with pytest.raises(ValueError, match="cell must divide the grid of 7 x 6 patches, got 2"):
        create_masking("attentive", cell=2)(inputs)


def test_half_precision_attention_ranks_like_its_values():
    attention = torch.rand(3, 49, generator=torch.Generator().manual_seed(0)).half()
    inputs = make_inputs(3, attention=attention)
    index = create_masking("attentive", mask_ratio=0.75)(inputs).index
    for row, scores in zip(index, attention.float(), strict=True):
        assert scores[row].min() >= scores.sort(descending=True).values[len(row) - 1]


def test_attention_that_is_missing_is_named():
    with pytest.raises(ValueError, match="attentive masking needs the teacher's attention"):
        create_masking("attentive")(make_inputs(attention=None))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"resolution": 0.0}, r"resolution must be in \(0, 1\], got 0.0"),
        ({"cell": 0}, r"cell must be in \[1, 1024\], got 0"),
        ({"momentum": 1.1}, r"momentum must be in \[0, 1\], got 1.1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_masking("attentive", **options)
