"""The planner's arithmetic: against figures measured by the memory benchmarks, and in what must follow from what."""

import json
from pathlib import Path

import pytest

from distlora.cli import main
from distlora.config import Recipe
from distlora.errors import UserError
from distlora.methods import registry
from distlora.plan import plan_of, side_by_side
from distlora.plan.advice import advice, fits
from distlora.plan.gathering import Event, Limits, Piece, gather, training_order
from distlora.plan.memory import memory_of
from distlora.plan.setup import setup_of
from distlora.plan.shapes import shapes_of
from distlora.plan.table import amount, table
from distlora.plan.traffic import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    GATHER,
    GROUP_GATHER,
    REDUCE,
    REDUCE_SCATTER,
    columns_of,
    over_links,
)
from tests.benchmarks.subjects import SHAPES, SHAPES_RANK, SHAPES_TOKENS
from tests.tiny_models import tiny_config, tiny_encoder_config

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
LORA = {"name": "lora", "rank": 4}


def recipe_of(directory: Path, method: dict, stage: int | None = 3, **changes) -> Recipe:
    """changes: of sections, by their name."""
    sections = {
        "model": {"path": str(directory), "dtype": "float32"},
        "data": {"task": "arithmetic", "max_length": 16},
        "train": {"steps": 40, "global_batch_size": 8},
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    zero = {"stage": stage} | sections.pop("zero", {})
    return Recipe(method=method, deepspeed=None if stage is None else {"zero_optimization": zero}, output_dir="unused", **sections)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model's directory with a config and no weights."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_config("mistral").save_pretrained(directory)
    return directory


# ---------------------------------------------------------------------- memory, against measurements


@pytest.mark.parametrize(
    ("model", "measured"),
    [  # GiB of training, probe, SVDs, search on one rank of ZeRO-3, as tests.benchmarks.init_memory prints them
        ("mistral-7b", {1: (14.278, 14.262, 14.232, 14.084), 2: (7.546, 7.530, 7.255, 7.351), 8: (2.313, 2.298, 2.021, 2.119)}),
        ("gemma2-9b", {1: (18.322, 18.302, 18.073, 18.139), 2: (11.117, 11.097, 9.159, 10.934), 8: (4.432, 4.412, 2.474, 4.249)}),
    ],
)
def test_peaks_are_those_of_the_simulated_rank(model, measured, tmp_path):
    SHAPES[model].save_pretrained(tmp_path)
    recipe = recipe_of(
        tmp_path, {"name": "lora_sb", "rank": SHAPES_RANK}, model={"dtype": "bfloat16"}, data={"max_length": SHAPES_TOKENS}
    )
    shapes = shapes_of(recipe)
    for world_size, figures in measured.items():
        peaks = memory_of(setup_of(recipe, shapes, world_size), deepspeed=False).peaks
        for phase, figure in zip(("training", "probe", "SVDs", "search"), figures):
            assert peaks[phase] / GIB == pytest.approx(figure, rel=0.03), (world_size, phase)


def test_the_parts_add_up_to_the_peak_of_training(tiny):
    for stage in (0, 1, 2, 3):
        memory = plan_of(recipe_of(tiny, LORA, stage), 1, 4).memory
        parts = (memory.weights, memory.adapters, memory.gradients, memory.optimizer, memory.activations, memory.gathered)
        assert sum(parts) == memory.peaks["training"], stage


def test_each_stage_shares_what_it_says(tiny):
    plans = {stage: plan_of(recipe_of(tiny, LORA, stage), 1, 8).memory for stage in (0, 1, 2, 3)}
    trained = sum(shapes_of(recipe_of(tiny, LORA)).trained.values())
    assert plans[0].optimizer == 8 * trained  # in float32 the parameter is its own master
    assert plans[1].optimizer == plans[2].optimizer == plans[3].optimizer == 12 * -(-trained // 8)
    assert plans[1].gradients == 4 * trained and plans[2].gradients == 4 * -(-trained // 8)
    assert plans[0].weights == plans[2].weights
    core = plan_of(recipe_of(tiny, {"name": "lora_sb", "rank": 4}, 0), 1, 8)
    assert core.memory.adapters == 4 * core.setup.shapes.factors + len(core.setup.layers) * 2 * 4 * 4 * 4  # and its corrections
    never = {"zero": {"stage3_param_persistence_threshold": 0}}
    assert plan_of(recipe_of(tiny, LORA, 3, **never), 1, 8).memory.weights < 0.13 * plans[0].weights


def test_offloading_moves_state_to_the_host(tiny):
    here = plan_of(recipe_of(tiny, LORA), 1, 2).memory
    there = plan_of(recipe_of(tiny, LORA, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}), 1, 2)
    assert there.memory.optimizer == 0 and there.memory.host > here.host + here.optimizer
    assert there.memory.peak < here.peak


@pytest.mark.parametrize("section", ["checkpointing", "micro_batch", "length"])
def test_activations_grow_with_what_a_pass_holds(section, tiny):
    small = plan_of(recipe_of(tiny, LORA), 1, 1).memory.activations
    larger = {
        "checkpointing": {"model": {"gradient_checkpointing": False}},
        "micro_batch": {"train": {"micro_batch_size": 2}},
        "length": {"data": {"max_length": 32}},
    }
    assert plan_of(recipe_of(tiny, LORA, **larger[section]), 1, 1).memory.activations > 1.5 * small


# ---------------------------------------------------------------------- every method, every kind of model


@pytest.mark.parametrize("name", registry())
def test_every_method_has_a_plan(name, tiny):
    method = {"name": name} | ({} if registry()[name].trains_weight else {"rank": 4})
    if "target_rank" in registry()[name].model_fields:
        method["target_rank"] = 8
    plan = plan_of(recipe_of(tiny, method), 2, 2)
    columns = list(side_by_side(recipe_of(tiny, method), [1, 2], 2))
    assert plan.memory.peak > plan.memory.weights > 0
    assert plan.step and "fits into" in table(columns, 2, 80)
    weight = registry()[name](**method).source_matrix()
    assert (GATHER in plan.init, REDUCE in plan.init) == (weight == "weight", weight == "gradient")


def test_moments_of_eight_bits_take_a_quarter_and_their_scales(tiny):
    def moments(name: str, momentum: float = 0.0) -> int:
        optimizer = {"name": name, "momentum": momentum}
        return plan_of(recipe_of(tiny, LORA, train={"optimizer": optimizer}), 1, 2).memory.optimizer

    masters = moments("sgd")
    assert moments("adamw8bit") - masters == pytest.approx((moments("adamw") - masters) * (1 + 4 / 256) / 4, rel=1e-3)


def test_an_encoder_has_a_plan(tmp_path):
    tiny_encoder_config("bert").save_pretrained(tmp_path)
    plan = plan_of(recipe_of(tmp_path, LORA, data={"task": "rte", "path": "nyu-mll/glue:rte"}), 1, 2)
    assert plan.setup.shapes.labels == 2 and plan.memory.peaks["training"] > plan.memory.weights


def test_what_a_method_takes_from_weights_is_found_by_asking_it():
    methods = registry()
    assert columns_of(methods["pissa"](rank=4)) == (4, 0)
    assert columns_of(methods["srlora"](rank=4, target_rank=40)) == (4, 36)
    assert columns_of(methods["lora"](rank=4)) == (0, 0)


def test_recompositions_fill_ledger_and_checkpoint(tiny):
    srlora = {"name": "srlora", "rank": 4, "target_rank": 12, "gamma": 0.5}
    plan, pissa = (plan_of(recipe_of(tiny, method), 1, 2) for method in (srlora, {"name": "pissa", "rank": 4}))
    assert (plan.setup.swaps, plan.setup.columns_of_a_swap) == (4, 4)
    assert plan.memory.checkpoint > pissa.memory.checkpoint
    assert set(plan.swap) == {ALL_REDUCE, BROADCAST} and not pissa.swap


# ---------------------------------------------------------------------- gathering


def test_a_parameter_stays_while_it_is_soon_used_again():
    modules = [(Piece("a", 10),), (Piece("b", 20), Piece("c", 5))]
    forward = [Event(kind, module) for module in (0, 1) for kind in ("enter", "leave")]
    order = training_order(forward, set(), set(), {0, 1})
    assert gather(modules, order, Limits(reuse=0, prefetch=0)).times == {"a": 2, "b": 2, "c": 2}
    assert gather(modules, order, Limits(reuse=15, prefetch=0)).times == {"a": 2, "b": 1, "c": 1}
    everything = gather(modules, order, Limits(reuse=1000, prefetch=0))
    assert (everything.times, everything.peak, everything.together) == ({"a": 1, "b": 1, "c": 1}, 35, 25)
    assert gather(modules, order, Limits(prefetch=1000), recorded=False).times == {"a": 2, "b": 2, "c": 2}


def test_a_checkpointed_block_gathers_frozen_weights_three_times():
    # Module 0 is the block, with 1 and 2 inside.
    forward = [Event(kind, m) for kind, m in (("enter", 0), ("enter", 1), ("leave", 1), ("enter", 2), ("leave", 2), ("leave", 0))]
    modules = [(), (Piece("frozen", 10), Piece("trained", 1, frozen=False)), (Piece("last", 10),)]
    order = training_order(forward, {0}, set(), {1, 2})
    found = gather(modules, order, Limits(reuse=15, prefetch=0))
    assert found.times == {"frozen": 3, "trained": 2, "last": 1}


# ---------------------------------------------------------------------- links


def test_rings_over_nodes():
    assert over_links({ALL_REDUCE: 800}, 1, 8) == over_links({ALL_GATHER: 1600}, 1, 8)
    one_gpu_a_node = over_links({ALL_REDUCE: 800}, 4, 1)
    assert (one_gpu_a_node.inter, one_gpu_a_node.intra) == (1200, 0)
    both = over_links({REDUCE_SCATTER: 800}, 2, 4)
    assert both.inter == both.intra == 700
    assert over_links({BROADCAST: 800}, 2, 4).inter == 800
    within = over_links({GROUP_GATHER: 800}, 2, 4, group=4)
    assert (within.inter, within.intra) == (0, 600)


def test_frozen_weights_stay_in_their_group_under_hpz(tiny):
    zero = {"stage3_param_persistence_threshold": 100}
    plain = plan_of(recipe_of(tiny, LORA, zero=zero), 2, 4)
    grouped = plan_of(recipe_of(tiny, LORA, zero=zero | {"zero_hpz_partition_size": 4}), 2, 4)
    assert plain.step[ALL_GATHER] == grouped.step[ALL_GATHER] + grouped.step[GROUP_GATHER]
    assert grouped.step[GROUP_GATHER] > 0 and grouped.memory.weights > plain.memory.weights


def test_a_transformed_gradient_travels_once_more(tiny):
    for stage, times in ((2, 1), (3, 2)):
        plain, transformed = (plan_of(recipe_of(tiny, {"name": name, "rank": 4}, stage), 1, 2) for name in ("rslora", "lora_pro"))
        more = transformed.step - plain.step
        assert more == {ALL_REDUCE: times * 4 * sum(plain.setup.shapes.trained.values())}


def test_one_rank_sends_nothing(tiny):
    plan = plan_of(recipe_of(tiny, LORA), 1, 1)
    assert not (plan.step or plan.init or plan.search or plan.swap)


# ---------------------------------------------------------------------- advice and table


def test_advice_names_changes_that_help(tiny):
    recipe = recipe_of(
        tiny, LORA, 2, model={"gradient_checkpointing": False}, train={"micro_batch_size": 4}, zero={"reduce_bucket_size": 1000}
    )
    plan = plan_of(recipe, 1, 2)
    enough = plan.memory.peak / GIB * 2
    assert fits(plan, enough) and advice([plan], enough)[0].startswith("It fits everywhere")
    *_, line = advice([plan], plan.memory.peak / GIB)
    assert line.startswith("It fits (") and "model.gradient_checkpointing=true" in line and "zero3" not in line
    *_, line = advice([plan], 1e-9)
    assert line.startswith("Not even ") and "zero3_offload" in line


def test_a_column_that_cannot_be_says_why(tiny):
    columns = side_by_side(recipe_of(tiny, LORA), [1, 2, 3], 2)
    lines = table(columns, 2, 80).splitlines()
    assert next(line for line in lines if line.startswith("fits into")).split()[-3:] == ["yes", "yes", "-"]
    assert any(line.startswith("3 nodes: train.global_batch_size=8 is not divisible") for line in lines)
    assert len({len(line) for line in lines if line.startswith(("  weights", "GPUs", "checkpoint"))}) == 1, "columns are aligned"
    with pytest.raises(UserError, match="not divisible"):
        side_by_side(recipe_of(tiny, LORA), [3], 2)


def test_amounts_keep_three_digits():
    assert [amount(size * GIB) for size in (0, 123.456, 1.5, 0.5, 0.0001)] == ["0", "123.46", "1.50", "0.500", "1.0e-04"]


@pytest.fixture
def recipe_file(tiny, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(tiny, LORA).model_dump(mode="json")))
    return path


def test_the_command_prints_a_table_and_draws_a_picture(recipe_file, tmp_path, capsys):
    picture = tmp_path / "plan.png"
    words = ["plan", str(recipe_file), "--nodes", "1,2", "--gpus-per-node", "2", "--plot", str(picture), "train.micro_batch_size=2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "fits into 80 GiB" in out and "micro-batch 2 of 16 tokens" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "0"], "--nodes must be above 0"),
        (["--gpu-memory", "-1"], "--gpu-memory must be above 0"),
        (["--gpus-per-node", "3", "--nodes", "1"], "is not divisible"),
        (["--nodes", "1", "--gpus-per-node", "2", "--plot", "plan.doc"], "ends in .png"),
        (["method.rank=999"], "lower method.rank"),
        (["model.quantization=nf4"], "model.quantization: there are no plans for nf4"),
        (["--nodes", "1", "method.name=pissa", "train.weight_decay=0.1"], "decay_pretrained"),
        (["--nodes", "1", "method.name=srlora", "method.target_rank=4", "method.rank=2", "train.optimizer.name=adamw8bit",
          "train.steps=9"], "keeps moments in blocks"),
    ],
)
def test_mistakes_end_in_a_sentence(words, sentence, recipe_file, capsys):
    assert main(["plan", str(recipe_file), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_an_unknown_recipe_is_named(capsys):
    assert main(["plan", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such recipe" in capsys.readouterr().err
