"""A sweep's YAML file: its points, their names, and every mistake told before anything starts."""

import pytest

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.recipe.load import dump_recipe, load_recipe
from distlora.recipe.yaml_text import parse_yaml
from distlora.sweeps.check import check_sweep
from distlora.sweeps.points import LONGEST_NAME, name_of
from tests.sweeping import Desk


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def names(sweep):
    return [point.name for point in sweep.points]


# ---------------------------------------------------------------------- points


def test_a_grid_is_every_combination_and_each_joins_every_entry_of_the_list(desk):
    sweep = desk.read(
        grid={"train.seed": [1, 2]},
        list=[{"method.name": "lora", "train.lr": 0.001}, {"method.name": "lora_xs", "train.lr": 0.004}],
    )
    assert names(sweep) == [
        "train.seed=1,method=lora,train.lr=0.001",
        "train.seed=1,method=lora_xs,train.lr=0.004",
        "train.seed=2,method=lora,train.lr=0.001",
        "train.seed=2,method=lora_xs,train.lr=0.004",
    ]
    recipes = check_sweep(sweep)
    assert [(r.method.name, r.train.lr, r.train.seed) for r in recipes][3] == ("lora_xs", 0.004, 2)
    assert recipes[3].output_dir == str(desk.folder / "out" / sweep.points[3].name)


def test_a_points_own_keys_win_over_the_command_line_and_that_over_what_is_common(desk):
    common = {"train.steps": 5, "train.lr": 0.1, "train.warmup_ratio": 0.5}
    sweep = desk.read("train.steps=7", common=common, grid={"train.lr": [0.2]})
    (recipe,) = check_sweep(sweep)
    assert (recipe.train.steps, recipe.train.lr, recipe.train.warmup_ratio) == (7, 0.2, 0.5)


def test_a_name_stays_when_points_are_added(desk):
    few = desk.read(grid={"train.seed": [1], "method.rank": [8]})
    many = desk.read(grid={"train.seed": [1, 2], "method.rank": [8, 16]})
    assert few.points[0].run_dir == many.points[0].run_dir


def test_any_value_arrives_as_it_is(desk):
    values = ["1e-3", "a b", "x: [y]", "", "true", "é'\"", [1, "2"], {"a": None}, "$(touch evil)"]
    sweep = desk.read(grid={"data.template": values}, list=None)
    for value, point in zip(values, sweep.points):
        key, _, text = point.overrides[0].partition("=")
        assert parse_yaml(text, "") == value and key == "data.template"
        assert all(sign.isalnum() or sign in "._=,+-" for sign in point.name.encode("ascii").decode())
    assert len(set(names(sweep))) == len(values)


def test_names_are_short_and_differ():
    long = [name_of({"data.template": "x" * 500 + end}) for end in "ab"]
    assert len(set(long)) == 2 and max(map(len, long)) == LONGEST_NAME
    assert name_of({"method.name": "lora_sb", "train.lr": 4e-3}) == "method=lora_sb,train.lr=0.004"


