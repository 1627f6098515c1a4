"""Reports: what is read of run directories, what is compared with what, and what stands on the page."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.exports.draft import new_directory
from distlora.report.build import write_report
from distlora.report.compare import common_facts, comparable_groups, different_facts
from distlora.report.costs import inference_table, initialisation_table, speed_table
from distlora.report.curves import TRAINING, curves, limits, panels, smooth_values
from distlora.report.hardware import command_of
from distlora.report.inference_cost import inference_cost, pass_cost
from distlora.report.page import Commands, Heading, Paragraph, Picture, Table, as_html, as_markdown
from distlora.report.runs import find_runs
from distlora.report.scores import scores_table
from tests.e2e.program import recipe_of, write_recipe
from tests.tiny_models import (
    tiny_config,
    tiny_encoder_dir,
    tiny_model_dir,
    tiny_vision_config,
    tiny_vision_dir,
)

CPU = {"ranks": 1, "device": "cpu", "hosts": {"a": [0]}}


def make_run(folder: Path, name: str, changes: dict | None = None, **files) -> Path:
    """A run directory of ten steps with a loss of 2 throughout.

    changes: dotted keys of the recipe. files: metrics (a list of objects), summary, environment, and scores:
    by task those of an evaluation after the last step.
    """
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    recipe = recipe_of(folder / "no-model", folder / "no-data", run_dir)
    recipe["train"] |= {"steps": 10, "exact_match_samples": 0}
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        node = recipe
        for section in sections:
            node = node[section]
        node[last] = value
    write_recipe(run_dir / "recipe.yaml", recipe)
    metrics = files.get("metrics", [{"step": step, "train/loss": 2.0} for step in range(1, 11)])
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    for task, scores in files.get("scores", {}).items():
        add_evaluation(run_dir, task, scores)
    for key in ("summary", "environment", "lr_search"):
        if key in files:
            (run_dir / f"{key}.json").write_text(json.dumps(files[key]))
    return run_dir


def add_evaluation(run_dir: Path, task: str, scores: dict, step: int = 10, **more) -> None:
    content = {"task": task, "step": step, "by": "distlora", "samples": 100, "scores": scores, "seconds": 1.0}
    content |= {"data": "there", "split": "test", "settings": {}} | more
    (run_dir / "eval").mkdir(exist_ok=True)
    (run_dir / "eval" / f"{task}-{step}.json").write_text(json.dumps(content))


LORA = {"method": {"name": "lora", "rank": 4}}
PISSA = {"method": {"name": "pissa", "rank": 4}}


def group_of(folder: Path):
    (group,) = comparable_groups(find_runs([folder]))
    return group


def column(table: Table, name: str) -> list[str]:
    return [row[list(table.header).index(name)] for row in table.rows]


def bold(table: Table) -> set[tuple[str, str]]:
    """(first cell of the row, cell) of what stands out."""
    return {(table.rows[row][0], table.rows[row][place]) for row, place in table.bold}


# ---------------------------------------------------------------------- which runs are compared


def test_runs_that_differ_in_their_seeds_are_one_setting(tmp_path):
    for seed in (1, 2):
        for name, method in (("lora", LORA), ("pissa", PISSA)):
            make_run(tmp_path, f"{name}-{seed}", method | {"train.seed": seed, "train.save_every": seed})
    group = group_of(tmp_path)
    assert group.columns == ("method", "rank")
    assert [(setting.label, setting.seeds) for setting in group.settings] == [
        ("lora", "1, 2"), ("pissa", "1, 2")
    ]  # fmt: skip


def test_columns_are_the_settings_that_differ(tmp_path):
    """Not those that only one method has, nor those that all have alike."""
    make_run(tmp_path, "a", {"train.lr": 0.01})
    make_run(tmp_path, "b", {"train.lr": 0.02, "train.weight_decay": 0.1})
    make_run(tmp_path, "c", {"method": {"name": "lora", "rank": 8}, "train.lr": 0.01})
    group = group_of(tmp_path)
    assert group.columns == ("method", "rank", "lr", "weight_decay")
    assert [setting.values for setting in group.settings] == [
        ("lora", "8", "0.01", "0"), ("lora_sb", "4", "0.01", "0"), ("lora_sb", "4", "0.02", "0.1"),
    ]  # fmt: skip
    assert [setting.label for setting in group.settings] == [
        "lora", "lora_sb lr 0.01 weight_decay 0", "lora_sb lr 0.02 weight_decay 0.1",
    ]  # fmt: skip


def test_columns_that_end_alike_have_their_whole_names(tmp_path):
    make_run(tmp_path, "a", {"method.init": {"samples": 4, "eta": 0.1}})
    make_run(tmp_path, "b", {"method.init": {"samples": 4, "eta": 0.2}, "train.optimizer": {"eps": 1e-6}})
    zero = {"optimizer": {"params": {"eps": 1}}, "zero_optimization": {"stage": 2}}
    make_run(tmp_path, "c", {"deepspeed": zero})
    zero = {"optimizer": {"params": {"eps": 2}}, "zero_optimization": {"stage": 2}}
    make_run(tmp_path, "d", {"deepspeed": zero})
    wanted = {"method", "rank", "eta", "train.optimizer.eps", "deepspeed.optimizer.params.eps"}
    assert wanted <= set(group_of(tmp_path).columns)


def test_full_fine_tuning_has_no_rank(tmp_path):
    make_run(tmp_path, "a", {"method": {"name": "full", "rank": 8}})
    make_run(tmp_path, "b", LORA)
    assert [setting.values for setting in group_of(tmp_path).settings] == [("full", "-"), ("lora", "4")]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data.path": "elsewhere"}, "data.path"),
        ({"data.split": "train[:5]"}, "data.split"),
        ({"model.path": "other-model"}, "base model"),
        ({"train.steps": 20}, "budget"),
        ({"train.global_batch_size": 8}, "budget"),
    ],
)
def test_other_data_model_or_budget_is_not_comparable(tmp_path, changes, told):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", changes)
    groups = comparable_groups(find_runs([tmp_path]))
    assert [[run.name for run in group.runs] for group in groups] == [["a"], ["b"]]
    assert different_facts(groups) == [told]


def test_what_is_not_comparable_is_told_and_kept_apart(tmp_path):
    scores = {"boolq": {"accuracy": 0.5}}
    make_run(tmp_path, "a", scores=scores)
    make_run(tmp_path, "b", {"data.split": "train[:5]"}, scores=scores)
    page = report_of(tmp_path)
    told, *groups = page.split("\n## ")[1:4]
    assert told.startswith("Not comparable") and "| group 2 | 1 | train\\[:5\\] |" in told
    assert [group.splitlines()[0] for group in groups] == ["Group 1", "Group 2"]
    assert [group.count("| 50.0 |") for group in groups] == [1, 1]
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"losses-1.png", "losses-2.png"}


@pytest.mark.parametrize("epochs, told", [(1.0, "1 epoch"), (0.5, "0.5 epochs"), (2.0, "2 epochs")])
def test_a_budget_of_epochs_is_told_in_words(tmp_path, epochs, told):
    make_run(tmp_path, "a", {"train.steps": None, "train.epochs": epochs}, metrics=[])
    assert common_facts(find_runs([tmp_path])[0])["budget"] == told


def test_a_budget_is_steps_times_batch(tmp_path):
    make_run(tmp_path, "a", {"train.steps": 10, "train.global_batch_size": 4})
    make_run(tmp_path, "b", {"train.steps": 5, "train.global_batch_size": 8})
    assert group_of(tmp_path).columns == ("method", "rank", "steps", "global_batch_size")


# ---------------------------------------------------------------------- scores


def test_scores_are_means_and_deviations_over_seeds(tmp_path):
    for seed, accuracy, perplexity in ((1, 0.50, 4.0), (2, 0.54, 3.0)):
        scores = {"boolq": {"accuracy": accuracy, "perplexity": perplexity}}
        make_run(
            tmp_path, f"lora-{seed}", LORA | {"train.seed": seed}, scores=scores, summary={"trained": 1234}
        )
    make_run(tmp_path, "pissa", PISSA, scores={"boolq": {"accuracy": 0.6, "perplexity": 5.0}})
    table = scores_table(group_of(tmp_path))
    # The deviation of 0.50 and 0.54 with n - 1 = 1 in the denominator is 0.04 / sqrt 2.
    assert column(table, "boolq: accuracy, %") == ["52.0 ± 2.8", "60.0"]
    assert column(table, "boolq: perplexity ↓") == ["3.500 ± 0.707", "5.000"]
    assert column(table, "n") == ["2", "1"] and column(table, "trained parameters") == ["1,234", "-"]
    assert bold(table) == {("pissa", "60.0"), ("lora", "3.500 ± 0.707")}


def test_equal_scores_are_not_in_bold(tmp_path):
    for name, method in (("a", LORA), ("b", PISSA)):
        make_run(tmp_path, name, method, scores={"boolq": {"accuracy": 0.5}})
    assert not scores_table(group_of(tmp_path)).bold


def test_a_missing_seed_is_told_in_its_cell(tmp_path):
    make_run(tmp_path, "a", {"train.seed": 1}, scores={"boolq": {"accuracy": 0.5}, "piqa": {"accuracy": 0.5}})
    make_run(tmp_path, "b", {"train.seed": 2}, scores={"boolq": {"accuracy": 0.5}})
    table = scores_table(group_of(tmp_path))
    assert column(table, "boolq: accuracy, %") == ["50.0 ± 0.0"]
    assert column(table, "piqa: accuracy, %") == ["50.0 (n = 1)"]


def test_scores_of_unfinished_runs_stand_apart(tmp_path):
    finished = make_run(tmp_path, "a", {"train.seed": 1}, scores={"boolq": {"accuracy": 0.5}})
    running = make_run(tmp_path, "b", {"train.seed": 2})
    other = make_run(tmp_path, "c", LORA, scores={"boolq": {"accuracy": 0.4}})
    add_evaluation(finished, "boolq", {"accuracy": 0.2}, step=5)  # of an older checkpoint
    add_evaluation(running, "boolq", {"accuracy": 0.9}, step=5)
    add_evaluation(other, "boolq", {"accuracy": 0.1}, step=0)
    table = scores_table(group_of(tmp_path))
    assert column(table, "method") == ["lora", "lora", "lora_sb", "lora_sb"]
    assert column(table, "after steps") == ["before training", "10", "10", "5 of 10"]
    assert column(table, "boolq: accuracy, %") == ["10.0", "40.0", "50.0", "90.0"]
    assert bold(table) == {("lora_sb", "50.0")}


def test_scores_of_other_samples_have_a_column_of_their_own(tmp_path):
    for name, method, samples in (("a", LORA, 100), ("b", PISSA, 200)):
        add_evaluation(make_run(tmp_path, name, method), "boolq", {"accuracy": 0.5}, samples=samples)
    header = scores_table(group_of(tmp_path)).header
    assert list(header[-2:]) == [
        "boolq: accuracy, % (100 samples)", "boolq: accuracy, % (200 samples)"
    ]  # fmt: skip


def test_what_the_run_itself_has_measured_stands_beside_what_others_have(tmp_path):
    """Also where these have asked fewer questions."""
    metrics = [{"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.0},
               {"step": 10, "eval/loss": 1.0, "eval/exact_match": 0.25}]  # fmt: skip
    run_dir = make_run(tmp_path, "a", {"train.exact_match_samples": 100}, metrics=metrics)
    add_evaluation(run_dir, "gsm8k", {"exact_match": 0.8}, samples=5)
    table = scores_table(group_of(tmp_path))
    assert column(table, "after steps") == ["before training", "10"]
    found = {name: column(table, name) for name in table.header if "exact match" in name}
    (few,) = [cells for name, cells in found.items() if "5 samples" in name]
    (own,) = [cells for name, cells in found.items() if "100 samples" in name]
    assert (few, own) == (["-", "80.0"], ["0.0", "25.0"])
    assert column(table, "gsm8k: loss ↓") == ["3.000", "1.000"]


def test_what_others_have_measured_alike_replaces_what_the_run_itself_has(tmp_path):
    run_dir = make_run(tmp_path, "a", metrics=[{"step": 5, "eval/loss": 2.0}, {"step": 10, "eval/loss": 1.0}])
    (run,) = find_runs([run_dir])
    (own,) = [score.measured for score in run.scores]
    same = {"by": own.by, "data": own.data, "split": own.split, "samples": own.samples}
    add_evaluation(run_dir, own.task, {"loss": 1.5}, **same)
    (run,) = find_runs([run_dir])
    assert [(score.step, score.value) for score in run.scores] == [(10, 1.5)]


@pytest.mark.parametrize(
    "key, names", [("data.max_new_tokens", ["max_new_tokens 8", "max_new_tokens 64"]),
                   ("train.exact_match_samples", ["8 samples", "64 samples"])]
)  # fmt: skip
def test_a_run_that_asked_otherwise_has_a_column_of_its_own(tmp_path, key, names):
    metrics = [{"step": 10, "eval/exact_match": 0.25, "eval/loss": 1.0}]
    for seed, value in ((1, 8), (2, 64)):
        changes = {"train.exact_match_samples": 100, "train.seed": seed} | {key: value}
        make_run(tmp_path, f"a{seed}", changes, metrics=metrics)
    table = scores_table(group_of(tmp_path))
    assert [name for name in table.header if "exact" in name] == [
        f"gsm8k: exact match, % ({name})" for name in names
    ]
    assert column(table, "gsm8k: loss ↓") == ["1.000 ± 0.000"], "which generates nothing"


def test_evaluations_of_equal_runs_have_one_column(tmp_path):
    """Though each file says of which checkpoint it is."""
    for seed in (1, 2):
        settings = {"checkpoint": f"sha{seed}", "model": "m", "dtype": "float32", "max_new_tokens": 64}
        run_dir = make_run(tmp_path, f"a{seed}", {"train.seed": seed})
        add_evaluation(run_dir, "gsm8k", {"exact_match": 0.5}, settings=settings)
    table = scores_table(group_of(tmp_path))
    assert column(table, "gsm8k: exact match, %") == ["50.0 ± 0.0"] and column(table, "n") == ["2"]


def test_scores_before_training_are_those_of_their_setting(tmp_path):
    for seed, method, loss in ((1, LORA, 2.0), (2, LORA, 4.0), (1, PISSA, 9.0)):
        metrics = [{"step": 0, "eval/loss": loss}, {"step": 10, "eval/loss": 1.0}]
        name = f"{method['method']['name']}-{seed}"
        make_run(tmp_path, name, method | {"train.seed": seed}, metrics=metrics)
    table = scores_table(group_of(tmp_path))
    assert column(table, "method") == ["lora", "lora", "pissa", "pissa"]
    assert column(table, "after steps") == ["before training", "10"] * 2
    assert column(table, "n") == ["2", "2", "1", "1"]
    assert column(table, "gsm8k: loss ↓") == ["3.000 ± 1.414", "1.000 ± 0.000", "9.000", "1.000"]


def test_the_same_scores_before_training_are_told_once(tmp_path):
    for name, method in (("a", LORA), ("b", PISSA)):
        metrics = [{"step": 0, "eval/loss": 2.0}, {"step": 10, "eval/loss": 1.0}]
        make_run(tmp_path, name, method, metrics=metrics)
    table = scores_table(group_of(tmp_path))
    assert column(table, "method") == ["-", "lora", "pissa"]
    assert column(table, "after steps") == ["before training", "10", "10"]
    assert column(table, "n") == ["2", "1", "1"] and column(table, "gsm8k: loss ↓")[0] == "2.000"


def test_learning_rates_that_were_found_are_told(tmp_path):
    scores = {"boolq": {"accuracy": 0.5}}
    search = {"train.lr": "search"}
    make_run(tmp_path, "a", search, scores=scores, lr_search={"rate": 0.002})
    metrics = [{"step": 0, "lr_search/rate": 0.003}, {"step": 10, "train/loss": 1.0}]
    make_run(tmp_path, "b", search | {"train.seed": 7}, scores=scores, metrics=metrics)
    make_run(tmp_path, "c", LORA, scores=scores)
    name = "learning rate found"
    table = scores_table(group_of(tmp_path))
    assert column(table, "lr") == ["0.02", "search"] and column(table, name) == ["-", "0.002 / 0.003"]
    page = report_of(tmp_path)
    assert f"| run | method | seed | {name} | state |" in page and "| 7 | 0.003 | at step 10 |" in page


def test_without_a_search_no_learning_rate_is_told(tmp_path):
    make_run(tmp_path, "a", scores={"boolq": {"accuracy": 0.5}})
    assert "learning rate found" not in report_of(tmp_path)


# ---------------------------------------------------------------------- time, memory


def test_costs_are_those_of_the_summary(tmp_path):
    summary = {"init_seconds": 3.0, "step_seconds": 0.5, "epoch_seconds": 60.0, "steps_per_epoch": 120,
               "tokens_per_second": 2000.0, "peak_memory_bytes": 3 * 2**30}  # fmt: skip
    environment = [{"topology": {**CPU, "device": "cuda", "ranks": 8}, "accelerator": "H100"}]
    make_run(tmp_path, "a", {"train.seed": 1}, summary=summary, environment=environment)
    summary |= {"init_seconds": 5.0, "epoch_seconds": 100.0, "peak_memory_bytes": 2**30}
    make_run(tmp_path, "b", {"train.seed": 2}, summary=summary, environment=environment)
    make_run(tmp_path, "c", {"train.seed": 3}, metrics=[{"step": 0, "init/seconds": 9.0}])
    group = group_of(tmp_path)
    assert [row[2:] for row in initialisation_table(group).rows] == [
        ["8 × H100", "4.00", "120", "80.0", "5.00 %"], ["-", "9.00", "-", "-", "-"]
    ]  # fmt: skip
    assert [row[2:] for row in speed_table(group).rows] == [
        ["8 × H100", "0.500", "2,000", "3.00 GiB"], ["-", "-", "-", "-"]
    ]  # fmt: skip


def layers_of(config) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of a decoder block: q, k, v, o, gate, up, down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    return [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries),
            (inner, hidden), (inner, hidden), (hidden, inner)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("method", ["lora", "lora_sb", "dora", "full"])
def test_macs_of_a_forward_pass(tmp_path, model, method):
    """A product of (tokens, in) with (in, out) takes tokens × in × out of them."""
    make_run(tmp_path, "a", {"model.path": str(model), "method": {"name": method, "rank": 4}})
    (run,) = find_runs([tmp_path])
    cost, config, tokens, rank = inference_cost(run.recipe), tiny_config("llama"), 256, 4
    layers = layers_of(config) * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_attention_heads * config.head_dim * tokens * config.num_hidden_layers
    plain = sum(out * inner for out, inner in layers)
    factors = sum(rank * (out + inner) for out, inner in layers)
    cores = len(layers) * rank * rank if method == "lora_sb" else 0
    assert cost.merged.macs == tokens * (plain + head + attention)
    if method == "full":
        assert cost.adapted is None and cost.trained == plain
        return
    assert cost.adapted.macs - cost.merged.macs == tokens * (factors + cores)
    assert cost.adapted.flops == 2 * cost.adapted.macs
    magnitudes = sum(out for out, _ in layers) if method == "dora" else 0
    assert cost.adapted.parameters - cost.merged.parameters == factors + cores + magnitudes
    assert cost.trained == (cores if method == "lora_sb" else factors + magnitudes)


def test_macs_of_a_linear_layer():
    class Only(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(11, 3), torch.nn.Linear(3, 7)

        def forward(self, input_ids):
            return self.out(self.embed(input_ids))

    cost = pass_cost(Only().to("meta"), {"input_ids": torch.zeros(1, 5, dtype=torch.long, device="meta")})
    assert (cost.macs, cost.parameters) == (5 * 3 * 7, 33 + 28)


def test_inference_costs_are_one_row_for_equal_ones(tmp_path, model):
    for lr in (0.1, 0.2):
        make_run(tmp_path, f"a{lr}", LORA | {"model.path": str(model), "train.lr": lr})
    table, about = inference_table(group_of(tmp_path))
    assert len(table.rows) == 2 and about.startswith("One sequence of 256 tokens")


def image_run(folder: Path, **files) -> Path:
    """Of a vision model whose images are 16 × 16."""
    base = tiny_vision_dir("vit", folder / "models")
    section = {"task": "mnist", "path": str(folder / "no-data"), "eval_split": "test"}
    return make_run(folder / "runs", "a", LORA | {"model.path": str(base), "data": section}, **files)


def test_runs_on_images_have_pages_like_others(tmp_path):
    metrics = [{"step": step, "train/loss": 2.0, "train/images_per_second": 7.0} for step in range(1, 11)]
    image_run(tmp_path, metrics=metrics)
    page = report_of(tmp_path / "runs")
    assert "One image of 16 × 16 pixels through the whole model" in page and "Not counted" not in page
    table = speed_table(group_of(tmp_path / "runs"))
    assert column(table, "images a second") == ["7.00"] and "tokens a second" not in table.header


def test_macs_of_an_image(tmp_path):
    """Of 16 patches, which a convolution makes, and of a token before them."""
    (run,) = find_runs([image_run(tmp_path)])
    cost, config = inference_cost(run.recipe), tiny_vision_config("vit")
    patches = (16 // config.patch_size) ** 2
    tokens, hidden, inner = patches + 1, config.hidden_size, config.intermediate_size
    block = tokens * (4 * hidden * hidden + 2 * hidden * inner) + 2 * tokens * tokens * hidden
    first = patches * config.patch_size**2 * config.num_channels * hidden
    assert cost.merged.macs == first + config.num_hidden_layers * block + 10 * hidden
    assert cost.adapted.macs > cost.merged.macs


def test_macs_of_a_classifier_of_texts(tmp_path):
    base = tiny_encoder_dir("bert", tmp_path / "models")
    section = {"task": "sst2", "path": str(tmp_path / "no-data"), "eval_split": "validation"}
    make_run(tmp_path / "runs", "a", LORA | {"model.path": str(base), "data": section | {"max_length": 8}})
    (run,) = find_runs([tmp_path / "runs"])
    cost, problem = run.cost
    assert problem == "" and cost.adapted.macs > cost.merged.macs > 0


def test_a_model_that_asks_for_values_is_not_counted():
    class Asks(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) if input.sum() > 0 else input

    with pytest.raises(UserError, match="Asks cannot be run without its weights"):
        pass_cost(Asks(2, 3, device="meta"), {"input": torch.zeros(1, 2, device="meta")})


def test_without_the_model_nothing_is_counted_and_the_reason_is_told(tmp_path):
    make_run(tmp_path, "a")
    table, about = inference_table(group_of(tmp_path))
    assert table is None and "no-model" in about


# ---------------------------------------------------------------------- curves


def test_smoothing_is_a_mean_that_stays_in_the_middle():
    values = np.array([1.0, 2.0, 6.0, 4.0, 7.0])
    assert smooth_values(values, 1).tolist() == values.tolist()
    assert smooth_values(values, 3) == pytest.approx([1.0, 3.0, 4.0, 17 / 3, 7.0])
    assert smooth_values(values, 99) == pytest.approx([1.0, 3.0, 4.0, 17 / 3, 7.0])
    assert smooth_values(np.array([1.0, np.nan, 3.0]), 3) == pytest.approx([1.0, np.nan, 3.0], nan_ok=True)


def test_a_curve_is_the_mean_over_the_steps_that_all_seeds_have(tmp_path):
    for seed, losses in ((1, [4.0, 2.0, "nan", 1.0]), (2, [2.0, 4.0, 5.0])):
        metrics = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
        run_dir = make_run(tmp_path, str(seed), {"train.seed": seed}, metrics=metrics)
        marks = [{"step": 1, "swapped": False, "reason": "", "layers": {}},
                 {"step": 1 + seed, "swapped": True, "reason": "", "layers": {}}]  # fmt: skip
        (run_dir / "recompositions.jsonl").write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    (curve,) = curves(group_of(tmp_path).settings, TRAINING, smooth=1, by_samples=False)
    assert curve.x.tolist() == [1, 2, 3]
    assert curve.mean == pytest.approx([3.0, 3.0, np.nan], nan_ok=True)
    assert [x.tolist() for x, _ in curve.raw] == [[1, 2, 3, 4], [1, 2, 3]] and curve.marks == (2, 3)
    low, high = limits([curve])
    assert low <= 1.1 and 4.9 <= high < 6
    (curve,) = curves(group_of(tmp_path).settings, TRAINING, smooth=1, by_samples=True)
    assert curve.x.tolist() == [4, 8, 12] and curve.marks == (8, 12)


def test_the_mean_is_over_finished_runs_if_there_are_any(tmp_path):
    for seed, count, loss in ((1, 10, 2.0), (2, 10, 4.0), (3, 4, 9.0)):
        metrics = [{"step": step, "train/loss": loss} for step in range(1, count + 1)]
        make_run(tmp_path, str(seed), {"train.seed": seed}, metrics=metrics)
    (curve,) = curves(group_of(tmp_path).settings, TRAINING, smooth=None, by_samples=False)
    assert len(curve.raw) == 3 and curve.mean.tolist() == [3.0] * 10


def test_many_settings_are_small_multiples(tmp_path):
    for index in range(9):
        make_run(tmp_path, f"lora-{index}", LORA | {"train.lr": 0.01 * (index + 1)})
    make_run(tmp_path, "pissa", PISSA)
    parts = panels(group_of(tmp_path).settings, most=8)
    assert [(title, len(settings)) for title, settings in parts] == [
        ("lora (1 of 2)", 5), ("lora (2 of 2)", 4), ("pissa", 1)
    ]  # fmt: skip
    assert len(panels(group_of(tmp_path).settings, most=10)) == 1
    report_of(tmp_path)
    width, height = size_of(tmp_path / "report" / "losses.png")
    assert height > 0.6 * width, "three panels stand below each other"


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height in the header of a PNG."""
    header = picture.read_bytes()[16:24]
    return int.from_bytes(header[:4]), int.from_bytes(header[4:])


