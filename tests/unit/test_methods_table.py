"""`distlora methods`: its numbers are those of the attached model, and what cannot be is said in one
sentence.
"""

import json

import pytest

from distlora.adapter.attach import attach
from distlora.adapter.targets import choose
from distlora.errors import UserError
from distlora.methods import registry
from distlora.models.hub import SHAPE_FILES
from distlora.models.loading import bare_model
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import ModelSection
from distlora.report.methods_table import methods_table, summary
from distlora.training.objective import objective_of
from tests.tiny_models import tiny_encoder_dir, tiny_model_dir

RANK = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_model_dir("llama", tmp_path_factory.mktemp("models")))


@pytest.fixture
def recipe(model, tmp_path):
    """Writes a recipe, with other sections beside the usual ones."""

    def write(**sections) -> str:
        content = {
            "model": {"path": model},
            "method": {"name": "srlora", "rank": RANK, "target_rank": 7},
            "data": {"task": "arithmetic"},
            "output_dir": "x",
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(content | sections))  # JSON is YAML
        return str(tmp_path / "recipe.yaml")

    return write


def rows(table: str) -> dict[str, str]:
    """The first table's lines by their methods."""
    return {line.split()[0]: line for line in table.split("\n\n")[0].splitlines()[1:]}


def cells(table: str, name: str) -> list[str]:
    return [cell.strip() for cell in rows(table)[name].split("  ") if cell]


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", sorted(registry()))
def test_trained_parameters_are_those_of_the_attached_model(name, recipe, model):
    overrides = [f"method={{name: {name}, rank: {RANK}}}", "targets=[q_proj, down_proj]"]
    if name == "srlora":
        overrides[0] = f"method={{name: srlora, rank: {RANK}, target_rank: 7}}"
    table = methods_table(recipe(), overrides)
    whole = bare_model(ModelSection(path=model))
    attach(whole, load_recipe(recipe(), overrides).method, ["q_proj", "down_proj"])
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert cells(table, name)[2] == f"{trained:,}"
    assert cells(table, name)[3] == (
        f"{trained * 12} B" if trained < 86 else f"{trained * 12 / 1024:.1f} KiB"
    )


def test_a_new_head_is_trained_by_every_method(recipe, tmp_path):
    bert = str(tiny_encoder_dir("bert", tmp_path))
    data = {"task": "classification", "labels": ["a", "b"], "path": "none.jsonl", "max_length": 8}
    path = recipe(model={"path": bert}, data=data, method={"name": "lora_xs", "rank": 1})
    objective = objective_of(load_recipe(path))
    whole = objective.bare_model()
    attached = attach(whole, load_recipe(path).method, "all-linear", objective.head(whole))
    head = sum(whole.get_parameter(name).numel() for name in objective.head(whole))
    table = methods_table(path)
    assert cells(table, "lora_xs")[2] == f"{len(attached.layers) + head:,}"
    assert f"a new head of {head:,} numbers" in table
    full = objective.bare_model()
    attach(full, registry()["full"](), "all-linear", objective.head(full))
    assert (
        cells(table, "full")[2] == f"{sum(p.numel() for p in full.parameters() if p.requires_grad):,}"
    )  # biases too


def test_a_rank_of_its_own_for_all(recipe, model):
    one, four = methods_table(model=model, rank=1), methods_table(model=model, rank=4)
    assert int(cells(four, "lora")[2].replace(",", "")) == 4 * int(cells(one, "lora")[2].replace(",", ""))
    assert int(cells(four, "lora_xs")[2].replace(",", "")) == 16 * int(
        cells(one, "lora_xs")[2].replace(",", "")
    )
    assert cells(methods_table(recipe(), rank=1), "lora") == cells(one, "lora")
    assert cells(methods_table(recipe()), "lora") == cells(methods_table(model=model, rank=RANK), "lora")


def test_without_a_model_there_are_formulas():
    table = methods_table()
    assert cells(table, "full")[2] == "out·in" and cells(table, "lora_xs")[2] == "r²"
    assert cells(table, "lora")[2] == "r·in + r·out"
    assert "optimizer state" not in table.splitlines()[0] and "by default 8" in table


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("{name: adamw}", "of adamw: float32 master, two moments, 12 bytes"),
        ("{name: sgd}", "of sgd: float32 master, 4 bytes"),
        ("{name: sgd, momentum: 0.9}", "of sgd: float32 master, one moment, 8 bytes"),
        ("{name: adamw8bit}", "of adamw8bit: float32 master, two moments, 6.031 bytes"),
    ],
)
def test_the_state_is_that_of_the_recipes_optimizer(recipe, optimizer, said):
    assert said in methods_table(recipe(), [f"train.optimizer={optimizer}"])


