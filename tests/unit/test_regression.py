"""A regression, such as STS-B: its data, one output, the squared error, the probe, the scores, and what is
refused.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from distlora.adapter.attach import attach
from distlora.data import LabelledRows, LabelledSample, collate_labelled, load_labelled
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.evaluation.scoring import label_scores
from distlora.initialisation.heads import draw_heads
from distlora.initialisation.probe import mean_gradients
from distlora.methods import registry
from distlora.models.loading import head_parameters, load_config, load_model
from distlora.models.losses import score_loss, squared_error
from distlora.models.targets import loss_of_samples, sample_weights
from distlora.plan import plan_of
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import ModelSection
from distlora.tasks.metrics import pearson, spearman
from distlora.training.objective import objective_of
from distlora.training.step import accumulate
from distlora.training.train import check
from tests.stepping import train_step
from tests.tiny_models import VOCAB_SIZE, tiny_encoder_dir, tiny_encoder_tokenizer

DATA = Path(os.environ.get("DISTLORA_TEST_DATA", "../shared/data")) / "glue"
PAD = 1
TSV = "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA plane.\tAn air plane.\t5.000\n1\tx\tA.\tB.\t0.8\n"


def section(path, **more):
    settings = {"fields": None, "template": None, "labels": None, "max_length": 40}
    return SimpleNamespace(task="stsb", path=str(path), **(settings | more))


def rows_file(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


# ---------------------------------------------------------------------- data


def test_official_files_and_rows_as_on_the_hub(tmp_path):
    (tmp_path / "STS-B").mkdir()
    (tmp_path / "STS-B" / "dev.tsv").write_text(TSV)
    expected = [("A plane.", "An air plane.", 5.0), ("A.", "B.", 0.8)]
    assert list(LabelledRows(section(tmp_path), "validation")) == expected
    hub = [
        {"sentence1": first, "sentence2": second, "label": label, "idx": 0}
        for first, second, label in (*expected, ("C.", "D.", -1.0), ("E.", "F.", 3))
    ]
    found = list(LabelledRows(section(rows_file(tmp_path, *hub)), "train"))
    assert found == [*expected, ("C.", "D.", None), ("E.", "F.", 3.0)]
    assert [type(label) for *_, label in found] == [float, float, type(None), float]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize("split, count", [("train", 5749), ("validation", 1500)])
def test_the_real_files_are_read_to_the_last_row(split, count):
    labels = [label for *_, label in LabelledRows(section(DATA), split)]
    assert len(labels) == count and min(labels) == 0 and max(labels) == 5


@pytest.mark.parametrize(
    ("score", "shown"),
    [("5.1", "'5.1'"), (-0.5, "-0.5"), ("good", "'good'"), ("nan", "'nan'"), (True, "true")],
)
def test_what_is_no_score_is_named(tmp_path, score, shown):
    good = {"sentence1": "a", "sentence2": "b", "label": 2.5}
    file = rows_file(tmp_path, good, good | {"label": score})
    said = f"row 1 of .* has the score {shown}, which is no number from 0 to 5; correct it"
    with pytest.raises(UserError, match=said):
        list(LabelledRows(section(file), "train"))


def test_a_batch_holds_scores_as_numbers():
    batch = collate_labelled([LabelledSample([5, 6], [0, 1], 2.5), LabelledSample([8], [0], 0.0)], PAD)
    assert batch["labels"].tolist() == [2.5, 0.0] and batch["labels"].dtype == torch.float32
    assert sample_weights(batch).tolist() == [1, 1], "a score of 0 is a target"


# ---------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_encoder_dir("bert", tmp_path_factory.mktemp("models"))


def where(directory) -> ModelSection:
    return ModelSection(path=str(directory), dtype="float32", gradient_checkpointing=False)


def rows(count=7):
    generator = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        ids = torch.randint(5, VOCAB_SIZE, (3 + 5 * (number % 4),), generator=generator).tolist()
        found.append(LabelledSample(ids, [int(i > 2) for i in range(len(ids))], ids[1] % 21 / 4))
    return found


def batches(size=3, count=7):
    samples = rows(count)
    return [collate_labelled(samples[i : i + size], PAD) for i in range(0, count, size)]


def started(directory, method="lora", seed=5, **settings):
    """(engine, attached) with a drawn head."""
    model, new = load_model(where(directory), ["score"])
    attached = attach(
        model, registry()[method](rank=4, **settings), "all-linear", new | head_parameters(model)
    )
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), torch.float32)
    engine.start(model, OptimizerSpec(lr=0.01))
    draw_heads(engine, new, seed)
    return engine, attached


def test_the_model_has_one_output_and_knows_that_it_is_a_regression(directory):
    config = load_config(where(directory), ["score"])
    assert (config.num_labels, config.problem_type, config.id2label) == (1, "regression", {0: "score"})
    assert load_config(where(directory), ["a", "b"]).problem_type is None
    model, new = load_model(where(directory), ["score"])
    assert new == {"classifier.weight", "classifier.bias"} and model.classifier.weight.shape[0] == 1


def test_the_loss_is_what_transformers_trains_with_one_output(directory):
    model, _ = load_model(where(directory), ["score"])
    (batch,) = batches(size=7)
    loss, count = score_loss(model, batch)
    assert count == 7 and loss.item() / 7 == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_rows_without_a_score_have_no_loss_and_rows_may_be_weighted():
    scores = torch.tensor([[1.0], [2.0], [7.0]], requires_grad=True)
    labels = torch.tensor([3.0, 2.5, -100.0])
    squared_error(scores, labels).backward()
    assert scores.grad.tolist() == [[-4.0], [-1.0], [0.0]]
    assert squared_error(scores, labels).item() == 4.25
    assert squared_error(scores, labels, torch.tensor([0.5, 2.0, 9.0])).item() == 2.5


def test_an_empty_batch_gives_zero_and_reaches_every_parameter(directory):
    model, _ = load_model(where(directory), ["score"])
    loss, count = score_loss(model.train(), collate_labelled([], PAD))
    loss.backward()
    assert (loss.item(), count) == (0, 0)
    assert all(each.grad is not None and not each.grad.any() for each in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_loss_of_a_global_batch_does_not_depend_on_how_it_is_cut(directory, size):
    engine, _ = started(directory)
    whole, count = score_loss(engine.module, batches(size=7)[0])
    loss = accumulate(engine, [*batches(size), collate_labelled([], PAD)], score_loss)
    assert loss == pytest.approx(whole.item() / count, rel=1e-5)


def test_it_learns(directory):
    engine, _ = started(directory)
    curve = [train_step(engine, batches(), score_loss, 0.01)[0] for _ in range(8)]
    assert curve[-1] < curve[0] / 2


def test_the_probe_gives_autograds_gradients(directory):
    engine, attached = started(directory)
    found = mean_gradients(
        engine,
        attached.layers,
        dict.fromkeys(attached.layers, 0),
        [*batches(), collate_labelled([], PAD)],
        7,
        loss_of_samples(score_loss),
    )
    plain, new = load_model(where(directory), ["score"])
    with torch.no_grad():
        for key in new:
            plain.get_parameter(key).copy_(engine.module.get_parameter(key))
    sum(score_loss(plain, batch)[0] for batch in batches()).backward()
    for layer, gradient in found.items():
        torch.testing.assert_close(
            gradient, plain.get_parameter(f"{layer}.weight").grad / 7, rtol=1e-3, atol=1e-5
        )
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


@pytest.mark.parametrize("size", [1, 3, 8])
def test_scores(directory, size):
    engine, _ = started(directory)
    found = label_scores(
        engine, rows(7), lambda part: collate_labelled(part, PAD), size, ["pearson", "spearman"]
    )
    (batch,) = batches(size=7)
    predicted = engine.module.eval()(**batch).logits.detach().squeeze(1)
    assert found == {
        "loss": pytest.approx(float((predicted - batch["labels"]).square().mean()), rel=1e-5),
        "pearson": pytest.approx(pearson(predicted, batch["labels"])),
        "spearman": pytest.approx(spearman(predicted, batch["labels"])),
    }


# ---------------------------------------------------------------------- the recipe


@pytest.fixture
def recipe(directory, tmp_path):
    """Makes the recipe of a run on STS-B's columns, with overrides."""
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(TSV)
    content = {
        "model": {"path": str(directory), "dtype": "float32"},
        "method": {"name": "lora", "rank": 8},
        "data": {"task": "stsb", "path": str(tmp_path), "eval_split": "validation", "max_length": 64},
        "train": {"steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def test_a_regression_is_checked_and_planned(recipe):
    check(recipe(), Topology(), None)
    assert objective_of(recipe()).labels == ("score",)
    plan = plan_of(recipe(), 1, 1)
    assert plan.setup.shapes.labels == 1 and plan.memory.peaks["training"] > plan.memory.weights


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.labels=[a, b]", "data.labels: the task stsb predicts a score; remove the labels"),
        ("data.template=chat", "data.template: the task stsb shows texts as they are"),
        ("data.think_step_by_step=true", "data.think_step_by_step: the task stsb asks nothing"),
        ("train.exact_match_samples=3", "train.exact_match_samples: the task stsb generates no answers"),
        ("data.fields={label: genre}", "has the score 'x', which is no number from 0 to 5"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(recipe, tmp_path, override, expected):
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        check(recipe(override), Topology(), None)
        load_labelled(recipe(override).data, "train", tiny_encoder_tokenizer("bert"))
    assert expected in str(caught.value)


def test_others_load_it_as_a_regression(directory):
    plain = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    (batch,) = batches(size=7)
    assert plain(**batch).loss.ndim == 0 and plain.config.problem_type == "regression"
