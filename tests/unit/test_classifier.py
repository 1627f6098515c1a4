"""Encoders with a new head: loading, the loss, the head's numbers, the probe, the scores, and what is
refused.
"""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from distlora.adapter.attach import attach
from distlora.data import LabelledSample, Sample, collate, collate_labelled
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.evaluation.scoring import label_scores
from distlora.initialisation.heads import draw_heads
from distlora.initialisation.probe import mean_gradients
from distlora.methods import registry
from distlora.models.dry_run import position_limit
from distlora.models.loading import (
    bare_model,
    head_parameters,
    load_config,
    load_model,
    load_tokenizer,
)
from distlora.models.losses import label_loss
from distlora.models.targets import loss_of_samples, sample_weights, targets_per_row
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import ModelSection
from distlora.training.objective import objective_of
from distlora.training.step import accumulate
from distlora.training.train import check
from tests.stepping import train_step
from tests.tiny_models import ENCODERS, VOCAB_SIZE, tiny_encoder_config, tiny_encoder_dir, tiny_model_dir

LABELS = ("red", "green", "blue")
PAD = 1
#: The parameters that the published weights of each class lack.
NEW = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    },
    "deberta": {f"{layer}.{kind}" for layer in ("pooler.dense", "classifier") for kind in ("weight", "bias")},
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def section(directory, **more) -> ModelSection:
    return ModelSection(
        **{"path": str(directory), "dtype": "float32", "gradient_checkpointing": False, **more}
    )


def rows(count=7, segments=True):
    generator = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        ids = torch.randint(5, VOCAB_SIZE, (3 + 5 * (number % 4),), generator=generator).tolist()
        found.append(
            LabelledSample(ids, [int(i > 2) for i in range(len(ids))] if segments else None, ids[1] % 3)
        )
    return found


def batches(name, size=3, count=7):
    samples = rows(count, segments=name != "roberta")
    return [collate_labelled(samples[i : i + size], PAD) for i in range(0, count, size)]


def started(directory, method="lora", dtype=torch.float32, seed=5, **settings):
    """(engine, attached) with a drawn head."""
    where = section(directory, dtype=str(dtype).removeprefix("torch."))
    model, new = load_model(where, LABELS)
    attached = attach(
        model, registry()[method](rank=4, **settings), "all-linear", new | head_parameters(model)
    )
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), dtype)
    engine.start(model, OptimizerSpec(lr=0.01))
    draw_heads(engine, new, seed)
    return engine, attached


# ---------------------------------------------------------------------- loading


@every_encoder
def test_the_weights_are_there_and_the_head_is_new(models, name):
    directory = tiny_encoder_dir(name, models)
    model, new = load_model(section(directory), LABELS)
    assert new == NEW[name] and head_parameters(model) == NEW[name]
    assert model.config.id2label == dict(enumerate(LABELS)) and not model.training
    theirs = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
    for key, parameter in theirs.named_parameters():
        assert key in new or torch.equal(parameter, model.get_parameter(key)), key


@pytest.mark.parametrize("labels", [3, 2])
def test_a_head_in_the_weights_is_kept_if_it_fits(models, tmp_path, labels):
    """It is trained whole in any case; with another number of labels it is a new one."""
    trained = AutoModelForSequenceClassification.from_config(
        tiny_encoder_config("deberta", num_labels=labels)
    )
    trained.save_pretrained(tmp_path)
    model, new = load_model(section(tmp_path), LABELS)
    assert new == (set() if labels == 3 else {"classifier.weight", "classifier.bias"})
    assert head_parameters(model) == NEW["deberta"]
    assert torch.equal(model.pooler.dense.weight, trained.pooler.dense.weight)
    assert model.classifier.weight.shape == (3, 60)


def test_other_weights_that_do_not_fit_are_refused(models, tmp_path):
    trained = AutoModelForSequenceClassification.from_config(tiny_encoder_config("bert", num_labels=3))
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 132}))
    with pytest.raises(UserError, match="the sizes of the weights are not those of config.json"):
        load_model(section(tmp_path), LABELS)


@every_encoder
def test_an_encoder_is_no_language_model(models, name):
    with pytest.raises(UserError, match="is no causal language model; a data.task with labels"):
        load_config(section(tiny_encoder_dir(name, models)))


