"""The example of a plain DeepSpeed script: it runs, and learns what the same recipe learns."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.e2e.program import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "deepspeed_script.py"
RANKS, STEPS, RATE = 2, 5, 1e-2
#: Responses of equally many tokens: then the mean over ranks of a batch's mean loss is the mean over tokens.
ROWS = [{"prompt": f"How much is {n}?", "response": f"It is {n}"} for n in (3, 4, 5, 6)]


def launch(*words: str) -> str:
    """What `deepspeed … WORDS` says on two ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null"),
        *("--num_gpus", str(RANKS), "--master_port", str(port), *words),
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture(scope="module")
def recipe(model, rows, tmp_path_factory) -> list[float]:
    """The losses of the same recipe, at ZeRO-3."""
    folder = tmp_path_factory.mktemp("recipe")
    content = {
        "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "method": {"name": "lora_sb", "rank": 4, "init": {"eta": 0.01, "samples": len(ROWS)}},
        "data": {
            "task": "text", "path": str(rows), "template": "{prompt}\n", "max_length": 64,
            "fields": {"prompt": "prompt", "response": "response"},
        },
        "train": {
            "steps": STEPS, "global_batch_size": len(ROWS), "lr": RATE, "schedule": "constant",
            "warmup_ratio": 0.0, "save_every": 0, "eval_every": 0,
        },
        "deepspeed": {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    launch("--module", "distlora", "train", str(folder / "recipe.yaml"))
    metrics = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in metrics if "train/loss" in line]


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.long), 3])
def example(request, model, rows, tmp_path_factory) -> tuple[list[float], Path]:
    """The losses of the example at a stage, and what it left."""
    folder = tmp_path_factory.mktemp(f"stage{request.param}")
    config = folder / "zero.json"
    zero = {"stage": request.param, "memory_efficient_linear": False}
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": len(ROWS) // RANKS}
    config.write_text(json.dumps(sizes | {"gradient_clipping": 1.0, "zero_optimization": zero}))
    words = map(str, (model, rows, config, folder / "out", "--steps", STEPS, "--lr", RATE))
    return _losses(launch(str(EXAMPLE), *words)), folder / "out"


def _losses(said: str) -> list[float]:
    """Of every step, the mean over its micro-batches, each of which is the mean over ranks."""
    found = [float(text) for text in re.findall(r"step \d+ loss (\S+)", said)]
    each = len(ROWS) // RANKS
    assert len(found) == STEPS * each
    return [sum(found[step * each :][:each]) / each for step in range(STEPS)]


def test_its_losses_are_those_of_the_recipe(example, recipe):
    losses, _ = example
    assert losses == pytest.approx(recipe, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_its_adapter_is_one_of_peft(example, model):
    _, out = example
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter")
    assert loaded.peft_config["default"].r == 4
    assert (out / "checkpoints" / f"checkpoint-{STEPS}" / "manifest.json").exists()


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 60
