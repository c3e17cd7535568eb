import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from open_clip_train.params import parse_args as parse_trainer_args

from clip_pgs.data.text_masking import TEXT_MASKINGS
from clip_pgs.integrations.open_clip_options import trainer_actions, trainer_parser
from clip_pgs.masking import describe_masking, list_maskings
from clip_pgs.training.checks import check_options
from clip_pgs.training.options import (
    REFUSED_FLAGS,
    TrainOptions,
    flag_of,
    help_text,
    is_theirs,
    option_parser,
    parse_options,
)
from support.options import VALID, write_model_config

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def refusal(argv):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_options(argv)
    return str(caught.value)


def test_options_of_open_clip_come_out_as_open_clip_parses_them():
    argv = ["--model", "ViT-B-16", "--lr", "3e-4", "--local-loss", "--image-mean", "0", "0.5", "1"]
    argv += ["--aug-cfg", "scale=(0.5, 1.0)", "use_timm=True", "--train-data", "a b/{0..3}.tar"]
    theirs, ours = vars(parse_trainer_args(argv)), vars(parse_options(argv).openclip)
    assert {name: ours[name] for name in theirs} == theirs


def test_defaults_of_the_optimiser_follow_the_model_in_a_file(tmp_path):
    # OpenCLIP's default model is a ResNet, for which beta2 and eps differ.
    args = parse_options(["--model-config", write_model_config(tmp_path / "vit_of_mine.json")])
    assert (args.beta2, args.eps) == (0.98, 1e-6)


def test_model_alone_is_not_taken_for_a_model_config():
    args = parse_options(["--model", "ViT-S-16"])
    assert (args.model, args.model_config) == ("ViT-S-16", None)


def test_model_config_alone_names_the_model(tmp_path):
    path = write_model_config(tmp_path / "vit_alone.json")
    args = parse_options(["--model-config", path])
    assert (args.model, args.model_config) == ("vit_alone", path)


@pytest.mark.parametrize("joined", [False, True])
def test_model_and_model_config_agree(tmp_path, joined):
    path = write_model_config(tmp_path / "vit_both.json")
    pairs = [("--model", "vit_both"), ("--model-config", path)]
    argv = [f"{flag}={value}" for flag, value in pairs] if joined else [a for p in pairs for a in p]
    args = parse_options(argv)
    assert (args.model, args.model_config) == ("vit_both", path)


def test_model_and_model_config_that_disagree_are_both_named(tmp_path):
    path = write_model_config(tmp_path / "vit_other.json")
    message = refusal(["--model", "ViT-B-16", "--model-config", path])
    assert "ViT-B-16" in message
    assert "vit_other.json" in message


def test_a_run_without_a_model_is_refused():
    assert "--model" in refusal(["--lr", "1e-3"])


def test_an_unknown_model_is_refused_with_near_names():
    message = refusal(["--model", "ViT-B16"])
    assert "'ViT-B16'" in message
    assert "ViT-B-16" in message


@pytest.mark.parametrize("name", ["local-dir:somewhere", "hf-hub:somebody/something"])
def test_models_outside_open_clip_keep_their_schema(name):
    assert parse_options(["--model", name]).model == name


@pytest.mark.parametrize(
    ("content", "part"),
    [("{", "not JSON"), ("[1]", "one JSON object"), ('{"embed_dim": 8}', "vision_cfg")],
)
def test_a_broken_model_config_is_refused(tmp_path, content, part):
    path = tmp_path / "vit_broken.json"
    path.write_text(content)
    message = refusal(["--model-config", str(path)])
    assert str(path) in message
    assert part in message


def test_a_missing_model_config_is_refused():
    assert "nowhere.json" in refusal(["--model-config", "nowhere.json"])


def test_a_model_config_does_not_replace_a_model_of_open_clip(tmp_path):
    assert "ViT-B-32.json" in refusal(
        ["--model-config", write_model_config(tmp_path / "ViT-B-32.json")]
    )


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--train-d", "--train-data"),
        ("--mode", "--model"),
        ("--mask", "--masking"),
        ("--batchsize", "--batch-size"),
        ("--mask_ratio", "--mask-ratio"),
        ("--no-local", "--no-local-loss"),
    ],
)
def test_unknown_and_abbreviated_flags_are_refused_with_near_names(flag, near):
    message = refusal(["--model", "ViT-B-16", flag, "1"])
    assert message.startswith(f"unknown option {flag} ")
    assert near in message.partition("nearest: ")[2]


