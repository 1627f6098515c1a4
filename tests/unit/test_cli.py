"""The command line itself: words into options, errors into one sentence and an exit code, a summary into a
table.
"""

import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distlora.cli import ending, shared, verbs
from distlora.cli.main import main
from distlora.cli.parser import parse
from distlora.cli.summary import next_steps, summary_table
from distlora.errors import TrainingError, UserError
from distlora.training.train import Summary


@pytest.fixture(autouse=True)
def logger_as_before():
    """The program takes hold of its logger, which other tests listen to."""
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """Seconds that the program slept, without sleeping."""
    slept = []
    monkeypatch.setattr("distlora.cli.ending.time.sleep", slept.append)
    return slept


# ---------------------------------------------------------------------- words into options


@pytest.mark.parametrize(
    "words",
    [
        [
            "--local_rank=1",
            "train",
            "x.yaml",
            "train.lr=1",
            "train.seed=2",
        ],  # as DeepSpeed's launcher injects it
        ["train", "x.yaml", "train.lr=1", "train.seed=2", "--local_rank", "1"],
        ["train", "--local-rank", "1", "x.yaml", "train.lr=1", "train.seed=2"],
        ["train", "x.yaml", "train.lr=1", "--local_rank=1", "train.seed=2"],
        ["train", "x.yaml", "--local_rank=1", "train.lr=1", "train.seed=2"],
    ],
)
def test_overrides_and_an_injected_rank_in_any_order(words):
    options = parse(words)
    assert (options.recipe, options.overrides) == ("x.yaml", ["train.lr=1", "train.seed=2"])


@pytest.mark.parametrize(("words", "resume"), [([], None), (["--resume"], True), (["--no-resume"], False)])
def test_resume_has_three_values(words, resume):
    for order in ([*words, "a.b=1"], ["a.b=1", *words]):
        options = parse(["train", "x.yaml", *order])
        assert options.resume is resume and options.overrides == ["a.b=1"]


def test_export_and_eval():
    options = parse(["export", "runs/x", "--format", "peft", "--out", "y", "--step", "5"])
    assert (options.run_dir, options.format, options.out, options.step) == (
        Path("runs/x"),
        "peft",
        Path("y"),
        5,
    )
    assert options.dtype is options.compress_rank is options.max_error is None
    options = parse(
        ["export", "x", "--format", "peft", "--out", "y", "--max-error", "1e-2", "--dtype", "bfloat16"]
    )
    assert (options.max_error, options.dtype) == (0.01, "bfloat16")
    assert parse(["export", "x", "--format", "peft", "--out", "y", "--compress-rank", "8"]).compress_rank == 8
    assert parse(["eval", "runs/x", "a.b=1"]).overrides == ["a.b=1"]
    options = parse(["eval", "--model", "m", "--tasks", "gsm8k", "--data", "a=b", "--data", "c=d", "a.b=1"])
    assert (options.model, options.tasks, options.data) == ("m", "gsm8k", ["a=b", "c=d"])


