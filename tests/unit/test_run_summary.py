"""`summary.json`: what is written of a run, and when it stays as it is."""

import json
import re
from pathlib import Path

import pytest
import torch

from distlora.engine.comm import Comm, Topology
from distlora.training.summary import peak_memory, record_summary

ALONE = Comm(Topology(), torch.device("cpu"), distributed=False)


def outcome(run_dir, **changes) -> dict:
    told = {
        "trained": 3,
        "lora_trained": 30,
        "rank": 2,
        "steps": 10,
        "stopped_early": False,
        "best": None,
        "init_seconds": 1.5,
        "step_seconds": 0.25,
    }
    return {"run_dir": run_dir, **told, "before": {"loss": 2.0}, "after": {"loss": float("nan")}} | changes


def written(run_dir) -> dict:
    """Strict JSON, without NaN."""
    return json.loads((run_dir / "summary.json").read_text(), parse_constant=pytest.fail)


def test_a_summary_is_json_that_others_can_read(tmp_path):
    lines = [
        {"step": 1, "train/tokens_per_second": 5.0},
        {"step": 2, "train/tokens_per_second": 7.0},
        {"step": 2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record_summary(ALONE, outcome(tmp_path), first_step=4, steps_per_epoch=8)
    found = written(tmp_path)
    assert (found["first_step"], found["epoch_seconds"], found["tokens_per_second"]) == (4, 2.0, 7.0)
    assert (found["device"], found["ranks"]) == ("cpu", 1)
    assert found["before"] == {"loss": 2.0} and found["after"] == {"loss": "nan"}


def test_lines_that_no_run_has_written_do_not_end_the_last_step(tmp_path):
    line = json.dumps({"step": 1, "train/tokens_per_second": 5.0}).encode()
    foreign = [b"\xff\xfe", b"[]", b"text", b'{"train/tokens_per_second": 9.0}', b"[" * 100_000]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*foreign[:2], line, *foreign[2:]]))
    record_summary(ALONE, outcome(tmp_path), first_step=0, steps_per_epoch=8)
    assert written(tmp_path)["tokens_per_second"] == 5.0


@pytest.mark.parametrize("unit, other", [("tokens", "images"), ("images", "tokens")])
def test_a_summary_has_the_speed_in_what_the_run_counts(tmp_path, unit, other):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, f"train/{unit}_per_second": 5.0}) + "\n")
    record_summary(ALONE, outcome(tmp_path), first_step=0, steps_per_epoch=8)
    found = written(tmp_path)
    assert (found[f"{unit}_per_second"], found[f"{other}_per_second"]) == (5.0, None)


def test_a_start_without_a_step_keeps_what_the_steps_have_told(tmp_path):
    record_summary(ALONE, outcome(tmp_path), first_step=0, steps_per_epoch=8)
    before = written(tmp_path)
    record_summary(ALONE, outcome(tmp_path, step_seconds=0.0), first_step=10, steps_per_epoch=8)
    assert written(tmp_path) == before
    (tmp_path / "summary.json").unlink()
    record_summary(ALONE, outcome(tmp_path, step_seconds=0.0), first_step=10, steps_per_epoch=8)
    assert (written(tmp_path)["step_seconds"], written(tmp_path)["epoch_seconds"]) == (None, None)


def test_the_peak_is_in_bytes_and_grows_with_what_is_held():
    held = torch.ones(64 * 2**20)  # 256 MiB
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])
    del held
    assert now > 2**28
    assert now - 2**24 <= peak_memory(ALONE) < 2**40, "the kernel's two numbers are off by some pages"


def test_the_peak_is_that_of_the_rank_with_the_most():
    class Two:
        device = torch.device("cpu")

        def gather(self, own):
            return [own, own + 5]

    assert peak_memory(Two()) >= peak_memory(ALONE) + 5
