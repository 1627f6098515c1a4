"""The environment report and the log of each rank: what stands in them, what does not, and when."""

import json
import logging
import subprocess
from pathlib import Path

import pytest
import torch

from distlora.cluster import environment
from distlora.cluster.logs import RankLog
from distlora.engine.comm import Comm, Topology
from distlora.errors import UserError

WHERE = {
    "ranks": 4,
    "hosts": {"node1": [0, 1], "node2": [2, 3]},
    "master": "node1:29500",
    "backend": "gloo",
    "launcher": "SLURM",
}


# ---------------------------------------------------------------------- topology


def test_the_topology_in_one_line():
    assert environment.topology_line(WHERE) == (
        "4 ranks on 2 hosts (node1: 0-1; node2: 2-3), master node1:29500, gloo, told by SLURM"
    )
    alone = {"ranks": 1, "hosts": {"here": [0]}, "master": None, "backend": None, "launcher": ""}
    assert (
        environment.topology_line(alone)
        == "1 rank on 1 host (here: 0), no process group, started without a launcher"
    )
    assert "(a: 0, 2-4, 9)" in environment.topology_line(WHERE | {"hosts": {"a": [0, 2, 3, 4, 9]}})


def test_ranks_are_put_to_the_hosts_that_said_them(monkeypatch):
    comm = Comm(Topology(), torch.device("cpu"), distributed=False)
    monkeypatch.setattr(comm, "gather", lambda value: ["b", "a", "b"])
    found = environment.resolve_topology(comm, Topology(launcher="torchrun"))
    assert found["hosts"] == {"b": [0, 2], "a": [1]} and found["launcher"] == "torchrun"
    assert found["master"] is None and found["backend"] is None, "one process without a group has none"


# ---------------------------------------------------------------------- environment.json


def test_one_object_for_every_start(tmp_path):
    environment.record(tmp_path, WHERE, {"zero_optimization": {"stage": 3}}, None)
    environment.record(tmp_path, WHERE | {"ranks": 8}, None, 40)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert first["deepspeed"] == {"zero_optimization": {"stage": 3}} and first["resumed_at"] is None
    assert (second["resumed_at"], second["topology"]["ranks"], second["deepspeed"]) == (40, 8, None)
    assert first["topology"] == WHERE and first["versions"]["torch"] == torch.__version__
    assert {
        "started",
        "command",
        "working_directory",
        "git",
        "source",
        "platform",
        "variables",
    } <= first.keys()


@pytest.mark.parametrize("damage", ["", "{", '{"a": 1}'])
def test_a_damaged_report_is_no_reason_not_to_train(tmp_path, damage):
    (tmp_path / "environment.json").write_text(damage)
    environment.record(tmp_path, WHERE, None, None)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_variables_without_secrets(monkeypatch):
    given = {
        "NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "RANK": "0", "TOKENIZERS_PARALLELISM": "false",
        "HF_TOKEN": "hf_x", "SLURM_JWT": "x", "HF_API_KEY": "x", "TORCH_PASSWORD": "x", "EDITOR": "vi",
        "HOME": "/home/me",
    }  # fmt: skip
    assert list(environment.relevant_variables(given)) == [
        "HF_HOME",
        "NCCL_DEBUG",
        "RANK",
        "TOKENIZERS_PARALLELISM",
    ]
    monkeypatch.setenv("HF_ENDPOINT", "https://ann:pl4nted@hub.example/x")
    monkeypatch.setattr(
        "sys.argv", ["distlora", "train", "r.yaml", "data.path=https://ann:pl4nted@x.example"]
    )
    text = json.dumps(environment.report(WHERE, None, None))
    assert "pl4nted" not in text and "https://***@hub.example/x" in text


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the file `x` in it: its folder, and git there."""
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert environment.git_revision(tmp_path) is None
    git("init", "-q")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-qm", "one")
    return tmp_path, git


def test_the_revision_of_a_checkout(checkout):
    folder, git = checkout
    assert environment.git_revision(folder) == {"revision": git("rev-parse", "HEAD"), "changed": False}
    (folder / "x").write_text("2")
    assert environment.git_revision(folder)["changed"] is True


def test_the_revision_of_the_program_wherever_the_user_stands(checkout, monkeypatch, tmp_path_factory):
    folder, git = checkout
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.delenv("DISTLORA_REVISION", raising=False)
    monkeypatch.setattr(environment.distlora, "__file__", str(folder / "x"))
    told = environment.report(WHERE, None, None)
    assert (told["git"], told["source"]) == (None, {"revision": git("rev-parse", "HEAD"), "changed": False})
    (folder / "y").touch()
    monkeypatch.setattr(environment.distlora, "__file__", str(folder / "y"))
    assert environment.source_revision() is None, "installed into a folder of somebody else's checkout"
    for built, revision in (("unknown", None), ("abc", {"revision": "abc", "changed": None})):
        monkeypatch.setenv("DISTLORA_REVISION", built)
        assert environment.source_revision() == revision


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_revision(Path.cwd()) is None


# ---------------------------------------------------------------------- logs


@pytest.fixture
def logger():
    """The program's logger, at the level that the program gives it, and put back afterwards."""
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level
    logger.setLevel(logging.INFO)
    yield logging.getLogger("distlora.training.train")
    logger.handlers[:], logger.level = before