def test_what_a_packed_weight_excludes_is_said_in_the_methods_line(recipe):
    table = methods_table(recipe(), ["model.quantization=int8"])
    for name in ("full", "dora"):
        assert "model.quantization: " in next(
            line for line in table.splitlines() if line.startswith(name + " ")
        )
    assert "model.quantization" not in rows(table)["lora"]
    table = methods_table(recipe(), ["model.quantization=int8", "deepspeed={zero_optimization: {stage: 3}}"])
    assert "does not go with ZeRO stage 3" in next(
        line for line in table.splitlines() if line.startswith("lora ")
    )


# ---------------------------------------------------------------------- facts


def test_facts_are_the_contracts():
    table = methods_table(rank=4)
    assert list(rows(table)) == list(registry())
    for name, cls in registry().items():
        assert summary(cls) in table.split("\n\n")[-1]
        assert cells(table, name)[1] == (", ".join(cls.trains) or "W")
    assert cells(table, "lora")[3:] == ["-", "yes", "LoRA of rank r"]
    assert cells(table, "pissa")[3:] == ["SVD of W", "yes", "LoRA of rank 2r"]
    assert cells(table, "lora_sb")[3:] == ["SVD of gradients", "no", "LoRA of rank r"]
    assert cells(table, "lora_xs")[4] == "nearly"
    assert cells(table, "srlora")[5] == "LoRA of rank 2r, more with each recomposition"
    assert cells(table, "full")[5] == "merged model"


def test_the_recipes_own_method_is_as_it_is_set_there(recipe):
    assert cells(methods_table(recipe()), "srlora")[4] == "SVD of W"
    changed = methods_table(recipe(), ["method.refill=gradient"])
    assert cells(changed, "srlora")[4] == "SVD of W and SVD of gradients"
    assert cells(methods_table(recipe(), ["method.schedule=none"]), "srlora")[6] == "LoRA of rank 2r"


def test_columns_stand_below_each_other(model):
    table = methods_table(model=model, rank=RANK).split("\n\n")[0].splitlines()
    column = table[0].index("exact at start")
    whole = [line for line in table if "LoRA of" in line]
    assert len(whole) > 3 and all(
        line[column - 2 : column].isspace() and not line[column].isspace() for line in whole
    )


# ---------------------------------------------------------------------- what cannot be


def test_what_one_method_cannot_do_is_said_in_its_line(model):
    """And the others have their numbers."""
    widest = max(
        min(p.shape)
        for n, p in bare_model(ModelSection(path=model)).named_parameters()
        if n.endswith("proj.weight")
    )
    table = methods_table(model=model, rank=widest)
    assert f"above min(out, in) = {widest}; lower method.rank" in rows(table)["lora_ga"]
    assert cells(table, "lora")[2].split()[0].replace(",", "").isdigit()
    assert "(15 of 21 layers are wide enough)" in cells(table, "lora")[2]
    table = methods_table(model=model, rank=widest + 1)
    assert f"rank {widest + 1} is above min(out, in) = {widest}" in rows(table)["lora"]
    assert cells(table, "full")[2].replace(",", "").isdigit()
    said = rows(methods_table(model=model, rank=widest))["srlora"]
    assert f"leaves 0 of min(out, in) = {widest} singular directions unused" in said
    half = rows(methods_table(model=model, rank=widest // 2))["srlora"]
    assert "lower" not in half and "lower" not in rows(methods_table(rank=32))["srlora"], (
        "target_rank follows rank and layers"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"model": "/none/model"}, "model.path=/none/model: there is no such directory; check the path"),
        (
            {"recipe_path": "none.yaml"},
            "none.yaml: no such recipe; give the path of a YAML file, "
            "or a name that `distlora recipes` lists",
        ),
        ({"recipe_path": "train.lr=1"}, "override train.lr=1 changes a recipe: name its file first"),
        ({"rank": 0}, "--rank=0: wanted a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_sentence(arguments, expected):
    with pytest.raises(UserError) as caught:
        methods_table(**arguments)
    assert str(caught.value) == expected


def test_targets_that_match_nothing(recipe):
    with pytest.raises(UserError, match="did you mean q_proj"):
        methods_table(recipe(), ["targets=[q_porj]"])


def test_of_a_model_on_the_hub_only_the_config_is_fetched(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "distlora.models.hub.snapshot_download",
        lambda *_, allow_patterns, **__: asked.append(allow_patterns) or model,
    )
    assert (
        cells(methods_table(model="someone/tiny-of-the-table", rank=RANK), "lora")[2]
        == cells(methods_table(model=model, rank=RANK), "lora")[2]
    )
    assert asked == [list(SHAPE_FILES)]


def test_no_memory_is_taken_for_the_model(recipe, monkeypatch):
    """The shapes come from the meta device."""
    seen = []

    def watched(model, *arguments):
        seen.append(model)
        return choose(model, *arguments)

    monkeypatch.setattr("distlora.report.methods_table.choose", watched)
    methods_table(recipe())
    assert seen and all(parameter.is_meta for model in seen for parameter in model.parameters())