def test_methods_takes_a_recipe_or_none():
    options = parse(["methods"])
    assert (options.recipe, options.overrides, options.rank, options.model) == (None, [], None, None)
    options = parse(["methods", "x.yaml", "--rank", "16", "a.b=1", "--model", "y"])
    assert (options.recipe, options.overrides, options.rank, options.model) == ("x.yaml", ["a.b=1"], 16, "y")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "required: VERB"),
        (["trian", "x.yaml"], "invalid choice: 'trian'"),
        (["train"], "required: recipe"),
        (["train", "x.yaml", "--resum3"], "unrecognized arguments: --resum3"),
        (["train", "x.yaml", "--resume", "a.b=1", "--fast"], "--fast"),
        (["methods", "--rnk", "8"], "unrecognized arguments: --rnk"),
        (["methods", "--rank", "many"], "'many' is no whole number"),
        (["export", "runs/x", "--format", "peft"], "required: --out"),
        (["export", "runs/x", "--format", "onnx", "--out", "y"], "invalid choice: 'onnx'"),
        (["export", "runs/x", "--format", "peft", "--out", "y", "--max-error", "nan"], "'nan' is no number"),
        (
            ["export", "runs/x", "--format", "peft", "--out", "y", "--compress-rank", "few"],
            "'few' is no whole number",
        ),
        (
            ["export", "runs/x", "--format", "peft", "--out", "y", "--max-error", "1%"],
            "'1%' is no number",
        ),
        (["export", "runs/x", "--format", "peft", "--out", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_misspelt_command(words, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [["trian", "x.yaml"], ["train", "x.yaml", "--resum3"], ["train"]])
def test_a_misspelt_command_is_told_by_the_first_rank_of_a_node(words, monkeypatch, capsys, naps):
    """On another host it may be another command, typed there."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local_rank, told in (("3", "1", False), ("2", "0", True), ("0", "0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert bool(capsys.readouterr().err) == told
    assert naps == [ending.PATIENCE] * 2, "the other ranks speak and leave later"


# ---------------------------------------------------------------------- errors into sentences


def raising(error):
    def verb(options):
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("x is wrong"), 2, "distlora: x is wrong\n"),
        (TrainingError("the loss is nan"), 1, "distlora: the loss is nan\n"),
        (
            PermissionError(13, "Permission denied", "/theirs/recipe.yaml"),
            2,
            "distlora: /theirs/recipe.yaml: permission denied\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, said, monkeypatch, capsys, naps):
    monkeypatch.setitem(verbs.COMMANDS, "methods", raising(error))
    assert main(["methods"]) == code
    assert capsys.readouterr() == ("", said)
    assert naps == []


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(verbs.COMMANDS, "methods", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["methods"])


@pytest.mark.parametrize(
    ("rank", "size"),
    [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")],
)
def test_other_ranks_leave_it_to_rank_0_and_leave_later(rank, size, monkeypatch, capsys, naps):
    """A launcher ends rank 0 as soon as another rank has ended. One that nobody has ended is alone with its
    mistake.
    """
    for name, value in {rank: "1", size: "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    shared, lonely = UserError("x is wrong"), UserError("y is missing here")
    shared.agreed = True
    monkeypatch.setitem(verbs.COMMANDS, "methods", raising(shared))
    assert main(["methods"]) == 2
    assert capsys.readouterr() == ("", "")
    assert naps == [ending.PATIENCE]
    monkeypatch.setitem(verbs.COMMANDS, "methods", raising(lonely))
    assert main(["methods"]) == 2
    assert re.fullmatch(r"distlora \(rank 1 on \S+\): y is missing here\n", capsys.readouterr().err)


@pytest.mark.parametrize(("local_rank", "speaks"), [("0", True), ("1", False)])
def test_the_first_rank_of_a_node_says_what_is_missing_there(local_rank, speaks, monkeypatch, capsys, naps):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    assert main(["plan", "none.yaml"]) == 2
    said = capsys.readouterr().err
    assert (
        bool(re.fullmatch(r"distlora \(rank 5 on \S+\): none.yaml: no such recipe; .*\n", said))
        == speaks
        == bool(said)
    )
    assert naps == [ending.PATIENCE]


def test_log_of_rank_0_and_of_others(capsys):
    for shown in (True, False):
        shared.log_to_terminal(shown)
        logging.getLogger("distlora.training.train").info("told")
        logging.getLogger("distlora.training.train").error("wrong")
    assert capsys.readouterr() == ("", "told\nwrong\nwrong\n")


def test_a_mistyped_command_does_not_wait_for_torch():
    """It takes seconds to import, on every rank."""
    code = "import sys, distlora.cli.main as cli; cli.parse(['train', 'x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# ---------------------------------------------------------------------- the table


def summary(**values) -> Summary:
    known = dict(
        run_dir=Path("runs/x"),
        adapter=Path("runs/x/adapter"),
        trained=100,
        lora_trained=1500,
        rank=4,
        steps=7,
    )
    return Summary(**known | values)


def test_table_of_a_run_with_everything():
    before, after = {"loss": 2.5, "exact_match": 0.125}, {"loss": 1.25, "exact_match": 0.5}
    text = summary_table(
        summary(before=before, after=after, init_seconds=3.21, step_seconds=0.456, tensorboard="tb")
    )
    rows = [line.split() for line in text.splitlines() if line]
    assert rows[:3] == [
        ["before", "after"],
        ["loss", "2.5000", "1.2500"],
        ["exact", "match", "12.5%", "50.0%"],
    ]
    assert "100 (15.0 times fewer than LoRA's 1,500 at rank 4)" in text
    assert "3.2 s" in text and "0.46 s (mean of 7)" in text
    facts = text.rpartition("\n\n")[0].splitlines()
    assert [line.split()[-1] for line in facts[-3:]] == ["runs/x/adapter", "tb", "runs/x/metrics.jsonl"]


@pytest.mark.parametrize("run", ["runs/x", "runs/a run's"])
def test_the_next_commands_are_ones_that_the_program_takes(run):
    told = summary(run_dir=Path(run), after={"loss": 1.0}, tensorboard=f"{run}/tensorboard")
    commands = [shlex.split(command) for _, command in next_steps(told)]
    verbs = {words[1]: parse(words[1:]) for words in commands if words[0] == "distlora"}
    assert {"eval", "export", "report"} <= verbs.keys()
    assert verbs["eval"].run_dir == verbs["export"].run_dir == Path(run)
    assert ["distlora", "monitor", run] in commands
    without = next_steps(summary(run_dir=Path(run)))
    assert not any(
        command.startswith("distlora monitor") or command == f"distlora eval {run}" for _, command in without
    )


def test_table_of_a_run_without_evaluation_or_adapter():
    text = summary_table(summary(adapter=None, lora_trained=0, trained=1234567))
    assert "before" not in text and "LoRA" not in text
    assert "1,234,567" in text
    assert "none: PEFT's format does not hold it; see distlora export --format merged" in text
    assert "none: the DeepSpeed config turns no tensorboard section on" in text


def test_table_does_not_praise_what_is_not_smaller():
    assert "1,500 (beside LoRA's 1,500 at rank 4)" in summary_table(summary(trained=1500))


def test_table_tells_a_learning_rate_that_was_found():
    assert "learning rate" not in summary_table(summary())
    assert "0.00149, found by the search" in summary_table(summary(found_rate=1.49e-3))
