from pathlib import Path

import pytest

from clip_pgs.training.options import parse_options, read_options
from support.options import write_model_config

BASE = "model: ViT-B-16\n"


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def parse(tmp_path, text, *argv):
    return parse_options(["--config", write(tmp_path, text), *argv])


def refusal(tmp_path, text, *argv):
    with pytest.raises(ValueError, match=r".") as caught:
        parse(tmp_path, text, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_says_the_same_as_flags(tmp_path):
    text = """
    model: ViT-B-16
    masking: pgs
    mask_ratio: 0.5
    mask-ratio-min: 0.3
    masking-option: {edge_weight: 1e-1, edges: true, threshold: null}
    lr: 1e-3
    train-num-samples: 10_968_539
    train-data: "data/{0..3}.tar"
    image-mean: [0.1, 0.2, 0.3]
    force-image-size: 96
    local_loss: true
    siglip: false
    csv-separator: "\\t"
    aug-cfg: {scale: [0.5, 1.0], use_timm: true}
    report-to:
    """
    flags = ["--model", "ViT-B-16", "--masking", "pgs", "--mask-ratio", "0.5"]
    flags += ["--mask-ratio-min", "0.3", "--masking-option", "edge_weight=0.1", "edges=True"]
    flags += ["threshold=None", "--lr", "1e-3", "--train-num-samples", "10968539"]
    flags += ["--train-data", "data/{0..3}.tar", "--image-mean", "0.1", "0.2", "0.3"]
    flags += ["--force-image-size", "96", "--local-loss", "--csv-separator", "\t"]
    flags += ["--aug-cfg", "scale=[0.5, 1.0]", "use_timm=True"]
    from_config, from_flags = vars(parse(tmp_path, text)), vars(parse_options(flags))
    assert {**from_config, "config": None} == from_flags


def test_the_home_folder_is_found_in_flags_and_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(tmp_path, "base.yaml").write_text("val-data: ~/{0..1}.tar::~/2.tar\nname: a~/b\n")
    text = BASE + "base: ~/base.yaml\nlogs: ~/logs\ntext-masking: frequency\n"
    text += "text-masking-option: {frequencies: ~/words.json}\n"
    args = parse(tmp_path, text, "--train-data=~/a.tar", "--resume", "~/a.pt")
    assert (args.logs, args.train_data) == (f"{tmp_path}/logs", f"{tmp_path}/a.tar")
    assert (args.resume, args.name) == (f"{tmp_path}/a.pt", "a~/b")
    assert args.val_data == f"{tmp_path}/{{0..1}}.tar::{tmp_path}/2.tar"
    assert args.text_masking_options == {"frequencies": f"{tmp_path}/words.json"}


def test_flags_win_over_the_config_wherever_they_stand(tmp_path):
    text = BASE + "lr: 0.1\nimage-mean: [1, 1, 1]\nmasking: random\nmask-ratio: 0.5\n"
    argv = ["--lr", "0.2", "--image-mean", "0", "0", "0", "--mask-ratio", "0.75"]
    args = parse(tmp_path, text, *argv)
    assert (args.lr, args.image_mean, args.masking_options) == (
        0.2,
        [0, 0, 0],
        {"mask_ratio": 0.75},
    )
    before = parse_options([*argv, "--config", args.config])
    assert vars(before) == vars(args)


def test_a_masking_option_on_the_command_line_wins_by_its_key(tmp_path):
    text = BASE + "masking: pgs\nmasking-option: {edge_weight: 1.0, num_iters: 5}\n"
    args = parse(tmp_path, text, "--masking-option", "edge_weight=2.0")
    assert args.masking_options == {"edge_weight": 2.0, "num_iters": 5}


def test_a_ratio_of_the_config_can_be_taken_back(tmp_path):
    text = BASE + "masking: pgs\nmask-ratio: 0.5\nmask-ratio-min: 0.3\n"
    args = parse(tmp_path, text, "--masking", "random", "--mask-ratio-min", "none")
    assert args.masking_options == {"mask_ratio": 0.5}


@pytest.mark.parametrize("flag", ["local-loss", "no-set-device-rank"])
def test_a_switch_of_the_config_can_be_undone(tmp_path, flag):
    name = flag.replace("-", "_")
    assert getattr(parse(tmp_path, BASE + f"{flag}: true\n"), name)
    assert not getattr(parse(tmp_path, BASE + f"{flag}: true\n", f"--no-{flag}"), name)
    assert not getattr(parse(tmp_path, BASE + f"{flag}: false\n"), name)


def test_a_model_on_the_command_line_replaces_the_configs_model_file(tmp_path):
    path = write_model_config(tmp_path / "vit_from_config.json")
    args = parse(tmp_path, f"model-config: {path}\n", "--model", "ViT-B-32")
    assert (args.model, args.model_config) == ("ViT-B-32", None)


def test_a_model_file_on_the_command_line_replaces_the_configs_model(tmp_path):
    path = write_model_config(tmp_path / "vit_from_flag.json")
    assert parse(tmp_path, BASE, "--model-config", path).model == "vit_from_flag"


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("mask-ration: 0.5", "--mask-ratio"),
        ("batchsize: 3", "--batch-size"),
        ("no-local-loss: true", "--local-loss"),
    ],
)
def test_unknown_keys_are_refused_with_near_names(tmp_path, line, near):
    message = refusal(tmp_path, BASE + line)
    assert "run.yaml" in message
    assert repr(line.partition(":")[0]) in message
    assert near in message


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("batch-size: many", ["batch-size", "many"]),
        ("batch-size: 2.5", ["batch-size", "2.5"]),
        ("lr: true", ["lr", "True"]),
        ("lr: [1, 2]", ["lr", "[1, 2]"]),
        ("mask-ratio: half", ["mask-ratio", "half"]),
        ("local-loss: 1", ["local-loss", "true or false", "got 1"]),
        ("epochs: 1:30", ["epochs", "1:30"]),
        ("batch-size: 0x10", ["batch-size", "0x10"]),
        ("name: 2001-01-01", ["name", "quotes", "2001"]),
        ("name: yes", ["name", "True"]),
        ("precision: int3", ["precision", "int3", "amp"]),
        ("text-masking-option: [threshold]", ["text-masking-option", "mapping"]),
        ("image-mean: [a, b]", ["image-mean", "'a'"]),
        ("image-mean: [[1], 2]", ["image-mean", "[1]"]),
        ("aug-cfg: strong", ["aug-cfg", "mapping", "strong"]),
        ("masking-option: [edges]", ["masking-option", "mapping"]),
        ("config: other.yaml", ["config", "command line"]),
        ("check-only: true", ["check-only", "command line"]),
        ("train-data: 'pipe:touch pwned'", ["train-data", "command"]),
        ("model: ViT-B-32", ["'model' is given twice"]),
        ("lr: 1\nlr: 2", ["'lr' is given twice"]),
        ("wd: 1\nsave_frequency: 1\nsave-frequency: 2", ["'save-frequency' is given twice"]),
        ("aug-cfg: {scale: 1, scale: 2}", ["'scale' is given twice"]),
        ("masking-option: {mask-edges: 1, mask_edges: 2}", ["'mask_edges' twice"]),
        ("<<: {lr: 1}", ["merge keys (<<) are not taken"]),
        ("!!merge a: {lr: 1}", ["merge keys (<<) are not taken"]),
        ("aug-cfg: {<<: {scale: 1}}", ["merge keys (<<) are not taken"]),
    ],
)
def test_a_wrong_value_names_file_key_and_value(tmp_path, line, parts):
    message = refusal(tmp_path, BASE + line)
    assert "run.yaml" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "epochs"), [("010", 10), ("+3", 3), ("'7'", 7), ("1_0", 10), ("8 # or 9", 8)]
)
def test_whole_numbers_are_decimal(tmp_path, text, epochs):
    assert parse(tmp_path, f"{BASE}epochs: {text}\n").epochs == epochs


