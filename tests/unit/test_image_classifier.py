"""Vision models with a new head: loading, the loss, the head, the probe, the names in their files, the plan,
and what is refused.
"""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import ResNetConfig

from distlora.adapter.attach import attach
from distlora.data import blank_images
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.files.tensors import TensorFiles, stored_name
from distlora.initialisation.heads import draw_heads
from distlora.initialisation.probe import mean_gradients
from distlora.methods.lora import LoRA
from distlora.models.image_processor import check_pixels, load_image_processor
from distlora.models.loading import bare_model, head_parameters, load_model
from distlora.models.losses import label_loss
from distlora.models.stored_names import renamed
from distlora.models.targets import IGNORE, loss_of_samples
from distlora.plan import plan_of
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import ModelSection
from distlora.training.objective import objective_of
from distlora.training.step import accumulate
from distlora.training.train import check
from tests.tiny_images import write_npz
from tests.tiny_models import VISION, tiny_image_processor, tiny_model_dir, tiny_vision_dir

LABELS = ("a", "b", "c")
HEAD = {"classifier.weight", "classifier.bias"}
every_model = pytest.mark.parametrize("name", VISION)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


def section(directory, **more):
    return ModelSection(path=str(directory), dtype="float32", gradient_checkpointing=False, **more)


def batches(size=2, count=7):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % 3
    return [
        {"pixel_values": pixels[i : i + size], "labels": labels[i : i + size]} for i in range(0, count, size)
    ]


EMPTY = {"pixel_values": torch.zeros(1, 3, 16, 16), "labels": torch.tensor([IGNORE])}


def started(directory, seed=5):
    model, new = load_model(section(directory), LABELS, images=True)
    attached = attach(model, LoRA(rank=3), "all-linear", new | head_parameters(model))
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), torch.float32, 0.0)
    engine.start(model, OptimizerSpec(lr=0.01))
    draw_heads(engine, new, seed)
    return engine, attached


# ---------------------------------------------------------------------- loading


@every_model
@pytest.mark.parametrize("labels", [None, 3, 5])
def test_a_head_is_new_unless_the_files_hold_one_of_as_many_labels(models, name, labels):
    directory = tiny_vision_dir(name, models / str(labels), labels)
    model, new = load_model(section(directory), LABELS, images=True)
    assert new == (set() if labels == 3 else HEAD)
    assert head_parameters(model) == HEAD and model.config.id2label == dict(enumerate(LABELS))


@every_model
def test_all_linear_layers_of_the_blocks_are_targets_and_the_patches_are_frozen(models, name):
    model = bare_model(section(tiny_vision_dir(name, models)), LABELS, images=True)
    attached = attach(model, LoRA(rank=3), "all-linear", head_parameters(model))
    ends = {layer.rpartition(".")[2] for layer in attached.layers}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"} | (
        {"reduction"} if name == "swin" else set()
    )
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert {key for key in trained if not key.endswith((".A", ".B"))} == HEAD


@every_model
def test_the_names_of_all_parameters_are_found_in_the_files(models, name):
    """Every weight of the model is that of its name there, also in files of the base model."""
    directory = tiny_vision_dir(name, models)
    model, new = load_model(section(directory), LABELS, images=True)
    files = TensorFiles(directory, "model")
    renaming = renamed(directory, type(model).__name__, files.names)
    for key, parameter in model.named_parameters():
        if key not in new:
            assert torch.equal(files.read(stored_name(files, key, renaming)), parameter), key
    assert any(".query." in stored for stored in files.names) and renaming, "as they are published"


def test_names_are_left_alone_where_transformers_renames_nothing(models, tmp_path):
    directory = tiny_model_dir("llama", models)
    assert renamed(directory, "LlamaForCausalLM", TensorFiles(directory, "model").names) == {}
    assert renamed(tmp_path, "Linear", ["a.weight"]) == {}, "a user's own class"


@pytest.mark.parametrize("torchvision", [{}, {"image_processor_type": "ViTImageProcessorFast"}])
def test_images_are_prepared_as_the_models_own_file_says(models, tmp_path, torchvision):
    directory = tiny_vision_dir("vit", tmp_path)
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | torchvision))
    images = blank_images()
    images[0].paste((255, 51, 0), (0, 0, 32, 32))
    pixels = load_image_processor(section(directory))(images)
    assert pixels.shape == (3, 3, 16, 16) and pixels.dtype is torch.float32
    expected = (torch.tensor([1.0, 0.2, 0.0]) - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
        [0.3, 0.25, 0.2]
    )
    torch.testing.assert_close(pixels[0, :, 7, 7], expected)


# ---------------------------------------------------------------------- loss, head, probe