def test_a_decoder_classifies_by_the_last_token_that_is_no_padding(models):
    directory = tiny_model_dir("llama", models)  # its tokenizer has no padding token
    model, new = load_model(section(directory), LABELS)
    assert new == {"score.weight"}
    pad = load_tokenizer(section(directory)).pad_token_id
    assert model.config.pad_token_id == pad
    alone = [label_loss(model, collate_labelled([row], pad))[0] for row in rows(3, segments=False)]
    together, count = label_loss(model, collate_labelled(rows(3, segments=False), pad))
    torch.testing.assert_close(together, sum(alone))
    assert count == 3


@pytest.mark.parametrize(("name", "limit"), [("bert", 64), ("roberta", 64), ("deberta", None)])
def test_position_limit(models, name, limit):
    """The longest text that the model runs on; with one token more it fails where there is a limit."""
    directory = tiny_encoder_dir(name, models)
    assert position_limit(bare_model(section(directory), LABELS)) == limit
    model, _ = load_model(section(directory), LABELS)
    label_loss(model, collate_labelled([LabelledSample([9] * 64, None, 0)], PAD))
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            label_loss(model, collate_labelled([LabelledSample([9] * 65, None, 0)], PAD))


# ---------------------------------------------------------------------- the loss


@every_encoder
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_is_the_models_own(models, name, checkpointing):
    model, _ = load_model(
        section(tiny_encoder_dir(name, models), gradient_checkpointing=checkpointing), LABELS
    )
    model.train()
    (batch,) = batches(name, size=7)
    loss, count = label_loss(model, batch)
    assert count == 7
    torch.testing.assert_close(loss / 7, model(**batch).loss)
    weights = torch.arange(7.0)
    weighted, count = label_loss(model, batch, weights)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    torch.testing.assert_close(
        weighted, (F.cross_entropy(logits, batch["labels"], reduction="none") * weights).sum()
    )
    assert count == 7


@every_encoder
def test_a_pass_without_a_row_has_zero_gradients_everywhere(models, name):
    model, _ = load_model(section(tiny_encoder_dir(name, models)), LABELS)
    loss, count = label_loss(model.train(), collate_labelled([], PAD))
    loss.backward()
    assert (loss.item(), count) == (0, 0)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


@every_encoder
@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_loss_of_a_global_batch_does_not_depend_on_how_it_is_cut(models, name, size):
    engine, _ = started(tiny_encoder_dir(name, models))
    whole, count = label_loss(engine.module, batches(name, size=7)[0])
    loss = accumulate(engine, [*batches(name, size), collate_labelled([], PAD)], label_loss)
    assert loss == pytest.approx(float(whole) / count, rel=1e-5)


def test_targets_are_rows_with_a_label_or_response_tokens():
    assert targets_per_row({"labels": torch.tensor([2, -100, 0])}).tolist() == [1, 0, 1]
    assert sample_weights({"labels": torch.tensor([2, -100, 0])}).tolist() == [1.0, 0.0, 1.0]
    responses = collate(
        [Sample([1, 2, 3], [1, -100, 3], [1], None), Sample([1, 2], [-100] * 2, [1], None)], 0
    )
    assert targets_per_row(responses).tolist() == [1, 0]


def test_bfloat16_follows_float32(models):
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        engine, _ = started(tiny_encoder_dir("bert", models), dtype=dtype)
        curves.append([train_step(engine, batches("bert"), label_loss, 0.01)[0] for _ in range(4)])
        assert {parameter.dtype for parameter in engine.module.parameters()} == {dtype}
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
    assert curves[0][-1] < curves[0][0]


# ---------------------------------------------------------------------- the head


@every_encoder
def test_the_head_depends_on_the_seed_and_on_nothing_else(models, name):
    directory = tiny_encoder_dir(name, models)
    heads = []
    for seed, noise in ((5, 0), (5, 3), (6, 0)):
        with torch.random.fork_rng():
            torch.randn(noise)  # the default generator is elsewhere
            engine, attached = started(directory, seed=seed)
        heads.append({key: engine.read_trained(key)["master"] for key in NEW[name]})
        assert NEW[name] < set(attached.trained)
    for key, value in heads[0].items():
        assert torch.equal(value, heads[1][key])
        if value.ndim == 1:
            assert not value.any()
        else:
            assert not torch.equal(value, heads[2][key])
            assert 0.03 < value.std() < 0.07, "of the spread in the model's config"


