"""`distlora eval` on tasks: of runs and of other models, cut short and gone on with, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from distlora.cli.verbs import evaluate as verb
from distlora.evaluation.predictions import Predictions
from distlora.tasks import SUITES, get_task
from tests.e2e.program import call, files_of, recipe_of, succeed, write_recipe, write_rows
from tests.e2e.test_mistakes import refused


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A finished run's own copy."""
    return shutil.copytree(finished[1], tmp_path / "run")


def on_gsm8k(data, *more):
    return ["--tasks", "gsm8k", "--data", f"gsm8k={data}", *more]


def predictions(folder, name="gsm8k-6") -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "eval" / f"{name}.jsonl").read_text().splitlines()]
    found = {line["index"]: line for line in lines}
    assert len(found) == len(lines), "a question was answered twice"
    return found


def outputs(folder, name="gsm8k-6") -> list[str]:
    return [line["output"] for _, line in sorted(predictions(folder, name).items())]


def summary(folder, name="gsm8k-6") -> dict:
    return json.loads((folder / "eval" / f"{name}.json").read_text())


# ---------------------------------------------------------------------- a run


def test_a_run_is_scored_and_every_prediction_is_kept(run_dir, data):
    outcome = succeed("eval", run_dir, *on_gsm8k(data))
    found, told = predictions(run_dir), summary(run_dir)
    assert sorted(found) == list(range(7))
    assert all(line.keys() == {"index", "prompt", "output", "answer", "right"} for line in found.values())
    score = sum(line["right"] for line in found.values()) / 7
    assert outcome.out == f"eval/gsm8k/exact_match {score:.6f}\n"
    settings, seconds = told.pop("settings"), told.pop("seconds")
    assert told == {
        "task": "gsm8k", "step": 6, "by": "generation", "samples": 7, "scores": {"exact_match": score},
        "data": str(data), "split": "test", "dropped": 0,
    }  # fmt: skip
    assert settings["max_new_tokens"] == 4 and settings["template"] == "{prompt}\n" and seconds > 0


def test_batches_of_any_size_and_folded_adapters_answer_alike(run_dir, data, tmp_path):
    for name, more in (("one", ["--batch-size", "1"]), ("all", []), ("folded", ["--merge"])):
        succeed("eval", run_dir, *on_gsm8k(data), *more, "--out", tmp_path / name)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "all") == outputs(tmp_path / "folded")
    assert len(set(outputs(tmp_path / "all"))) > 1 and not (run_dir / "eval").exists()


def test_several_tasks_are_folded_once(run_dir, data, tmp_path):
    tasks = ["--tasks", "arithmetic,gsm8k", "--data", f"gsm8k={data}", "--limit", "7", "data.max_length=64"]
    succeed("eval", run_dir, *tasks, "--merge", "--out", tmp_path / "folded")
    succeed("eval", run_dir, *tasks, "--out", tmp_path / "plain")
    for name in ("arithmetic-6", "gsm8k-6"):
        assert outputs(tmp_path / "folded", name) == outputs(tmp_path / "plain", name)
    assert summary(tmp_path / "plain", "arithmetic-6")["settings"]["template"] == "{prompt}\n", "of the run"


def test_an_evaluation_that_was_killed_goes_on_where_it_was(run_dir, data, tmp_path, monkeypatch):
    words = ["eval", run_dir, *on_gsm8k(data, "--batch-size", "2")]
    add, calls = Predictions.add, []

    def killed(self, records):
        add(self, records)
        calls.append([record["index"] for record in records])
        if len(calls) == 2:
            with self.lines.open("a") as file:
                file.write('{"index": 5, "out')
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", killed)
        assert call(*words).code == 130
    assert not (run_dir / "eval" / "gsm8k-6.json").exists()
    assert "max_new_tokens is 4 there and 3 here" in refused(*words, "data.max_new_tokens=3")
    before = [index for indices in calls for index in indices]
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", lambda self, records: (calls.append(records), add(self, records)))
        outcome = succeed(*words)
    after = [record["index"] for records in calls for record in records]
    assert len(before) == 4 and sorted(before + after) == list(range(7))
    succeed("eval", run_dir, *on_gsm8k(data), "--out", tmp_path / "whole")
    assert predictions(run_dir) == predictions(tmp_path / "whole")
    assert summary(run_dir)["scores"] == summary(tmp_path / "whole")["scores"]
    again = succeed(*words)
    assert again.out == outcome.out and "evaluated before; --fresh begins anew" in again.err