def test_scores_are_drawn_where_methods_train_differently_many_parameters(tmp_path):
    scores = {"boolq": {"accuracy": 0.5, "loss": 1.0}}
    make_run(tmp_path, "a", LORA, scores=scores, summary={"trained": 100})
    report_of(tmp_path)
    assert not (tmp_path / "report" / "scores.png").exists()
    make_run(tmp_path, "b", PISSA, scores=scores, summary={"trained": 200})
    assert "scores.png" in report_of(tmp_path)
    assert (tmp_path / "report" / "scores.png").exists()


# ---------------------------------------------------------------------- the page


def report_of(folder: Path, **options) -> str:
    return write_report([folder], folder / "report", "distlora report", **options).read_text(encoding="utf-8")


def test_markdown_shows_texts_as_they_are():
    table = Table(["a|b", "n"], [["x_*y*", "1"], ["<b>", "2"]], frozenset({(1, 1)}))
    assert as_markdown([Heading("one_two"), Paragraph("a\nb"), Commands(["x_y"]), table]).splitlines() == [
        "## one\\_two", "", "a b", "", "```bash", "x_y", "```", "",
        "| a\\|b | n |", "| :-- | --: |", "| x\\_\\*y\\* | 1 |", "| \\<b\\> | **2** |",
    ]  # fmt: skip


