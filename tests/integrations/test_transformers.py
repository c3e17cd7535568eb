"""Masking of Hugging Face models, built from configs."""

import copy
import importlib
import io
import subprocess
import sys

import pytest
import torch
import transformers

from clip_pgs import MaskingStrategy, PatchSelection
from clip_pgs.integrations.transformers import (
    apply_masking,
    calibrate_masking,
    force_selection,
    last_selection,
    masked_inference,
    num_patches,
    patch_size,
    remove_masking,
    set_masking_noise,
    set_masking_progress,
    update_masking,
)
from support.hf_models import SHAPES, hf_features, hf_images, hf_model, hf_tower, naflex_images
from support.models import text_batch
from support.tower_gradients import adaptive

FIXED = ["CLIPModel", "CLIPVisionModel", "SiglipModel", "SiglipVisionModel", "ChineseCLIPModel"]
ALL = [*FIXED, "Siglip2Model", "Siglip2VisionModel", "CLIPVisionModelWithProjection"]
every_model = pytest.mark.parametrize("name", ALL)
every_fixed = pytest.mark.parametrize("name", FIXED)
one_of_each = pytest.mark.parametrize(
    "name", ["CLIPModel", "SiglipModel", "ChineseCLIPModel", "Siglip2Model"]
)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
SELECTIONS = {
    "fixed": PatchSelection(torch.tensor([[0, 3, 9, 14], [1, 2, 3, 4], [5, 8, 10, 15]])),
    "adaptive": adaptive([4, 9, 6]),
}
both_selections = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


@every_model
@both_attentions
def test_eval_mode_is_bit_identical_to_the_plain_model(name, attention):
    plain = hf_model(name, attention=attention).eval()
    masked = apply_masking(copy.deepcopy(plain), "pgs", mask_ratio=0.5).eval()
    images = hf_images(plain)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    got, expected = (hf_tower(model)(**images, **wanted) for model in (masked, plain))
    assert got.keys() == expected.keys()
    assert torch.equal(got.pooler_output, expected.pooler_output)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    for key in {"hidden_states", "attentions"} & got.keys():
        assert all(map(torch.equal, got[key], expected[key]))


@every_model
def test_the_state_dict_keeps_its_keys_and_a_saved_model_is_a_plain_one(name, tmp_path):
    plain = hf_model(name).eval()
    masked = apply_masking(hf_model(name, seed=1), "pgs")
    assert list(masked.state_dict()) == list(plain.state_dict())
    masked.load_state_dict(plain.state_dict())
    masked.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [name]
    loaded = getattr(transformers, name).from_pretrained(tmp_path).eval()
    assert type(hf_tower(loaded)) is type(hf_tower(plain))
    images = hf_images(plain)
    torch.testing.assert_close(hf_features(loaded, images), hf_features(plain, images))