def test_an_evaluation_that_is_asked_to_stop_ends_with_75(run_dir, data, monkeypatch):
    words = ["eval", run_dir, *on_gsm8k(data, "--batch-size", "2")]
    with monkeypatch.context() as patch:
        patch.setattr(verb.StopSignals, "asked", lambda self: True)
        outcome = call(*words)
    assert outcome.code == 75 and "the same command goes on from the predictions so far" in outcome.err
    assert len(predictions(run_dir)) == 2
    succeed(*words)
    assert len(predictions(run_dir)) == 7


def test_predictions_in_the_way_are_left_alone_unless_asked(run_dir, data):
    succeed("eval", run_dir, *on_gsm8k(data, "--limit", "3"))
    before = files_of(run_dir)
    assert "limit is 3 there and none here" in refused("eval", run_dir, *on_gsm8k(data))
    assert files_of(run_dir) == before
    succeed("eval", run_dir, *on_gsm8k(data, "--fresh"))
    assert summary(run_dir)["samples"] == 7


def test_beginning_anew_and_asked_to_stop_leaves_no_other_predictions_in_the_way(run_dir, data, monkeypatch):
    tasks = ["--tasks", "gsm8k,arithmetic", "--data", f"gsm8k={data}", "data.max_length=64"]
    succeed("eval", run_dir, *tasks, "--limit", "2")
    with monkeypatch.context() as patch:
        patch.setattr(verb.StopSignals, "asked", lambda self: True)
        assert call("eval", run_dir, *tasks, "--limit", "3", "--batch-size", "1", "--fresh").code == 75
    succeed("eval", run_dir, *tasks, "--limit", "3")
    assert [summary(run_dir, f"{task}-6")["samples"] for task in ("gsm8k", "arithmetic")] == [3, 3]


def test_an_evaluation_reads_no_training_data(model, tmp_path):
    data = write_rows(tmp_path / "rows")
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(model, data, tmp_path / "run"))
    succeed("train", recipe, "train.steps=1", "method.name=lora")
    (data / "train.jsonl").unlink()
    succeed("eval", tmp_path / "run")
    succeed("eval", tmp_path / "run", "--tasks", "gsm8k")
    assert summary(tmp_path / "run", "gsm8k-1")["data"] == str(data), "a run's own data is known"


