"""Whatever the other commands are asked for is done, or refused in one sentence."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_pgs.data.__main__ import main as data
from clip_pgs.evaluation.__main__ import main as evaluation
from clip_pgs.evaluation.models import load_model
from clip_pgs.inspection.__main__ import main as inspection
from support.bad_files import model_configs
from support.bad_flags import FILES, OPTION_NAMES, numbers, texts
from support.fuzzing import accepts, fuzz, run_command

pytestmark = pytest.mark.slow

# A command that the user types is run, and a URL is fetched.
words = st.one_of(texts, st.sampled_from([*FILES, "photo.png"]), numbers.map(str)).filter(
    lambda text: not text.startswith(("pipe:", "http", "-"))
)
places = st.sampled_from(["out", "out/new/x.png", "out.PNG", "empty", "empty/x.png", "", "\0", "."])
maskings = st.one_of(
    st.sampled_from(["random", "pgs", "cluster", "attentive", "none", "psg", "pgs:", ":", "pgs:="]),
    st.builds(
        lambda name, key, value: f"{name}:{key}={value}",
        st.sampled_from(["pgs", "gaussian", "cluster", "pgs-released"]),
        st.sampled_from(OPTION_NAMES),
        words,
    ),
)
small = st.one_of(st.integers(-1, 3).map(str), st.sampled_from(["nan", "", "1e3", "9" * 30]))
shares = st.one_of(st.floats(-1, 2).map(str), words)
# Thousands of patches are no hang, and take their time.
sizes = st.sampled_from(["32", "64", "7", "8", "1", "0", "-1", "nan", "", "100000", "9" * 30])
VIEW = {"--model": words, "--image-size": sizes, "--patch-size": sizes, "--progress": shares}
TINY = ["--image-size", "32", "--patch-size", "8"]
DATA_SETS = {
    "--suite": st.one_of(words, st.sampled_from(["robustness", "linear-probe"])),
    "--datasets": st.one_of(words, st.sampled_from(["demo", "paper"])),
    "--data-root": st.one_of(words, st.just("folder/{dataset}")),
}


def lines(first, flags, *, most=4):
    """Command lines of some words, each by its strategy, and a few of these flags."""
    options = [st.tuples(st.just(flag), value) for flag, value in flags.items()]
    return st.builds(
        lambda start, chosen: [*start, *(token for pair in chosen for token in pair)],
        st.tuples(
            *[word if isinstance(word, st.SearchStrategy) else st.just(word) for word in first]
        ),
        st.lists(st.one_of(*options), max_size=most) if options else st.just([]),
    )


def evaluation_lines():
    flags = {
        **DATA_SETS,
        "--model": words,
        "--model-config": words,
        "--pretrained": words,
        "--batch-size": words,
        "--workers": words,
        "--device": words,
        "--output": places,
        "--nonsense": words,
    }
    return st.one_of(
        lines([words], flags),
        lines(["sets"], DATA_SETS),
        lines(["report", words], {"-o": places}),
        lines(["report", "folder", words], {"-o": places}),
    )


def inspection_lines():
    masks = {
        "--masking": maskings,
        "--mask-ratio": shares,
        "--mask-ratio-min": shares,
        "--seed": words,
        "-o": places,
        **VIEW,
    }
    kept = {
        "--masking": maskings,
        "--mask-ratio": shares,
        "--seeds": small,
        "--foreground": words,
        "-o": places,
        **VIEW,
    }
    return st.one_of(
        lines(["masks", "photo.png", "-o", "out/x.png", *TINY], masks),
        lines(["masks", words, "-o", "out/x.png", *TINY], masks),
        lines(["kept", "photo.png", "--foreground", "masks", "--seeds", "2", *TINY], kept),
        lines(["kept", words, "--foreground", "masks", "--seeds", "2", *TINY], kept),
    )


def data_lines():
    table = {"--image-key": words, "--caption-key": words, "--separator": words}
    return st.one_of(
        lines(["pack", words, places], {**table, "--shard-size": words}),
        lines(["pack", "good.csv", "out"], {**table, "--shard-size": words}),
        lines(["check", words], {}),
        lines(["words", words, "-o", places], {**table, "--min-count": words, "--workers": small}),
        lines(["world", places, "--num-train", "0"], {"--seed": words, "--num-val": small}),
    )


@fuzz(150)
@given(evaluation_lines())
def test_any_evaluation_is_done_or_refused(capsys, argv):
    run_command(evaluation, argv, capsys)


@fuzz(80)
@given(model_configs())
def test_a_checkpoint_of_any_model_config_is_opened_or_refused(content):
    Path("tiny.json").write_bytes(content)
    accepts(lambda path: load_model("weights.pt", model_config=path), "tiny.json")


@fuzz(150)
@given(inspection_lines())
def test_any_inspection_is_done_or_refused(capsys, argv):
    run_command(inspection, argv, capsys)


@fuzz(80)
@given(model_configs())
def test_any_model_config_is_looked_at_or_refused(capsys, content):
    Path("tiny.json").write_bytes(content)
    argv = ["masks", "photo.png", "-o", "out/x.png", "--masking", "random", "--model", "tiny.json"]
    run_command(inspection, argv, capsys)


@fuzz(150)
@given(data_lines())
def test_any_data_command_is_done_or_refused(capsys, argv):
    run_command(data, argv, capsys)
