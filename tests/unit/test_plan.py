"""The planner's arithmetic: against figures measured by the memory benchmarks, and in what must follow from
what.
"""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.methods import TrainsWeight, registry
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
    GROUP_GATHER,
    REDUCE,
    REDUCE_SCATTER,
    columns_of,
    over_links,
)
from distlora.recipe.sections import Recipe
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
    return Recipe(
        method=method,
        deepspeed=None if stage is None else {"zero_optimization": zero},
        output_dir="unused",
        **sections,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model's directory with a config and no weights."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_config("mistral").save_pretrained(directory)
    return directory


# ---------------------------------------------------------------------- memory, against measurements


@pytest.mark.parametrize(
    ("model", "measured"),
    # GiB of training, probe, SVDs, search on one rank of ZeRO-3, as tests.benchmarks.init_memory prints them
    [
        (
            "mistral-7b",
            {
                1: (14.278, 14.262, 14.232, 14.084),
                2: (7.546, 7.530, 7.255, 7.351),
                8: (2.313, 2.298, 2.021, 2.119),
            },
        ),
        pytest.param(
            "gemma2-9b",
            {
                1: (18.322, 18.302, 18.073, 18.139),
                2: (11.117, 11.097, 9.159, 10.934),
                8: (4.432, 4.412, 2.474, 4.249),
            },
            marks=pytest.mark.long,
        ),
    ],
)
def test_peaks_are_those_of_the_simulated_rank(model, measured, tmp_path):
    SHAPES[model].save_pretrained(tmp_path)
    recipe = recipe_of(
        tmp_path,
        {"name": "lora_sb", "rank": SHAPES_RANK},
        model={"dtype": "bfloat16"},
        data={"max_length": SHAPES_TOKENS},
    )
    shapes = shapes_of(recipe)
    for world_size, figures in measured.items():
        peaks = memory_of(setup_of(recipe, shapes, world_size), deepspeed=False).peaks
        for phase, figure in zip(("training", "probe", "SVDs", "search"), figures):
            assert peaks[phase] / GIB == pytest.approx(figure, rel=0.03), (world_size, phase)


def test_the_parts_add_up_to_the_peak_of_training(tiny):
    for stage in (0, 1, 2, 3):
        memory = plan_of(recipe_of(tiny, LORA, stage), 1, 4).memory
        parts = (
            memory.weights,
            memory.adapters,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.gathered,
        )
        assert sum(parts) == memory.peaks["training"], stage


def test_each_stage_shares_what_it_says(tiny):
    plans = {stage: plan_of(recipe_of(tiny, LORA, stage), 1, 8).memory for stage in (0, 1, 2, 3)}
    trained = sum(shapes_of(recipe_of(tiny, LORA)).trained.values())
    assert plans[0].optimizer == 8 * trained  # in float32 the parameter is its own master
    assert plans[1].optimizer == plans[2].optimizer == plans[3].optimizer == 12 * -(-trained // 8)
    assert plans[1].gradients == 4 * trained and plans[2].gradients == 4 * -(-trained // 8)
    assert plans[0].weights == plans[2].weights
    core = plan_of(recipe_of(tiny, {"name": "lora_sb", "rank": 4}, 0), 1, 8)
    assert (
        core.memory.adapters == 4 * core.setup.shapes.factors + len(core.setup.layers) * 2 * 4 * 4 * 4
    )  # and its corrections
    never = {"zero": {"stage3_param_persistence_threshold": 0}}
    assert plan_of(recipe_of(tiny, LORA, 3, **never), 1, 8).memory.weights < 0.13 * plans[0].weights


def test_offloading_moves_state_to_the_host(tiny):
    here = plan_of(recipe_of(tiny, LORA), 1, 2).memory
    there = plan_of(
        recipe_of(
            tiny, LORA, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        ),
        1,
        2,
    )
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
    method = {"name": name} | ({} if issubclass(registry()[name], TrainsWeight) else {"rank": 4})
    if "target_rank" in registry()[name].model_fields:
        method["target_rank"] = 8
    plan = plan_of(recipe_of(tiny, method), 2, 2)
    columns = list(side_by_side(recipe_of(tiny, method), [1, 2], 2))
    assert plan.memory.peak > plan.memory.weights > 0
    assert plan.step and "fits into" in table(columns, 2, 80)
    weight = registry()[name](**method).source_matrix()
    assert (ALL_GATHER in plan.init, REDUCE in plan.init) == (weight == "weight", weight == "gradient")


def test_moments_of_eight_bits_take_a_quarter_and_their_scales(tiny):
    def moments(name: str, momentum: float = 0.0) -> int:
        optimizer = {"name": name, "momentum": momentum}
        return plan_of(recipe_of(tiny, LORA, train={"optimizer": optimizer}), 1, 2).memory.optimizer

    masters = moments("sgd")
    assert moments("adamw8bit") - masters == pytest.approx(
        (moments("adamw") - masters) * (1 + 4 / 256) / 4, rel=1e-3
    )


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
    plan, pissa = (
        plan_of(recipe_of(tiny, method), 1, 2) for method in (srlora, {"name": "pissa", "rank": 4})
    )
    assert (plan.setup.recompositions, plan.setup.columns_of_a_recomposition) == (4, 4)
    assert plan.memory.checkpoint > pissa.memory.checkpoint
    assert set(plan.recomposition) == {ALL_REDUCE, BROADCAST} and not pissa.recomposition


# ---------------------------------------------------------------------- packed weights

NF4, INT8 = {"quantization": "nf4"}, {"quantization": "int8"}


def test_packed_weights_take_their_share(tiny):
    whole, nf4, int8, single = (
        plan_of(recipe_of(tiny, LORA, 2, model=model), 1, 2)
        for model in ({}, NF4, INT8, {"quantization": {"kind": "nf4", "double": False}})
    )
    linears = sum(out * into for out, into in nf4.setup.layers.values())
    assert whole.memory.weights - int8.memory.weights == 3 * linears - 4 * sum(
        out for out, _ in nf4.setup.layers.values()
    )
    assert whole.memory.weights - nf4.memory.weights == pytest.approx(3.5 * linears - linears / 64, rel=0.01)
    assert single.memory.weights - nf4.memory.weights == pytest.approx(3 * linears / 64, rel=0.1)
    assert nf4.setup.shapes.elements == whole.setup.shapes.elements
    assert nf4.memory.checkpoint == whole.memory.checkpoint and nf4.step == whole.step
    assert f", of which {linears:,} in nf4" in table([(1, nf4)], 2, 80)


def test_scales_are_whole_on_every_rank_and_numbers_are_not(tiny):
    never = {"stage3_param_persistence_threshold": 0}
    nf4, whole = (plan_of(recipe_of(tiny, LORA, 3, model=model, zero=never), 1, 8) for model in (NF4, {}))
    scales = nf4.setup.shapes.scales
    one = plan_of(recipe_of(tiny, LORA, 3, model=NF4, zero=never), 1, 1)
    assert nf4.memory.weights == pytest.approx((one.memory.weights - scales) / 8 + scales, rel=0.01)
    times = whole.setup.gathered().times
    travelling = sum(times[f"{name}.weight"] * out * into for name, (out, into) in nf4.setup.layers.items())
    assert whole.step[ALL_GATHER] - nf4.step[ALL_GATHER] == pytest.approx(
        3.5 * travelling, rel=0.02
    )  # bytes a number


def test_packed_weights_come_whole_before_they_are_packed(tiny):
    def loading(stage, model, count):
        return plan_of(recipe_of(tiny, LORA, stage, model=model), 1, count).memory.loading

    weights = 4 * sum(shapes_of(recipe_of(tiny, {"name": "full"})).sizes.values())
    assert loading(3, NF4, 2) == loading(3, NF4, 8) == loading(2, {}, 8) == weights
    assert loading(3, {}, 8) < weights / 4


def test_the_matrix_of_a_pass_is_in_its_type(tiny):
    def whole(**quantization):
        plan = plan_of(
            recipe_of(tiny, LORA, 2, model={"dtype": "bfloat16", "quantization": quantization}), 1, 2
        )
        return plan.memory.gathered, max(out * into for out, into in plan.setup.layers.values())

    nf4, largest = whole(kind="nf4")
    assert whole(kind="int8")[0] - nf4 == pytest.approx(6 * largest, rel=0.1)
    assert whole(kind="nf4", compute_dtype="float32")[0] - nf4 > 2 * largest


def test_what_is_taken_out_of_a_packed_weight_packs_the_rest_anew(tiny):
    def plan(name, stage=3, **model):
        return plan_of(recipe_of(tiny, {"name": name, "rank": 4}, stage, model=model), 1, 2)

    packed, plain, of_packed = plan("pissa", **NF4), plan("pissa"), plan("lora_xs", **NF4)
    packings = packed.setup.shapes.packings.values()
    stored = sum(4 * packing.elements for packing in packings)
    assert packed.init[BROADCAST] - plain.init[BROADCAST] == stored + packed.setup.shapes.scales
    assert packed.init[ALL_GATHER] == of_packed.init[ALL_GATHER] == pytest.approx(stored, rel=0.01)
    assert plan("pissa", 2, **NF4).init[ALL_GATHER] == 0
    assert packed.memory.host > plain.memory.host
    largest = max(4 * packing.shape[0] * packing.shape[1] for packing in packings)
    assert packed.memory.peaks["SVDs"] - packed.memory.weights > 3 * largest


def test_fused_components_beside_packed_weights_take_memory_on_every_rank(tiny):
    def plan(into, stage=3, **model):
        method = {"name": "srlora", "rank": 4, "target_rank": 12, "gamma": 0.5, "fuse_into": into}
        return plan_of(recipe_of(tiny, method, stage, model=model), 1, 2)

    beside, base = plan(None, **NF4), plan("base", 2, **NF4)
    sides = sum(map(sum, beside.setup.layers.values()))
    assert (
        beside.memory.adapters - plan(None).memory.adapters == 4 * 4 * 4 * sides
    )  # swaps, columns of each, bytes
    assert plan("sidecar").memory.adapters == beside.memory.adapters
    anew = (
        sum(4 * packing.elements for packing in base.setup.shapes.packings.values())
        + base.setup.shapes.scales
    )
    assert base.recomposition[BROADCAST] - plan(None, 2, **NF4).recomposition[BROADCAST] == anew


def test_advice_for_packed_weights_keeps_to_what_can_be(tiny):
    *_, line = advice([plan_of(recipe_of(tiny, LORA, 2, model=INT8), 1, 2)], 1e-9)
    assert "zero3" not in line and "quantization" not in line and "offload_optimizer" in line
    *_, line = advice([plan_of(recipe_of(tiny, LORA, 2), 1, 2)], 1e-9)
    assert "zero3_offload" in line and "model.quantization=nf4" in line


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
    forward = [
        Event(kind, m)
        for kind, m in (("enter", 0), ("enter", 1), ("leave", 1), ("enter", 2), ("leave", 2), ("leave", 0))
    ]
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
        plain, transformed = (
            plan_of(recipe_of(tiny, {"name": name, "rank": 4}, stage), 1, 2)
            for name in ("rslora", "lora_pro")
        )
        more = transformed.step - plain.step
        assert more == {ALL_REDUCE: times * 4 * sum(plain.setup.shapes.trained.values())}


def test_one_rank_sends_nothing(tiny):
    plan = plan_of(recipe_of(tiny, LORA), 1, 1)
    assert not (plan.step or plan.init or plan.search or plan.recomposition)


# ---------------------------------------------------------------------- advice and table


def test_advice_names_changes_that_help(tiny):
    recipe = recipe_of(
        tiny,
        LORA,
        2,
        model={"gradient_checkpointing": False},
        train={"micro_batch_size": 4},
        zero={"reduce_bucket_size": 1000},
    )
    plan = plan_of(recipe, 1, 2)
    enough = plan.memory.peak / GIB * 2
    assert fits(plan, enough) and advice([plan], enough)[0].startswith("It fits everywhere")
    *_, line = advice([plan], plan.memory.peak / GIB)
    assert (
        line.startswith("It fits (") and "model.gradient_checkpointing=true" in line and "zero3" not in line
    )
    *_, line = advice([plan], 1e-9)
    assert line.startswith("Not even ") and "zero3_offload" in line


def test_a_column_that_cannot_be_says_why(tiny):
    columns = side_by_side(recipe_of(tiny, LORA), [1, 2, 3], 2)
    lines = table(columns, 2, 80).splitlines()
    assert next(line for line in lines if line.startswith("fits into")).split()[-3:] == ["yes", "yes", "-"]
    assert any(line.startswith("3 nodes: train.global_batch_size=8 is not divisible") for line in lines)
    assert len({len(line) for line in lines if line.startswith(("  weights", "GPUs", "checkpoint"))}) == 1, (
        "columns are aligned"
    )
    with pytest.raises(UserError, match="not divisible"):
        side_by_side(recipe_of(tiny, LORA), [3], 2)


def test_amounts_keep_three_digits():
    assert [amount(size * GIB) for size in (0, 123.456, 1.5, 0.5, 0.0001)] == [
        "0",
        "123.46",
        "1.50",
        "0.500",
        "1.0e-04",
    ]


@pytest.fixture
def recipe_file(tiny, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(tiny, LORA).model_dump(mode="json")))
    return path


def test_the_command_prints_a_table_and_draws_a_picture(recipe_file, tmp_path, capsys):
    picture = tmp_path / "plan.png"
    words = [
        "plan",
        str(recipe_file),
        "--nodes",
        "1,2",
        "--gpus-per-node",
        "2",
        "--plot",
        str(picture),
        "train.micro_batch_size=2",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "fits into 80 GiB" in out and "micro-batch 2 of 16 tokens" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "0,x"], "--nodes '0,x': wanted whole numbers above 0 with commas between them"),
        (["--nodes", "1,,2"], "--nodes '1,,2': wanted"),
        (["--nodes", ""], "--nodes '': wanted"),
        (["--gpus-per-node", "0"], "--gpus-per-node '0': wanted a whole number above 0"),
        (["--gpus-per-node", "1.5"], "--gpus-per-node '1.5': wanted"),
        (["--gpu-memory", "nan"], "--gpu-memory 'nan': wanted a number above 0"),
        (["--gpu-memory", "1e999"], "--gpu-memory '1e999': wanted"),
        (["--samples", "many"], "--samples 'many': wanted a whole number above 0"),
        (["model.path=/nowhere/at/all"], "model.path=/nowhere/at/all: there is no such directory"),
        (["--gpus-per-node", "3", "--nodes", "1"], "is not divisible"),
        (["--plot", "plan.doc"], "--plot plan.doc: wanted a name that ends in .png"),
        (["--plot", "plan"], "--plot plan: wanted a name that ends in .png"),
        (["--plot", "/nowhere/plan.png"], "--plot /nowhere/plan.png: there is no directory /nowhere"),
        (["method.rank=999"], "lower method.rank"),
        (["model.quantization=int8"], "model.quantization: int8 does not go with ZeRO stage 3"),
        (
            ["model.quantization=nf4", "method={name: full}"],
            "model.quantization: method full trains the weights themselves",
        ),
        (["model.quantization={kind: nf4, duble: true}"], "duble"),
        (["--nodes", "1", "method.name=pissa", "train.weight_decay=0.1"], "decay_pretrained"),
        (
            [
                "--nodes",
                "1",
                "method.name=srlora",
                "method.target_rank=4",
                "method.rank=2",
                "train.optimizer.name=adamw8bit",
                "train.steps=9",
            ],
            "keeps moments in blocks",
        ),
    ],
)
def test_mistakes_end_in_a_sentence(words, sentence, recipe_file, capsys):
    assert main(["plan", str(recipe_file), *words]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert sentence in line and said.out == ""


def test_an_unknown_recipe_is_named(capsys):
    assert main(["plan", "nowhere.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere.yaml: no such recipe" in line


def test_a_picture_that_cannot_be_written_is_refused_before_the_plans_are_made(
    recipe_file, tmp_path, monkeypatch, capsys
):
    def refused(picture: Path) -> str:
        assert main(["plan", str(recipe_file), "--plot", str(picture)]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr("distlora.plan.side_by_side", lambda *_: pytest.fail("planned"))
    (tmp_path / "a.png").mkdir()
    assert "is a directory" in refused(tmp_path / "a.png")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in refused(tmp_path / "b.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert (
        refused(tmp_path / "b.png")
        == "distlora: --plot needs the package matplotlib; pip install 'distlora[plot]'\n"
    )


def test_a_model_that_no_network_brings_is_named(recipe_file, monkeypatch, capsys):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("distlora.models.hub.snapshot_download", offline)
    assert main(["plan", str(recipe_file), "model.path=nobody/has-this"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distlora: model.path=nobody/has-this: no") and "cache" in line
