import torch

from clip_pgs.masking.similarity import candidate_similarity

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
