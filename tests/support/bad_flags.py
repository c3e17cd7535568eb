"""Command lines that a user may type: plausible values and wild ones."""

from dataclasses import fields

from hypothesis import strategies as st

from clip_pgs.training.options import TrainOptions, flag_of, is_theirs, option_parser

_ACTIONS = {action.option_strings[0]: action for action in option_parser()._actions}
_OPTIONS = [f for f in fields(TrainOptions) if is_theirs(f) or "heading" in f.metadata]
FLAGS = {flag_of(option.name): _ACTIONS[flag_of(option.name)] for option in _OPTIONS}
# Prints a page; and the test itself names the config.
FUZZED_FLAGS = sorted(FLAGS.keys() - {"--help", "--config", "--check-only", "--trial"})

FILES = [
    "train.tar",
    "train{0..1}.tar",
    "pairs.csv",
    "words.json",
    "weights.pt",
    "evil.pt",
    "evil.pth",
    "tiny.json",
    "run.yaml",
    "folder",
    "folder/missing.tar",
    "empty",
    "binary",
    "list.txt",
]
WILD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e400",
    "1" * 400,
    "9" * 5000,
    "0x10",
    "1_000",
    "none",
    "latest",
    "/",
    ".",
    "..",
    "../../x",
    "~",
    "/dev/null",
    "/proc/self/mem",
    "x" * 5000,
    "a\nb",
    "\u202e\u0000\ud800",
    "\U0001f600",
    "-",
    "--",
    "--lr",
    "{0..99999999999999}.tar",
    "{a,b}" * 40,
    "{" * 3000,
    "{" * 500 + "}" * 500,
    "((((((((((" * 300,
    "[" * 5000,
    "pipe:touch pwned",
    "http://127.0.0.1:9/x.tar",
    "file:///etc",
    "::",
    "**/*",
    "**/" * 30 + "*",
    "a=b=c",
    "=",
    "k=",
    "k=__import__('os').system('touch pwned')",
    "local-dir:folder",
    "local-dir:",
    "hf-hub:",
    "hf-hub:../../x",
    "hf-hub:" + "a/" * 9,
]
OPTION_NAMES = [
    "mask_ratio",
    "mask_ratio_min",
    "edges",
    "temperature",
    "num_iters",
    "solver",
    "threshold",
    "neighbourhood",
    "candidate_ratio",
    "edge_detector",
    "sigma",
    "num_epochs",
    "frequencies",
    "fill",
    "scale",
    "use_timm",
    "ratio",
    "color_jitter",
    "interpolation",
    "re_prob",
]

numbers = st.one_of(
    st.integers(-3, 70),
    st.floats(-1, 2),
    st.floats(),
    st.integers(),
    st.sampled_from([0, 1, 2**31, 2**63, -(2**64), 10**30, 10**400, 1e-300, 1e308]),
)
texts = st.one_of(
    st.sampled_from(WILD_TEXTS),
    st.sampled_from(FILES),
    numbers.map(str),
    st.text(max_size=12),
)
pairs = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(OPTION_NAMES), texts)


def item(action):
    """Values of one flag: mostly of its own kind."""
    if action.choices:
        return st.one_of(st.sampled_from(sorted(map(str, action.choices))), texts)
    if action.type in (None, str):
        return st.one_of(texts, st.sampled_from(FILES))
    return st.one_of(st.integers(0, 8).map(str), st.floats(0, 1).map(str), numbers.map(str), texts)


@st.composite
def _option(draw, flag):
    action = FLAGS[flag]
    if action.nargs == 0:
        form = draw(st.sampled_from([flag, flag, f"--no-{flag[2:]}", f"{flag}=1"]))
        return [form]
    if action.nargs in ("+", "*"):
        words = pairs if flag.endswith(("-option", "-cfg")) else item(action)
        return [flag, *draw(st.lists(st.one_of(words, words, texts), max_size=4))]
    value = draw(item(action))
    return draw(st.sampled_from([[flag, value], [f"{flag}={value}"]]))


def command_lines(base, flags=FUZZED_FLAGS, *, max_flags=4):
    """Command lines of a valid base and a few flags after it, now and then with a stray word."""
    option = st.sampled_from(flags).flatmap(_option)
    stray = texts.map(lambda text: [text])
    options = st.lists(st.one_of(*[option] * 15, stray), max_size=max_flags)
    return options.map(lambda chosen: [*base, *(token for tokens in chosen for token in tokens)])
