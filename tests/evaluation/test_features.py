"""Features: what they are, and when they are computed again."""

import shutil
from dataclasses import replace

import open_clip
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torchvision import transforms

from clip_pgs.evaluation import features, load_model
from clip_pgs.evaluation.features import (
    NonFiniteFeaturesError,
    data_fingerprint,
    model_fingerprint,
    tokenizer_description,
    transform_description,
)
from clip_pgs.evaluation.suites import get_suite
from support.encoding import count_images, encode, images_of, make_encoder


@pytest.fixture
def six(data_root):
    return get_suite("zeroshot-classification").eval_set("six", str(data_root / "six"))


@pytest.fixture
def pairs(data_root):
    return get_suite("zeroshot-retrieval").eval_set("pairs", str(data_root / "pairs"))


def test_a_text_of_megabytes_is_read_as_far_as_a_text_tower_could(color_model):
    lengths = []

    def count(texts):
        lengths.extend(map(len, texts))
        return color_model.tokenizer(texts)

    encoder = make_encoder(replace(color_model, tokenizer=count))
    encoder.texts(["number 1", "number 2" + " " * 10**6])
    assert lengths == [8, 2000]


def test_features_are_those_of_the_model_image_by_image(finished_run, six, data_root):
    loaded = load_model(finished_run)
    features = encode(loaded, six)
    with torch.no_grad():
        expected = [
            loaded.model.encode_image(loaded.transform(image)[None])
            for image in images_of(data_root / "six/test")
        ]
    torch.testing.assert_close(features.images, torch.cat(expected))
    # One shard after the other: the even images, then the odd ones.
    assert features.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_captions_stay_with_their_images(color_model, pairs, tmp_path):
    for _ in range(2):
        features = encode(color_model, pairs, tmp_path)
        assert features.labels is None
        assert features.captions[:2] == [["it is 0", "so 0"], ["it is 1", "so 1"]]
        nearest = normalize(features.images, dim=-1) @ color_model.model.colors.T
        assert nearest.argmax(dim=1)[:3].tolist() == [1, 0, 2]


def test_features_that_are_not_finite_stop_with_a_sentence(color_model, six, tmp_path):
    encode_image = color_model.model.encode_image

    def broken(pixels):
        features_BD = encode_image(pixels)
        features_BD[0, 0] = torch.nan
        return features_BD

    color_model.model.__dict__["encode_image"] = broken
    sentence = "the features of colors on six are not finite: 3 of 12 hold a NaN or an infinity"
    with pytest.raises(NonFiniteFeaturesError, match=sentence):
        encode(color_model, six, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_split_that_is_not_there_is_a_missing_file(color_model, pairs):
    with pytest.raises(FileNotFoundError, match=r"has no train/nshards\.txt"):
        encode(color_model, replace(pairs, splits=("train",)), split="train")


def test_model_is_left_in_its_own_mode(color_model, six):
    color_model.model.train()
    encode(color_model, six)
    assert color_model.model.training


def test_equal_texts_have_equal_features_whatever_their_place(finished_run):
    loaded = load_model(finished_run)
    texts = ["a cat", "two dogs", "a cat", "a bird in a tree", "a cat"]
    features_TD = make_encoder(loaded).texts(texts, batch_size=2)
    assert torch.equal(features_TD[0], features_TD[2])
    assert torch.equal(features_TD[0], features_TD[4])
    with torch.no_grad():
        expected_TD = loaded.model.encode_text(loaded.tokenizer(texts))
    torch.testing.assert_close(features_TD, expected_TD)


def test_texts_that_are_not_finite_stop_with_a_sentence(color_model):
    color_model.model.colors.data[3] = torch.inf
    with pytest.raises(NonFiniteFeaturesError, match="of colors on texts are not finite: 1 of 2"):
        make_encoder(color_model).texts(["number 3", "number 4"])


@pytest.mark.parametrize("max_prompts", [1, 7, 2**17])
def test_classes_equal_those_of_clip_benchmark(finished_run, monkeypatch, max_prompts):
    monkeypatch.setattr(features, "_MAX_PROMPTS", max_prompts)
    loaded = load_model(finished_run)
    names, templates = ["cat", "dog", "tall tree"], ["a {c}", "a photo of a {c}.", "{c}"]
    classes_CD = make_encoder(loaded).classes(names, templates)
    theirs_DC = zero_shot_classifier(
        loaded.model, loaded.tokenizer, names, templates, "cpu", amp=False
    )
    torch.testing.assert_close(classes_CD, theirs_DC.T)


def test_suites_share_the_features_of_a_split(color_model, six):
    encoder, counts = make_encoder(color_model), count_images(color_model)
    probed = get_suite("linear-probe").eval_set(six.name, six.location)
    assert encoder.images(six).images is not None
    assert encoder.images(probed).labels is not None
    assert sum(counts) == 12
    assert len(encoder.images(probed, split="train").images) == 24
    assert sum(counts) == 36


def test_features_on_disk_outlive_the_call(color_model, six, tmp_path):
    first = encode(color_model, six, tmp_path)
    counts = count_images(color_model)
    again = encode(color_model, six, tmp_path)
    assert counts == []
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)