def text(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / f"rank-{rank}.log").read_text()


def test_what_was_said_before_the_directory_was_known_is_there_too(logger, tmp_path):
    with RankLog(3) as rank_log:
        logger.info("first")
        assert list(tmp_path.iterdir()) == []
        rank_log.open(tmp_path)
        logger.warning("second")
    logger.info("third")
    lines = text(tmp_path, 3).splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO distlora.training.train: first",
        "WARNING distlora.training.train: second",
    ]
    assert logging.getLogger("distlora").handlers == [] or all(
        "rank-3" not in str(h) for h in logging.getLogger("distlora").handlers
    )


def test_starts_follow_one_another(logger, tmp_path):
    for word in ("one", "two"):
        with RankLog(0) as rank_log:
            rank_log.open(tmp_path)
            logger.info(word)
    assert [line.rsplit(" ", 1)[1] for line in text(tmp_path, 0).splitlines()] == ["one", "two"]


def test_a_start_that_is_refused_leaves_nothing(logger, tmp_path):
    with pytest.raises(UserError), RankLog(0):
        logger.info("hello")
        raise UserError("another recipe's run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "last"), [(UserError("x is wrong"), "ended: x is wrong"), (ValueError("y"), "ValueError: y")]
)
def test_the_end_stands_in_the_log(logger, tmp_path, error, last):
    with pytest.raises(type(error)), RankLog(1) as rank_log:
        rank_log.open(tmp_path)
        raise error
    assert text(tmp_path, 1).rstrip().endswith(last)
    assert ("Traceback" in text(tmp_path, 1)) == isinstance(error, ValueError)


def test_no_secret_of_the_config_or_the_command_is_written(monkeypatch):
    words = ["deepspeed.comet.api_key=SEKRET", "data.path=https://me:SEKRET@a/b"]
    monkeypatch.setattr("sys.argv", ["distlora", "train", "r.yaml", *words])
    config = {
        "comet": {"api_key": "SEKRET", "project": "p"},
        "lists": [{"auth_token": "SEKRET"}],
        "train_batch_size": 4,
    }
    told = environment.report({}, config, None)
    assert "SEKRET" not in json.dumps(told)
    hidden = {
        "comet": {"api_key": "***", "project": "p"},
        "lists": [{"auth_token": "***"}],
        "train_batch_size": 4,
    }
    assert told["deepspeed"] == hidden
    assert told["command"][-2:] == ["deepspeed.comet.api_key=***", "data.path=https://***@a/b"]


def test_names_that_only_look_like_secrets():
    variables = dict.fromkeys(
        ("TOKENIZERS_PARALLELISM", "CC", "HF_HOME", "LD_LIBRARY_PATH", "NCCL_IB_PKEY"), "x"
    )
    others = dict.fromkeys(("HF_PAT", "TORCH_APIKEY", "CCACHE_DIR", "CC_PWD"), "y")
    assert environment.relevant_variables(variables | others) == variables
