"""Recipes: what is accepted, what it becomes, and the sentence for each mistake."""

import json
import os

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from distlora.errors import UserError
from distlora.methods import registry
from distlora.methods.lora import LoRA
from distlora.recipe.deepspeed_config import plan_batches, resolve_deepspeed
from distlora.recipe.load import dump_recipe, load_recipe, load_run_recipe, run_identity
from distlora.recipe.sections import FORMAT, Recipe

MINIMAL = """\
model: {path: some/model}
method: {name: lora_sb, rank: 4, init: {samples: 32}}
data: {task: arithmetic, eval_split: test}
output_dir: runs/x
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in its own folder, with a recipe `x.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(MINIMAL)
    return tmp_path


def load(*overrides, text=None):
    if text is not None:
        with open("x.yaml", "w") as file:
            file.write(text)
    return load_recipe("x.yaml", overrides)


def sentence(*overrides, text=None):
    with pytest.raises(UserError) as error:
        load(*overrides, text=text)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("text", ["nf4", "{kind: nf4}", "{kind: nf4, double: true, compute_dtype: null}"])
def test_a_kind_of_quantisation_may_stand_alone(text):
    recipe = load(f"model.quantization={text}")
    assert recipe.model.quantization.model_dump() == {"kind": "nf4", "double": True, "compute_dtype": None}
    assert load(text=dump_recipe(recipe)) == recipe and load(text=MINIMAL).model.quantization is None
    assert run_identity(recipe) != run_identity(load(text=MINIMAL))


def test_defaults():
    recipe = load()
    assert (recipe.train.epochs, recipe.train.steps, recipe.train.lr, recipe.train.clip) == (
        1.0,
        None,
        1e-4,
        1.0,
    )
    assert recipe.targets == "all-linear" and recipe.deepspeed is None and recipe.notes == ()
    assert recipe.model.dtype == "bfloat16" and recipe.data.max_length == 512
    assert (
        type(recipe.method).__name__ == "LoRASB"
        and recipe.method.rank == 4
        and recipe.method.init.samples == 32
    )


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("1E+2", 100.0), (".5e-1", 0.05), ("2", 2.0), ("1.0e-8", 1e-8)]
)
def test_every_way_to_write_a_number(text, value):
    assert load(f"train.lr={text}").train.lr == value
    assert load(text=MINIMAL + f"train: {{lr: {text}}}\n").train.lr == value


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj", ["q_proj"]),
        ("'*.mlp.*'", ["*.mlp.*"]),
        ("all-linear", "all-linear"),
        ("experts", "experts"),
    ],
)
def test_one_name_is_a_list_of_targets(text, targets):
    assert load(f"targets={text}").targets == targets
    assert load(f"targets={{include: {text}}}").targets.include in (targets, [targets])


def test_overrides_are_yaml_and_apply_in_order():
    recipe = load(
        "train.lr=1e-3", "train.lr=2e-3", "targets=[q_proj, v_proj]", "method.init.eta=search",
        "data.path='5'", "data.fields.prompt=question", "train.optimizer={name: sgd, momentum: 0.9}",
        "train.steps=", "model.path=a=b",
    )  # fmt: skip
    assert (
        recipe.train.lr == 2e-3
        and recipe.targets == ["q_proj", "v_proj"]
        and recipe.method.init.eta == "search"
    )
    assert (
        recipe.data.path == "5"
        and recipe.data.fields == {"prompt": "question"}
        and recipe.train.steps is None
    )
    assert recipe.train.optimizer.name == "sgd" and recipe.train.optimizer.momentum == 0.9
    assert recipe.model.path == "a=b"


def test_labels_that_are_whole_numbers_need_no_quotes():
    assert load("data.task=classification", "data.labels=[-1, 0, x]").data.labels == ["-1", "0", "x"]


@pytest.mark.parametrize("off", ["0", "null"])
def test_zero_and_null_turn_off(off):
    keys = ("eval_every", "save_every", "clip", "steps", "exact_match_samples")
    train = load(*(f"train.{key}={off}" for key in keys)).train
    assert (train.eval_every, train.save_every, train.clip, train.steps) == (None, None, None, None)
    assert train.exact_match_samples == 0


def test_epochs_may_be_off_where_steps_are_given():
    assert load("train.epochs=0", "train.steps=5").train.epochs is None


def test_recipes_can_be_built_in_python():
    recipe = Recipe(
        model={"path": "m"}, method={"name": "lora", "rank": 2}, data={"task": "arithmetic"}, output_dir="o"
    )
    assert recipe.method.rank == 2 and recipe.train.seed == 42
    with pytest.raises(ValueError, match="frozen"):
        recipe.output_dir = "p"


# ---------------------------------------------------------------------- another method


def test_another_method_keeps_what_it_has_and_tells_what_it_dropped():
    recipe = load("method.name=lora", "method.alpha=8")
    assert recipe.method.model_dump() == {
        "name": "lora",
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "modules_to_save": (),
        "from": None,
    }
    assert recipe.notes == ("method lora has no method.init: dropped from what x.yaml says",)


def test_the_same_method_drops_nothing():
    recipe = load("method.name=lora_sb")
    assert recipe.method.init.samples == 32 and recipe.notes == ()


def test_a_key_of_an_override_is_never_dropped():
    assert sentence("method.name=lora", "method.init.eta=search") == (
        "override method.init.eta: method lora has no method.init"
    )
    assert sentence("method.name=lora", "method.init=5").startswith("override method.init: unknown key")


def test_nested_keys_that_another_method_lacks(monkeypatch):
    class Probe(BaseModel):
        model_config = ConfigDict(extra="forbid")
        gamma: float = 16

    class Other(LoRA):  # no default name: not in the registry of the other tests
        name: str
        init: Probe = Probe()

    for module in ("sections", "load"):
        monkeypatch.setattr(f"distlora.recipe.{module}.registry", lambda: registry() | {"other": Other})
    recipe = load("method.name=other", "method.init.gamma=2")
    assert recipe.method.init == Probe(gamma=2) and recipe.method.rank == 4
    assert recipe.notes == ("method other has no method.init.samples: dropped from what x.yaml says",)
    assert load("method.name=other", "method.init={gamma: 3}").notes == ()
    assert sentence("method.name=other", "method.init={samples: 3}").startswith(
        "override method.init.samples: unknown key"
    )


def test_a_typo_in_the_file_is_told_whichever_method_runs():
    text = MINIMAL.replace("rank: 4", "rnak: 4")
    expected = "x.yaml: method.rnak: unknown key, did you mean rank?"
    assert sentence(text=text) == sentence("method.name=lora", text=text) == expected


def test_a_whole_method_can_be_given():
    assert load("method={name: lora, rank: 2}").method.rank == 2


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.lrr=1e-3", "override train.lrr: unknown key, did you mean lr?"),
        ("trian.lr=1e-3", "override trian: unknown key, did you mean train?"),
        ("method.rnak=3", "override method.rnak: unknown key, did you mean rank?"),
        ("method.init.etaa=3", "override method.init.etaa: unknown key, did you mean eta?"),
        ("train.optimizer.beta=1", "override train.optimizer.beta: unknown key, did you mean betas?"),
        ("model.zzz=1",
         "override model.zzz: unknown key; known here: path, dtype, attention, gradient_checkpointing, "
         "quantization"),
        ("train.lr=fast", 'override train.lr: found "fast", wanted a number or search'),
        ("train.lr='1e-3'", 'override train.lr: found "1e-3", wanted a number or search'),
        ("train.lr=.inf", "override train.lr: found Infinity, wanted a finite number or search"),
        ("train.lr=0", "override train.lr: found 0, wanted a number above 0 or search"),
        ("train.lr=true", "override train.lr: found true, wanted a number or search"),
        ("train.seed=true", "override train.seed: found true, wanted a whole number"),
        ("train.steps=1.5", "override train.steps: found 1.5, wanted a whole number"),
        ("train.steps=-1", "override train.steps: found -1, wanted a number of at least 0"),
        ("train.micro_batch_size=0",
         "override train.micro_batch_size: found 0, wanted a number of at least 1"),
        ("train.warmup_ratio=1", "override train.warmup_ratio: found 1, wanted a number below 1"),
        ("train.clip=-1", "override train.clip: found -1, wanted a number of at least 0"),
        ("train.eval_samples=0", "override train.eval_samples: found 0, wanted a number of at least 1"),
        ("train.schedule=cosin",
         'override train.schedule: found "cosin", wanted cosine, linear, constant, constant_with_warmup, '
         "cosine_with_restarts, cosine_with_min_lr, cosine_warmup_with_min_lr, polynomial, inverse_sqrt or "
         "warmup_stable_decay"),
        ("train.optimizer.betas=[0.9, x]", 'override train.optimizer.betas.1: found "x", wanted a number'),
        ("train.optimizer.betas=[0.9]", "override train.optimizer.betas.1 is missing"),
        ("train.optimizer.betas=[0.9, 0.99, 1]",
         "override train.optimizer.betas: found [0.9, 0.99, 1], wanted a list of at most 2"),
        ("train.optimizer.betas=[0.9, 1]",
         "x.yaml: train.optimizer: betas are [0.9, 1.0], wanted two numbers below 1"),
        ("train.optimizer.momentum=0.9",
         "x.yaml: train.optimizer: momentum is for sgd, and name is adamw; set momentum to 0 or name to sgd"),
        ("train.optimizer.name=adam", 'override train.optimizer.name: found "adam", '
         "wanted adamw, sgd, adamw8bit, paged_adamw or paged_adamw8bit"),
        ("train.optimizer.lora_plus_ratio=16",
         "x.yaml: train.optimizer.lora_plus_ratio=16 is for methods that train B, and lora_sb trains R; "
         "set it to null"),
        ("train.optimizer.lora_plus_ratio=0",
         "override train.optimizer.lora_plus_ratio: found 0, wanted a number above 0"),
        ("train=5", "override train: found 5, wanted a mapping"),
        ("train.epochs=0",
         "x.yaml: train: epochs and steps are both off; set one of them to a number above 0"),
        ("train.lr.x=5", "override train.lr.x: train.lr is 1, which has no keys"),
        ("model.dtype=bf16", 'override model.dtype: found "bf16", wanted bfloat16 or float32'),
        ("model.gradient_checkpointing=1",
         "override model.gradient_checkpointing: found 1, wanted true or false"),
        ("model.quantization=fp4", 'override model.quantization: found "fp4", wanted nf4 or int8'),
        ("model.quantization={kind: nf4, duoble: true}",
         "override model.quantization.duoble: unknown key, did you mean double?"),
        ("model={}", "override model.path is missing"),
        ("data.path=5", "override data.path: found 5, wanted a text (put it in quotes)"),
        ("data.task=", "override data.task: found null, wanted a text"),
        ("data.fields={a: [b]}", 'override data.fields.a: found ["b"], wanted a text'),
        ("output_dir=''", 'override output_dir: found "", wanted a text that is not empty'),
        (
            "targets=7",
            'override targets: found 7, wanted all-linear or experts or a list or a mapping',
        ),
        (
            "targets=[]",
            "override targets: found [], wanted all-linear or experts or a list of at least 1 or a mapping",
        ),
        (
            "data.labels=[false, true]",
            "override data.labels.0: found false, wanted a text (put it in quotes)",
        ),
        (
            "data.labels=[a, null]",
            "override data.labels.1: found null, wanted a text "
            "(YAML reads null and ~ as null: put the word in quotes)",
        ),
        ("data.labels=[1.0, a]", "override data.labels.0: found 1.0, wanted a text (put it in quotes)"),
        ("targets=[q_proj, 1]", "override targets.1: found 1, wanted a text (put it in quotes)"),
        ("method.rank=0", "override method.rank: found 0, wanted a number of at least 1"),
        ("method.init.eta=serch",
         'override method.init.eta: found "serch", wanted a number or search or schedule'),
        ("method.init=5", "override method.init: found 5, wanted a mapping"),
        ("deepspeed=5", "override deepspeed: found 5, wanted the path of a DeepSpeed config, "
         "such as configs/zero/zero3.json, its content, or null"),
        ("deepspeed=no.json",
         "override deepspeed: no file no.json in the current folder, the recipe's or one above it; "
         "give a JSON file"),
        ("train.lr", "override train.lr: wanted dotted.key=value, as in train.lr=1e-3"),
        ("=5", "override =5: wanted dotted.key=value, as in train.lr=1e-3"),
        ("train..lr=5", "override train..lr=5: wanted dotted.key=value, as in train.lr=1e-3"),
    ],
)  # fmt: skip
def test_a_bad_override(override, expected):
    # The section exists in the file, so that only what the override itself says is blamed on it.
    assert sentence(override, text=MINIMAL + "train: {lr: 1, optimizer: {name: adamw}}\n") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (MINIMAL + "trian: {}\n", "x.yaml: trian: unknown key, did you mean train?"),
        (MINIMAL + "train: {lr: fast}\n", 'x.yaml: train.lr: found "fast", wanted a number or search'),
        (MINIMAL + "train: {lr: 0}\n", "x.yaml: train.lr: found 0, wanted a number above 0 or search"),
        (MINIMAL + "train: {lr: search, lr_search: {rates: 1}}\n",
         "x.yaml: train.lr_search.rates: found 1, wanted a number of at least 2"),
        (MINIMAL + "train: {lr_search: {lowest: 1e-2, highest: 1e-3}}\n",
         "x.yaml: train.lr_search: lowest is 0.01, wanted less than highest, which is 0.001"),
        (MINIMAL + "train: {lr_search: {step: 3}}\n",
         "x.yaml: train.lr_search.step: unknown key, did you mean steps?"),
        (MINIMAL + "train: {lr: {search: true}}\n",
         'x.yaml: train.lr: found {"search": true}, wanted a number or search'),
        (MINIMAL + "train: {optimizer: {epz: 1}}\n",
         "x.yaml: train.optimizer.epz: unknown key, did you mean eps?"),
        (MINIMAL + "train.lr: 5\n",
         "x.yaml: train.lr: unknown key; write lr as a key of train, as in train: {lr: …}"),
        (MINIMAL + "train:\n", "x.yaml: train: found null, wanted a mapping"),
        (MINIMAL + "train: {1: 2}\n", "x.yaml: train.1: unknown key; known here: epochs, steps,"),
        (MINIMAL + "output_dir: y\n",
         "x.yaml: line 5, column 1: key output_dir is given twice"),
        (MINIMAL + "train: {exact_match_samples: 5}\n", None),
        (MINIMAL.replace(", eval_split: test", "") + "train: {exact_match_samples: 5}\n",
         "x.yaml: train.exact_match_samples=5 needs data.eval_split; name the split or set it to 0"),
        (MINIMAL.replace("output_dir: runs/x\n", ""), "x.yaml: output_dir is missing"),
        (MINIMAL.replace("task: arithmetic, ", ""), "x.yaml: data.task is missing"),
        (MINIMAL.replace("name: lora_sb, ", ""), "x.yaml: method.name is missing; methods: dora, full, "),
        (MINIMAL.replace("samples: 32", "smaples: 32"),
         "x.yaml: method.init.smaples: unknown key, did you mean samples?"),
        ("method: lora\n",
         'x.yaml: method: found "lora", wanted a mapping with a name, as in method: {name: lora} ('),
        ("output_dir: x\n", "x.yaml: model is missing"),
        ("",
         "x.yaml is no recipe: wanted a mapping with the keys model, method, targets, data, train, "
         "deepspeed, output_dir"),
        ("- a\n", "x.yaml is no recipe: wanted a mapping with the keys model, "),
        ("a: [1\n", "x.yaml is not YAML: "),
        ("a: !!python/name:os.system x\n",
         "x.yaml: line 1, column 4: !!python/name:os.system names a type, which is not read"),
    ],
)  # fmt: skip
def test_a_bad_file(text, expected):
    if expected is None:
        load(text=text)
    else:
        assert sentence(text=text).startswith(expected)


@pytest.mark.parametrize("method, hint", [("lorasb", ", did you mean lora_sb?"), ("zzz", "")])
def test_an_unknown_method(method, hint):
    expected = f"method.name: no method is called {method}{hint} (methods: dora, full, "
    assert sentence(f"method.name={method}").startswith(f"override {expected}")
    assert sentence(text=MINIMAL.replace("lora_sb", method)).startswith(f"x.yaml: {expected}")


def test_no_such_recipe(folder):
    with pytest.raises(
        UserError, match="^nowhere.yaml: no such recipe; give the path of a YAML file, or a name"
    ):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match="is a directory; give a recipe's file"):
        load_recipe(folder)
    (folder / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="^x.yaml cannot be read as a recipe: .*utf-8"):
        load_recipe("x.yaml")


# ---------------------------------------------------------------------- dump and identity


@pytest.mark.parametrize("path", ["some/model", "1e4", "2020-01-01", "yes", "5", "ünï: #x", " x", "null"])
def test_a_dump_is_the_same_recipe(path, folder):
    config = {"train_batch_size": "auto", "x": [1, "1e4"]}
    (folder / "zero.json").write_text(json.dumps(config))
    recipe = load("train.lr=3e-7", "targets=[a, b]", "deepspeed=zero.json", f"model.path={json.dumps(path)}")
    text = dump_recipe(recipe)
    os.remove("zero.json")
    again = load(text=text)
    assert again == recipe and again.model.path == path and dump_recipe(again) == text
    assert again.deepspeed == config
    assert (
        again.deepspeed_source == "the recipe's deepspeed section" and recipe.deepspeed_source == "zero.json"
    )


def test_a_dump_names_every_key():
    content = yaml.safe_load(dump_recipe(load()))
    keys = ["format", "model", "method", "targets", "data", "train", "deepspeed", "output_dir"]
    assert list(content) == keys
    assert content["method"]["init"]["orthonormal"] is True and content["train"]["keep_checkpoints"] == 2


def test_unequal_recipes():
    assert load() != load("train.lr=1")
    assert load() != "recipe"


@pytest.mark.parametrize(
    "override",
    ["deepspeed={}", "train.micro_batch_size=2", "train.eval_every=7", "train.save_every=7",
     "train.keep_checkpoints=7", "train.eval_samples=7", "train.exact_match_samples=7", "output_dir=y",
     "model.gradient_checkpointing=false", "model.attention=eager", "data.max_new_tokens=7",
     "train.lr_search.steps=7"],
)  # fmt: skip
def test_what_a_resume_may_change(override):
    assert load(override) != load()
    assert run_identity(load(override)) == run_identity(load())


@pytest.mark.parametrize(
    "override",
    ["train.lr=1", "train.seed=1", "train.steps=7", "train.global_batch_size=7", "train.clip=2",
     "train.optimizer.eps=1", "method.rank=2", "method.init.eta=1", "targets=[a]", "model.path=b",
     "model.dtype=float32", "data.split=test", "train.lr=search"],
)  # fmt: skip
def test_what_a_resume_may_not_change(override):
    identity = run_identity(load(override))
    assert identity != run_identity(load())
    assert json.loads(json.dumps(identity)) == identity


def test_how_a_rate_is_searched_decides_the_numbers_of_a_run_that_searches():
    searching = run_identity(load("train.lr=search"))
    assert run_identity(load("train.lr=search", "train.lr_search.steps=7")) != searching
    assert searching["train"]["lr"] == "search", "whatever rate was found"


# ---------------------------------------------------------------------- format


def test_what_a_user_writes_is_in_the_newest_format():
    assert load().format == FORMAT == Recipe(**yaml.safe_load(MINIMAL)).format
    assert yaml.safe_load(dump_recipe(load()))["format"] == FORMAT


def test_a_run_that_does_not_say_its_format_is_of_the_first():
    load(text=MINIMAL)
    assert load_run_recipe("x.yaml").format == 1 and load("train.lr=1").format == FORMAT


@pytest.mark.parametrize("read", [load_recipe, load_run_recipe])
@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_format_that_is_said_is_kept(read, number, folder):
    (folder / "x.yaml").write_text(dump_recipe(load().in_format(number)))
    again = read("x.yaml")
    assert again.format == number and again.in_format(FORMAT) == load(text=MINIMAL)
    assert again.model_copy(update={"targets": ["a"]}).format == number


def test_the_format_is_no_part_of_what_two_recipes_must_share_to_resume():
    assert run_identity(load().in_format(1)) == run_identity(load())
    assert "format" not in run_identity(load()) and load().in_format(1) != load()


@pytest.mark.parametrize("read", [load_recipe, load_run_recipe])
def test_a_format_of_the_future_is_one_sentence(read, folder):
    (folder / "x.yaml").write_text(f"format: {FORMAT + 1}\nunheard: of\n")
    with pytest.raises(UserError) as refused:
        read("x.yaml")
    assert str(refused.value) == (
        f"x.yaml was written by a newer distlora: its format is {FORMAT + 1}, and this one knows "
        f"those up to {FORMAT}; install the newer distlora"
    )


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.0", "true", "null", "[1]"])
def test_a_format_is_a_number(text):
    expected = f"^x.yaml: format: found .*, wanted a whole number from 1 to {FORMAT}; remove the line"
    with pytest.raises(UserError, match=expected):
        load(text=f"format: {text}\n{MINIMAL}")


def test_the_format_is_no_key():
    with pytest.raises(UserError, match="^override format: unknown key; known here: model, method, "):
        load("format=1")
    assert "format" not in Recipe.model_fields


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "whole, micro, world, steps", [(32, 1, 1, 32), (32, 1, 8, 4), (12, 2, 3, 2), (8, 8, 1, 1)]
)
def test_accumulation(whole, micro, world, steps):
    assert (
        plan_batches(load(f"train.global_batch_size={whole}", f"train.micro_batch_size={micro}"), world)
        == steps
    )


@pytest.mark.parametrize(
    "whole, world, expected",
    [
        (32, 3, "=32 is not divisible by train.micro_batch_size=2 times 3 ranks; the nearest that is: 30"),
        (1, 1, "=1 is not divisible by train.micro_batch_size=2 times 1 rank; the nearest that is: 2"),
    ],
)
def test_batches_that_do_not_divide(whole, world, expected):
    recipe = load(f"train.global_batch_size={whole}", "train.micro_batch_size=2", "deepspeed={}")
    for check in (plan_batches, lambda *args: resolve_deepspeed(*args, 64)):
        with pytest.raises(UserError) as error:
            check(recipe, world)
        assert str(error.value) == f"train.global_batch_size{expected}"
