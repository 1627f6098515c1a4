"""Recipes, overrides, sweeps, DeepSpeed configs and hostfiles that are made to break a parser: one sentence
each, in well under a second."""

import json
import math
import re
import time

import pytest

from distlora.cli.main import main
from distlora.cluster import nodelist
from distlora.cluster.hostfile import read_hostfile
from distlora.cluster.rendezvous import complete_environment, find_place
from distlora.cluster.topology import topology_from_environment
from distlora.errors import UserError
from distlora.recipe.deepspeed_file import read_deepspeed
from distlora.recipe.load import load_recipe
from distlora.recipe.yaml_text import dump_yaml, parse_yaml
from distlora.sentences import nearest
from distlora.sweeps.file import read_sweep_file
from distlora.sweeps.lines import read_sweep
from tests.fuzz.recipes import RECIPE
from tests.fuzz.rule import problem_with

#: Seconds; far more than any of them takes.
QUICK = 2.0


def refused(read, *given) -> str:
    """The sentence, which came at once."""
    begun = time.process_time()
    with pytest.raises(UserError) as error:
        read(*given)
    assert time.process_time() - begun < QUICK
    assert problem_with(str(error.value)) is None
    return str(error.value)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder, text, name="recipe.yaml"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


# ---------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("plain", "value"),
    [
        ("1e-3", 0.001), ("1.5E+2", 150.0), (".5", 0.5), ("5.", 5.0), ("-7", -7), ("+7", 7), ("0", 0),
        (".inf", math.inf), ("~", None), ("NULL", None), ("True", True), ("false", False),
        *((text, text) for text in ("yes", "No", "on", "OFF", "y", "n", "nan", "inf", "Infinity", "tRue")),
        *((text, text) for text in ("2026-01-31", "2026-01-31 10:00:00", "1:30", "190:20:30.15")),
        *((text, text) for text in ("010", "0o10", "0x1F", "0b101", "0b_", "1_000", "1__", "00", "-0x1")),
        ("=", "="), ("<<", "<<"),
        ("١٢", "١٢"), ("1e", "1e"), ("1e-", "1e-"), ("e5", "e5"), (".", "."), ("-", [None]), ("+", "+"),
    ],
)  # fmt: skip
def test_plain_words_are_those_of_json_or_texts(plain, value):
    assert parse_yaml(plain, "x") == value and parse_yaml(
        f"a: [{plain}]" if plain != "-" else "a: [null]", "x"
    )
    if isinstance(value, str):
        assert parse_yaml(dump_yaml({plain: plain}), "x") == {plain: plain}


