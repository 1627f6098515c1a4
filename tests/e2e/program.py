"""Small recipes over tiny models, the ways to start the program on them, and what a run leaves."""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from distlora.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("Tom", "Anna", "Benjamin", "Li")
#: Seconds for what takes some ten on a quiet machine.
PATIENCE = 240


@dataclass(frozen=True)
class Outcome:
    """How a start of the program ended."""

    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """What the program has to say on its way out."""
        return [line for line in self.err.splitlines() if line.startswith("distlora: ")]


# ---------------------------------------------------------------------- what goes in


def write_rows(folder: Path, train: int = 22, test: int = 7) -> Path:
    """A folder with `train.jsonl` and `test.jsonl` in GSM8K's columns: texts of different length. Returns the
    folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        lines = [json.dumps(_row(number if split == "train" else number + 1000)) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _row(number: int) -> dict[str, str]:
    name, have, more = NAMES[number % 4], number % 7 + 1, number % 5
    story = f"{name} has {have} apples. " + f"{name} buys {more} more. " * (number % 3)
    return {
        "question": story + "How many?",
        "answer": f"{name} has " * (number % 4) + f"#### {have + more * (number % 3)}",
    }


def recipe_of(model: Path, data: Path, output_dir: Path) -> dict:
    """A whole run that takes a second or two, in float32, with everything in it that a run can have."""
    return {
        "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "method": {"name": "lora_sb", "rank": 4, "init": {"samples": 6, "micro_batch_size": 2}},
        "targets": "all-linear",
        "data": {
            "task": "gsm8k", "path": str(data), "template": "{prompt}\n", "split": "train",
            "eval_split": "test", "max_length": 48, "max_new_tokens": 4,
        },
        "train": {
            "steps": 6, "micro_batch_size": 2, "global_batch_size": 4, "lr": 0.02, "schedule": "constant",
            "warmup_ratio": 0.0, "seed": 3, "eval_every": 2, "save_every": 3, "exact_match_samples": 3,
        },
        "deepspeed": None,
        "output_dir": str(output_dir),
    }  # fmt: skip


def write_recipe(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


# ---------------------------------------------------------------------- starting


def call(*arguments: object) -> Outcome:
    """The program in this process: quick, because everything is imported already."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            code = main([str(argument) for argument in arguments])
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Outcome:
    """`call`, which must end well."""
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


@contextlib.contextmanager
def started(*command: object, **environment: str) -> Iterator[subprocess.Popen]:
    """The command in a process group of its own, which is gone afterwards, whatever it has started."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    settings = plain | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # The launchers and ninja of this very environment, installed or not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), plain["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [plain.get("PYTHONPATH")])]),
    } | environment  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, env=settings, start_new_session=True, **pipes
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


#: Variables by which a process takes itself for one rank of a group.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "SLURM_", "TORCHELASTIC_")


def finish(process: subprocess.Popen, seconds: float) -> Outcome:
    """Waits for the process and for all that write into its pipes."""
    out, err = process.communicate(timeout=seconds)
    return Outcome(process.returncode, out, err)


def run(*command: object, **environment: str) -> Outcome:
    """The command to its end."""
    with started(*command, **environment) as process:
        return finish(process, PATIENCE)


def python(*arguments: object) -> tuple[object, ...]:
    """The command line of `python -m distlora …`."""
    return (sys.executable, "-m", "distlora", *arguments)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float, what: str, process: subprocess.Popen) -> None:
    """Polls, because nothing else tells how far another process has come. Fails if that ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended before {what}: {finish(process, 10).err}"
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


def processes_with(**environment: str) -> dict[int, dict[str, str]]:
    """The running processes whose environment holds these variables: process id -> environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if environment.items() <= variables.items():
                found[int(folder.name)] = variables
    return found


# ---------------------------------------------------------------------- what comes out


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, tag: str = "train/loss") -> dict[int, float]:
    """Step -> value of one tag; no step may come twice."""
    pairs = [(line["step"], line[tag]) for line in metrics(run_dir) if tag in line]
    assert len(dict(pairs)) == len(pairs), f"{tag} is doubled: {pairs}"
    return dict(pairs)


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file()
    }
