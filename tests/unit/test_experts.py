"""Experts that are 3-D parameters: what adapters on them compute, how they start, and what files hold."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import distlora
from distlora.adapter.expert_layers import AdapterExperts, expert_weights
from distlora.checkpoints.directory import newest
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.exports.exported import AdapterSource
from distlora.exports.peft_files import read_peft
from distlora.exports.sources import CheckpointSource
from distlora.initialisation.probe import mean_gradients
from distlora.maths.generators import layer_generator
from distlora.maths.grouped import grouped_linear
from distlora.methods import LayerInit, registry
from distlora.models.losses import response_loss
from distlora.models.router_loss import take_router_loss
from distlora.recipe.load import load_recipe
from distlora.training.subject import put_on
from tests.tiny_zoo import zoo_model, zoo_model_dir

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def _load(kind, folder):
    return AutoModelForCausalLM.from_pretrained(zoo_model_dir(kind, folder), dtype=torch.float32)


def _logits(model):
    return model.eval()(input_ids=IDS).logits


def _loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def _draw_factors(adapted, scale=0.3):
    for layer in adapted.layers.values():
        for factor in layer.factors().values():
            factor.copy_(torch.randn(factor.shape) * scale)


def _start(model, method, targets="experts", **settings):
    """The adapted model with its factors, and the optimizer."""
    adapted = distlora.attach(model, method, targets=targets, **settings)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=3e-2, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, probe=[IDS], loss=_loss, first_rate=3e-2, steps=4)
    return adapted, optimizer


def _train(adapted, optimizer, steps=2):
    adapted.model.train()
    for _ in range(steps):
        _loss(adapted.model, IDS).backward()
        adapted.before_step()
        optimizer.step()
        optimizer.zero_grad()
        adapted.after_step()
    return _logits(adapted.model).detach()


def _engine(model):
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False))
    engine.start(model, OptimizerSpec(lr=1e-2))
    return engine


# ---------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("transposed", (False, True))
def test_the_gradients_of_grouped_products_are_right(transposed):
    """An expert without rows among them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    weight = draw(3, 4, 5) if transposed else draw(3, 5, 4)
    assert torch.autograd.gradcheck(
        lambda x, w, b: grouped_linear(x, w, b, (2, 0, 3), transposed), (draw(5, 4), weight, draw(3, 5))
    )


@pytest.mark.parametrize("implementation", ("eager", "batched_mm", "grouped_mm"))
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_compute_what_the_class_does_with_the_sum_of_each_experts_weights(kind, implementation):
    model = zoo_model(kind)
    model.set_experts_implementation(implementation)
    dense = copy.deepcopy(model)
    adapted = distlora.attach(model, "lora", rank=3, alpha=4, targets="experts")
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=1e-4, atol=1e-5)  # B is zero
    _draw_factors(adapted)
    weights, factors = dict(dense.named_parameters()), {}
    for name, layer in adapted.layers.items():
        assert isinstance(layer, AdapterExperts)
        a, b = (factor.detach().clone().requires_grad_() for factor in (layer.A, layer.B))
        delta = adapted.method.scaling * b @ a
        weights[name] = weights[name].detach() + (delta.mT if layer.transposed else delta)
        factors[name] = a, b
    expected = functional_call(dense, weights, (), {"input_ids": IDS}).logits
    found = _logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(found.shape)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for name, (a, b) in factors.items():
        layer = adapted.layers[name]
        for here, there in ((layer.A.grad, a.grad), (layer.B.grad, b.grad)):
            torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-5 * float(there.abs().max()))


def test_dropout_acts_on_the_adapters_input_alone():
    model = zoo_model("mixtral")
    adapted = distlora.attach(model, "lora", rank=3, dropout=0.5, targets=["gate_up_proj"])
    _draw_factors(adapted)
    layer = next(iter(adapted.layers.values())).train()
    x, counts = torch.randn(7, layer.in_features), (3, 0, 4, 0)
    torch.manual_seed(5)
    found = layer(x, counts)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    frozen = grouped_linear(x, layer.weight, None, counts)
    update = grouped_linear(grouped_linear(dropped, layer.A, None, counts), layer.B, None, counts)
    torch.testing.assert_close(found, frozen + update)


def test_experts_without_a_gate_are_adapted():
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, layers_block_type=["moe"], num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=16, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = NemotronHForCausalLM(config)
    before = _logits_of(model)
    adapted = distlora.attach(model, "lora", rank=2, targets="experts")
    assert [name.rpartition(".")[2] for name in adapted.layers] == ["up_proj", "down_proj"]
    torch.testing.assert_close(_logits_of(model), before, rtol=1e-4, atol=1e-5)