@every_model
def test_the_loss_is_the_models_own_and_an_empty_pass_has_zero_gradients(models, name):
    model, _ = load_model(section(tiny_vision_dir(name, models)), LABELS, images=True)
    (batch,) = batches(7)
    loss, count = label_loss(model.train(), batch)
    assert count == 7
    torch.testing.assert_close(loss / 7, model(**batch).loss)
    nothing, count = label_loss(model, EMPTY)
    nothing.backward()
    assert (nothing.item(), count) == (0, 0)
    unused = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert all("mask_token" in key for key in unused)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@every_model
def test_the_probe_gives_autograds_gradients(models, name):
    directory = tiny_vision_dir(name, models)
    engine, attached = started(directory)
    owners = dict.fromkeys(attached.layers, 0)
    found = mean_gradients(
        engine, attached.layers, owners, [*batches(), EMPTY], 7, loss_of_samples(label_loss)
    )
    plain, _ = load_model(section(directory), LABELS, images=True)
    with torch.no_grad():
        for key in HEAD:
            plain.get_parameter(key).copy_(engine.module.get_parameter(key))
    sum(label_loss(plain, batch)[0] for batch in batches()).backward()
    for layer, gradient in found.items():
        expected = plain.get_parameter(f"{layer}.weight").grad / 7
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_loss_of_a_global_batch_does_not_depend_on_how_it_is_cut(models, size):
    engine, _ = started(tiny_vision_dir("vit", models))
    (whole,) = batches(7)
    expected = F.cross_entropy(engine.module(whole["pixel_values"]).logits, whole["labels"]).item()
    assert accumulate(engine, [*batches(size), EMPTY], label_loss) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------- recipes


@pytest.fixture
def recipe(models, tmp_path):
    """Makes the recipe of a run on ten classes, with overrides."""
    for split in ("train", "test"):
        write_npz(tmp_path / f"{split}.npz", 4)
    content = {
        "model": {"path": str(tiny_vision_dir("vit", models)), "dtype": "float32"},
        "method": {"name": "lora", "rank": 8},
        "data": {"task": "cifar10", "path": str(tmp_path), "eval_split": "test"},
        "train": {"steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_good_recipe_passes_whatever_the_length_of_texts(recipe):
    check(recipe(), Topology(), None)
    check(recipe("data.max_length=100000"), Topology(), None)
    assert objective_of(recipe()).labels[0] == "airplane"


def test_a_plan_counts_the_patches_of_an_image(recipe, models):
    plan = plan_of(recipe(), 1, 1)
    assert plan.setup.length == 17, "16 patches of 4 x 4, and the class token"
    more = plan_of(recipe("data.max_length=4096"), 1, 1)
    assert more.memory == plan.memory
    with pytest.raises(UserError, match="blocks of several widths"):
        plan_of(recipe(f"model.path={tiny_vision_dir('swin', models)}"), 1, 1)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.exact_match_samples=3"], "the task cifar10 generates no answers; set it to 0"),
        (["data.labels=[a, b]"], "data.labels: the task cifar10 has its own labels"),
        (["data.task=gsm8k"], "the type vit is no causal language model; a data.task of images, such as"),
        (["data.task=rte"], "the type vit has no classifier, which data.task wants; a data.task of images"),
        (["data.task=images"], "data.labels: the task images needs them"),
        (["data.split=valid"], "has no split 'valid'"),
        (["data.task=cifra10"], "unknown task 'cifra10', did you mean cifar10?"),
        (["targets=[query]"], "targets: query matches no linear layer"),
    ],
)
def test_what_needs_no_weights_is_refused_before_anything_is_loaded(recipe, overrides, expected):
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        check(recipe(*overrides), Topology(), None)
    assert expected in str(caught.value)


def test_a_language_model_is_refused_for_images(recipe, models):
    with pytest.raises(UserError, match="the type llama has no classifier of images, which data.task wants"):
        check(recipe(f"model.path={tiny_model_dir('llama', models)}"), Topology(), None)


def test_batch_norms_are_refused(tmp_path):
    ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ResNetForImageClassification has batch norms"):
        bare_model(section(tmp_path), LABELS, images=True)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, "no preprocessor_config.json in"),
        ({"size": {"height": 20, "width": 20}}, r"does not take images .*\(.*20\*20.*"),
        ({"size": {"shortest_edge": 16}}, "images of different shapes keep different sizes"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(tmp_path, processor, expected):
    directory = tiny_vision_dir("vit", tmp_path)
    (directory / "preprocessor_config.json").unlink()
    if processor is not None:
        tiny_image_processor(**processor).save_pretrained(directory)
    model = bare_model(section(directory), LABELS, images=True)
    with pytest.raises(UserError, match=f"^[^\n]*{expected}[^\n]*$"):
        check_pixels(model, load_image_processor(section(directory)), blank_images(), "it")
