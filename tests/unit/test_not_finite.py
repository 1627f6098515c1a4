"""Weights that are finite, and overflow in a forward pass: nothing that is made of them is a result."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distlora.checkpoints.soundness import MARK, mark, soundness
from distlora.data import Question, Questions
from distlora.errors import TrainingError, UserError
from distlora.evaluation.answering import Generation, Likelihood
from distlora.evaluation.scoring import answer_questions, check_scores, exact_match
from distlora.files.atomic import sha256_of
from distlora.models.loading import load_tokenizer
from distlora.training import train
from distlora.training.build import build
from distlora.training.export_run import export_run
from distlora.training.objective import objective_of
from distlora.training.run import Run
from distlora.training.targets import choose_targets
from tests.distributed.cases import solo
from tests.e2e.program import call, files_of
from tests.tiny_models import tiny_model_dir
from tests.unit.test_bad_steps import ALONE
from tests.unit.test_train import short_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def overflowing(model, tmp_path_factory) -> Path:
    """A run with a checkpoint whose numbers are finite, and whose loss is not; nothing has proven it."""
    recipe = short_recipe(model, tmp_path_factory.mktemp("run"))
    made = recipe("method={name: lora, rank: 2}", "train.steps=1")
    train.train(made, ALONE)
    run_dir = Path(made.output_dir)
    checkpoint = run_dir / "checkpoint-1"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in (checkpoint / "adapter.safetensors", checkpoint / "optimizer.safetensors"):
        tensors = load_file(file)
        large = [name for name in tensors if file.stem == "adapter" or name.endswith("/master")]
        save_file(tensors | {name: torch.full_like(tensors[name], 1e30) for name in large}, file)
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert soundness(checkpoint) == "unproven"
    return run_dir


# ---------------------------------------------------------------------- exports


@pytest.mark.parametrize("format", ["peft", "merged"])
@pytest.mark.parametrize("step", [None, 1])
def test_they_are_not_exported(format, step, overflowing, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="^the weights after step 1 give logits that are infinite or not a "):
        export_run(overflowing, format, out, checkpoint=step)
    assert not out.exists()
    assert export_run(overflowing, format, out, checkpoint=step, check=False).path == out


def test_what_is_proven_is_not_computed_again(overflowing, tmp_path):
    mark(overflowing / "checkpoint-1", "good", "for this test")
    try:
        assert export_run(overflowing, "peft", tmp_path / "out").path.is_dir()
    finally:
        (overflowing / "checkpoint-1" / MARK).unlink()


def test_without_the_pretrained_model_a_line_says_so(overflowing, tmp_path, caplog, model):
    recipe = (overflowing / "recipe.yaml").read_text()
    caplog.set_level("INFO", "distlora")
    (overflowing / "recipe.yaml").write_text(recipe.replace(str(model), "some-owner/some-model"))
    try:
        assert export_run(overflowing, "peft", tmp_path / "out").path.is_dir()
    finally:
        (overflowing / "recipe.yaml").write_text(recipe)
    assert "was not checked: some-owner/some-model is not at hand" in caplog.text


# ---------------------------------------------------------------------- evaluations


def refusal(*words) -> str:
    outcome = call("eval", *words)
    assert outcome.code == 1 and "Traceback" not in outcome.err and "nan" not in outcome.out
    (sentence,) = outcome.sentences
    return sentence


def test_the_loss_of_a_run_that_is_no_number_ends_its_evaluation(overflowing):
    before = files_of(overflowing)
    said = refusal(overflowing, "deepspeed=null", "data.eval_split=train[:2]")
    assert f"{overflowing / 'checkpoint-1'}: the loss on data.eval_split=train[:2] is nan" in said
    assert files_of(overflowing) == before


@pytest.mark.parametrize("more", [[], ["--merge"]])
def test_answers_of_logits_that_are_no_numbers_are_no_answers(more, overflowing, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is 1?", "answer": "One.\\n#### 1"}\n' * 2)
    words = ["--tasks", "gsm8k", "--data", f"gsm8k={rows}", "--out", tmp_path, *more]
    said = refusal(overflowing, "deepspeed=null", "data.eval_split=train", *words)
    assert "for question " in said and "of gsm8k ('What is" in said
    assert not list((tmp_path / "eval").glob("*.json"))
    assert all(not path.read_text() for path in (tmp_path / "eval").glob("*.jsonl"))


@pytest.fixture
def ruined(tmp_path):
    """(engine, tokenizer) of a model whose logits are no numbers behind one of its tokens."""
    recipe = short_recipe(tiny_model_dir("mistral", tmp_path), tmp_path)()
    objective = objective_of(recipe)
    engine = build(solo(), recipe, objective, choose_targets(recipe, objective)).engine
    tokenizer = load_tokenizer(recipe.model)
    with torch.no_grad():
        engine.module.get_input_embeddings().weight[tokenizer.encode("z")[0]] = torch.nan
    return engine, tokenizer


def questions(tokenizer, *prompts: str) -> Questions:
    options = tuple(tuple(tokenizer.encode(text)) for text in ("a", "b"))
    items = [Question(text, tokenizer.encode(text), "1", options=options, correct=0) for text in prompts]
    return Questions(items, (), "here", 0, "")


@pytest.mark.parametrize("way", [Generation, Likelihood])
def test_one_question_among_others_is_named(way, ruined):
    engine, tokenizer = ruined
    found = questions(tokenizer, "hello", "a z", "help")
    more = [2] if way is Generation else []
    taken: list = []
    with pytest.raises(TrainingError, match="for question 2 of arithmetic .'a z'."):
        answer_questions(way(engine, tokenizer, "arithmetic", found, *more), range(3), None, taken.extend)
    assert taken == []
    fine = way(engine, tokenizer, "arithmetic", questions(tokenizer, "hello", "help"), *more)
    answer_questions(fine, range(2), None, taken.extend)
    assert [record["index"] for record in taken] == [0, 1]


def test_exact_match_on_the_way_ends_the_run(ruined):
    with pytest.raises(TrainingError, match="^the logits for question 1 of arithmetic"):
        exact_match(*ruined, "arithmetic", questions(ruined[1], "z"), 2)


@pytest.mark.parametrize("name", ["loss", "accuracy", "perplexity"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_score_is_looked_at(name, value):
    check_scores({"loss": 1.0, "f1": 0.0}, "runs/x", "sst2")
    with pytest.raises(TrainingError, match=f"^runs/x: the {name} on sst2 is {value:g}, which is no score$"):
        check_scores({"f1": 0.5, name: value}, "runs/x", "sst2")


@pytest.mark.parametrize("evaluate", [Run._evaluate, Run._scores_on_the_way])
@pytest.mark.parametrize("loss", [1.0, float("nan"), float("inf")])
def test_nothing_is_generated_with_weights_whose_loss_is_not_finite(evaluate, loss):
    """Their run goes on as train.on_bad_step says, or ends as one with no finite loss."""
    made = SimpleNamespace(
        _scores=lambda: {"loss": loss},
        _generated=lambda: {"exact_match": 0.5},
        improvement=SimpleNamespace(metrics={"exact_match"}),
    )
    assert (evaluate(made).get("exact_match") == 0.5) == (loss == 1.0)