def test_html_is_one_file_and_shows_texts_as_they_are(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    table = Table(["<th>", "n"], [["<b>", "2"]], frozenset({(0, 1)}))
    page = as_html(
        [Heading("<h>"), Paragraph("&"), Commands(["<c>"]), Picture("a.png", '"'), table], tmp_path
    )
    for text in ("&lt;h&gt;", "<p>&amp;</p>", "&lt;c&gt;", 'alt="&quot;"', "&lt;th&gt;", "&lt;b&gt;"):
        assert text in page
    assert "<strong>2</strong>" in page and "data:image/png;base64,iVBORw==" in page
    assert "http" not in page and "a.png" not in page


def test_a_report_is_replaced_and_nothing_else_is(tmp_path):
    make_run(tmp_path, "a")
    report_of(tmp_path)
    found = {path.name for path in (tmp_path / "report").iterdir()}
    assert found == {"report.md", "report.html", "report.json", "losses.png"}
    assert "2 runs" not in report_of(tmp_path)
    make_run(tmp_path, "b", LORA)
    assert "# 2 runs" in report_of(tmp_path)
    (tmp_path / "report" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds what is no report, such as notes.txt"):
        report_of(tmp_path)
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"


def test_a_report_that_cannot_take_its_place_leaves_the_earlier_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("earlier")
    with pytest.raises(OSError), new_directory(tmp_path / "out", {"a"}) as draft:
        draft.rmdir()
    assert (tmp_path / "out" / "a").read_text() == "earlier"
    with new_directory(tmp_path / "out", {"a"}) as draft:
        (draft / "a").write_text("newer")
    assert (tmp_path / "out" / "a").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["{}", "broken", '{"files": 3}', '{"files": ["a", "report.json"]}'])
def test_a_directory_of_others_is_left_alone(tmp_path, content):
    make_run(tmp_path, "run")
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "report.json").write_text(content)
    with pytest.raises(UserError, match="holds what is no report"):
        write_report([tmp_path / "run"], tmp_path / "out", "")
    assert (tmp_path / "out" / "a").is_dir()