@every_model
def test_a_masked_model_is_pickled_and_copied(name):
    model = apply_masking(hf_model(name), "pgs", mask_ratio=0.5, mask_ratio_min=0.3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    images, noise = hf_images(model), torch.rand(3, 16)
    set_masking_noise(model, noise)
    expected = hf_features(model.train(), images)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert type(hf_tower(other)) is type(hf_tower(model))
        set_masking_noise(other, noise)
        assert torch.equal(hf_features(other.train(), images), expected)
        assert type(hf_tower(remove_masking(other))) is type(hf_tower(hf_model(name)))


@every_model
def test_keeping_all_patches_equals_the_plain_model(name):
    plain = hf_model(name).train()
    masked = apply_masking(copy.deepcopy(plain), "random", mask_ratio=0.0)
    images = hf_images(plain)
    got, expected = hf_features(masked, images), hf_features(plain, images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert last_selection(masked).index.shape == (3, 16)


def encode_by_hand(tower, images, kept):
    """Return the feature (D,) of one image's kept patches, through the model's own parts."""
    embeddings = tower.embeddings
    if "spatial_shapes" in images:
        tokens = embeddings(images["pixel_values"], images["spatial_shapes"])[:, kept]
        return tower.head(tower.post_layernorm(tower.encoder(tokens).last_hidden_state))[0]
    tokens = embeddings(images["pixel_values"])
    if hasattr(tower, "pre_layrnorm"):
        kept = torch.cat([torch.tensor([0]), kept + 1])
        tokens = tower.pre_layrnorm(tokens[:, kept])
        return tower.post_layernorm(tower.encoder(tokens).last_hidden_state[0, 0])
    return tower.head(tower.post_layernorm(tower.encoder(tokens[:, kept]).last_hidden_state))[0]


@every_model
@both_attentions
@both_selections
def test_features_are_those_of_the_kept_tokens_in_the_models_own_encoder(
    name, attention, selection
):
    plain = hf_model(name, attention=attention).train()
    masked = apply_masking(copy.deepcopy(plain), "random").train()
    images = hf_images(plain)
    if "spatial_shapes" in images:
        # The second image has 12 patches.
        selection = PatchSelection(selection.index.clamp(max=11), selection.valid)
    with force_selection(masked, selection):
        output = hf_tower(masked)(**images, output_hidden_states=True)
    counts = selection.kept_counts().tolist()
    for row, count in enumerate(counts):
        one = {key: value[row : row + 1] for key, value in images.items()}
        kept = selection.index[row, :count]
        expected = encode_by_hand(hf_tower(plain), one, kept)
        torch.testing.assert_close(output.pooler_output[row], expected, atol=1e-5, rtol=1e-5)
    tokens = output.last_hidden_state
    prefix = tokens.shape[1] - selection.index.shape[1]
    assert len(output.hidden_states) == 3
    for row, count in enumerate(counts):
        assert tokens[row, prefix + count :].abs().sum() == 0


@every_fixed
@both_selections
def test_gradients_arrive_at_the_kept_patches_alone(name, selection):
    model = apply_masking(hf_model(name), "random").train()
    pixels = hf_images(model)["pixel_values"].requires_grad_()
    with force_selection(model, selection):
        hf_features(model, {"pixel_values": pixels}).square().sum().backward()
    reached = pixels.grad.unflatten(2, (4, 16)).unflatten(4, (4, 16)).abs().sum(dim=(1, 3, 5))
    expected = torch.zeros(3, 16, dtype=torch.bool)
    for row, count in enumerate(selection.kept_counts().tolist()):
        expected[row, selection.index[row, :count]] = True
    assert torch.equal(reached.flatten(1) > 0, expected)


def loss_of(model, seed=0):
    return model(
        input_ids=text_batch(seed=seed), **hf_images(model, seed=seed), return_loss=True
    ).loss


@one_of_each
@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.25}], ids=["fixed", "adaptive"])
def test_a_whole_model_trains_and_checkpointing_changes_no_gradient(name, options):
    model = apply_masking(hf_model(name), "pgs", mask_ratio=0.5, **options).train()
    set_masking_progress(model, 0.5)
    set_masking_noise(model, torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss_of(model).backward()
        gradients.append({key: each.grad for key, each in model.named_parameters()})
    vision = [key for key in gradients[0] if key.startswith("vision_model")]
    assert all(gradients[0][key].isfinite().all() for key in vision)
    for key, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][key], gradient)


@one_of_each
def test_the_same_noise_repeats_the_selection(name):
    model = apply_masking(hf_model(name), "pgs").train()
    set_masking_noise(model, torch.rand(3, 16))
    images = hf_images(model)
    first = hf_features(model, images)
    assert torch.equal(hf_features(model, images), first)
    set_masking_noise(model, None)
    assert any(not torch.equal(hf_features(model, images), first) for _ in range(4))


@every_model
def test_removing_gives_the_plain_model_back(name):
    plain = hf_model(name).train()
    model = remove_masking(apply_masking(copy.deepcopy(plain), "pgs"))
    assert type(hf_tower(model)) is type(hf_tower(plain))
    images = hf_images(plain)
    assert torch.equal(hf_features(model, images), hf_features(plain, images))


def test_masked_inference_masks_in_eval_mode_and_ends():
    model = hf_model("CLIPModel").eval()
    images = hf_images(model)
    with masked_inference(model, "random", mask_ratio=0.75):
        assert hf_tower(model)(**images).last_hidden_state.shape == (3, 5, 64)
    assert hf_tower(model)(**images).last_hidden_state.shape == (3, 17, 64)
    assert num_patches(model) == 16
    assert patch_size(model) == (16, 16)


@every_fixed
def test_merged_tokens_are_the_means_of_what_is_dropped(name):
    plain = hf_model(name).train()
    masked = apply_masking(copy.deepcopy(plain), "random", merge="1x1").train()
    images, kept = hf_images(plain, 1), torch.tensor([0, 3, 9, 14])
    with force_selection(masked, PatchSelection(kept[None])):
        got = hf_tower(masked)(**images).last_hidden_state
    tower = hf_tower(plain)
    tokens = tower.embeddings(**images)
    prefix = tokens.shape[1] - 16
    dropped = [patch for patch in range(16) if patch not in kept]
    tokens = torch.cat(
        [
            tokens[:, :prefix],
            tokens[:, prefix + kept],
            tokens[:, [prefix + patch for patch in dropped]].mean(dim=1, keepdim=True),
        ],
        dim=1,
    )
    tokens = tower.pre_layrnorm(tokens) if prefix else tokens
    expected = tower.encoder(tokens).last_hidden_state
    expected = expected if prefix else tower.post_layernorm(expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["CLIPModel", "ChineseCLIPModel", "SiglipModel"])
