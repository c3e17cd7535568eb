import pytest
import torch

from clip_pgs.inspection.cost.random_data import draw_captions


def lengths(tokens):
    return tokens.argmax(dim=1) + 1


@pytest.mark.parametrize(("kind", "mean", "tolerance"), [("flickr8k", 14.1, 0.5), ("web", 26, 2)])
def test_captions_are_as_long_as_real_ones(kind, mean, tolerance):
    tokens = draw_captions(kind, batch_size=4000, context_length=77, vocab_size=49408)
    assert lengths(tokens).float().mean().item() == pytest.approx(mean, abs=tolerance)


def test_some_captions_of_the_web_fill_the_context_and_none_of_flickr8k_does():
    def longest(kind):
        tokens = draw_captions(kind, batch_size=512, context_length=77, vocab_size=49408)
        return lengths(tokens).max().item()

    assert longest("web") == 77
    assert longest("flickr8k") < 48


def test_a_caption_ends_with_the_highest_id_and_zeros_follow():
    tokens = draw_captions("flickr8k", batch_size=64, context_length=20, vocab_size=100)
    assert tokens.shape == (64, 20)
    for row, length in zip(tokens, lengths(tokens).tolist(), strict=True):
        assert row[length - 1] == 99
        assert (row[: length - 1] > 0).all()
        assert (row[: length - 1] < 99).all()
        assert not row[length:].any()


def test_a_seed_gives_the_same_captions_again():
    options = {"batch_size": 4, "context_length": 16, "vocab_size": 100}
    assert torch.equal(draw_captions("web", **options), draw_captions("web", **options))
    assert not torch.equal(draw_captions("web", seed=1, **options), draw_captions("web", **options))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="captions must be one of flickr8k, web, got 'x'"):
        draw_captions("x", batch_size=1, context_length=8, vocab_size=9)