def test_commands_are_told_without_the_paths_of_programs(tmp_path):
    program = ["/venv/bin/python3", "/code/distlora/__main__.py", "--local_rank=0"]
    start = {
        "command": [*program, "train", "a b.yaml"],
        "working_directory": "/home/somebody",
        "started": "2026-01-02T03:04:05+00:00",
        "topology": CPU,
        "versions": {"torch": "2.13.0", "mpi4py": None},
        "source": {"revision": "0123456789abcdef"},
    }
    make_run(tmp_path, "a", environment=[start])
    page = report_of(tmp_path)
    assert "\ndistlora train 'a b.yaml'\n" in page and "torch 2.13.0" in page and "mpi4py" not in page
    assert "| 2026-01-02 | CPU, 1 rank | 0123456789ab |" in page
    assert "/venv" not in page and "somebody" not in page
    (run,) = find_runs([tmp_path])
    run.starts[0]["topology"] = CPU | {"ranks": 4, "launcher": "torchrun"}
    assert command_of(run) == "distlora train 'a b.yaml'    # on 4 ranks, torchrun"


def test_only_scores_of_the_named_tasks(tmp_path):
    make_run(tmp_path, "a", scores={"boolq": {"accuracy": 0.5}, "piqa": {"accuracy": 0.5}})
    page = report_of(tmp_path, tasks=["piqa"])
    assert "piqa: accuracy" in page and "boolq" not in page