def test_a_suite_is_its_tasks_and_their_average_and_options_are_chosen_among(run_dir, tmp_path):
    names = {task: get_task(task).folder for task in SUITES["commonsense"]}
    for count, folder in enumerate(names.values(), 1):
        (tmp_path / folder).mkdir()
        rows = [choice_row(number, right=number % count == 0) for number in range(4)]
        (tmp_path / folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--tasks", "commonsense", "--data", f"commonsense={tmp_path}", "data.max_length=128"]
    outcome = succeed("eval", run_dir, *words, "--by", "likelihood")
    told = dict(line.split() for line in outcome.out.splitlines())
    for metric in ("accuracy", "accuracy_norm"):
        scores = [summary(run_dir, f"{task}-6")["scores"][metric] for task in names]
        assert [told[f"eval/{task}/{metric}"] for task in names] == [f"{score:.6f}" for score in scores]
        assert float(told[f"eval/commonsense/{metric}"]) == pytest.approx(sum(scores) / 8, abs=1e-6)
        assert len(set(scores)) > 1, "an average of equal numbers would show nothing"
    line = predictions(run_dir, "boolq-6")[0]
    assert line["answer"] == "true" and len(line["log_likelihoods"]) == 2


def choice_row(number: int, right: bool) -> dict[str, str]:
    answer = "true" if right else "false"
    question = f"Has Tom {number} apples?\n\nAnswer format: true/false"
    return {
        "instruction": question,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


# ---------------------------------------------------------------------- other models


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_an_adapter_and_a_merged_model_answer_as_their_run(method, model, data, tmp_path):
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(model, data, run_dir))
    few = ["train.steps=3", "train.eval_every=0", "train.exact_match_samples=0", "train.lr=0.01"]
    succeed("train", recipe, f"method.name={method}", *few)
    succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged")
    same = [*on_gsm8k(data), "model.dtype=float32", 'data.template="{prompt}\\n"', "data.max_new_tokens=4"]
    same.append("data.max_length=48")
    succeed("eval", run_dir, *on_gsm8k(data))
    adapter = ["--adapter", run_dir / "adapter", "--out", tmp_path / "adapter"]
    succeed("eval", "--model", model, *adapter, *same)
    succeed("eval", "--model", tmp_path / "merged", "--out", tmp_path / "m", *same)
    assert (
        outputs(tmp_path / "adapter", "gsm8k-3")
        == outputs(tmp_path / "m", "gsm8k-0")
        == outputs(run_dir, "gsm8k-3")
    )
    base = succeed("eval", "--model", model, *same)
    assert base.out.startswith("eval/gsm8k/exact_match "), "without --out the scores are only told"


def test_adapters_that_do_not_fit_are_refused(finished, model, data, tmp_path):
    adapter = shutil.copytree(finished[1] / "adapter", tmp_path / "adapter")

    def said(path=model, *more):
        return refused("eval", "--model", path, "--adapter", adapter, *on_gsm8k(data), *more)

    other = recipe_of(model, data, tmp_path)["model"]["path"]
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    kept, whole = config.read_text(), weights.read_bytes()
    config.write_text(kept.replace('"LORA"', '"LOHA"'))
    assert "peft_type is LOHA; only LORA" in said()
    config.write_text(kept[:50])
    assert "adapter_config.json is no JSON" in said()
    config.unlink()
    assert said() == f"{adapter} is no adapter, or half written: it has no adapter_config.json"
    config.write_text(kept)
    weights.write_bytes(whole[: len(whole) // 2])
    assert "adapter_model.safetensors is broken" in said()
    weights.unlink()
    assert "has no adapter_model.safetensors: it is half written" in said()
    weights.write_bytes(whole)
    shallow = json.loads((Path(other) / "config.json").read_text())
    for change, expected in (
        ({"num_hidden_layers": 2}, "this one has no linear layer model.layers.2"),
        ({"intermediate_size": 128}, "has the shape (131, 60), and this one's (128, 60)"),
    ):
        folder = shutil.copytree(other, tmp_path / "other", dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(shallow | change))
        assert expected in said(folder)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "gsm9k"], "unknown task 'gsm9k', did you mean gsm8k?"),
        (["--tasks", ""], "--tasks is empty"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit '0': wanted a whole number above 0"),
        (["--tasks", "gsm8k", "--batch-size", "x"], "--batch-size 'x': wanted a whole number above 0"),
        (["--tasks", "gsm8k", "--data", "rte=/tmp"], "--data rte=/tmp: rte is not among --tasks"),
        (["--tasks", "gsm8k", "--data", "gsm8k"], "--data gsm8k: wanted TASK=PATH"),
        (["--tasks", "gsm8k", "data.path=x"], "a path is given as --data TASK=PATH"),
        (["--tasks", "gsm8k", "data.eval_split=tset"], "no file for split 'tset'"),
        (["--tasks", "gsm8k", "--by", "likelihood"], "the task gsm8k has none to choose from"),
        (["--tasks", "rte"], "the task rte wants a classifier"),
        (["--limit", "3"], "--limit is for --tasks"),
        (["--merge"], "--merge is for --tasks"),
        (["--adapter", "x"], "--adapter is for --model"),
        (["--model", "x", "--tasks", "gsm8k"], "and --model were both given"),
        (["train.lr=0.5"], "(train.lr is 0.02 there and 0.5 here); an evaluation may change data.…"),
        (["method.rank=3"], "(method.rank is 4 there and 3 here)"),
        (["model.dtype=bfloat16"], "(model.dtype is float32 there and bfloat16 here)"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(words, expected, finished):
    before = files_of(finished[1])
    assert expected in refused("eval", finished[1], *words)
    assert files_of(finished[1]) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "nothing to evaluate was given"),
        (["--model", "{model}"], "--model needs --tasks"),
        (["--model", "{model}", "--tasks", "gsm8k", "method.rank=3"], "override method.rank: an evaluation"),
        (["--model", "/none", "--tasks", "arithmetic"], "model.path=/none: there is no such directory"),
    ],
)
def test_what_is_evaluated_must_be_clear(words, expected, model):
    assert expected in refused("eval", *(word.replace("{model}", str(model)) for word in words))


def test_a_run_without_a_checkpoint_is_told(run_dir, data):
    for path in run_dir.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert "holds no complete checkpoint; train first" in refused("eval", run_dir, *on_gsm8k(data))
