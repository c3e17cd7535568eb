"""Training CLIP models with masked image towers: `python -m clip_pgs.training`."""