@every_encoder
def test_the_whole_head_trains(models, name):
    engine, attached = started(tiny_encoder_dir(name, models))
    before = {key: engine.read_trained(key)["master"] for key in NEW[name]}
    for _ in range(2):
        train_step(engine, batches(name), label_loss, 0.01)
    assert all(not torch.equal(engine.read_trained(key)["master"], value) for key, value in before.items())


# ---------------------------------------------------------------------- the probe and the scores


@every_encoder
def test_the_probe_gives_autograds_gradients(models, name):
    directory = tiny_encoder_dir(name, models)
    engine, attached = started(directory)
    owners = dict.fromkeys(attached.layers, 0)
    found = mean_gradients(
        engine,
        attached.layers,
        owners,
        [*batches(name), collate_labelled([], PAD)],
        7,
        loss_of_samples(label_loss),
    )
    plain, _ = load_model(section(directory), LABELS)
    with torch.no_grad():
        for key in NEW[name]:
            plain.get_parameter(key).copy_(engine.module.get_parameter(key))
    sum(label_loss(plain, batch)[0] for batch in batches(name)).backward()
    for layer, gradient in found.items():
        torch.testing.assert_close(
            gradient, plain.get_parameter(f"{layer}.weight").grad / 7, rtol=1e-3, atol=1e-5
        )
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


@pytest.mark.parametrize("size", [1, 3, 8])
def test_scores(models, size):
    engine, _ = started(tiny_encoder_dir("bert", models))
    samples = rows(7)
    scores = label_scores(engine, samples, lambda part: collate_labelled(part, PAD), size, ["accuracy", "f1"])
    (batch,) = batches("bert", size=7)
    loss, _ = label_loss(engine.module.eval(), batch)
    right = engine.module(**batch).logits.argmax(-1) == batch["labels"]
    assert scores["loss"] == pytest.approx(loss.item() / 7, rel=1e-5)
    assert scores["accuracy"] == pytest.approx(right.float().mean().item()) and set(scores) == {
        "loss",
        "accuracy",
        "f1",
    }


# ---------------------------------------------------------------------- what is refused


@pytest.fixture
def recipe(models, tmp_path):
    """Makes the recipe of a run on RTE's columns, with overrides."""
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    content = {
        "model": {"path": str(tiny_encoder_dir("bert", models)), "dtype": "float32"},
        "method": {"name": "lora", "rank": 8},
        "data": {"task": "rte", "path": str(tmp_path), "eval_split": "validation", "max_length": 64},
        "train": {"steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_good_recipe_passes_though_the_head_is_smaller_than_the_rank(recipe):
    check(recipe(), Topology(), None)
    assert objective_of(recipe()).labels == ("entailment", "not_entailment")
    own = ["data.task=classification", "data.labels=[x, y, z]", "data.fields={text: sentence1, label: index}"]
    assert objective_of(recipe(*own)).labels == ("x", "y", "z")
    check(recipe(*own), Topology(), None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.exact_match_samples=3"],
            "train.exact_match_samples: the task rte generates no answers; set it to 0",
        ),
        (["data.labels=[a, b]"], "data.labels: the task rte has its own labels"),
        (
            ["data.task=gsm8k", "data.labels=[a, b]"],
            "data.labels: the task gsm8k has responses and no labels",
        ),
        (["data.task=classification"], "data.labels: the task classification needs them"),
        (["data.max_length=65"], "data.max_length=65 is beyond the 64 positions of"),
        (["data.task=gsm8k"], "the type bert is no causal language model"),
        (["data.task=qnli"], "has no column 'question'"),
        (["data.task=tre"], "unknown task 'tre', did you mean rte?"),
        (["targets=[qeury]"], "did you mean query?"),
        (["method.rank=61"], "rank 61"),
    ],
)
def test_what_needs_no_weights_is_refused_before_anything_is_loaded(recipe, overrides, expected, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoModelForSequenceClassification.from_pretrained",
        lambda *_: pytest.fail("loaded"),
    )
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        check(recipe(*overrides), Topology(), None)
    assert expected in str(caught.value)
