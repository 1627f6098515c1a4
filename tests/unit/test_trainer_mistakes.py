"""What cannot be trained by an adapted trainer ends in one sentence, and nothing else does."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import distlora
from distlora.integrations.mistakes import refuse_other_ranks, refuse_surroundings
from distlora.integrations.transformers import AdapterTrainer
from tests.tiny_models import tiny_model_dir

ROWS = [
    {"input_ids": [1, 5, 6, 7, 8, 9 + i], "labels": [-100, -100, 6, 7, 8, 9 + i], "note": "x"}
    for i in range(8)
]
WITHOUT_LABELS = [row | {"labels": [-100] * 6} for row in ROWS]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def load(directory):
    return lambda **settings: AutoModelForCausalLM.from_pretrained(directory, **settings)


@pytest.fixture
def make(directory, load, tmp_path):
    """A trainer of three steps. adapter: of `attach`; more: of the trainer; the rest: TrainingArguments."""

    def make_trainer(adapter=None, model=None, more=None, **arguments) -> AdapterTrainer:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.pad_token = tokenizer.eos_token
        usual = dict(
            output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=3, per_device_train_batch_size=2,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        args = TrainingArguments(**(usual | arguments))
        given = {"train_dataset": ROWS, "data_collator": DataCollatorForSeq2Seq(tokenizer)} | (more or {})
        if "adapted" not in given:
            chosen = {"method": "lora", "rank": 4} | (adapter or {})
            given["adapted"] = distlora.attach(model or load(), **chosen)
        return AdapterTrainer(args=args, **given)

    return make_trainer


@contextmanager
def refused(text: str):
    with pytest.raises(distlora.UserError) as caught:
        yield
    said = str(caught.value)
    assert text in said and "\n" not in said


LORA_SB = {"method": "lora_sb", "init": {"eta": 0.01}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fp16": True}, "fp16=True scales gradients"),
        ({"fsdp": True}, "use deepspeed="),
        ({"torch_compile": True}, "torch_compile=True is not supported"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True begins a run again"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "load_best_model_at_end=True"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant=True",
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant=True",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(make, arguments, text):
    with refused(text):
        make(**arguments)


def test_a_model_that_was_not_attached(make, load):
    with refused("the model has no adapter: call adapted = distlora.attach"):
        make(more={"model": load(), "adapted": None})
    with refused("model= is another model than the adapted one"):
        make(more={"model": load()})
    with refused("model= is the name some/model"):
        make(more={"model": "some/model"})
    with refused("model_init="):
        make(more={"model_init": load})
    with refused("adapted= is of the class LlamaForCausalLM"):
        make(more={"adapted": load()})
    with refused("adapted= is of the class str"):
        make(more={"adapted": "lora_sb"})


def test_an_adapter_of_peft(make, load):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    with refused("the model has an adapter of PEFT already"):
        make(more={"model": peft.get_peft_model(load(), config), "adapted": None})
    with refused("the model has an adapter of PEFT already"):
        make(model=peft.get_peft_model(load(), config))
    inside = load()
    inside.add_adapter(config)
    with refused("the model has an adapter of PEFT already"):
        make(model=inside)
    with refused("peft_config="):
        make(more={"peft_config": config})


def test_optimizers(make):
    with refused("the optimizer Adafactor keeps a state"):
        make(optim="adafactor").train()
    with refused("would shrink"):
        make({"method": "pissa"}, weight_decay=0.1).train()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with refused("the optimizer does not train"):
        make(more={"optimizers": (other, None)}).train()


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"world_size": 2}, "2 ranks need DeepSpeed"),
        ({"n_gpu": 2}, "over 2 GPUs"),
        ({"is_fsdp_enabled": True}, "accelerate is set to FSDP"),
    ],
)
def test_surroundings(make, found, text):
    usual = {"world_size": 1, "n_gpu": 1, "is_fsdp_enabled": False, "is_deepspeed_enabled": False}
    told = SimpleNamespace(**(usual | found))
    told.args = told
    with refused(text):
        refuse_surroundings(told, make().adapted)


def test_ranks_that_the_trainer_does_not_know():
    with refused("set use_cpu=True"):
        refuse_other_ranks(SimpleNamespace(world_size=1), 2)
    refuse_other_ranks(SimpleNamespace(world_size=2), 2)


def test_samples_without_labels(make):
    with refused("none of the 8 samples of the probe has a label that counts"):
        make(LORA_SB, more={"train_dataset": WITHOUT_LABELS}).train()


def test_order_of_calls(make, tmp_path):
    trainer = make()
    with refused("there is no adapter to save yet"):
        trainer.save_model(str(tmp_path / "adapter"))
    trainer.train()
    with refused("the adapter has its factors already"):
        trainer.train()


def test_checkpoints_that_cannot_be_gone_on_from(make, directory, tmp_path):
    with refused("there is no such directory"):
        make().train(resume_from_checkpoint=str(tmp_path / "missing"))
    with refused("it has no folder distlora"):
        make().train(resume_from_checkpoint=str(directory))
    make(save_strategy="steps", save_steps=2, save_only_model=True).train()
    with refused("save_only_model=True"):
        make().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    with refused("save_only_model=True"):
        make().train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("adapter", "more", "arguments"),
    [
        (LORA_SB, {}, {"bf16": True}),
        (LORA_SB, {}, {"gradient_checkpointing": True}),
        (LORA_SB, {"train_dataset": Stream()}, {}),
        (LORA_SB, {"train_dataset": [WITHOUT_LABELS[0], *ROWS]}, {}),
        ({"method": "lora_sb", "init": {"eta": "schedule"}}, {}, {"warmup_steps": 1}),
        ({"method": "lora_sb", "init": {"samples": 7, "micro_batch_size": 3}}, {}, {}),
        ({"method": "lora_ga"}, {}, {"label_smoothing_factor": 0.1}),
        ({"method": "dora"}, {}, {"bf16": True}),
        ({"method": "lora"}, {}, {"optim": "sgd"}),
    ],
)
def test_what_is_trained(make, adapter, more, arguments):
    trainer = make(adapter, more=more, learning_rate=1e-2, **arguments)
    before = [p.detach().clone() for p in trainer.adapted.parameters()]
    trainer.train()
    assert trainer.state.global_step == trainer.adapted.steps == 3
    assert any((p != q).any() for p, q in zip(before, trainer.adapted.parameters(), strict=True))


def test_a_full_run_saves_the_whole_model(make, tmp_path, load):
    trainer = make({"method": "full", "rank": 8})
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for (name, mine), theirs in zip(saved.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_lora_plus_gives_b_its_own_rate_in_the_whole_schedule(make):
    trainer = make(more={"lora_plus_ratio": 8.0}, learning_rate=1e-3)
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [group for group in trainer.optimizer.param_groups if group["params"]]
    kinds = [{names[id(p)].rpartition(".")[2] for p in group["params"]} for group in groups]
    assert kinds == [{"A"}, {"B"}]
    assert groups[1]["initial_lr"] == 8 * groups[0]["initial_lr"] == 8e-3


def test_clipping_by_the_norm_of_before_is_told(make):
    trainer = make({"method": "lora_pro", "alpha": 2}, max_grad_norm=1e-3, learning_rate=1e-2)
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(norms) == 3 and all(norm > 1e-2 for norm in norms)