def _logits_of(model):
    return model.eval()(input_ids=IDS % 40, use_cache=False).logits


# ---------------------------------------------------------------------- which are adapted


@pytest.mark.parametrize(
    "targets, count",
    [
        ("experts", 4),
        (["experts"], 4),
        (["q_proj", "experts"], 6),
        (["all-linear", "experts"], 12),
        ("all-linear", 8),
        (["down_proj"], 2),
        (["*.experts.gate_up*"], 2),
        ({"include": ["all-linear", "experts"], "layers": 1}, 6),
        ({"include": "experts", "exclude": ["down_proj"]}, 2),
    ],
)
def test_targets_choose_experts_by_a_word_or_by_name(targets, count):
    assert len(distlora.attach(zoo_model("mixtral"), "lora", rank=2, targets=targets).layers) == count


@pytest.mark.parametrize(
    "kind, method, targets, words",
    [
        ("mixtral", {"method": "srlora", "target_rank": 60}, "experts", "target_rank 60 is above"),
        ("mixtral", {"method": "lora", "rank": 60}, "experts", "rank 60 is above"),
        ("qwen2", {"method": "lora"}, ["q_proj", "experts"], "has no experts; leave experts out"),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence(kind, method, targets, words):
    with pytest.raises(distlora.UserError, match=words):
        distlora.attach(zoo_model(kind), targets=targets, **{"rank": 2, **method})


def test_experts_of_an_unknown_form_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(4, 3, 3))

    model = nn.ModuleDict({"experts": Experts(), "other": nn.Linear(3, 3)})
    model["experts"].router = nn.Linear(3, 4)  # what is called so beside them does not stand for them
    with pytest.raises(distlora.UserError, match="computed in a way that is not known here"):
        distlora.attach(model, "lora", rank=2, targets="experts")


def test_the_plan_counts_their_factors(folder, tmp_path):
    from distlora.plan.shapes import shapes_of

    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {zoo_model_dir('mixtral', folder)}, dtype: float32}}\n"
        "method: {name: pissa, rank: 3}\ntargets: experts\ndata: {task: gsm8k}\noutput_dir: none\n"
    )
    shapes = shapes_of(load_recipe(tmp_path / "recipe.yaml"))
    weights = expert_weights(zoo_model("mixtral")).values()
    assert shapes.factors == sum(weight.experts * 3 * sum(weight.shape) for weight in weights)
    assert shapes.factors == sum(shapes.trained.values())


# ---------------------------------------------------------------------- starts


@pytest.mark.parametrize("kind", ("mixtral", "gpt_oss"))
def test_the_probe_finds_the_gradient_of_every_expert(kind):
    """One that no token came to has the gradient zero."""
    model, one = zoo_model(kind), IDS[:1, :3]
    dense = copy.deepcopy(model)
    _loss(dense, one).backward()
    adapted = distlora.attach(model, "lora", rank=2, targets="experts")
    engine = _engine(model)
    found = mean_gradients(engine, adapted.layers, dict.fromkeys(adapted.layers, 0), [one], 1, _loss)
    reached = 0
    for name, layer in adapted.layers.items():
        expected = dense.get_parameter(name).grad
        expected = expected.mT if layer.transposed else expected
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
        reached += sum(bool(own.any()) for own in found[name])
    assert 0 < reached < sum(layer.stack[0] for layer in adapted.layers.values())


def test_every_expert_starts_as_a_layer_of_its_own(folder):
    model = _load("gpt_oss", folder)
    weights = {name: model.get_parameter(name).detach().mT.clone() for name in expert_weights(model)}
    before = _logits(model).detach()
    adapted, _ = _start(model, "pissa", rank=3)
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)
    for name, layer in adapted.layers.items():
        for expert, weight in enumerate(weights[name]):
            generator = layer_generator(42, f"{name}.{expert}")
            own = adapted.method.initialise(LayerInit(layer.shape, weight, generator))
            torch.testing.assert_close(layer.A[expert], own.factors["A"])
            torch.testing.assert_close(layer.B[expert], own.factors["B"])


def test_an_expert_that_no_token_of_the_probe_reached_starts_without_a_step(folder, caplog):
    model = _load("mixtral", folder)
    adapted = distlora.attach(model, "lora_sb", rank=2, init={"eta": 1e-2}, targets="experts")
    optimizer = torch.optim.AdamW(adapted.parameters(), weight_decay=0.0)
    with caplog.at_level("WARNING"):
        distlora.initialise(adapted, optimizer=optimizer, probe=[IDS[:1, :2]], loss=_loss)
    assert "it starts there in arbitrary directions" in caplog.text
    steps = [core for layer in adapted.layers.values() for core in layer.R.detach()]
    assert any(core.any() for core in steps) and not all(core.any() for core in steps)


