"""What every rank of a distributed test builds: a small model with all the shapes that shards stumble over,
and its data.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTModel,
)

from distlora.adapter.attach import Attached, attach, pack_linears
from distlora.adapter.packed import packer
from distlora.data import LabelledSample, Sample, collate, micro_batches
from distlora.engine.comm import Comm
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.owners import open_ledger
from distlora.engine.protocol import Engine
from distlora.initialisation.heads import draw_heads
from distlora.initialisation.pretrained import PretrainedFiles
from distlora.methods import magnitude_of, registry
from distlora.models.loading import check_sizes, head_parameters, load_model
from distlora.recipe.sections import ModelSection
from tests.tiny_zoo import zoo_model

VOCABULARY = 97
#: Layers to adapt where a test does not care which: one of each shape, none of which a world divides.
FEW = ["k_proj", "o_proj", "down_proj"]


def save_model(directory: Path) -> None:
    """Three blocks, biases, tied embeddings, grouped key/value heads, and sizes such as 60 × 131 that no
    world divides.
    """
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=60, intermediate_size=131, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    save_encoder(directory / "encoder")
    save_heads(directory)
    save_vision(directory / "vision")
    save_gpt2(directory / "gpt2")
    save_experts(directory / "experts")
    save_own_logits(directory / "own_logits")
    zoo_model("llava").save_pretrained(directory / "wrapper")


def save_gpt2(directory: Path) -> None:
    """Two blocks whose linear weights lie in the files as (in, out)."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=60, n_layer=2, n_head=6, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        GPT2LMHeadModel(config).save_pretrained(directory)


def save_own_logits(directory: Path) -> None:
    """A BERT as a decoder: layers of its own lie between hidden states and logits, so that the loss is taken
    of all logits.
    """
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=60, intermediate_size=131, num_hidden_layers=2,
        num_attention_heads=6, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.1, is_decoder=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertLMHeadModel(config).save_pretrained(directory)


def save_encoder(directory: Path) -> None:
    """A BERT as it is published, but without its pooler: a classifier's head and the pooler are new, and
    tensors are small.
    """
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=60, intermediate_size=131, num_hidden_layers=3,
        num_attention_heads=6, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config, add_pooling_layer=False).save_pretrained(directory)


def save_heads(directory: Path) -> None:
    """The encoder with heads that do not fit three labels: of five, and without the bias."""
    for family, labels, lacking in (("five_labels", 5, None), ("no_bias", 3, "classifier.bias")):
        config = BertConfig.from_pretrained(directory / "encoder", num_labels=labels)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = BertForSequenceClassification(config)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != lacking}
        model.save_pretrained(directory / family / "encoder", state_dict=tensors)


def save_experts(directory: Path) -> None:
    """A Mixtral whose rows choose one of seven experts, so that ranks choose different ones."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=60, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, num_local_experts=7,
        num_experts_per_tok=1, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        MixtralForCausalLM(config).save_pretrained(directory)


def save_vision(directory: Path) -> None:
    """A ViT as it is published: without a head, and under names that transformers changes while it loads."""
    config = ViTConfig(
        image_size=12, patch_size=4, hidden_size=60, intermediate_size=131, num_hidden_layers=2,
        num_attention_heads=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        ViTModel(config, add_pooling_layer=False).save_pretrained(directory)


def images_with_labels(count: int, labels: int, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    """Pixels (3, 12, 12) and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 12, 12, generator=generator), number % labels) for number in range(count)]


