"""The examples of trainers: they run, learn, and leave what PEFT loads."""

import json
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.e2e.program import REPOSITORY, run
from tests.e2e.test_examples import RANKS, ROWS, launch

TRAINER, SFT = REPOSITORY / "examples" / "trainer.py", REPOSITORY / "examples" / "trl_sft.py"
STEPS = 4


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def is_adapter_of(model: Path, adapter: Path) -> bool:
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    return any("lora_B" in name and bool(p.any()) for name, p in loaded.named_parameters())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[Path, Path]:
    """The rows of each example."""
    folder = tmp_path_factory.mktemp("rows")
    renamed = [{"prompt": row["prompt"], "completion": row["response"]} for row in ROWS]
    for name, rows in (("trainer", ROWS), ("sft", renamed)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {TRAINER: folder / "trainer.jsonl", SFT: folder / "sft.jsonl"}


def plain(example: Path, model: Path, rows: Path, out: Path, *words: object) -> list[float]:
    outcome = run(sys.executable, example, model, rows, out, "--steps", STEPS, "--lr", 1e-2, *words)
    assert outcome.code == 0, outcome.err[-3000:]
    return losses(out)


def test_trl(files, model, tmp_path):
    found = plain(SFT, model, files[SFT], tmp_path)
    assert len(found) == STEPS and found[-1] < found[0]
    assert is_adapter_of(model, tmp_path / "adapter")


@pytest.mark.long  # two ranks of a Trainer are tried in test_trainer.py
def test_the_trainer_on_two_ranks_at_stage_3_as_alone(files, model, tmp_path):
    alone = plain(TRAINER, model, files[TRAINER], tmp_path / "alone", "--accumulation", len(ROWS))
    assert len(alone) == STEPS and alone[-1] < alone[0]
    config = tmp_path / "zero.json"
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    zero = {"stage": 3, "memory_efficient_linear": False}
    config.write_text(json.dumps(sizes | {"gradient_clipping": "auto", "zero_optimization": zero}))
    words = (TRAINER, model, files[TRAINER], tmp_path / "both", "--steps", STEPS, "--lr", 1e-2)
    launch(*map(str, (*words, "--accumulation", len(ROWS) // RANKS, "--deepspeed", config)))
    assert losses(tmp_path / "both") == pytest.approx(alone, rel=1e-5)
    assert is_adapter_of(model, tmp_path / "both" / "adapter")


@pytest.mark.parametrize("example", [TRAINER, SFT], ids=lambda path: path.stem)
def test_they_are_short(example):
    assert len(example.read_text().splitlines()) < 60