def test_gradients_are_transformed_expert_by_expert():
    adapted = distlora.attach(zoo_model("mixtral"), "lora_pro", rank=2, targets="experts")
    layer = next(iter(adapted.layers.values()))
    factors, gradients = (
        {name: torch.randn(shape) for name, shape in layer.factor_shapes().items()} for _ in "12"
    )
    found = layer.transform_gradients(gradients, factors)
    for expert in range(*layer.stack):
        own = registry()["lora_pro"](rank=2).transform_gradients(
            {name: gradient[expert] for name, gradient in gradients.items()},
            {name: factor[expert] for name, factor in factors.items()},
        )
        for name in own:
            torch.testing.assert_close(found[name][expert], own[name])


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "kind, method, targets",
    [
        ("mixtral", "lora", "experts"),
        ("qwen3_moe", "lora_xs", ["all-linear", "experts"]),
        ("gpt_oss", "pissa", ["q_proj", "experts"]),
        ("gpt_oss", "lora", ["down_proj"]),
    ],
)
def test_files_hold_what_was_trained(kind, method, targets, folder, tmp_path):
    """PEFT, transformers and a resumed run compute the same, and the exports are read again as they are."""
    from peft import PeftModel

    base = zoo_model_dir(kind, folder)
    adapted, optimizer = _start(_load(kind, folder), method, targets, rank=3)
    wanted = _train(adapted, optimizer)
    assert float((wanted - _logits(_load(kind, folder)).detach()).abs().max()) > 1e-4
    close = dict(rtol=1e-3, atol=1e-4)

    distlora.export(adapted, tmp_path / "merged", format="merged", base_model=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), wanted, **close)

    distlora.export(adapted, tmp_path / "peft", base_model=base)
    peft = PeftModel.from_pretrained(_load(kind, folder), tmp_path / "peft")
    torch.testing.assert_close(_logits(peft), wanted, **close)

    distlora.save(adapted, tmp_path / "run")
    again = distlora.attach(_load(kind, folder), method, targets=targets, rank=3)
    optimizer = torch.optim.AdamW(again.parameters(), lr=3e-2, weight_decay=0.0)
    distlora.load(again, None, tmp_path / "run", optimizer=optimizer)
    torch.testing.assert_close(_logits(again.model), wanted, rtol=0, atol=0)

    checkpoint = CheckpointSource(newest(tmp_path / "run"), adapted.method)
    earlier, files = AdapterSource(tmp_path / "peft"), read_peft(tmp_path / "peft")
    assert checkpoint.layers == earlier.layers
    for name in earlier.layers:
        update = checkpoint.low_rank(name)
        for pair in (earlier.low_rank(name), files.pair(name)):
            torch.testing.assert_close(
                pair.left @ pair.right, update.left @ update.right, rtol=1e-4, atol=1e-5
            )

    evaluated = distlora.attach(_load(kind, folder), "lora", rank=1, targets=list(files.layers))
    files.refuse_other_model(_load(kind, folder), str(base))
    put_on(_engine(evaluated.model), files)
    torch.testing.assert_close(_logits(evaluated.model), wanted, **close)


def test_an_adapter_of_other_experts_is_refused(folder, tmp_path):
    adapted, _ = _start(_load("mixtral", folder), "lora", rank=2)
    distlora.export(adapted, tmp_path / "peft", base_model="x")
    with pytest.raises(distlora.UserError, match="this one has no 4 experts"):
        read_peft(tmp_path / "peft").refuse_other_model(zoo_model("qwen3_moe"), "y")


def test_full_trains_experts_themselves(folder, tmp_path):
    model = _load("gpt_oss", folder)
    adapted, optimizer = _start(model, "full")
    assert adapted.trained and all(".experts." in name for name in adapted.trained)
    assert any(name.endswith("_bias") for name in adapted.trained)
    wanted = _train(adapted, optimizer)
    distlora.export(adapted, tmp_path / "m", format="merged", base_model=zoo_model_dir("gpt_oss", folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), wanted, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the router's loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_routers_loss_is_the_classs_own(kind):
    model = zoo_model(kind).train()
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.7
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}
    own = model(**batch)
    total, count = response_loss(model, batch)
    torch.testing.assert_close(total / count, own.loss, rtol=1e-5, atol=1e-5)
    seen, targets = take_router_loss(model)
    assert targets == count and math.isclose(seen / targets, float(own.aux_loss), rel_tol=1e-5)
    model.eval()
    alone, _ = response_loss(model, batch)
    torch.testing.assert_close(alone / count, own.loss - 0.7 * own.aux_loss, rtol=1e-4, atol=1e-5)
    assert take_router_loss(model) == (0.0, 0)