def test_attentive_keeps_what_the_models_own_attention_favors(name):
    plain = hf_model(name, attention="eager").eval()
    model = apply_masking(copy.deepcopy(plain), "attentive", mask_ratio=0.5).train()
    images = hf_images(plain)
    hf_features(model, images)
    output = hf_tower(plain)(**images, output_attentions=True)
    if name == "SiglipModel":
        head, x = hf_tower(plain).head, output.last_hidden_state
        query = head.probe.expand(3, -1, -1)
        scores = head.attention(query, x, x, need_weights=True)[1][:, 0]
    else:
        scores = torch.stack([each[:, :, 0, 1:].mean(dim=1) for each in output.attentions]).mean(0)
    expected = scores.topk(8, dim=1).indices.sort(dim=1).values
    assert torch.equal(last_selection(model).index, expected)
    with torch.no_grad():
        for parameter in hf_tower(model).parameters():
            parameter.mul_(1.5)
    before = copy.deepcopy(hf_tower(model).masking.teacher.state())
    update_masking(model, step=0, total_steps=2)
    after = hf_tower(model).masking.teacher.state()
    assert any(not torch.equal(after[key], before[key]) for key in after)


class KeepFirst(MaskingStrategy):
    """Keeps the first half of the patches, and what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, inputs, *, generator=None):
        self.seen.append(inputs)
        index = torch.arange(inputs.num_patches // 2)
        return PatchSelection(index.repeat(inputs.batch_size, 1))


def test_a_strategy_sees_naflex_images_in_their_own_shape():
    strategy = KeepFirst()
    model = apply_masking(hf_model("Siglip2Model"), strategy).train()
    hf_features(model, hf_images(model))
    images = naflex_images()
    square, wide = strategy.seen
    assert torch.equal(square.pixels, torch.stack([images[0], images[2]]))
    assert torch.equal(wide.pixels, images[1][None])
    assert [each.grid_size for each in strategy.seen] == [SHAPES[0], SHAPES[1]]
    assert last_selection(model).kept_counts().tolist() == [8, 6, 8]


@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.25}], ids=["fixed", "adaptive"])
def test_a_naflex_image_is_encoded_as_by_itself(options):
    model = apply_masking(hf_model("Siglip2Model"), "pgs", mask_ratio=0.5, **options).train()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    images = hf_images(model)
    set_masking_noise(model, noise)
    together = hf_features(model, images)
    for row in range(3):
        set_masking_noise(model, noise[row : row + 1])
        one = {key: value[row : row + 1] for key, value in images.items()}
        torch.testing.assert_close(hf_features(model, one)[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "masking", "options", "sentence"),
    [
        ("Siglip2Model", "pgs", {"merge": "2x2"}, "merge needs one grid for all images"),
        ("Siglip2Model", "attentive", {}, "grids of their own"),
        ("Siglip2Model", "cluster", {}, "ClusterMasking without a threshold of its own needs one"),
        ("Siglip2ForImageClassification", "pgs", {}, "by the mask of all patches"),
        ("CLIPForImageClassification", "pgs", {"mask_ratio_min": 0.3}, "averages all tokens"),
        ("CLIPForImageClassification", "cluster", {"mask_ratio_min": 0.5}, "averages all tokens"),
        ("SiglipForImageClassification", "pgs", {"merge": "2x2"}, "averages all tokens"),
        ("CLIPTextModel", "pgs", {}, "CLIPTextModel has no image tower; masking supports .*CLIP"),
    ],
)
def test_what_cannot_be_masked_is_refused_and_stays_plain(name, masking, options, sentence):
    model = hf_model(name) if "Text" not in name else hf_text_model(name)
    with pytest.raises(ValueError, match=sentence):
        apply_masking(model, masking, **options)
    assert not any(type(each).__name__ == "TowerMasking" for each in model.modules())


def hf_text_model(name):
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(num_hidden_layers=1, hidden_size=64))


def test_flex_attention_is_refused_before_anything_changes():
    model = hf_model("CLIPModel")
    hf_tower(model).config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError, match=r'flex_attention.*build it with attn_implementation="sdpa"'
    ):
        apply_masking(model, "pgs")


def test_a_siglip_without_a_head_has_no_attention_to_follow():
    model = apply_masking(hf_model("SiglipVisionModel", vision_use_head=False), "pgs").train()
    assert model(**hf_images(model)).pooler_output is None
    with pytest.raises(ValueError, match="no head that pools"):
        apply_masking(model, "attentive")


@pytest.mark.parametrize("noise", ["a", [0.5]])
def test_noise_is_a_tensor(noise):
    model = apply_masking(hf_model("CLIPVisionModel"), "random")
    with pytest.raises(ValueError, match="noise must be a tensor or None, got"):
        set_masking_noise(model, noise)


def test_images_of_another_size_are_refused_where_patches_are_dropped():
    model = apply_masking(hf_model("CLIPModel"), "pgs").train()
    pixels = torch.randn(1, 3, 96, 96)
    with pytest.raises(ValueError, match=r"takes images of 64 x 64 .*, got \(96, 96\)"):
        model.get_image_features(pixels, interpolate_pos_encoding=True)
    model.eval().get_image_features(pixels, interpolate_pos_encoding=True)


@every_fixed
def test_it_trains_in_bf16_and_under_autocast(name):
    model = apply_masking(hf_model(name), "pgs", mask_ratio=0.5, mask_ratio_min=0.25).train()
    images = hf_images(model)
    noise = torch.rand(3, 16)
    set_masking_noise(model, noise)
    exact = hf_features(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = hf_features(model, images)
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)
    hf_features(model.to(torch.bfloat16), images).float().square().sum().backward()


def test_cluster_is_calibrated():
    model = apply_masking(hf_model("CLIPModel"), "cluster", mask_ratio=0.5).train()
    assert calibrate_masking(model, hf_images(model)["pixel_values"])


@pytest.mark.slow
def test_a_vision_model_compiles_into_one_graph():
    torch._dynamo.reset()
    options = {"mask_ratio": 0.5, "mask_ratio_min": 0.25}
    model = apply_masking(hf_model("CLIPVisionModel"), "pgs", **options).train()
    images = hf_images(model)
    set_masking_noise(model, torch.rand(3, 16))
    expected = model(**images).pooler_output
    got = torch.compile(model, backend="eager", fullgraph=True)(**images).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def samples():
    images = hf_images(hf_model("CLIPModel"), 8)["pixel_values"]
    pairs = zip(images, text_batch(8), strict=True)
    return [{"pixel_values": image, "input_ids": text} for image, text in pairs]


def collate(batch):
    return {**torch.utils.data.default_collate(batch), "return_loss": True}


class Progress(transformers.TrainerCallback):
    """Remembers the progress of the steps."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(state.global_step / state.max_steps)
        set_masking_progress(model, self.seen[-1])


