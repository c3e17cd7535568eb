"""CLIP-PGS once more: slow float64 loops over images and patches, straight from the definition."""

import math

import numpy as np


def edge_map(image, patch_size):
    """Return the min-max scaled mean Sobel magnitude of each patch; image (3, H, W)."""
    luminance = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    height, width = luminance.shape
    kernel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    magnitude = np.zeros_like(luminance)
    for row in range(height):
        for column in range(width):
            gradient_x = gradient_y = 0.0
            for i in range(3):
                for j in range(3):
                    near_row = min(max(row + i - 1, 0), height - 1)
                    near_column = min(max(column + j - 1, 0), width - 1)
                    gradient_x += kernel[i][j] * luminance[near_row, near_column]
                    gradient_y += kernel[j][i] * luminance[near_row, near_column]
            magnitude[row, column] = math.sqrt(gradient_x**2 + gradient_y**2)
    edges = np.array([patch.mean() for patch in cut(magnitude[None], patch_size)])
    span = edges.max() - edges.min()
    return (edges - edges.min()) / span if span > 0 else np.zeros_like(edges)


def cut(image, patch_size):
    """Return the patches of an image (C, H, W) in raster order, each flattened."""
    _, height, width = image.shape
    return [
        image[:, row : row + patch_size, column : column + patch_size].reshape(-1)
        for row in range(0, height, patch_size)
        for column in range(0, width, patch_size)
    ]


def cosine(features, candidates):
    """Return centred cosine similarities (C, N) under the flat-patch rule."""
    directions = []
    for feature in features:
        centred = feature - feature.mean()
        norm = math.sqrt((centred**2).sum())
        flat = norm <= 1e-5 * math.sqrt((feature**2).sum()) + 1e-12
        directions.append(np.zeros_like(centred) if flat else centred / norm)
    similarity = np.zeros((len(candidates), len(features)))
    for row, candidate in enumerate(candidates):
        for patch in range(len(features)):
            similarity[row, patch] = directions[candidate] @ directions[patch]
        similarity[row, candidate] = 1.0
    return similarity


def transport_plan(similarity, temperature, num_iters):
    """Return the entropic plan (C, N) after plain-domain sweeps of rows, then columns."""
    plan = np.exp(-(1.0 - similarity) / temperature)
    num_rows, num_columns = plan.shape
    for _ in range(num_iters):
        for row in range(num_rows):
            plan[row] *= (1.0 / num_rows) / plan[row].sum()
        for column in range(num_columns):
            plan[:, column] *= (1.0 / num_columns) / plan[:, column].sum()
    return plan


def scores(
    image,
    tokens,
    candidates,
    *,
    patch_size,
    progress=0.0,
    edge_weight=0.5,
    temperature=0.1,
    num_iters=12,
    edges=True,
    transport=True,
    reach=None,
    columns=None,
):
    """Return the score of every patch of one image, -inf where no candidate reaches.

    With `reach`, a candidate stands for the patches at most that many rows and columns away, on
    a grid of so many `columns`.
    """
    similarity = cosine(cut(image, patch_size), candidates)
    if progress > 0:
        similarity = (1 - progress) * similarity + progress * cosine(tokens, candidates)
    num_patches = similarity.shape[1]
    if reach is not None:
        return within_reach(
            similarity,
            candidates,
            edge_weight * edge_map(image, patch_size),
            reach=reach,
            columns=columns,
            transport=transport,
        )
    if transport:
        plan = transport_plan(similarity, temperature, num_iters)
        redundancy = [
            sum(num_patches * plan[c, j] * similarity[c, j] for c in range(len(candidates)))
            for j in range(num_patches)
        ]
    else:
        redundancy = [max(similarity[:, j]) for j in range(num_patches)]
    result = np.array(redundancy)
    return result - edge_weight * edge_map(image, patch_size) if edges else result


def within_reach(similarity, candidates, penalty, *, reach, columns, transport):
    """Return scores less a penalty where candidates stand for their neighbours alone."""
    num_rows, num_patches = similarity.shape
    near = np.zeros(similarity.shape, dtype=bool)
    for row, candidate in enumerate(candidates):
        for j in range(num_patches):
            rows_apart = abs(candidate // columns - j // columns)
            columns_apart = abs(candidate % columns - j % columns)
            near[row, j] = max(rows_apart, columns_apart) <= reach
    # Only the patches that some candidate reaches take part in the transport.
    reached = [j for j in range(num_patches) if near[:, j].any()]
    kernel = np.where(near, np.exp(-(1.0 - similarity) / 0.1), 0.0)[:, reached]
    for _ in range(12):
        for row in range(num_rows):
            kernel[row] *= (1.0 / num_rows) / kernel[row].sum()
        for column in range(len(reached)):
            kernel[:, column] *= (1.0 / num_patches) / kernel[:, column].sum()
    result = np.full(num_patches, -np.inf)
    for column, j in enumerate(reached):
        if transport:
            result[j] = sum(
                num_patches * kernel[c, column] * similarity[c, j] for c in range(num_rows)
            )
        else:
            result[j] = max(similarity[c, j] for c in range(num_rows) if near[c, j])
    return result - penalty


def candidates(noise, edges, *, protection, count, places=None):
    """Return the first `count` patches of an image by random key less protection.

    With `places`, no other patch comes before these.
    """
    keys = [
        -math.log(-math.log(number)) - protection * edge
        for number, edge in zip(noise.tolist(), edges, strict=True)
    ]
    first = range(len(keys)) if places is None else places
    return sorted(range(len(keys)), key=lambda j: (j not in first, -keys[j]))[:count]


def second_draw(noise):
    """Return the numbers that a random share is drawn by, from those of one image."""
    return [int(number * 2**24) * 10368889 % 2**24 / 2**24 for number in noise.tolist()]


def kept(
    patch_scores, candidates, *, ratio_max, ratio_min, threshold, random_share=0.0, noise=None
):
    """Return the positions that stay: candidates go first, then the highest scores.

    A random share of them is drawn in the end, from all but the lowest scores.
    """
    num_patches = len(patch_scores)
    most = math.floor(ratio_max * num_patches + 1e-9)
    fewest = math.floor(ratio_min * num_patches + 1e-9)
    above = [j for j in range(num_patches) if patch_scores[j] > threshold or j in candidates]
    num_mask = min(max(len(above), fewest), most)
    order = sorted(range(num_patches), key=lambda j: (j not in candidates, -patch_scores[j], j))
    num_keep = num_patches - num_mask
    num_lowest = round((1 - random_share) * num_keep)
    others, lowest = order[: num_patches - num_lowest], order[num_patches - num_lowest :]
    if num_lowest < num_keep:
        draw = second_draw(noise)
        others.sort(key=lambda j: (draw[j], -j))
    return sorted(lowest + others[: num_keep - num_lowest])
