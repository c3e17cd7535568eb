"""Configs and model configs that a stranger may have written."""

import copy
import json

import yaml
from hypothesis import strategies as st

from support.bad_flags import FLAGS, FUZZED_FLAGS, OPTION_NAMES, item, numbers, texts
from support.options import MODEL_CONFIG

scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(texts, scalars.filter(lambda v: v == v)), inner, max_size=3),
    ),
    max_leaves=6,
)
KEYS = st.one_of(
    st.sampled_from([flag[2:] for flag in FUZZED_FLAGS]),
    st.sampled_from(["base", "config", "batch_size", "masking_option", "help"]),
)
HOSTILE_YAML = [
    b"lr: !!python/object/apply:os.system ['touch pwned']",
    b"!!python/object/new:os.system ['touch pwned']",
    b"lr: !!python/name:os.system",
    b"a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b]\nlr: *c",
    b"a: &a\n  b: *a",
    b"&a lr: *a",
    b"? [1, 2]\n: 3",
    b"? {a: b}\n: 3",
    b"<<: {lr: 1}\nlr: 2",
    b"<<: [1]",
    b"<<: &a {<<: *a}",
    b"lr: 1\n---\nlr: 2",
    b"%YAML 9.9\n---\nlr: 1",
    b"\xff\xfe\x00",
    b"\x00",
    b"lr: \x07",
    b"{" * 3000,
    b"- " * 3000,
    b"lr: " + b"[" * 5000,
    b"name: 2001-99-99",
    b"name: 2001-01-01",
    b"lr: .nan",
    b"batch-size: .inf",
    b"seed: 0o17",
    b"lr: 190:20:30",
    b"lr: !!int x",
    b"lr: !!binary '?'",
    b"lr: !!timestamp x",
    b"lr: !!set {a, b}",
    b"lr: !!omap [a]",
    b"lr: " + b"9" * 5000,
    b"base: run.yaml",
    b"base: .",
    b'base: "\\0"',
    b"base: binary",
    b"base: /dev/zero",
    b"train-data: pipe:touch pwned",
]


def _bomb(depth):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join([*lines, f"image-mean: *a{depth - 1}"]).encode()


@st.composite
def _plausible(draw):
    """Options of a few flags, mostly of the right kind."""
    options = {}
    for flag in draw(st.lists(st.sampled_from(FUZZED_FLAGS), max_size=5)):
        action = FLAGS[flag]
        if action.nargs == 0:
            value = draw(st.booleans())
        elif flag.endswith(("-option", "-cfg")):
            value = draw(st.dictionaries(st.sampled_from(OPTION_NAMES), scalars, max_size=3))
        else:
            text = draw(item(action))
            value = [text] if action.nargs in ("+", "*") else text
            if action.type not in (None, str):
                value = draw(st.one_of(st.just(value), st.integers(1, 9), st.floats(0, 1), numbers))
        options[flag[2:]] = value
    return options


mappings = st.dictionaries(KEYS, st.one_of(scalars, trees), max_size=4)
yaml_files = st.one_of(
    *[_plausible().map(lambda tree: yaml.safe_dump(tree).encode())] * 4,
    mappings.map(lambda tree: yaml.safe_dump(tree, allow_unicode=False).encode()),
    mappings.map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass")),
    st.sampled_from([*HOSTILE_YAML, _bomb(9), _bomb(3)]),
    st.lists(st.sampled_from(HOSTILE_YAML), max_size=3).map(b"\n".join),
    st.binary(max_size=40),
    trees.map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass")),
)


def _vision_keys():
    return [*MODEL_CONFIG["vision_cfg"], "patch_dropout", "pool_type", "timm_model_name", "ls_x"]


_MORE_VISION_KEYS = ["mlp_ratio", "attentional_pool", "pos_embed_type", "act_kwargs", "block_type"]
EDITS = st.tuples(
    st.sampled_from(
        [("embed_dim",), ("vision_cfg",), ("text_cfg",), ("quick_gelu",), ("unheard_of",)]
        + [("vision_cfg", key) for key in _vision_keys()]
        + [
            ("vision_cfg", key)
            for key in [
                "mlp_ratio",
                "attentional_pool",
                "pos_embed_type",
                "act_kwargs",
                "block_type",
            ]
        ]
        + [("text_cfg", key) for key in (*MODEL_CONFIG["text_cfg"], "pad_id", "hf_tokenizer_name")]
        + [
            ("multimodal_cfg",),
            ("multimodal_cfg", "width"),
            ("custom_text",),
            ("init_logit_scale",),
        ]
    ),
    st.one_of(
        st.just("delete"),
        st.integers(-2, 64),
        st.sampled_from([0, 1, 3, 8, 31, 48, 2**20, 2**31, 2**62, 10**12, 10**40, 1e308, 0.5]),
        trees,
    ),
)


@st.composite
def model_configs(draw):
    """Bytes of a small valid model config after a few edits."""
    config = copy.deepcopy(MODEL_CONFIG)
    for path, value in draw(st.lists(EDITS, max_size=3)):
        *parents, key = path
        place = config
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if value == "delete":
            place.pop(key, None)
        else:
            place[key] = value
    return json.dumps(config).encode("utf-8", "surrogatepass")