@pytest.mark.parametrize(
    ("text", "lr"),
    [("1e-3", 1e-3), ("1.e-3", 1e-3), (".5", 0.5), ("-2.5E+1", -25), ("010.5", 10.5)],
)
def test_numbers_are_read_as_on_the_command_line(tmp_path, text, lr):
    assert parse(tmp_path, f"{BASE}wd: {text}\n").wd == lr


@pytest.mark.parametrize("text", ["- model", "just a text", "42"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path, text):
    assert "must hold one mapping" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["lr: [1", "lr: !!python/object/apply:os.getcwd []", "a: b: c"])
def test_a_config_that_is_not_plain_yaml_is_refused(tmp_path, text):
    assert "run.yaml is not a plain YAML file" in refusal(tmp_path, text)


def test_an_empty_config_sets_nothing(tmp_path):
    assert parse(tmp_path, "# nothing yet\n", "--model", "ViT-B-16").given == ["model"]


@pytest.mark.parametrize("more", [["--config", "other.yaml"], ["--config=other.yaml"]])
def test_a_second_config_is_refused_and_not_taken_in_place_of_the_first(tmp_path, more):
    assert "two configs are given" in refusal(tmp_path, BASE, *more)


def test_an_option_like_no_other_is_told_what_lists_all(tmp_path):
    assert "unknown option --xyzzy (no abbreviations); --help-all lists" in refusal(
        tmp_path, BASE, "--xyzzy"
    )