def test_features_that_were_let_go_of_are_found_on_disk(color_model, six, tmp_path):
    encoder, counts = make_encoder(color_model, tmp_path), count_images(color_model)
    encoder.images(six)
    encoder.cache.forget()
    encoder.images(six)
    assert sum(counts) == 12


def test_checkpoint_that_was_overwritten_gives_its_own_features(
    finished_run, six, save_run, tmp_path
):
    run, kept = tmp_path / "run", tmp_path / "features"
    shutil.copytree(finished_run, run)
    old = load_model(run)
    old_features = encode(old, six, kept)
    with torch.no_grad():
        old.model.visual.proj.neg_()
    save_run(run, old.model)

    new = load_model(run)
    assert new.source == str(run / "export")
    new_features = encode(new, six, kept)
    assert torch.equal(new_features.images, encode(new, six).images)
    assert not torch.allclose(new_features.images, old_features.images, atol=1e-3)


def test_data_that_changed_under_the_same_path_are_encoded_again(color_model, six, tmp_path):
    folder, kept = tmp_path / "six", tmp_path / "features"
    shutil.copytree(six.location, folder)
    here = get_suite(six.suite).eval_set("six", str(folder))
    before = encode(color_model, here, kept)
    # The other shard twice: names and sizes stay as they were.
    assert (folder / "test/0.tar").stat().st_size == (folder / "test/1.tar").stat().st_size
    shutil.copyfile(folder / "test/1.tar", folder / "test/0.tar")
    after = encode(color_model, here, kept)
    assert torch.equal(after.images[:6], after.images[6:])
    assert not torch.equal(after.images, before.images)


def test_same_weights_in_another_architecture_give_other_features(finished_run, six, tmp_path):
    plain, quick = load_model(finished_run), load_model(finished_run)
    for module in quick.model.visual.modules():
        if hasattr(module, "num_heads"):
            module.num_heads, module.head_dim = 1, 16
    first = encode(plain, six, tmp_path)
    second = encode(quick, six, tmp_path)
    assert not torch.equal(first.images, second.images)