def test_values_that_look_like_flags_are_left_alone():
    args = parse_options([*VALID, "--wandb-notes=--train-d", "--name", "a--b"])
    assert (args.wandb_notes, args.name) == ("--train-d", "a--b")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--precision", "int3"], "invalid choice: 'int3'"),
        (["--mask-ratio", "half"], "--mask-ratio"),
        (["--masking-option", "edges"], "KEY=VALUE"),
        (["--masking-option", "edges=false", "edges=true"], "each key once, got 'edges' twice"),
        (["--aug-cfg", "scale"], "KEY=VALUE"),
        (["--local-loss=true"], "--local-loss"),
        (["--lr=--"], "'--' is no value, got '--lr=--'"),
        (["--lr"], "--lr: expected one argument"),
        (["config.yaml"], "unrecognized arguments: config.yaml"),
    ],
)
def test_malformed_values_are_one_sentence(argv, part, capsys):
    message = refusal([*VALID, *argv])
    assert part in message
    assert "\n" not in message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flag", sorted(REFUSED_FLAGS))
def test_flags_that_are_not_supported_are_refused_with_a_reason(flag):
    needs_value = trainer_actions()[flag].nargs != 0
    value = (trainer_actions()[flag].choices or ["1"])[0]
    message = refusal([*VALID, flag, *([value] if needs_value else [])])
    assert message == f"{flag} is not supported: {REFUSED_FLAGS[flag]}"
    assert "not supported" not in REFUSED_FLAGS[flag]


def test_no_flag_of_open_clip_is_ignored_in_silence():
    obeyed = [flag_of(option.name) for option in fields(TrainOptions) if is_theirs(option)]
    assert set(trainer_actions()) == {*obeyed, "--model", *REFUSED_FLAGS}
    assert not REFUSED_FLAGS.keys() & obeyed


def test_reading_the_trainers_parser_leaves_the_trainer_as_it_was():
    trainer_parser.cache_clear()
    assert trainer_parser().get_default("batch_size") == 64
    assert parse_trainer_args(["--batch-size", "3"]).batch_size == 3


def test_the_last_word_on_a_switch_holds():
    assert not parse_options([*VALID, "--local-loss", "--no-local-loss"]).local_loss
    assert parse_options([*VALID, "--no-local-loss", "--local-loss"]).local_loss


def test_a_switch_that_is_refused_may_be_said_to_be_off():
    assert parse_options([*VALID, "--no-horovod", "--no-trace"]).name is None


def test_a_switch_that_begins_with_no_is_itself_and_can_be_undone():
    assert parse_options([*VALID, "--no-set-device-rank"]).no_set_device_rank
    undone = [*VALID, "--no-set-device-rank", "--no-no-set-device-rank"]
    assert not parse_options(undone).no_set_device_rank


def test_masking_options_hold_what_was_given_and_nothing_else():
    argv = ["--masking", "pgs", "--mask-ratio", "0.5", "--masking-option", "edges=false"]
    argv += ["temperature=1e-1", "solver=pot", "--masking-option", "num-iters=3", "threshold=None"]
    args = parse_options([*VALID, *argv])
    assert args.masking_options == {
        "mask_ratio": 0.5,
        "edges": False,
        "temperature": 0.1,
        "solver": "pot",
        "num_iters": 3,
        "threshold": None,
    }


def test_a_ratio_given_twice_is_refused():
    argv = ["--masking", "pgs", "--mask-ratio", "0.5", "--masking-option", "mask_ratio=0.4"]
    assert "mask_ratio is given" in refusal([*VALID, *argv])


def test_masking_is_none_unless_it_is_asked_for():
    args = parse_options(VALID)
    assert (args.masking, args.masking_options, args.mask_ratio) == ("none", {}, None)


def test_given_names_what_was_set():
    args = parse_options([*VALID, "--masking", "pgs", "--local-loss", "--siglip", "--no-siglip"])
    assert args.given == [
        "dataset_type",
        "local_loss",
        "masking",
        "model",
        "train_num_samples",
        "warmup",
    ]