def test_a_missing_config_is_refused():
    with pytest.raises(ValueError, match=r"cannot read the config nowhere\.yaml: No such file"):
        parse_options(["--config", "nowhere.yaml"])


def test_a_flag_that_is_not_supported_is_refused_from_a_config_too(tmp_path):
    assert "--horovod is not supported" in refusal(tmp_path, BASE + "horovod: true")


def write_family(tmp_path, **files):
    """Write configs by name and return the folder."""
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_a_base_gives_what_the_config_leaves_out(tmp_path):
    (tmp_path / "below").mkdir()
    write_family(tmp_path, base=BASE + "lr: 0.1\nlocal-loss: true\nwd: 0.3\n")
    write_family(tmp_path / "below", child="base: ../base.yaml\nlr: 0.2\nlocal-loss: false\n")
    args = parse_options(["--config", str(tmp_path / "below" / "child.yaml"), "--beta1", "0.5"])
    assert (args.model, args.lr, args.local_loss) == ("ViT-B-16", 0.2, False)
    assert (args.wd, args.beta1) == (0.3, 0.5)


def test_a_base_can_have_a_base(tmp_path):
    write_family(
        tmp_path, a=BASE + "lr: 0.1\nwd: 0.1\neps: 0.1\n", b="base: a.yaml\nlr: 0.2\nwd: 0.2\n"
    )
    args = parse(tmp_path, "base: b.yaml\nlr: 0.3\n")
    assert (args.lr, args.wd, args.eps) == (0.3, 0.2, 0.1)


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/train/demo.yaml"])
def test_a_base_may_be_a_bundled_config(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "run.yaml").write_text(f"base: {name}\nlr: 0.25\n")
    options = read_options(["--config", "below/run.yaml"])
    bundled = read_options(["--config", "demo"])
    assert (options.lr, options.epochs, options.model) == (0.25, bundled.epochs, bundled.model)
    # One that lies beside goes first.
    beside = tmp_path / "below" / name
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text("model: RN50\n")
    assert read_options(["--config", "below/run.yaml"]).model == "RN50"


def test_null_takes_a_value_of_the_base_back(tmp_path):
    write_family(tmp_path, base=BASE + "masking: pgs\nmask-ratio: 0.5\nmask-ratio-min: 0.3\n")
    args = parse(tmp_path, "base: base.yaml\nmask-ratio-min:\n")
    assert args.masking_options == {"mask_ratio": 0.5}


def test_a_mapping_replaces_the_one_of_the_base(tmp_path):
    write_family(tmp_path, base=BASE + "masking: pgs\nmasking-option: {edges: false}\n")
    args = parse(tmp_path, "base: base.yaml\nmasking-option: {transport: false}\n")
    assert args.masking_options == {"transport": False}


def test_a_model_replaces_the_model_file_of_the_base(tmp_path):
    path = write_model_config(tmp_path / "vit_of_the_base.json")
    write_family(tmp_path, base=f"model-config: {path}\n")
    args = parse(tmp_path, "base: base.yaml\nmodel: ViT-B-32\n")
    assert (args.model, args.model_config) == ("ViT-B-32", None)


def test_mistakes_of_a_base_name_its_file(tmp_path):
    write_family(tmp_path, base="model: ViT-B-16\nlr: many\n")
    assert "base.yaml: 'lr'" in refusal(tmp_path, "base: base.yaml\n")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: run.yaml", "run.yaml is its own base"),
        ("base: other.yaml", "run.yaml is its own base"),
        ("base: nowhere.yaml", "nowhere.yaml: No such file"),
        ("base: [other.yaml]", "'base' takes the name of a config, got ['other.yaml']"),
    ],
)
def test_a_base_that_cannot_be_is_refused(tmp_path, text, part):
    write_family(tmp_path, other="base: run.yaml\n")
    assert part in refusal(tmp_path, text)
