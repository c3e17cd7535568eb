"""Command lines and files for the tests of training options."""

import json

MODEL_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SYNTHETIC = ("--dataset-type", "synthetic", "--train-num-samples", "1000", "--warmup", "2")
VALID = ("--model", "ViT-B-16", *SYNTHETIC)


def write_model_config(path, **vision):
    """Write a small model config, with changes to its image tower, and return its path."""
    config = {**MODEL_CONFIG, "vision_cfg": {**MODEL_CONFIG["vision_cfg"], **vision}}
    path.write_text(json.dumps(config))
    return str(path)


def write_shards(folder, *, num_shards=2, num_samples=500):
    """Write empty shards with a sizes.json, enough for checks, and return their pattern."""
    folder.mkdir()
    sizes = {f"{index:05d}.tar": num_samples for index in range(num_shards)}
    for name in sizes:
        (folder / name).touch()
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return f"{folder}/{{00000..{num_shards - 1:05d}}}.tar"