@pytest.mark.parametrize("content", [b"", b"half", None, b"\xff" * 100])
def test_damaged_file_is_not_used(color_model, six, tmp_path, content):
    good = encode(color_model, six, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    counts = count_images(color_model)
    assert torch.equal(encode(color_model, six, tmp_path).images, good.images)
    assert sum(counts) == 12


@pytest.mark.parametrize(
    ("tensors", "notes"),
    [
        ({"images": torch.zeros(12, 3)}, {}),
        ({"images": torch.zeros(12, 3)}, {"texts": "["}),
        ({"other": torch.zeros(12, 3)}, {"texts": "{}"}),
        ({"images": torch.zeros(12)}, {"texts": "{}"}),
        ({"images": torch.zeros(12, 3), "labels": torch.zeros(11)}, {"texts": "{}"}),
        ({"images": torch.zeros(12, 3)}, {"texts": '{"captions": [["a"]]}'}),
    ],
)
def test_file_of_another_shape_is_not_used_and_named(
    color_model, six, tmp_path, caplog, tensors, notes
):
    good = encode(color_model, six, tmp_path)
    (path,) = tmp_path.iterdir()
    save_file(tensors, path, metadata={"key": path.stem, **notes})
    again = encode(color_model, six, tmp_path)
    assert torch.equal(again.images, good.images)
    assert path.name in caplog.text


def test_features_that_cannot_be_kept_are_told_and_used(color_model, six, tmp_path, caplog):
    (tmp_path / "features").touch()
    assert len(encode(color_model, six, tmp_path / "features").images) == 12
    assert "cannot be kept" in caplog.text


def test_file_of_other_features_is_not_used(color_model, six, tmp_path):
    encode(color_model, six, tmp_path)
    (path,) = tmp_path.iterdir()
    color_model.model.colors.data += 0.1
    changed = make_encoder(color_model, tmp_path).cache
    key = changed.key("images", data_fingerprint(six.location, "test"))
    path.rename(tmp_path / f"{key}.safetensors")
    with pytest.raises(ZeroDivisionError):
        changed.get_or_make(key, lambda: 1 / 0)


def test_finished_call_leaves_no_half_written_file(color_model, six, tmp_path):
    encode(color_model, six, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_transform_that_cannot_be_described_keeps_nothing_on_disk(color_model, six, tmp_path):
    to_tensor = color_model.transform
    object.__setattr__(color_model, "transform", lambda image: 1 - to_tensor(image))
    encode(color_model, six, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_precision_is_part_of_the_key(color_model):
    caches = [make_encoder(color_model, amp=amp).cache for amp in (False, True)]
    keys = {cache.key("images", "six") for cache in caches}
    assert len(keys) == 2


def test_list_of_classes_is_encoded_once(finished_run):
    loaded = load_model(finished_run)
    encoder, calls = make_encoder(loaded), []
    encode_text = loaded.model.encode_text
    loaded.model.__dict__["encode_text"] = lambda tokens: (
        calls.append(len(tokens)) or encode_text(tokens)
    )
    for templates in (["a {c}"], ["a {c}"], ["the {c}"]):
        encoder.classes(["cat", "dog"], templates)
        encoder.cache.forget()
    assert calls == [2, 2]


def test_data_that_moved_are_the_same_data(six, tmp_path):
    shutil.copytree(six.location, tmp_path / "elsewhere")
    assert data_fingerprint(str(tmp_path / "elsewhere"), "test") == data_fingerprint(
        six.location, "test"
    )


def test_transform_of_open_clip_is_described_without_addresses(finished_run):
    first, again = load_model(finished_run).transform, load_model(finished_run).transform
    description = transform_description(first)
    assert description == transform_description(again)
    assert "Normalize" in description
    assert "0x" not in description


def invert(image):
    return image.point(lambda value: 255 - value)


class Turn(torch.nn.Module):
    """Prints no angle."""

    def __init__(self, angle):
        super().__init__()
        self.angle = angle

    def forward(self, image):
        return image.rotate(self.angle)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (transforms.Lambda(lambda image: image), transforms.Lambda(invert)),
        (Turn(90), Turn(180)),
        (open_clip.transform.CenterCropOrPad(64), open_clip.transform.CenterCropOrPad(64, 255)),
    ],
)
def test_transforms_that_are_printed_alike_are_told_apart_by_their_pixels(
    first, second, color_model, six, tmp_path
):
    first, second = (
        transforms.Compose([transforms.Resize(48), changed, transforms.ToTensor()])
        for changed in (first, second)
    )
    assert repr(first) == repr(second)
    assert transform_description(first) != transform_description(second)
    assert transform_description(first) == transform_description(first)
    for transform in (first, second):
        encode(replace(color_model, transform=transform), six, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_of_a_transform_at_random_nothing_is_kept(color_model, six, tmp_path):
    transform = transforms.Compose([transforms.RandomCrop(8), transforms.ToTensor()])
    assert transform_description(transform) is None
    encode(replace(color_model, transform=transform), six, tmp_path)
    assert list(tmp_path.iterdir()) == []


def with_fewer_merges():
    tokenizer = open_clip.SimpleTokenizer()
    tokenizer.bpe_ranks = dict(list(tokenizer.bpe_ranks.items())[:4000])
    # Tests share one, with the words that it has split.
    tokenizer.cache = {}
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: open_clip.SimpleTokenizer(clean="whitespace"),
        lambda: open_clip.SimpleTokenizer(clean="canonicalize"),
        lambda: open_clip.SimpleTokenizer(context_length=40),
        with_fewer_merges,
    ],
)
def test_tokenizers_are_told_apart_by_their_tokens(make):
    plain = tokenizer_description(open_clip.SimpleTokenizer())
    assert plain == tokenizer_description(open_clip.SimpleTokenizer())
    assert tokenizer_description(make()) not in (plain, None)


@pytest.mark.parametrize("kind", ["simple", "random", "shuffle"])
def test_nothing_tells_a_tokenizer_at_random_from_another(kind):
    assert tokenizer_description(open_clip.SimpleTokenizer(reduction_mask=kind)) is None


def test_an_attention_mask_that_no_checkpoint_holds_tells_models_apart(finished_run):
    causal, free = load_model(finished_run).model, load_model(finished_run).model
    assert model_fingerprint(causal) == model_fingerprint(free)
    free.attn_mask = None
    assert "attn_mask" not in causal.state_dict()
    assert model_fingerprint(causal) != model_fingerprint(free)


def test_large_files_are_told_apart_by_a_sample_of_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_pgs.evaluation.features.WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("clip_pgs.evaluation.features._BLOCK_BYTES", 16)
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        (folder / "test").mkdir(parents=True)
        (folder / "test/nshards.txt").write_text("1")
        (folder / "test/0.tar").write_bytes(bytes(4000) + bytes([number]))
        found.append(data_fingerprint(str(folder), "test"))
    assert found[0] != found[1]


def test_nothing_is_known_of_data_on_a_server():
    assert data_fingerprint("https://example.org/wds_six", "test") is None