@pytest.mark.parametrize("value", [True, None, 3, 0.001, 1e-30, -1e300, "1e4", "010", "yes", [], {"a": [{}]}])
def test_what_is_written_is_read_again(value):
    assert dump_yaml(parse_yaml(dump_yaml({"a": value}), "x")) == dump_yaml({"a": value})
    shared = [value]
    assert parse_yaml(dump_yaml({"a": shared, "b": shared}), "x") == {"a": [value], "b": [value]}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "line 1, column 5: &a0 names a value"),
        ("&a [*a]", "line 1, column 1: &a names a value"),
        ("a: *b", "line 1, column 4: .b stands for a value elsewhere"),
        ("<<: *b", "<< merges a mapping that is elsewhere, which is not read; write its keys out"),
        ("!!timestamp x", "line 1, column 1: !!timestamp names a type"),
        ("a: !!int x", "line 1, column 4: !!int names a type"),
        ("!!map [1]", "!!map names a type"),
        ("!!binary aGk=: 1", "!!binary names a type"),
        ("!!python/object/apply:os.system [x]", "names a type"),
        ("a: !x {b: 1}", "!x names a type"),
        ("[" * 100_000, "values lie in more than 32 others"),
        ("- " * 10_000, "values lie in more than 32 others"),
        ("{a: " * 5_000, "values lie in more than 32 others"),
        ("? " * 5_000, "a list or a mapping is no key"),
        ("[a]: 1", "a list or a mapping is no key"),
        ("9" * 5000, "a number has 5,000 characters"),
        ("a: -" + "1" * 400 + ".5e3", "characters, wanted at most 40"),
        ('a: "\\0"', "holds a NUL or half of a character"),
        ('a: "\\ud800"', "not YAML"),
        ("\udcff", "half of a character"),
        ("a\x07", r"U\+0007 at line 1"),
        ("a: 1\n---\nb: 2", "second document"),
        ("'': 1", "a key is empty"),
        ("? : 1", "no key|a key is empty"),
        ("a: 1\n1: 2\n'1': 3", "line 3, column 1: key 1 is given twice"),
        ("x" * (1 << 20) + "x", "has more than 1,048,576 characters"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_made_to_break_the_parser_is_one_sentence(text, told):
    sentence = refused(parse_yaml, text, "x.yaml")
    assert re.search(told, sentence) and sentence.startswith("x.yaml")


def test_many_unknown_keys_take_as_long_as_they_are_many(folder):
    many = RECIPE + "".join(f"key{number}: {{a: 1}}\n" for number in range(20_000))
    assert "key0: unknown key" in refused(load_recipe, written(folder, many))
    inner = RECIPE.replace("lr: 1e-3", ", ".join(f"k{number}: 1" for number in range(20_000)))
    assert "train.k0: unknown key" in refused(load_recipe, written(folder, inner))


def test_a_long_name_is_compared_with_nothing():
    begun = time.process_time()
    assert nearest("a" * 100_000, ["a" * 99_999]) == "" == nearest("ax", ["b" * 10**6] * 10)
    assert nearest("rnk", ["rank", "r" * 1000]) == ", did you mean rank?"
    nearest("key1x", (f"key{number}" for number in range(200_000)))
    assert time.process_time() - begun < QUICK


@pytest.mark.parametrize(
    "override", ["a." * 40 + "a=1", "data.fields." + ".".join("a" * 5000) + "=1", "." * 10**5]
)
def test_a_key_with_thousands_of_dots_is_refused(folder, override):
    assert "override" in refused(load_recipe, written(folder, RECIPE), [override])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps=9" + "9" * 30, "beyond the whole numbers of 64 bits"),
        ("method.rank=9223372036854775808", "beyond the whole numbers of 64 bits"),
        ("train.lr=.nan", "found NaN, wanted a finite number"),
        ("train.clip=1e999", "found Infinity, wanted a finite number"),
        ("train.steps=1_000", 'found "1_000", wanted a whole number'),
        ("model.gradient_checkpointing=yes", 'found "yes", wanted true or false'),
        ("deepspeed={overlap_comm: no}", "deepspeed.overlap_comm: found no, wanted true or false"),
        ("deepspeed.zero_optimization.stage=.inf", "stage: found inf, wanted a finite number"),
        ("deepspeed={a: [off]}", "deepspeed.a.0: found off"),
        ("data.split=train[:١٢]", None),
    ],
)  # fmt: skip
def test_values_that_no_setting_takes(folder, override, told):
    if told is None:
        from distlora.data.sources import parse_split

        refused(parse_split, load_recipe(written(folder, RECIPE), [override]).data.split)
    else:
        assert told in refused(load_recipe, written(folder, RECIPE), [override])


def test_words_for_yes_and_no_may_be_labels(folder):
    assert load_recipe(written(folder, RECIPE), ["data.labels=[no, yes]"]).data.labels == ["no", "yes"]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("read", [load_recipe, read_sweep_file, read_sweep, read_hostfile, read_deepspeed])
def test_files_that_are_none(folder, read):
    (folder / "link").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    long = "a" * 300
    for path in ("a\0b", "\ud800", long, "link", "loop", ".", "recipe.yaml/x", "/dev/zero", "/dev/null"):
        refused(read, path)
    refused(read, written(folder, b"a: \xff\xfe", "bytes"))
    assert "1,048,576" in refused(read, written(folder, b"#\n" * (1 << 20), "long")) or read is read_deepspeed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "too deep"),
        ('{"a":' * 50_000, "too deep"),
        ('{"a": ' + "9" * 5000 + "}", "has 5,000 digits"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "beyond all numbers"),
        ('{"a": 1, "b": 2, "a": 3}', "key a is given twice"),
        ('{"a": {"b": 1, "b": 2}}', "key b is given twice"),
        ("[1]", "a JSON object is wanted"),
    ],
)  # fmt: skip
def test_a_deepspeed_config_that_is_made_to_break_the_parser(folder, text, told):
    written(folder, text, "zero.json")
    assert told in refused(read_deepspeed, "zero.json")


