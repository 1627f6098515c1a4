"""TRL's SFTTrainer with an adapter: the passes of a probe are no part of what it counts."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import distlora
from distlora.integrations.trl import AdapterSFTTrainer
from tests.tiny_models import tiny_model_dir

ROWS = [{"prompt": f"How much is {n}?", "completion": f" It is {n}."} for n in range(8)]


def test_a_probe_leaves_its_counts_as_they_were(tmp_path):
    directory = tiny_model_dir("llama", tmp_path / "models")
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, logging_steps=1, per_device_train_batch_size=2,
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    adapted = distlora.attach(AutoModelForCausalLM.from_pretrained(directory), "lora_sb", rank=4)
    trainer = AdapterSFTTrainer(
        args=args, train_dataset=Dataset.from_list(ROWS), adapted=adapted,
        processing_class=AutoTokenizer.from_pretrained(directory),
    )  # fmt: skip
    trainer.train()
    assert dict(trainer._metrics["eval"]) == {}
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2 and all("entropy" in line for line in lines)
    assert lines[0]["init/samples"] == len(ROWS)
