"""Where captions come from: texts, several texts, a field of the side-car JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from clip_pgs.data.__main__ import main
from clip_pgs.data.bad_samples import BadSampleError, UnusableDataError
from clip_pgs.data.preflight import preflight
from clip_pgs.data.samples import MAX_CHARACTERS, RawSample, SampleDecoder, decode_captions
from support.streams import numbers, open_stream, read_from, same, with_options


@pytest.fixture
def write(tmp_path, make_tar, make_image):
    """Write a shard of pictures with the members that a function gives for each number."""

    def write_shard(members_of, *, number=12):
        members = []
        for index in range(number):
            members.append((f"{index:03d}.jpg", make_image(index)))
            members += [
                (f"{index:03d}.{suffix}", data) for suffix, data in members_of(index).items()
            ]
        make_tar(tmp_path / "0.tar", members)
        return f"{tmp_path}/0.tar"

    return write_shard


def with_json(index, **more):
    """Return a side-car JSON as img2dataset and CC12M-recap write it."""
    record = {
        "caption": str(index),
        "several": [f"{100 + index}", "", f"{200 + index}", f"{300 + index}"],
        "url": "https://host/x.jpg",
        **more,
    }
    return {"txt": b"999", "json": json.dumps(record).encode()}


def several_texts(index):
    return {f"{n}.txt": f"{100 * n + index}".encode() for n in (1, 2, 3)}


@pytest.fixture(params=["json", "texts", "fields"])
def several(request, write, make_args):
    """Options for shards of which each picture has three captions: 100, 200 and 300 + number."""
    if request.param == "texts":
        return make_args(train_data=write(several_texts), batch_size=4)
    if request.param == "json":
        return make_args(train_data=write(with_json), batch_size=4, caption_key="several")
    path = write(
        lambda index: with_json(index, a=[f"{100 + index}", f"{200 + index}"], b=f"{300 + index}")
    )
    return make_args(train_data=path, batch_size=4, caption_key="a,b")


@pytest.mark.parametrize("piped", [False, True])
def test_caption_is_a_field_of_the_side_car_json(write, make_args, piped):
    path = write(with_json)
    pattern = f"pipe:cat {path}" if piped else path
    args = make_args(train_data=pattern, train_num_samples=12, batch_size=4, caption_key="caption")
    stream = open_stream(args)
    assert sorted(numbers(read_from(stream))) == list(range(12))
    assert not stream.skipped


def test_one_of_several_captions_is_drawn_each_epoch(several):
    stream = open_stream(several)
    epochs = [
        sorted(numbers(read_from(stream, epoch)), key=lambda n: n % 100) for epoch in range(8)
    ]
    assert all([number % 100 for number in epoch] == list(range(12)) for epoch in epochs)
    assert {number // 100 for epoch in epochs for number in epoch} == {1, 2, 3}
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_the_draw_depends_on_seed_epoch_and_sample_and_survives_a_resume(several):
    whole = read_from(open_stream(several), 3)
    assert same(read_from(open_stream(with_options(several, workers=2)), 3), whole)
    assert same(read_from(open_stream(several), 3, 4), whole[1:])
    assert not same(read_from(open_stream(with_options(several, seed=1)), 3), whole)


def test_drawing_a_caption_leaves_the_image_as_it_is(several, write, make_args):
    one = read_from(open_stream(make_args(train_data=write(lambda n: {"txt": b"7"}), batch_size=4)))
    many = read_from(
        open_stream(with_options(several, train_data=write(several_texts), caption_key=None))
    )
    assert all((a[0] == b[0]).all() for a, b in zip(one, many, strict=True))


def test_the_plain_text_wins_over_others(write, make_args):
    path = write(lambda index: {"0.txt": b"999", "txt": str(index).encode(), "1.txt": b"999"})
    stream = open_stream(make_args(train_data=path, batch_size=4))
    assert sorted(numbers(read_from(stream))) == list(range(12))


BAD_JSON = {
    "{": "unreadable JSON",
    "[" * 100_000: "unreadable JSON",
    "[]": "unreadable JSON",
    "\ufeff\x00": "unreadable JSON",
    '{"text": "x"}': "no caption",
    '{"caption": null}': "no caption",
    '{"caption": 7}': "caption is no text",
    '{"caption": ["1", {}]}': "caption is no text",
    '{"caption": ""}': "empty caption",
    '{"caption": []}': "empty caption",
    '{"caption": "\\ud800"}': "caption is not UTF-8",
    '{"caption": 1' + "0" * 5000 + "}": "unreadable JSON",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json_is_a_bad_sample(write, make_args, text):
    path = write(lambda index: with_json(index) if index else {"json": text.encode()})
    stream = open_stream(make_args(train_data=path, batch_size=4, caption_key="caption"))
    assert set(numbers(read_from(stream))) == set(range(1, 12))
    assert stream.skipped == {BAD_JSON[text]: 1}


@pytest.mark.parametrize(
    ("members_of", "caption_key", "parts"),
    [
        (lambda n: {"json": b"{}"}, None, [".jpg .json", "--caption-key KEY"]),
        (lambda n: {"caption": b"1"}, None, ["but .jpg .caption", "share a name"]),
        (lambda n: {}, None, ["no .txt member but .jpg", "follow one another"]),
        (lambda n: {"json": b'{"text": 1}'}, "caption", ["it has 'text'"]),
        (lambda n: {"txt": b"1"}, "caption", ["no .json member but .jpg .txt"]),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_what_is_there_in_place_of_a_caption_is_told(
    write, make_args, members_of, caption_key, parts, piped
):
    path = write(members_of)
    pattern = f"pipe:cat {path}" if piped else path
    args = make_args(train_data=pattern, train_num_samples=12, caption_key=caption_key)
    with pytest.raises(ValueError, match="no usable sample") as error:
        preflight(args)
    assert all(part in str(error.value) for part in parts), error.value
    with pytest.raises(UnusableDataError) as error:
        read_from(open_stream(args))
    assert all(part in str(error.value) for part in parts), error.value


def test_suffix_that_begins_at_the_first_dot_is_told(tmp_path, make_tar, make_image, make_args):
    make_tar(tmp_path / "0.tar", [("a.b.jpg", make_image(0)), ("a.b.png", b""), ("a.txt", b"1")])
    with pytest.raises(ValueError, match=r"but \.b\.jpg \.b\.png \.txt; .* first dot"):
        preflight(make_args(train_data=f"{tmp_path}/0.tar"))


def test_pairs_that_are_not_adjacent_are_told(tmp_path, make_tar, make_image, make_args):
    images = [(f"{n}.jpg", make_image(n)) for n in range(4)]
    make_tar(tmp_path / "0.tar", [*images, *((f"{n}.txt", b"1") for n in range(4))])
    with pytest.raises(ValueError, match=r"share a name .* and follow one another"):
        preflight(make_args(train_data=f"{tmp_path}/0.tar"))


def test_check_and_words_take_the_key(write, tmp_path, capsys):
    path = write(with_json)
    assert main(["check", path, "--caption-key", "several"]) == 0
    out = tmp_path / "words.json"
    assert (
        main(["words", path, "-o", str(out), "--caption-key", "several", "--min-count", "1"]) == 0
    )
    assert json.loads(out.read_text())["num_captions"] == 36
    assert main(["check", path, "--caption-key", "nothing"]) == 1
    assert "it has 'caption', 'several', 'url'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "key", "words"),
    [
        ({"caption": None}, "caption", "--caption-key caption leads to null in the JSON"),
        ({"a": None, "b": "x"}, "a,c", "leads to null in the JSON: 'a'"),
        ({"a": "x"}, "caption", "is no field of the JSON; it has 'a'"),
        ({"caption": 5}, "caption", "leads to a number"),
        ({"caption": True}, "caption", "leads to true"),
        ({"caption": {"en": "x"}}, "caption", "leads to an object"),
        ({"caption": [["x"]]}, "caption", "leads to a list"),
        ({"caption": ["x", None]}, "caption", "leads to null"),
        (["x"], "caption", "a list in place of an object"),
        (None, "caption", "null in place of an object"),
    ],
)
def test_a_field_that_holds_no_caption_is_told_by_what_it_holds(record, key, words):
    raw = RawSample("0.tar", "0", b"", (json.dumps(record).encode(),))
    with pytest.raises(BadSampleError) as error:
        decode_captions(raw, caption_key=key)
    assert words in error.value.detail


def run_words(path, key, tmp_path):
    out = tmp_path / "words.json"
    return main(["words", path, "-o", str(out), "--caption-key", key, "--min-count", "1"])


def test_blanks_between_fields_belong_to_no_name(write, make_args, tmp_path, capsys):
    path = write(lambda n: {"json": json.dumps({"a": f"{n}", "b": f"{100 + n}"}).encode()})
    args = make_args(train_data=path, batch_size=4, caption_key=" a, b")
    assert preflight(args) == []
    assert same(
        read_from(open_stream(args)), read_from(open_stream(with_options(args, caption_key="a,b")))
    )
    assert run_words(path, " a, b", tmp_path) == 0
    assert json.loads((tmp_path / "words.json").read_text())["num_captions"] == 24
    assert main(["check", path, "--caption-key", " a, b"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_field_that_no_sample_has_is_told(write, make_args, tmp_path, capsys, caplog):
    # The last sample alone has the third of them.
    def with_fields(number):
        record = {"a": f"{number}", "b": None, **({"c": "9"} if number == 11 else {})}
        return {"json": json.dumps(record).encode()}

    path = write(with_fields)
    key = "a,b,recpa,c"
    args = make_args(train_data=path, val_data=path, caption_key=key)
    told = preflight(args)
    assert [text.partition(":")[0] for text in told] == ["--train-data", "--val-data"]
    # It looks at the first samples.
    assert all("has 'b' or 'recpa' or 'c', and captions come from a alone" in text for text in told)
    assert run_words(path, key, tmp_path) == 0
    assert main(["check", path, "--caption-key", key]) == 0
    out = capsys.readouterr().out
    for text in (caplog.text, out):
        assert "has 'b' or 'recpa', and captions come from a and c alone" in text
    assert preflight(with_options(args, mae={})) == []


@pytest.mark.parametrize("key", ["", " ", "a,", ",a", "a,,b", "a, ,b"])
def test_an_empty_name_of_a_field_is_refused(write, make_args, tmp_path, capsys, key):
    path = write(with_json)
    with pytest.raises(ValueError, match="--caption-key takes fields"):
        preflight(make_args(train_data=path, caption_key=key))
    for argv in (["check", path], ["words", path, "-o", str(tmp_path / "words.json")]):
        assert main([*argv, "--caption-key", key]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("blanks", [" " * 2000, "\n" * 1999, " \t" * 5000])
def test_blanks_before_a_caption_take_none_of_its_place(write, make_args, tmp_path, capsys, blanks):
    path = write(lambda number: {"txt": f"{blanks}{number}".encode()})
    args = make_args(train_data=path, batch_size=4)
    assert sorted(numbers(read_from(open_stream(args)))) == list(range(12))
    out = tmp_path / "words.json"
    assert main(["words", path, "-o", str(out), "--min-count", "1"]) == 0
    assert json.loads(out.read_text())["num_words"] == 12


@pytest.mark.parametrize("caption", [" 7" + " x" * 500, "7" * 5000, " 7 " + "x" * 1997])
def test_a_caption_without_many_blanks_is_read_as_it_was(caption, make_image):
    taken = []

    def tokenize(captions):
        taken.extend(captions)
        return torch.zeros(1, 1)

    decode = SampleDecoder(pil_to_tensor, tokenize, 0)
    decode(RawSample("0.tar", "0", make_image(0), (caption.encode(),)), epoch=0)
    assert taken == [caption[:MAX_CHARACTERS]]