def test_keys_that_are_given_twice_are_found_in_linear_time(folder):
    names = [f"k{number}" for number in range(50_000)]
    pairs = ", ".join(f"{json.dumps(name)}: 1" for name in (*names, names[-1]))
    written(folder, f"{{{pairs}}}", "zero.json")
    assert "key k49999 is given twice" in refused(read_deepspeed, "zero.json")


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("{" + ", ".join(f"a{n}: [1, 2]" for n in range(60)) + "}", "more than 10,000 points"),
        ("{" + ", ".join(f"k{n}: [1]" for n in range(20_000)) + ", k7.b: [1]}", "sets k7"),
        ("{a: [1], a.b.c: [2]}", "sets a, and the grid sets a.b.c"),
    ],
    ids=["points", "keys", "sections"],
)
def test_a_grid_that_is_made_to_take_all_memory_or_time(folder, grid, told):
    written(folder, RECIPE)
    assert told in refused(
        read_sweep_file, written(folder, f"recipe: recipe.yaml\ngrid: {grid}", "sweep.yaml")
    )


# ---------------------------------------------------------------------- hosts and ranks


@pytest.mark.parametrize("slots", ["9" * 5000, "9" * 7, "-1", "1e3", "0x8", "8.0", "", "0" * 10])
def test_slots_that_no_host_has(folder, slots):
    assert "hosts:1" in refused(read_hostfile, written(folder, f"node1 slots={slots}\n", "hosts"))


@pytest.mark.parametrize(
    "nodes",
    ["n[1-" + "9" * 5000 + "]", "n[" + "9" * 5000 + "]", "n[3-1]", "a[1]" * 5000, "n[١-٣]", "n[1-2-3]"],
)
def test_lists_of_nodes_that_slurm_never_writes(nodes):
    refused(lambda: next(nodelist.hosts(nodes)))


def test_a_long_list_of_nodes_is_read_as_far_as_it_is_asked_for():
    assert next(nodelist.hosts("n[1-999999999999999999]")) == "n1"


@pytest.mark.parametrize(
    "name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "GROUP_RANK", "LOCAL_WORLD_SIZE"]
)
@pytest.mark.parametrize("number", ["9" * 5000, "١٢", "1e3", "-1", "0x1"])
def test_numbers_of_launchers_that_are_none(name, number):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | {name: number}
    refused(lambda: complete_environment(environment, find_place(environment)))


@pytest.mark.parametrize("minutes", ["nan", "inf", "1e999", "-1", "0", "9" * 400, "١٢"])
def test_a_patience_without_end_is_refused(monkeypatch, minutes):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    assert "DEEPSPEED_TIMEOUT" in refused(topology_from_environment)


@pytest.mark.parametrize("word", ["a" * 5000, "a\nb", "\x1b[2J", "--" + "b" * 9000, "\udcff"])
def test_words_that_no_verb_takes_are_told_in_one_line(word, capsys, folder):
    for words in ([word], ["status", "r", word], ["export", "r", "--format", word, "--out", "o"]):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        last = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and last.startswith("distlora") and last.isprintable() and len(last) < 2200


@pytest.mark.parametrize("number", ["9" * 5000, "١٢", "1_000", "nan", "inf", "0x10", ""])
@pytest.mark.parametrize(
    "words",
    [
        ("sweep", "s.yaml", "--point"), ("sweep", "lines", "--line"), ("export", "r", "--step"),
        ("eval", "r", "--limit"),
        ("doctor", "--port"), ("doctor", "--limit"), ("methods", "--rank"), ("status", "r", "--since"),
        ("plan", "r", "--nodes"), ("plan", "r", "--gpu-memory"), ("report", "r", "--out", "o", "--smooth"),
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)  # fmt: skip
def test_numbers_on_the_command_line_are_plain_digits(words, number, capsys, folder):
    try:
        code = main([*words, number])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err
    assert code == 2 and "Traceback" not in told and len(told.splitlines()[-1]) < 300
