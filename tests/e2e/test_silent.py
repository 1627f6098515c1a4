"""Three ranks, of which one fails by itself, or between two of which the link goes silent."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest

from distlora.cluster.status import read_status
from tests.e2e.program import curve, finish, free_port, python, recipe_of, started, write_recipe
from tests.e2e.testbed import HOSTS, wait_for

RANKS = 3
#: Seconds for what takes some ten on a quiet machine.
PATIENCE = 240


@pytest.fixture
def recipe(model, data, tmp_path) -> Path:
    """A recipe that three ranks share; its run goes to `tmp_path / "run"`."""
    content = recipe_of(model, data, tmp_path / "run")
    content["method"] = {"name": "lora", "rank": 2}
    content["train"] |= {"global_batch_size": 6, "eval_every": 0, "exact_match_samples": 0}
    return write_recipe(tmp_path / "recipe.yaml", content)


def arguments(recipe: Path, *overrides: str, stage: int) -> list[str]:
    return ["train", str(recipe), f"deepspeed={{zero_optimization: {{stage: {stage}}}}}", *overrides]


def place(rank: int, address: str, port: str) -> dict[str, str]:
    """The variables by which a process is this rank of three."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": address, "MASTER_PORT": port,
    }  # fmt: skip


def three(recipe: Path, own: dict[int, list[str]], stage: int) -> list:
    """How three ranks on this machine end. own: rank -> overrides of its recipe alone."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(
                    *python(*arguments(recipe, "train.hang_timeout=0", *own.get(rank, []), stage=stage)),
                    **place(rank, "127.0.0.1", port),
                )
            )
            for rank in range(RANKS)
        ]
        return [finish(process, PATIENCE) for process in processes]


def expect_one_sentence(outcomes: list, run_dir: Path, rank: int, what: str, begun: bool = True) -> None:
    """All ranks have ended as for a mistake of the user, and rank 0 has said it, and no other. begun: whether
    the run had; a start that is refused before leaves nothing.
    """
    assert [outcome.code for outcome in outcomes] == [2, 2, 2], [outcome.err[-1500:] for outcome in outcomes]
    (sentence,) = outcomes[0].sentences
    assert f"rank {rank} on " in sentence and what in sentence
    assert not any("Traceback" in outcome.err for outcome in outcomes)
    if not begun:
        assert not run_dir.exists()
        return
    status = read_status(run_dir)
    assert (status.state, status.requeue) == ("failed", False) and what in status.message


def test_a_rank_whose_weights_cannot_be_read_ends_all(recipe, model, tmp_path):
    """Before any are loaded, and without a limit."""
    other = shutil.copytree(model, tmp_path / "other")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002.safetensors"}}
    shutil.move(other / "model.safetensors", other / "model-00001.safetensors")
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    outcomes = three(recipe, {1: [f"model.path={other}"]}, stage=3)
    expect_one_sentence(outcomes, tmp_path / "run", 1, f"model.path={other}", begun=False)


def test_a_rank_that_reads_other_data_ends_all(recipe, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(lines[1:] + lines[:1]) + "\n")
    outcomes = three(recipe, {2: [f"data.path={other}"]}, stage=2)
    expect_one_sentence(outcomes, tmp_path / "run", 2, "samples of rank 2 are others than those of rank 0")


def test_a_silent_link_between_two_others_ends_all_and_shows_what_they_did(recipe, ssh_cluster, tmp_path):
    """head, where rank 0 is, reaches both nodes all the time, and they reach it."""
    limit, run_dir = 6, tmp_path / "run"
    words = arguments(recipe, f"train.hang_timeout={limit}", "train.steps=100000", stage=2)
    processes = []
    with contextlib.ExitStack() as stack:
        for rank, host in enumerate(HOSTS):
            variables = [f"{name}={value}" for name, value in place(rank, "head", "29517").items()]
            command = ["env", *variables, "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", *python(*words)]
            processes.append(stack.enter_context(started(*ssh_cluster.on(host, *command))))

        def steps() -> int:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return max(curve(run_dir), default=0)
            return 0

        wait_for(lambda: steps() >= 5 or processes[0].poll() is not None, PATIENCE, "step 5")
        ssh_cluster.part()
        began = time.monotonic()
        outcomes = [finish(process, limit + 40) for process in processes]
        seconds = time.monotonic() - began
    assert [outcome.code for outcome in outcomes] == [1, 1, 1], [outcome.err[-1500:] for outcome in outcomes]
    assert seconds < limit + 20
    (sentence,) = outcomes[0].sentences
    assert "nothing has moved on any rank for" in sentence and "in training after step" in sentence
    status = read_status(run_dir)
    assert (status.state, status.requeue) == ("failed", True) and "nothing has moved" in status.message
    for rank in range(RANKS):
        stacks = (run_dir / "logs" / f"stacks-rank-{rank}.txt").read_text()
        assert "distlora/training/loop.py" in stacks and "Current thread" in stacks