@pytest.mark.slow
def test_a_trainer_resumes_and_its_checkpoint_is_a_plain_model(tmp_path):
    pytest.importorskip("accelerate")

    def train(folder, *, resume=None):
        model = apply_masking(hf_model("CLIPModel"), "pgs", mask_ratio=0.5)
        arguments = transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        progress = Progress()
        trainer = transformers.Trainer(
            model, arguments, collate, train_dataset=samples(), callbacks=[progress]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, progress.seen

    whole, seen = train(tmp_path / "whole")
    assert seen == [0.0, 0.25, 0.5, 0.75]
    resumed, seen = train(tmp_path / "resumed", resume=str(tmp_path / "whole/checkpoint-2"))
    assert seen == [0.5, 0.75]
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "whole/checkpoint-4")
    for key, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], weight)
        assert torch.equal(loaded.state_dict()[key], weight)


@pytest.mark.slow
def test_accelerate_saves_and_restores_a_masked_model(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = apply_masking(hf_model("SiglipModel"), "pgs", mask_ratio=0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_masking_progress(model, 0.5)
    accelerator.save_state(tmp_path)
    before = copy.deepcopy(model.state_dict())
    accelerator.backward(loss_of(model))
    optimizer.step()
    assert any(not torch.equal(before[key], each) for key, each in model.state_dict().items())
    accelerator.load_state(tmp_path)
    assert all(torch.equal(before[key], each) for key, each in model.state_dict().items())
    hf_model("SiglipModel").load_state_dict(accelerator.unwrap_model(model).state_dict())


WITHOUT_OPEN_CLIP = """
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from clip_pgs.integrations.transformers import apply_masking, last_selection
config = CLIPVisionConfig(num_hidden_layers=1, image_size=64, patch_size=16)
model = apply_masking(CLIPVisionModel(config), "pgs", mask_ratio=0.5).train()
model(torch.randn(2, 3, 64, 64))
print(tuple(last_selection(model).index.shape))
"""


@pytest.mark.slow
def test_it_works_where_open_clip_is_not_installed(monkeypatch):
    monkeypatch.setenv("HIDDEN_PACKAGES", "open_clip timm")
    command = [sys.executable, "-c", WITHOUT_OPEN_CLIP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 8)\n"


@pytest.mark.parametrize("version", ["4.57.6", "5.5.4"])
def test_a_transformers_of_another_shape_is_refused(monkeypatch, version):
    name = "clip_pgs.integrations.transformers"
    # The package puts another module into its place while it is imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=f"needs transformers 5.6 or newer, got {version}"):
        importlib.import_module(name)
