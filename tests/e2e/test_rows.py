"""The program on other people's rows: runs that go on with changed data, and continued pretraining."""

import json

import pytest

from tests.e2e.program import (
    call,
    curve,
    recipe_of,
    succeed,
    write_recipe,
    write_rows,
)

QUICK = ("method={name: lora, rank: 4}", "train.exact_match_samples=0", "train.eval_every=null")


def test_a_run_goes_on_only_with_the_data_that_it_was_begun_with(model, tmp_path):
    data = write_rows(tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(model, data, tmp_path / "run"))
    succeed("train", recipe, *QUICK)
    remembered = (tmp_path / "run" / "data.json").read_bytes()
    succeed("train", recipe, *QUICK)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(reversed(lines)))
    refused = call("train", recipe, *QUICK)
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "the training samples (split train) are in another order than before" in refused.sentences[0]
    assert (tmp_path / "run" / "data.json").read_bytes() == remembered
    allowed = succeed("train", recipe, *QUICK, "--allow-changed-data")
    assert "--allow-changed-data: the training samples" in allowed.err
    succeed("train", recipe, *QUICK)
    (data / "train.jsonl").write_text("".join(lines[1:]))
    assert "have changed (20 before, 19 here)" in call("train", recipe, *QUICK).sentences[0]
    (tmp_path / "run" / "data.json").unlink()  # a run of an older version
    succeed("train", recipe, *QUICK)
    (data / "train.jsonl").write_text("".join(lines))
    succeed("train", recipe, *QUICK, "--no-resume")
    assert (tmp_path / "run" / "data.json").read_bytes() == remembered


@pytest.fixture(scope="module")
def pretrained(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    texts = [f"Tom has {n} apples. " * (n % 5 * 3) for n in range(12)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = recipe_of(model, folder, folder / "run")
    content["data"] = {
        "task": "completion", "path": str(folder), "split": "train", "eval_split": "test", "max_length": 24
    }  # fmt: skip
    recipe = write_recipe(folder / "recipe.yaml", content)
    return folder, recipe, succeed("train", recipe, "train.exact_match_samples=0")


def test_texts_are_learned_whole(pretrained):
    folder, _, outcome = pretrained
    line = next(line for line in outcome.err.splitlines() if "samples of split train" in line)
    assert "pieces of 9 texts (7 longer than 24 tokens), 3 dropped because they are empty" in line
    losses = curve(folder / "run", "eval/loss")
    assert losses[6] < losses[0]
    assert "perplexity" in outcome.out and curve(folder / "run", "eval/perplexity")[6] > 1


def test_any_language_model_is_evaluated_on_texts(pretrained, finished, tmp_path):
    folder, (_, answering) = pretrained[0], finished
    assert "perplexity" in succeed("eval", folder / "run").out
    succeed(
        "eval", answering, "--tasks", "gsm8k,completion", "--data", f"completion={folder}", "--out", tmp_path
    )  # fmt: skip
    scores = [json.loads(file.read_text())["scores"] for file in sorted((tmp_path / "eval").glob("*.json"))]
    assert [set(found) for found in scores] == [{"loss", "perplexity"}, {"exact_match"}]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.exact_match_samples=3",
            "train.exact_match_samples: the task completion generates no answers",
        ),
        ("data.template=chat", "data.template: the task completion learns texts as they are"),
        ("data.labels=[a, b]", "data.labels: the task completion has responses and no labels"),
        ("data.think_step_by_step=true", "data.think_step_by_step: the task completion asks nothing"),
    ],
)
def test_what_is_no_setting_of_texts(pretrained, override, expected):
    outcome = call("train", pretrained[1], "train.exact_match_samples=0", "output_dir=none", override)
    assert outcome.code == 2 and expected in outcome.sentences[0]
