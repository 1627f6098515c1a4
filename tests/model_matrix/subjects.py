"""The rows of the table, and one short run of each."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from distlora import api
from distlora.engine.comm import Comm
from distlora.recipe.load import recipe_of
from distlora.recipe.sections import Recipe
from distlora.training.build import Built, build
from distlora.training.objective import objective_of
from distlora.training.step import accumulate
from distlora.training.targets import choose_targets
from tests.tiny_images import write_npz
from tests.tiny_zoo import CLASSIFIERS, ZOO, zoo_model_dir

#: Of the zoo, as the table calls them.
ROWS = {
    "llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma-2", "gemma3_text": "Gemma-3 (text)",
    "gemma3": "Gemma-3", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE",
    "qwen3_moe_dense": "Qwen3-MoE, one block dense", "qwen3_5": "Qwen3.5", "mixtral": "Mixtral",
    "mixtral+experts": "Mixtral, with its experts", "gpt_oss": "gpt-oss", "phi3": "Phi-3",
    "gpt2": "GPT-2", "opt": "OPT",
    "falcon": "Falcon", "stablelm": "StableLM", "olmo2": "OLMo-2", "cohere": "Cohere", "granite": "Granite",
    "mamba": "Mamba", "bert": "BERT", "roberta": "RoBERTa", "deberta": "DeBERTa-v3",
    "modernbert": "ModernBERT", "t5": "T5", "bart": "BART", "vit": "ViT",
}  # fmt: skip
#: What follows the name of a model of the zoo in a row that adapts its experts, too.
WITH_EXPERTS = "+experts"
STEPS, ROWS_OF_A_RANK, RANKS, RATE = 3, 2, 2, 2e-3
_ZERO_3 = {
    "zero_optimization": {
        "stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 200,
    },
    "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
}  # fmt: skip


def kind_of(name: str) -> str:
    """The model of the zoo that a row is about."""
    return name.removesuffix(WITH_EXPERTS)


def write_inputs(folder: Path) -> None:
    """Models and data of all rows."""
    with torch.random.fork_rng(devices=[]):  # some classes draw what the zoo does not
        torch.manual_seed(0)
        for name in ROWS:
            zoo_model_dir(kind_of(name), folder / "models")
    asked = [{"prompt": f"What is {i} plus {i}?", "response": f"The answer is {2 * i}."} for i in range(8)]
    names = ("bad", "good")
    rated = [{"text": f"It is {names[i % 2]}. " * (i % 3 + 1), "label": names[i % 2]} for i in range(8)]
    for file, rows in (("asked.jsonl", asked), ("rated.jsonl", rated)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "images").mkdir()
    write_npz(folder / "images" / "train.npz", 8)


def recipe(name: str, folder: Path, zero: bool) -> Recipe:
    if ZOO[kind_of(name)].tokenizer is None:
        data = {"task": "cifar10", "path": str(folder / "images"), "split": "train", "eval_split": None}
    elif name in CLASSIFIERS:
        data = {
            "task": "classification", "path": str(folder / "rated.jsonl"), "labels": ["bad", "good"],
            "fields": {"text": "text", "label": "label"}, "max_length": 40,
        }  # fmt: skip
    else:
        fields = {"prompt": "prompt", "response": "response"}
        data = {"task": "text", "path": str(folder / "asked.jsonl"), "fields": fields, "template": "{prompt}"}
        data["max_length"] = 60
    path = str(folder / "models" / kind_of(name))
    targets = ["all-linear", "experts"] if name.endswith(WITH_EXPERTS) else "all-linear"
    return recipe_of(
        {
            "model": {"path": path, "dtype": "float32", "gradient_checkpointing": False},
            "method": {"name": "lora", "rank": 3}, "targets": targets, "data": data,
            "train": {
                "steps": STEPS, "lr": RATE, "micro_batch_size": ROWS_OF_A_RANK,
                "global_batch_size": ROWS_OF_A_RANK * RANKS,
            },
            "deepspeed": _ZERO_3 if zero else None, "output_dir": str(folder / "runs" / name),
        },
        name,
    )  # fmt: skip


@dataclass
class Subject:
    """A model under an engine, with its first batches. Collective."""

    name: str
    folder: Path
    comm: Comm
    #: Trained tensors without a gradient in any step so far. Only one process knows them: under ZeRO-3 a rank
    #: has a part of each gradient.
    silent: set[str] = field(default_factory=set)

    @cached_property
    def recipe(self) -> Recipe:
        return recipe(self.name, self.folder, zero=self.comm.world_size > 1)

    @cached_property
    def objective(self):
        return objective_of(self.recipe)

    @cached_property
    def preprocessor(self):
        return self.objective.load_preprocessor()

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        """Of this rank; of all ranks together on one process."""
        samples = self.objective.read("train", self.preprocessor).samples
        own = range(RANKS) if self.comm.world_size == 1 else [self.comm.rank]
        parts = [samples[rank * ROWS_OF_A_RANK :][:ROWS_OF_A_RANK] for rank in own]
        return [self.objective.batch(part, self.preprocessor, self.comm.device) for part in parts]

    def start(self) -> Built:
        """As `distlora.training.run` does."""
        self.objective.check_length()
        targets = choose_targets(self.recipe, self.objective)
        self.objective.prepare(self.preprocessor)
        built = build(self.comm, self.recipe, self.objective, targets)
        api.initialise(built.adapted, built.engine, steps=STEPS, seed=5)
        return built

    def train(self, built: Built) -> list[float]:
        """The losses of all steps."""
        losses, engine = [], built.engine
        trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.silent = set(trained)
        engine.train_mode(True)
        for _ in range(STEPS):
            losses.append(accumulate(engine, self.batches, self.objective.loss))
            self.silent -= {name for name, p in trained.items() if p.grad is not None and p.grad.any()}
            built.adapted.before_step()
            engine.step()
            built.adapted.after_step(losses[-1])
        return losses
