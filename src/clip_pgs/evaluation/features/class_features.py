"""Features of classes: what images are compared with in zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_pgs.evaluation.features.feature_cache import Entry, FeatureCache
from clip_pgs.evaluation.features.features import text_features
from clip_pgs.evaluation.features.fingerprints import content_digest
from clip_pgs.evaluation.models.models import LoadedModel


def class_features(
    loaded: LoadedModel,
    classnames: Sequence[str],
    templates: Sequence[str],
    *,
    device: torch.device,
    amp: bool,
    cache: FeatureCache,
) -> Tensor:
    """Encode classes as clip_benchmark does: the mean of a class's normalised prompts.

    Args:
        loaded: The model, on `device`.
        classnames: The C classes.
        templates: Prompts with a `{c}` for the name.
        device: Where the model is.
        amp: Whether to use half precision.
        cache: Of this model; a list of classes is encoded once.

    Returns:
        Features of length 1, shape (C, D), float32, on the CPU.

    Raises:
        NonFiniteFeaturesError: If a feature is not finite.
    """
    digest = content_digest([list(classnames), list(templates)])
    # The tokenizer has no printed form to key a file with: texts are kept in memory alone.
    key = cache.key("classes", digest, device=device, amp=amp)
    entry = cache.get(key)
    if entry is None:
        prompts = [template.replace("{c}", name) for name in classnames for template in templates]
        prompts_PD = normalize(text_features(loaded, prompts, device=device, amp=amp), dim=-1)
        mean_CD = prompts_PD.unflatten(0, (len(classnames), len(templates))).mean(dim=1)
        entry = Entry({"classes": normalize(mean_CD, dim=-1)})
        cache.put(key, entry, is_known=False)
    return entry.tensors["classes"]
