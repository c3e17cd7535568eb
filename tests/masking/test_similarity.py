import torch

from clip_pgs import PatchInputs
from clip_pgs.masking.similarity import candidate_similarity, mixed_similarity

FIRST = torch.tensor([[0]])


def test_similarity_is_the_cosine_of_centred_features():
    features = torch.tensor(
        [[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [11.0, 12.0, 13.0], [1.0, 3.0, 2.0]]]
    )
    torch.testing.assert_close(
        candidate_similarity(features, FIRST), torch.tensor([[[1.0, -1.0, 1.0, 0.5]]])
    )


def test_one_mean_is_taken_over_all_channels():
    # Two flat patches of other colours differ once one mean over all values is taken off.
    red, blue = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    similarity = candidate_similarity(torch.tensor([[red, blue]]), FIRST)
    torch.testing.assert_close(similarity, torch.tensor([[[1.0, -0.5]]]))


def test_a_flat_patch_resembles_only_itself():
    features = torch.tensor([[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]]])
    similarity = candidate_similarity(features, torch.tensor([[0, 2]]))
    assert similarity.tolist() == [[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]


def test_rounding_noise_counts_as_flat():
    grey = torch.full((1, 2, 768), 0.3)
    grey[0, 0, 5] += 1e-6
    grey[0, 1, 9] += 1e-6
    assert candidate_similarity(grey, FIRST).tolist() == [[[1.0, 0.0]]]


def test_a_faint_but_real_pattern_is_no_noise():
    pattern = torch.randn(768, generator=torch.Generator().manual_seed(0))
    faint = torch.stack([1 + 1e-2 * pattern, 2 + 1e-2 * pattern])[None]
    torch.testing.assert_close(
        candidate_similarity(faint, FIRST), torch.ones(1, 1, 2), atol=1e-3, rtol=0
    )


def test_autocast_keeps_float32():
    features = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    plain = candidate_similarity(features, FIRST)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(candidate_similarity(features, FIRST), plain)


def cosines(features, candidate_index):
    """Return centred cosines as they are defined, in float64."""
    centred = features.double() - features.double().mean(dim=-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True)
    return torch.stack([unit[i, row] @ unit[i].T for i, row in enumerate(candidate_index)])


def test_it_equals_float64_however_far_the_mean_lies_from_zero():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 30, 768, generator=generator)
    features += torch.tensor([0.0, 1.0, 10.0, 30.0])[:, None, None]
    index = torch.rand(4, 30, generator=generator).topk(5, dim=1).indices
    difference = candidate_similarity(features, index) - cosines(features, index)
    assert difference.abs().max() <= 1e-5


def test_a_batch_in_blocks_is_every_image_by_itself():
    # Each of these images fills more than a block.
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(5, 3, 480, 480, generator=generator)
    tokens = torch.randn(5, 225, 24, generator=generator)
    index = torch.rand(5, 225, generator=generator).topk(11, dim=1).indices
    whole = mixed_similarity(PatchInputs(pixels, 32, tokens=tokens, progress=0.5), index, name="x")
    for i in range(5):
        alone = PatchInputs(pixels[i : i + 1], 32, tokens=tokens[i : i + 1], progress=0.5)
        assert torch.equal(mixed_similarity(alone, index[i : i + 1], name="x")[0], whole[i])
