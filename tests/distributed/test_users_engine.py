"""The public calls around a DeepSpeed engine that the user made give what they give in plain PyTorch."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.distributed.users_engine import Case, plain

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS, PATIENCE = 2, 600

SRLORA = {"rank": 4, "target_rank": 12, "gamma": 0.5, "interval": 2}
ADAPTIVE = {
    "rank": 4, "target_rank": 12, "schedule": "adaptive",
    "adaptive": {"window": 1, "improvement": 0.9, "share": 1.0, "freeze_fraction": 0.0},
}  # fmt: skip
LORA_SB = {"rank": 4, "init": {"eta": "schedule", "step": "sgd"}, "recompose": {"interval": 3}}
#: Methods that between them use every call: a probe, the weight, a magnitude, transforms, recompositions.
EVERY_CALL = [
    Case("lora_sb", LORA_SB),
    Case("srlora", SRLORA),
    Case("dora", {"rank": 4}),
    Case("lora_pro", {"rank": 4, "alpha": 2}, head=True),
    Case("full"),
]


def at(case: Case, **changes) -> Case:
    return Case(**(asdict(case) | changes))


EXACT = [
    *(at(case, stage=stage) for case in EVERY_CALL for stage in (0, 1, 2, 3)),
    *(at(EVERY_CALL[1], stage=stage, accumulation=2) for stage in (0, 2, 3)),
    *(at(EVERY_CALL[1], stage=stage, config_optimizer=True) for stage in (0, 1, 2, 3)),
    *(at(case, stage=stage, offload=True) for case in (EVERY_CALL[1], EVERY_CALL[3]) for stage in (2, 3)),
    *(Case("srlora", ADAPTIVE, stage=stage, accumulation=2) for stage in (2, 3)),
    *(at(EVERY_CALL[1], stage=stage, resume="distlora") for stage in (0, 1, 2, 3)),
    *(at(EVERY_CALL[0], stage=stage, resume="distlora") for stage in (2, 3)),
    *(
        at(EVERY_CALL[1], stage=stage, resume="both", frozen=frozen)
        for stage in (2, 3)
        for frozen in (True, False)
    ),
]
#: Against the same run in float32.
ROUNDED = [at(case, stage=stage, bf16=True) for case in EVERY_CALL[:3] for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[float] | str]:
    """What every case gave under DeepSpeed: one start of the ranks for all."""
    folder = tmp_path_factory.mktemp("users")
    plan, out = folder / "plan.json", folder / "out.json"
    plan.write_text(json.dumps([asdict(case) for case in (*EXACT, *ROUNDED)]))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.distributed.users_engine", str(plan), str(out)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ranks = []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "PATH": path,
        }  # fmt: skip
        log = (folder / f"rank{rank}.log").open("w")
        ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
    try:
        for process in ranks:
            process.wait(PATIENCE)
    finally:
        for process in ranks:
            process.kill()
    if not out.exists():
        pytest.fail((folder / "rank0.log").read_text()[-3000:], pytrace=False)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.key)
def test_the_same_losses_as_in_plain_pytorch(case, found):
    wanted = plain(at(case, stage=0, resume=""))
    assert found[case.key] == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] < wanted[0]


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.key)
def test_in_bfloat16_nearly_the_same(case, found):
    assert found[case.key] == pytest.approx(plain(at(case, stage=0, bf16=False)), rel=2e-2)
