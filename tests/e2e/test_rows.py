"""The program on other people's rows: runs that go on with changed data, and continued pretraining."""

import json

import pytest

from tests.e2e.program import call, curve, python, recipe_of, run, succeed, write_recipe, write_rows

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
    assert "have changed (22 before, 21 here)" in call("train", recipe, *QUICK).sentences[0]
    (tmp_path / "run" / "data.json").unlink()  # a run of an older version
    succeed("train", recipe, *QUICK)
    (data / "train.jsonl").write_text("".join(lines))
    succeed("train", recipe, *QUICK, "--no-resume")
    assert (tmp_path / "run" / "data.json").read_bytes() == remembered


def test_ranks_that_read_different_rows_are_refused(model, tmp_path):
    """Each rank reads a folder of its own, as hosts without a shared disk do."""
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(model, "rows", tmp_path / "run"))
    zero = json.dumps({"zero_optimization": {"stage": 0}})
    for rank, rows in enumerate((22, 21)):
        write_rows(tmp_path / f"host{rank}" / "rows", train=rows)
    start = f'cd {tmp_path}/host$RANK && exec "$@"'
    words = [
        "torchrun",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--no-python",
        "bash",
        "-c",
        start,
        "x",
    ]
    outcome = run(*words, *python("train", recipe, *QUICK, f"deepspeed={zero}"))
    assert outcome.code != 0
    assert "the training samples of rank 1 are others than those of rank 0" in outcome.err


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
    assert "pieces of 9 texts (9 longer than 24 tokens), 3 dropped because they are empty" in line
    losses = curve(folder / "run", "eval/loss")
    assert losses[6] < losses[0]
    assert "perplexity" in outcome.out and curve(folder / "run", "eval/perplexity")[6] > 1


def test_a_model_of_texts_is_evaluated_like_any_language_model(pretrained, data, tmp_path):
    folder = pretrained[0]
    assert "perplexity" in succeed("eval", folder / "run").out
    both = succeed(
        "eval", folder / "run", "--tasks", "completion", "gsm8k", "--data", f"gsm8k={data}",
        "--out", tmp_path, "data.max_new_tokens=4", "data.max_length=64",
    )  # fmt: skip
    assert "perplexity" in both.out and "exact_match" in both.out.replace(" ", "_")
    scores = [json.loads(file.read_text())["scores"] for file in sorted((tmp_path / "eval").glob("*.json"))]
    assert set(scores[0]) == {"loss", "perplexity"}


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
    outcome = call("train", pretrained[1], "train.exact_match_samples=0", override)
    assert outcome.code == 2 and expected in outcome.sentences[0]
