"""Layers whose weight is stored as (in, out), as GPT-2's Conv1D: they do all that linear layers do."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from transformers.pytorch_utils import Conv1D

from distlora.adapter.attach import attach, linears_to_pack
from distlora.adapter.layer import AdapterLinear, PackedLinear
from distlora.adapter.linears import keeps_transpose, linears_of, shape_of
from distlora.adapter.packed import packer
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.exports.merged import export_merged_from_engine
from distlora.exports.peft import export_peft_from_engine
from distlora.exports.peft_files import read_peft
from distlora.initialisation.factors import initialise
from distlora.initialisation.probe import Probe
from distlora.maths.low_rank import LowRank
from distlora.methods import HasMagnitude, probe_of, registry
from distlora.methods.lora import LoRA
from tests.distributed.cases import solo
from tests.distributed.world import random_factors

OUT, IN = 24, 15
METHODS = sorted(set(registry()) - {"full"})


def twins():
    """A Conv1D and a linear layer of the same W."""
    conv, plain = Conv1D(OUT, IN), nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(OUT, IN, generator=generator))
        plain.bias.copy_(torch.randn(OUT, generator=generator))
        conv.weight.copy_(plain.weight.T)
        conv.bias.copy_(plain.bias)
    return conv, plain


def method(name):
    return registry()[name](rank=3, **({"target_rank": 6} if name == "srlora" else {}))


def test_its_shape_is_out_and_in():
    conv, plain = twins()
    assert shape_of(conv) == shape_of(plain) == (OUT, IN)
    assert keeps_transpose(conv) and not keeps_transpose(plain)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_computes_what_it_computes_on_a_linear_layer(name):
    """Forward and backward, adapted and bare, in the probe, and with a pair beside the weight."""
    layers = [AdapterLinear(layer, method(name), "x") for layer in twins()]
    factors = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(len(key) + shape[0]))
        for key, shape in layers[0].method.shapes(OUT, IN).items()
    }
    x, dy = torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    seen = []
    for layer in layers:
        layer.weight.requires_grad_(False)
        with torch.no_grad():
            for key, factor in factors.items():
                getattr(layer, key).copy_(factor)
        given = x.clone().requires_grad_(True)
        y = layer(given)
        y.backward(dy)
        trained = [getattr(layer, key).grad for key in layer.method.trains]
        layer.put_beside(LowRank(torch.ones(OUT, 1), torch.ones(1, IN)))
        with layer.bare():
            bare = layer(x)
        taps = []
        anchor = torch.zeros((), requires_grad=True)
        layer.tap(anchor, lambda dy, x, taps=taps: taps.append(dy.T @ x))
        torch.autograd.backward(layer(x), dy, inputs=[anchor])
        seen.append([y, given.grad, *trained, bare, *taps, layer.whole_weight(), layer.dense_weight()])
    for ours, theirs in zip(*seen):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_the_weight_arrives_transposed(dtype):
    update = LowRank(torch.randn(OUT, 2), torch.randn(2, IN))
    weights = []
    for layer in twins():
        model = nn.ModuleDict({"x": layer.to(dtype)})
        attach(model, LoRA(rank=2), ["x"])
        engine = LocalEngine(solo(), dtype)
        engine.start(model, OptimizerSpec())
        engine.add_low_rank(engine.layers["x"], update, "nearest", 0)
        weights.append(engine.layers["x"].whole_weight())
    assert torch.equal(*weights)
    assert tuple(engine.layers["x"].whole_weight().shape) == (OUT, IN)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_weight_is_that_of_the_linear_layer(kind):
    pytest.importorskip("bitsandbytes")
    make, layers = packer(kind, torch.float32), twins()
    packed = [PackedLinear(layer, make((OUT, IN)), torch.device("cpu")) for layer in layers]
    assert torch.equal(*(layer.weight.view(torch.int32) for layer in packed))  # some bits are no number
    x = torch.randn(4, IN)
    assert torch.equal(packed[0](x), packed[1](x))
    adapted = AdapterLinear(packed[0], LoRA(rank=2), "x")
    assert adapted.fan_in_fan_out and not adapted.transposed
    torch.testing.assert_close(adapted.whole_weight(), layers[1].weight, rtol=0.3, atol=0.3)


# ---------------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(_config())
    model.save_pretrained(folder)
    return folder


def _config():
    # Square projections: their shapes do not say which way they are stored.
    return GPT2Config(vocab_size=97, n_embd=36, n_layer=2, n_head=6, n_positions=32, initializer_range=0.2)


def _engine(directory, name):
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()
    attached = attach(model, method(name), "all-linear")
    engine = LocalEngine(solo())
    engine.start(model, OptimizerSpec())
    ids = torch.arange(12).view(2, 6)
    probe = None
    if probe_of(method(name)) is not None:
        probe = Probe(
            lambda: iter([ids]), lambda: iter([ids]), 2,
            lambda model, batch: model(batch, labels=batch).loss * 2,
        )  # fmt: skip
    initialise(engine, attached, 3, 1e-3, probe)
    for layer, factors in random_factors(attached).items():
        kept = engine.read(engine.layers[layer])
        engine.write(
            engine.layers[layer], {key: kept[key] + 0.1 * factors[key] for key in method(name).trains}
        )
    return engine, attached, model, ids


def test_all_linear_is_every_projection(directory):
    model = GPT2LMHeadModel(_config())
    wanted = {
        f"transformer.h.{block}.{part}"
        for block in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(linears_to_pack(model)) == wanted and set(linears_of(model)) == wanted | {"lm_head"}
    assert set(attach(model, LoRA(rank=2), "all-linear").layers) == wanted
    older = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=97, n_embd=36, n_layer=1, n_head=6))
    assert len(attach(older, LoRA(rank=2), "all-linear").layers) == 4


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "lora_sb", "srlora", "lora_ga"])
def test_peft_and_the_merged_files_answer_as_the_run_does(directory, tmp_path, name):
    peft = pytest.importorskip("peft")
    engine, attached, model, ids = _engine(directory, name)
    with torch.no_grad():
        here, plain = model(ids).logits, GPT2LMHeadModel.from_pretrained(directory)(ids).logits
    assert (here - plain).abs().max() > 1e-2
    export_peft_from_engine(engine, attached, tmp_path / "adapter", str(directory), 1)
    base = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert loaded.peft_config["default"].fan_in_fan_out
    merged = export_merged_from_engine(engine, attached, tmp_path / "merged", directory, 1)
    plain = GPT2LMHeadModel.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, here, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(ids).logits, here, rtol=1e-4, atol=1e-4)
    files = read_peft(tmp_path / "adapter")  # for an evaluation, or of PEFT's own making
    files.refuse_other_model(GPT2LMHeadModel(_config()), "x")
    assert bool(files.magnitudes) == isinstance(attached.method, HasMagnitude)