def words_of(text):
    """Return a text without white space: help breaks words at hyphens."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def whole_help():
    return help_text(is_short=False)


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
def test_help_is_printed_and_leaves_with_0(capsys, flag):
    with pytest.raises(SystemExit) as left:
        parse_options([flag])
    assert left.value.code == 0
    assert "--mask-ratio" in capsys.readouterr().out


def test_short_help_is_a_part_that_names_the_whole(whole_help):
    short = help_text(is_short=True)
    assert len(short.splitlines()) < len(whole_help.splitlines()) / 3
    for shown in ("--help-all", "--masking", "--batch-size", "--nproc", "85"):
        assert shown in short
    assert "--hang-timeout" not in short


def test_help_of_autoencoders_begins_with_theirs_and_leaves_out_what_they_refuse():
    for is_short in (True, False):
        text = help_text(is_short=is_short, is_autoencoder=True)
        assert text.startswith("usage: clip-pgs mae ")
        first, _, rest = text.partition("\nOptions:")
        for flag in ("--mae-sign {keep,hide}", "--model-config", "--masking", "--mask-ratio"):
            assert f"\n  {flag} " in first.replace("keep|hide", "{keep,hide}")
        for flag in ("--text-tokens", "--unmasked-epochs", "--val-data", "--merge"):
            assert f"\n  {flag}" not in text
        assert "\n  --train-data " in rest


def test_help_shows_our_options_before_open_clips(whole_help):
    for text in (whole_help, help_text(is_short=True)):
        assert text.index("--mask-ratio-min") < text.index("--train-data")
        assert "--horovod" not in text


@pytest.mark.parametrize("name", list_maskings())
def test_help_explains_every_option_of_every_strategy(whole_help, name):
    declared = describe_masking(name)
    assert words_of(declared.paper) in words_of(whole_help)
    start = whole_help.index(f"\n  {name}: keeps")
    section = words_of(whole_help[start : whole_help.find("\n\n", start)])
    for option in declared.options:
        assert option.help, option.name
        assert words_of(f"{option.name}: {option.help}") in section
        if option.default is not None:
            assert words_of(f"(default: {option.default})") in section


def test_help_names_text_maskings_and_unmasked_tuning_with_their_papers(whole_help):
    text = " ".join(whole_help.split())
    for name in TEXT_MASKINGS.names():
        declared = TEXT_MASKINGS.declaration(name)
        assert f"{name}: {declared['summary']} ({declared['source']}" in text
    for part in ("--unmasked-epochs", "2212.00794; GLIP, arXiv 2403.15837", "--target-mask-ratio"):
        assert part in text


def test_the_whole_help_gives_a_default_of_every_option():
    for action in option_parser()._actions:
        if action.help != argparse.SUPPRESS and "--help" not in action.option_strings[-1]:
            assert "default" in action.help.lower(), action.option_strings


@pytest.mark.slow
def test_names_read_from_the_source_are_those_that_are_registered():
    # In a process of its own: other tests register strategies.
    script = """
from clip_pgs.registry import registered_names
print(registered_names("masking"), registered_names("data"))
from clip_pgs.data.text_masking import TEXT_MASKINGS
from clip_pgs.masking import list_maskings
print(list_maskings(), TEXT_MASKINGS.names())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    read, registered = done.stdout.splitlines()
    assert read == registered


def test_a_token_budget_alone_truncates():
    args = parse_options([*VALID, "--text-tokens", "8"])
    assert (args.text_masking, args.text_tokens, args.text_masking_options) == ("truncate", 8, {})
    assert "text_masking" not in args.given


def test_text_masking_takes_its_options():
    argv = ["--text-masking", "frequency", "--text-masking-option", "frequencies=a.json", "fill=1"]
    assert parse_options([*VALID, *argv]).text_masking_options == {
        "frequencies": "a.json",
        "fill": 1,
    }


def test_defaults_of_our_own_options_are_there_without_being_given():
    args = parse_options(VALID)
    assert (args.mask_schedule, args.mask_ratio_end, args.mask_schedule_steps) == (
        "constant",
        None,
        5,
    )
    assert (args.text_masking, args.text_tokens, args.text_masking_options) == ("none", None, {})
    assert (args.unmasked_epochs, args.unmasked_lr) == (0, 1e-5)
    assert not {"mask_schedule", "text_masking", "unmasked_lr"} & set(args.given)


OWN = [option for option in fields(TrainOptions) if "heading" in option.metadata]


@pytest.mark.parametrize("option", OWN, ids=lambda option: option.name)
def test_every_option_of_ours_is_explained_in_help_and_listed_in_its_page(option):
    flag = flag_of(option.name)
    action = next(a for a in option_parser()._actions if flag in a.option_strings)
    assert action.help
    assert flag in PAGE.read_text()


@pytest.mark.parametrize("flag", ["--data-timeout", "--hang-timeout"])
def test_seconds_that_no_clock_counts_are_refused(flag):
    with pytest.raises(ValueError, match=rf"{flag} must be in \[0, 10\*\*8\]"):
        check_options(parse_options([*VALID, flag, "1e15"]))


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    "option",
    [option for option in OWN if option.metadata["metavar"] in ("N", "F", "S", "M", "K")],
    ids=lambda option: option.name,
)
def test_no_number_of_ours_is_taken_that_is_none(option, value):
    argv = [*VALID, "--masking", "pgs", "--mask-schedule", "linear", "--mask-ratio-end", "0.2"]
    with pytest.raises(ValueError, match=r"\S"):
        check_options(parse_options([*argv, f"{flag_of(option.name)}={value}"]))
