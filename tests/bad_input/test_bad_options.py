"""Whatever a training run is asked for is valid, or refused in one sentence before it starts.

`BAD_INPUT_EXAMPLES=5000 pytest tests/bad_input` looks longer, at other examples each time.
"""

from pathlib import Path

import pytest
from hypothesis import given

from clip_pgs.training.checks import check_options
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import parse_options
from support.bad_files import model_configs, yaml_files
from support.bad_flags import command_lines
from support.fuzzing import accepts, fuzz

pytestmark = pytest.mark.slow

SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "1000"]
BASE = ["--model", "ViT-B-32", *SYNTHETIC]
MASKED = ["--model-config", "tiny.json", *SYNTHETIC, "--masking", "pgs"]


def check(argv):
    args = parse_options(argv)
    check_options(args)
    option_warnings(args)


def check_config(content):
    Path("run.yaml").write_bytes(content)
    return accepts(check, ["--config", "run.yaml", *BASE])


def check_model(content):
    Path("tiny.json").write_bytes(content)
    return accepts(check, MASKED)


@fuzz(200)
@given(command_lines(BASE))
def test_any_flags_are_valid_or_refused(argv):
    accepts(check, argv)


@fuzz(100)
@given(yaml_files)
def test_any_config_is_valid_or_refused(content):
    check_config(content)


@fuzz(100)
@given(model_configs())
def test_any_model_config_is_valid_or_refused(content):
    check_model(content)