def test_the_recipe_is_looked_up_beside_the_sweep_and_above(desk, monkeypatch):
    monkeypatch.chdir("/")
    assert desk.read().recipe == desk.folder / "recipe.yaml"


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gird": {"train.lr": [1]}}, "gird: unknown key, did you mean grid?"),
        ({"grid": None}, "has no points; give a grid (key: [value, …]) or a list of mappings"),
        ({"grid": {"train.lr": []}}, "grid.train.lr: found [], wanted a list of at least 1"),
        ({"grid": {"train.lr": 1}}, "grid.train.lr: found 1, wanted a list"),
        (
            {"grid": {"train.lrr": [1]}},
            "point 0 (train.lrr=1): override train.lrr: unknown key, did you mean lr?",
        ),
        ({"grid": {"train..lr": [1]}}, "wanted dotted.key=value"),
        (
            {"grid": {"train.lr": [0.1, "fast"]}},
            'point 1 (train.lr=fast): override train.lr: found "fast", wanted',
        ),
        ({"grid": {"train.lr": [0.1, 0.10]}}, "share the output directory"),
        (
            {"grid": {"train.lr": [1, 1.0]}},
            "point 0 (train.lr=1) and point 1 (train.lr=1.0) are the same run",
        ),
        ({"list": [{}]}, "list.0 is empty"),
        (
            {"list": [{"train.seed": 4}]},
            "list.0 sets train.seed, and the grid sets train.seed; leave one of them out",
        ),
        ({"list": [{"train": {"seed": 4}}]}, "list.0 sets train, and the grid sets train.seed"),
        ({"grid": {"output_dir": ["a", "./a"]}}, "share the output directory"),
        ({"common": {"output_dir": "a"}}, "output_dir is a point's own; set output"),
        ({"recipe": "none.yaml"}, "recipe: no file none.yaml here, beside the sweep or in a folder above it"),
        ({"recipe": None}, "recipe is missing"),
        ({"name": "../x"}, 'name: found "../x", wanted letters'),
        ({"evaluate": []}, "evaluate: found [], wanted a list of at least 1"),
        ({"evaluate": ["gsm9k"]}, "evaluate: unknown task 'gsm9k', did you mean gsm8k?"),
        ({"evaluate": {"tasks": ["gsm8k"], "limt": 2}}, "evaluate.limt: unknown key, did you mean limit?"),
        (
            {"evaluate": ["gsm8k", "boolq"], "common": {"model.path": "/no/model"}},
            "point 0 (train.seed=1): model.path=/no/model: there is no such directory",
        ),
        (
            {"grid": {"train.global_batch_size": [2, 3]}, "common": {"train.micro_batch_size": 2}},
            "point 1 (train.global_batch_size=3): ",
        ),
        ({"common": {"data.labels": ["a", "b"]}}, "data.labels: the task gsm8k has responses and no labels"),
        ({"common": {"method.name": "pissa", "train.weight_decay": 0.1}}, "train.weight_decay=0.1"),
        (
            {"common": {"deepspeed": {"zero_optimisation": {}}}},
            "zero_optimisation: unknown key, did you mean",
        ),
        (
            {"evaluate": ["gsm8k", "rte"]},
            "point 0 (train.seed=1): evaluate: the task rte wants a classifier",
        ),
        (
            {"evaluate": {"tasks": ["gsm8k"], "data": {"math": "x"}}},
            "evaluate.data: math is not among the tasks; add it, or leave it out",
        ),
        ({"launcher": "no-such-program -n 2"}, "launcher: there is no program no-such-program here"),
        ({"launcher": "a 'b"}, "launcher is not quoted as in a shell: no closing quotation"),
        ({"launcher": []}, "launcher"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(desk, changes, sentence, capsys):
    assert main(["sweep", str(desk.write(**changes))]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("distlora: ") and sentence in line and said.out == ""
    assert desk.starts() == [] and not (desk.folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train.seed=9"], "sets train.seed, and the command line sets train.seed"),
        (["output_dir=a"], "output_dir is a point's own; set output"),
        (["recipe.yaml"], "recipe.yaml: wanted dotted.key=value;"),
        (["--point", "3"], "has no point 3, only 3, counted from 0"),
        (["--jobs", "2"], "--sbatch and --jobs are for --slurm"),
        (["--launcher", "no-such-program"], "--launcher: there is no program no-such-program"),
    ],
)
def test_a_mistake_on_the_command_line(desk, words, sentence, capsys):
    assert main(["sweep", str(desk.write()), *words]) == 2
    assert sentence in capsys.readouterr().err and desk.starts() == []


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "grid: 1\ngrid: 2\n"])
def test_a_file_that_is_no_sweep(tmp_path, text, capsys):
    (tmp_path / "x.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "x.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read as a sweep: No such file" in capsys.readouterr().err


def test_a_directory_that_holds_another_recipes_run(desk):
    sweep = desk.read()
    run = sweep.points[1].run_dir
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    other = load_recipe(sweep.recipe, [*sweep.points[1].overrides, "train.lr=0.5"])

    (run / "recipe.yaml").write_text(dump_recipe(other))
    with pytest.raises(
        UserError, match=r"point 1 \(train.seed=2\): .*another recipe \(train.lr is 0.5 there"
    ):
        check_sweep(sweep)


# ---------------------------------------------------------------------- shown


def test_check_shows_the_points_and_runs_none(desk, capsys):
    assert main(["sweep", str(desk.write()), "--check", "train.steps=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("1 train.steps=2 train.seed=2 output_dir=")
    assert desk.starts() == [] and not (desk.folder / "out").exists()


def test_a_point_as_words_for_a_script(desk, capsys):
    assert main(["sweep", str(desk.write()), "--line", "2"]) == 0
    assert capsys.readouterr().out == f"train.seed=3\0output_dir={desk.folder}/out/train.seed=3\0"