# ---------------------------------------------------------------------- refusals


def refusal(capsys, *words: object) -> str:
    assert main(["report", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path, "a", scores={"boolq": {"accuracy": 0.5}})
    out = ("--out", tmp_path / "out")
    assert "there is no such directory" in refusal(capsys, tmp_path / "nothing", *out)
    assert "has a recipe.yaml" in refusal(capsys, tmp_path / "empty", *out)
    assert "did you mean boolq?" in refusal(capsys, tmp_path / "a", *out, "--task", "bolq")
    assert "--smooth '0'" in refusal(capsys, tmp_path / "a", *out, "--smooth", "0")
    assert "holds what is no report" in refusal(capsys, tmp_path / "a", "--out", tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert "holds what is no report" in refusal(capsys, tmp_path / "a", "--out", tmp_path / "file")
    assert "cannot be written" in refusal(capsys, tmp_path / "a", "--out", tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_every_run_below_a_folder_is_found(tmp_path):
    """And none within a run, such as a copy of another one's files."""
    inner = make_run(tmp_path / "runs" / "sweep" / "points", "b")
    make_run(inner / "copies", "no")
    make_run(tmp_path / "runs", "a")
    (tmp_path / "runs" / "sweep" / "circle").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert [run.name for run in find_runs([tmp_path / "runs"])] == ["a", "b"]


def test_without_matplotlib_one_sentence(tmp_path, capsys, monkeypatch):
    make_run(tmp_path, "a")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "distlora[plot]" in refusal(capsys, tmp_path / "a", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("metrics.jsonl", '{"step": 1}\nbroken\n{"step": 2}\n', "metrics.jsonl, line 2 is no JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', "metrics.jsonl, line 2: the key step is missing"),
        (
            "metrics.jsonl",
            '{"step": 1, "train/loss": []}\n',
            "metrics.jsonl, line 1: train/loss is no number",
        ),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1: wanted a JSON object"),
        ("recompositions.jsonl", '{"step": "x"}\n', "recompositions.jsonl, line 1: the key step"),
        ("summary.json", "[]", "summary.json: wanted a JSON object"),
        ("lr_search.json", "[]", "lr_search.json: wanted a JSON object"),
        ("summary.json", "{", "summary.json cannot be read as JSON"),
        ("environment.json", "{}", "environment.json: wanted a JSON list"),
        ("status.json", "{}", "status.json is not a run's status"),
        ("eval/x-1.json", '{"task": "x"}', "x-1.json: no evaluation"),
        ("eval/x-1.json", '{"task": "x", "step": 1, "scores": {"a": "b"}}', "the score a is no number"),
        ("recipe.yaml", "method: 3", "recipe.yaml"),
    ],
)
def test_broken_files_are_named(tmp_path, capsys, name, text, told):
    run_dir = make_run(tmp_path, "a")
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text(text)
    assert told in refusal(capsys, run_dir, "--out", tmp_path / "out")


def test_the_last_line_of_a_running_run_may_be_half_written(tmp_path):
    run_dir = make_run(tmp_path, "a")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/lo')
    (run,) = find_runs([run_dir])
    assert run.curve("train/loss") == ([1], [2.5])


def test_a_run_that_has_told_nothing_yet_is_on_the_page(tmp_path):
    run_dir = make_run(tmp_path, "a")
    (run_dir / "metrics.jsonl").unlink()
    page = report_of(tmp_path)
    assert "at step 0" in page and "losses.png" not in page and "### Scores" not in page
