import pytest
import torch

from clip_pgs.integrations.apply import tower_masking
from clip_pgs.masking.merge import Merge
from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.options import IDENTITY, names_of, parse_options
from clip_pgs.training.run_folder import describe_run
from support.options import SYNTHETIC, VALID, write_model_config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), None),
        (("--merge", "2x2"), Merge((2, 2), by_candidate=False)),
        (("--merge", "candidates", "--merge-counts"), Merge(None, by_candidate=True, counts=True)),
    ],
)
def test_the_flags_reach_the_model(tmp_path, flags, expected):
    config = write_model_config(tmp_path / "vit_merging.json")
    options = parse_options(["--model-config", config, *SYNTHETIC, "--masking", "pgs", *flags])
    assert tower_masking(build_model(options, torch.device("cpu")).model).merge == expected


def test_a_config_holds_it_and_the_command_line_wins(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: ViT-B-16\nmasking: pgs\nmerge: 2x2+candidates\nmerge_counts: true\n")
    options = parse_options(["--config", str(config)])
    assert (options.merge, options.merge_counts) == ("2x2+candidates", True)
    undone = parse_options(["--config", str(config), "--merge", "none", "--no-merge-counts"])
    assert (undone.merge, undone.merge_counts) == ("none", False)


def test_a_checkpoint_says_of_its_run_what_was_merged(tmp_path):
    config = write_model_config(tmp_path / "vit_recorded.json")
    for flags, expected in ((("--merge", "2x2"), "2x2"), ((), None)):
        options = parse_options(["--model-config", config, *SYNTHETIC, "--masking", "pgs", *flags])
        model = build_model(options, torch.device("cpu")).model
        record = describe_run(options, model, torch.device("cpu"), num_samples=9)
        assert record["recipe"].get("merge") == expected


def test_it_belongs_to_what_a_run_is():
    assert {"merge", "merge_counts"} <= set(names_of(IDENTITY))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--merge", "2x2"), "--merge needs --masking NAME"),
        (("--masking", "none", "--merge", "2x2"), "merge needs a masking that drops patches"),
        (("--masking", "random", "--merge", "15x2"), "at most as fine as the 14x14 patches"),
        (("--masking", "random", "--merge", "2by2"), "merge must be none, ROWSxCOLUMNS"),
        (("--masking", "random", "--merge", "candidates"), "merge by candidates needs pgs"),
        (("--masking", "random", "--merge-counts"), "merge_counts needs merge"),
        (("--masking", "none", "--merge-counts"), "merge_counts needs merge"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_made(flags, match):
    with pytest.raises(ValueError, match=match):
        check_options(parse_options([*VALID, *flags]))