def batch_of_images(rows: list[tuple[torch.Tensor, int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """None give one without a label."""
    pixels, labels = zip(*(rows or [(torch.zeros(3, 12, 12), -100)]))
    return {"pixel_values": torch.stack(pixels).to(dtype), "labels": torch.tensor(labels)}


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Rows of very different length: 3 to 40 tokens, of which 1 to 25 are a response."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(count):
        prompt, response = draw(2, 16), draw(1, 25)
        ids = torch.randint(1, VOCABULARY, (prompt + response,), generator=generator).tolist()
        rows.append(Sample(ids, [-100] * prompt + ids[prompt:], ids[:prompt], None))
    return rows


def labelled_samples(count: int, labels: int, seed: int = 0) -> list[LabelledSample]:
    """Rows of 3 to 40 tokens in two segments, and a label that depends on a token."""
    rows = []
    for sample in samples(count, seed):
        ids, first = sample.input_ids, len(sample.prompt_ids)
        rows.append(LabelledSample(ids, [0] * first + [1] * (len(ids) - first), ids[first] % labels))
    return rows


def share(
    comm: Comm, rows: list[Sample], micro_batch: int, accumulation: int
) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of a global batch."""
    indices = micro_batches(range(len(rows)), comm.rank, comm.world_size, micro_batch, accumulation)
    return [collate([rows[i] for i in part], 0, comm.device) for part in indices]


def build(
    engine: Engine,
    directory: Path,
    method: str = "lora_sb",
    checkpointing: bool = False,
    targets: str | list[str] = "all-linear",
    spec: OptimizerSpec | None = None,
    when_loaded: Callable[[nn.Module], None] = lambda model: None,
    labels: int = 0,
    images: bool = False,
    quantization: str | None = None,
    family: str = "",
    **settings,
) -> Attached:
    """Loads, attaches and starts, as the training program does. when_loaded: shown the model before anything
    is attached. targets: as in a recipe, or "few". labels: how many the encoder tells apart; 0 for the
    language model. images: of images and not of texts. quantization: kind of packed weights. family: the
    directory of another model than Qwen2; of experts, all are adapted."""
    directory = directory / family
    if labels:
        directory = directory / ("vision" if images else "encoder")
    if family == "experts":
        targets = ["q_proj", "experts"]
    section = ModelSection(
        path=str(directory),
        dtype=str(engine.dtype).removeprefix("torch."),
        gradient_checkpointing=checkpointing,
    )
    names = [f"label {number}" for number in range(labels)]
    other_sizes = check_sizes(section, names, images)
    with engine.loading(whole=quantization is not None):
        model, new = load_model(section, names, images, other_sizes)
    when_loaded(model)
    if quantization:
        heads = new | head_parameters(model) if labels else new
        pack_linears(model, packer(quantization, engine.dtype), engine.comm.device, heads)
    with engine.attaching():
        chosen = registry()[method](**{"rank": 7, **settings} if method != "full" else settings)
        attached = attach(
            model,
            chosen,
            FEW if targets == "few" else targets,
            new | head_parameters(model) if labels else new,
        )
    engine.start(model, spec or OptimizerSpec(lr=1e-2))
    if quantization:
        shapes = {name: layer.shape for name, layer in attached.layers.items() if layer.packing}
        transposed = [name for name in shapes if attached.layers[name].fan_in_fan_out]
        files = PretrainedFiles(directory, shapes, engine.dtype, transposed=transposed)
        open_ledger(engine, attached, 3, files)
    draw_heads(engine, new, seed=3)
    engine.train_mode(True)
    return attached


def random_factors(attached: Attached, seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    """Factors of which none is zero: at B = 0 or R = 0 most errors are invisible. Magnitudes are around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            factor: torch.randn(shape, generator=generator) * 0.1 + (factor == magnitude_of(attached.method))
            for factor, shape in layer.factor_shapes().items()
        }
        for name, layer in attached.layers.items()
    }


def write_random_factors(engine: Engine, attached: Attached) -> None:
    for name, factors in random_factors(attached).items():
        engine.write(attached.layers[name], {k: v.to(engine.comm.device) for k, v in factors.items()})


#: What DeepSpeed takes for leaving them out.
NOT_OFFLOADED = {"offload_param": None, "offload_optimizer": None}


def deepspeed_config(
    stage: int,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    dtype: str = "float32",
    clip: float = 0.0,
    **zero,
) -> dict:
    """As the program resolves one: gradients are summed in float32."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": clip,
        # DeepSpeed's own linear map at stage 3 stays installed in the process: what other cases compute would
        # depend on the order.
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False, **NOT_OFFLOADED, **zero},
        # DeepSpeed's own CPU Adam would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
        if stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
