"""Likely mistakes of somebody who is new: the sentence says what was given, and what to give instead."""

import pytest

from distlora.cli.parser import parse
from distlora.errors import UserError
from distlora.files.tensor_headers import read_header
from distlora.models.hub import resolve_path
from distlora.recipe.load import load_recipe
from distlora.sweeps.file import read_sweep_file
from distlora.training.evaluated import subject_of_run
from distlora.training.export_run import export_run

RECIPE = """\
model: {path: some/model}
method: {name: lora, rank: 4}
data: {task: arithmetic}
output_dir: runs/x
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(text: str, *overrides: str) -> str:
    with open("x.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(UserError) as caught:
        load_recipe("x.yaml", overrides)
    return str(caught.value)


# ---------------------------------------------------------------------- files that are no recipes


@pytest.mark.parametrize(
    "text",
    [
        "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ntemplate: llama3\noutput_dir: x\n",
        "base_model: a/b\nadapter: lora\ndatasets: [{path: c, type: alpaca}]\noutput_dir: x\n",
        "name: env\nchannels: [conda-forge]\ndependencies: [python]\n",
    ],
)
def test_a_file_of_another_program_is_no_recipe(text):
    assert refused(text) == (
        "x.yaml is no recipe: it has none of the sections model, method, data, train; begin with one that "
        "`distlora recipes` lists"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 3}}', "is a DeepSpeed config and no recipe; name it in a recipe's"),
        ("recipe: y.yaml\ngrid: {train.lr: [1]}\n", "is a sweep and no recipe; give it to `distlora sweep`"),
    ],
)
def test_another_file_of_a_run_is_named(text, said):
    assert f"x.yaml {said}" in refused(text)


def test_a_recipe_is_no_sweep(folder):
    (folder / "x.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="x.yaml is a recipe and no sweep; give it to `distlora train`"):
        read_sweep_file("x.yaml")


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("override", "home"),
    [
        ("lr=1", "train.lr (the key lr of train)"),
        ("rank=8", "method.rank (the key rank of method)"),
        ("train.rank=8", "method.rank (the key rank of method)"),
        ("data.lr=1", "train.lr (the key lr of train)"),
        ("learning_rate=1", "train.lr (the key lr of train)"),
        ("train.learning_rate=1", "train.lr (the key lr of train)"),
        (
            "train.gradient_accumulation_steps=8",
            "train.global_batch_size (the key global_batch_size of train)",
        ),
        ("method.target_modules=[q_proj]", "targets"),
        ("method.r=8", "method.rank (the key rank of method)"),
        ("method.targets=[q_proj]", "targets"),
        ("data.cutoff_len=8", "data.max_length (the key max_length of data)"),
    ],
)
def test_a_key_of_another_place_or_program_is_shown_its_own(override, home):
    key = override.partition("=")[0]
    assert refused(RECIPE, override) == f"override {key}: unknown key, did you mean {home}?"


def test_a_misspelt_key_is_still_compared_with_its_neighbours():
    assert "method.rnak: unknown key, did you mean rank?" in refused(RECIPE, "method.rnak=1")
    assert "path.x" not in refused(RECIPE, "train.path=1")  # of several sections: none is better


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method=dora", 'found "dora", wanted a mapping with a name, as in method: {name: dora}'),
        ("model=a/b", 'found "a/b", wanted a mapping, as in model: {path: "a/b"}'),
        ("data=rows.jsonl", 'found "rows.jsonl", wanted a mapping, as in data: {path: "rows.jsonl"}'),
        ("deepspeed=3", "found 3, wanted the path of a DeepSpeed config, such as configs/zero/zero3.json"),
        ("deepspeed=true", "found true, wanted the path of a DeepSpeed config"),
        ("method.name=LoRA", "no method is called LoRA, did you mean lora?"),
        ("output_dir=$SCRATCH/run", "no shell fills in its variable; write the path out"),
        ("model.path=${MODELS}/llama", "no shell fills in its variable; write the path out"),
    ],
)
def test_a_value_in_the_wrong_form_shows_the_right_one(override, said):
    assert said in refused(RECIPE, override)


def test_a_name_with_a_dollar_that_is_there_is_taken(folder):
    (folder / "$x").mkdir()
    assert load_recipe(folder / "y.yaml" if (folder / "y.yaml").write_text(RECIPE) else "", ["output_dir=$x"])


def test_an_override_like_an_option_is_shown_without_dashes(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "x.yaml", "--train.lr=1e-3"])
    assert "write overrides without dashes, as in train.lr=1e-3" in capsys.readouterr().err


# ---------------------------------------------------------------------- directories


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_config.json", "it holds an adapter and no model"),
        ("manifest.json", "it is of a run, and no model"),
        ("recipe.yaml", "it is of a run, and no model"),
        ("q4.gguf", "GGUF files are not read"),
    ],
)
def test_a_directory_that_is_no_model_is_named(folder, file, said):
    (folder / "model").mkdir()
    (folder / "model" / file).write_text("{}")
    with pytest.raises(UserError, match=said):
        resolve_path(str(folder / "model"))


def test_an_address_of_the_hub_is_shown_as_a_name():
    with pytest.raises(UserError, match="is an address; give the name of the repository, a/b"):
        resolve_path("https://huggingface.co/a/b")


def test_a_pointer_in_the_place_of_weights_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(Exception, match="it is a pointer of Git LFS and not the file itself"):
        read_header(folder / "model.safetensors")


@pytest.mark.parametrize(
    "verb", [lambda path: subject_of_run(path, ()), lambda p: export_run(p, "peft", "x")]
)
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("manifest.json", "it is a checkpoint; name the directory of its run"),
        ("adapter_config.json", "it is an adapter"),
        (None, "there is no such directory"),
    ],
)
def test_what_is_no_run_is_named(folder, verb, file, said):
    path = folder / "given"
    if file:
        path.mkdir()
        (path / file).write_text("{}")
    with pytest.raises(UserError, match=said):
        verb(path)
