"""The program under every launcher, on two ranks of this machine: one loss curve, one sentence, and nobody
left behind.

A start with DeepSpeed takes many seconds, so each has to show several things.
"""

import json
import os
import shutil
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.bench import Bench
from tests.e2e.program import (
    PATIENCE,
    curve,
    finish,
    free_port,
    processes_with,
    python,
    run,
    started,
    wait_until,
)

STEPS = 24
#: Seconds within which the ranks of a group must have followed one that died.
FAREWELL = 60


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(
        tmp_path_factory.mktemp("launchers"), steps=STEPS, save_every=4, eval_every=6, exact_match_samples=3
    )


def under_deepspeed(*arguments: str) -> list[str]:
    options = ["--hostfile", os.devnull, "--num_gpus", "2", "--master_port", free_port()]
    return ["deepspeed", *options, "--module", "distlora", *arguments]


def under_torchrun(*arguments: str) -> list[str]:
    return ["torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "distlora", *arguments]


# ---------------------------------------------------------------------- the same run


def test_deepspeed_and_its_monitors(bench):
    enabled = "{enabled: true, output_path: auto, job_name: auto}"
    monitors = [f"deepspeed.tensorboard={enabled}", f"deepspeed.csv_monitor={enabled}"]
    persistence = "deepspeed.zero_optimization.stage3_param_persistence_threshold=auto"
    outcome = run(
        *under_deepspeed("train", *bench.arguments("deepspeed", *monitors, persistence, "train.steps=6"))
    )
    assert outcome.code == 0, outcome.err
    bench.expect_same_curve("deepspeed", 6)
    assert "deepspeed.zero_optimization.stage3_param_persistence_threshold = 600 (auto)" in outcome.err
    assert outcome.out.count("trained parameters") == 1, "one rank shows the table"
    assert outcome.err.count("data: 20 samples") == 1, "one rank tells what happens"
    assert "2 ranks on 1 host (" in outcome.err and "told by DeepSpeed's launcher" in outcome.err

    run_dir = bench.folder / "deepspeed"
    (start,) = json.loads((run_dir / "environment.json").read_text())
    assert start["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] == 600, (
        "as it was resolved"
    )
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert "data: 20 samples" in (run_dir / "logs" / "rank-1.log").read_text(), (
        "every rank tells it to its file"
    )
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "init/seconds"):
        written = {event.step: event.value for event in events.Scalars(tag)}
        assert written == pytest.approx(curve(run_dir, tag), rel=1e-6), tag
    shown = [tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]]
    assert {tag.partition("/")[0] for tag in shown} == {"train", "eval", "init", "method", "system"}, (
        "none of DeepSpeed's own"
    )
    (table,) = (run_dir / "csv_monitor").rglob("*train_loss.csv")
    assert len(table.read_text().splitlines()) == 7, "a header and six steps"


def test_a_rank_that_dies_under_torchrun_and_one_process_that_goes_on(bench):
    run_dir = bench.folder / "torchrun"
    mark = {"DISTLORA_TEST_MARK": str(run_dir)}
    with started(*under_torchrun("train", *bench.arguments("torchrun", stage=2)), **mark) as launcher:
        wait_until((run_dir / "checkpoint-8").exists, PATIENCE, "the checkpoint of step 8", launcher)
        ranks = {
            variables["RANK"]: pid for pid, variables in processes_with(**mark).items() if "RANK" in variables
        }
        os.kill(ranks["1"], signal.SIGKILL)
        outcome = finish(launcher, FAREWELL)
        assert outcome.code != 0
        assert processes_with(**mark) == {}, "no rank is left"
    assert max(curve(run_dir)) < STEPS, "the run was not finished"

    outcome = run(*python("train", *bench.arguments("torchrun")))
    assert outcome.code == 0, outcome.err
    assert f"continuing from {run_dir}/checkpoint-" in outcome.err
    bench.expect_same_curve("torchrun")


def test_srun_sets_only_its_own_variables(bench):
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    command = python("train", *bench.arguments("srun", "train.steps=6", stage=1))
    with (
        started(*command, SLURM_PROCID="0", SLURM_LOCALID="0", **common) as first,
        started(*command, SLURM_PROCID="1", SLURM_LOCALID="1", **common) as second,
    ):
        outcomes = [finish(process, PATIENCE) for process in (first, second)]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    bench.expect_same_curve("srun", 6)
    assert "trained parameters" in outcomes[0].out and outcomes[1].out == ""


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")
def test_mpirun(bench):
    mpirun = ["mpirun", "-np", "2", "--allow-run-as-root", "--oversubscribe"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    outcome = run(*mpirun, *python("train", *bench.arguments("mpirun", "train.steps=6")), **address)
    assert outcome.code == 0, outcome.err
    bench.expect_same_curve("mpirun", 6)
    assert outcome.out.count("trained parameters") == 1


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("train.lrr=1", "distlora: override train.lrr: unknown key, did you mean lr?"),
        # Every answer is cut away, which shows once the ranks have met and the tokenizer has been at the
        # data.
        ("data.max_length=4", "none of the 22 samples"),
    ],
)
def test_deepspeed_passes_a_mistake_on_as_one_sentence(bench, mistake, sentence):
    mark = {"DISTLORA_TEST_MARK": f"{bench.folder}/{mistake}"}
    with started(*under_deepspeed("train", *bench.arguments("mistake", mistake)), **mark) as launcher:
        outcome = finish(launcher, PATIENCE)
        assert processes_with(**mark) == {}, "no rank is left"
    assert outcome.code == 2, outcome.err
    assert len(outcome.sentences) == 1 and sentence in outcome.sentences[0]
    assert "Traceback" not in outcome.err + outcome.out
