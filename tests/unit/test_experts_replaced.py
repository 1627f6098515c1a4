"""Stacks of experts under methods that replace components or train norms: every expert is a layer of its own.

The oracle is the same model with one linear layer for each expert and projection, which the code for single
layers adapts. Its layers have the names of the experts, so that their random numbers are the same.
"""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import distlora
from distlora.adapter.expert_layers import expert_weights, of_expert
from distlora.evaluation.folding import folded
from distlora.maths.functional import rows_rescaled
from distlora.maths.grouped import spread_rows
from distlora.maths.importance import component_of, component_sums
from distlora.maths.linalg import row_norms, with_row_norms
from distlora.maths.low_rank import LowRank, pair_norm
from distlora.plan import stored
from distlora.plan.setup import setup_of
from distlora.plan.shapes import shapes_of
from distlora.recipe.load import load_recipe
from distlora.recompose.report import PIXELS, WIDEST, RecompositionReport
from tests.tiny_zoo import zoo_model, zoo_model_dir

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
RATE, STEPS = 1e-2, 6
#: Components replaced after steps 2 and 4.
SRLORA = {"method": "srlora", "rank": 3, "target_rank": 7, "gamma": 0.7, "interval": 2}
LORA_SB = {"method": "lora_sb", "rank": 2, "recompose": {"times": 2}, "init": {"eta": 1e-2}}
SETTINGS = {
    "srlora": SRLORA,
    "sidecar": SRLORA | {"fuse_into": "sidecar"},
    "gradient": SRLORA | {"refill": "gradient"},
    "adaptive": SRLORA
    | {
        "interval": None,
        "schedule": "adaptive",
        "adaptive": {"window": 1, "improvement": 0.99, "share": 1.0},
    },
    "lora_sb": LORA_SB,
    "lora_sb from zero": LORA_SB | {"recompose": {"times": 2, "start": "zero"}},
    "dora": {"method": "dora", "rank": 2},
    "scaled dora": {"method": "dora", "rank": 2, "alpha": 5.0},
}
#: Every setting with one class, SRLoRA with all three.
CASES = [(kind, "srlora") for kind in KINDS] + [
    (KINDS[number % 3], key) for number, key in enumerate(SETTINGS) if key != "srlora"
]
GOING_ON = [("mixtral", "srlora"), ("qwen3_moe", "lora_sb"), ("gpt_oss", "gradient"), ("mixtral", "dora")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


class Separate(nn.Module):
    """Experts as linear layers of their own, with the names that the matrices of a stack have. All are called
    in every pass.
    """

    def __init__(self, own: nn.Module):
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            weights, biases = getattr(own, name), getattr(own, f"{name}_bias", None)
            weights = weights.detach().mT if own.is_transposed else weights.detach()
            setattr(self, name, nn.ModuleList(_linear(*pair) for pair in _pairs(weights, biases)))
        self._gate = own._apply_gate

    def forward(self, hidden, top_k_index, top_k_weights):
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(experts, minlength=len(self.down_proj)).tolist()
        rows = hidden[order // top_k_index.shape[1]].split(counts)
        inner = self._gate(torch.cat([up(own) for up, own in zip(self.gate_up_proj, rows)]))
        outer = torch.cat([down(own) for down, own in zip(self.down_proj, inner.split(counts))])
        weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = order.argsort()
        return weighted[back].view(*top_k_index.shape, -1).sum(1).to(hidden.dtype)


def _pairs(weights, biases):
    return [(weight, None if biases is None else biases[e].detach()) for e, weight in enumerate(weights)]


def _linear(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def _unstacked(model):
    """The same model with `Separate` in the place of every stack."""
    for name in dict.fromkeys(weight.module for weight in expert_weights(model).values()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Separate(model.get_submodule(name)))
    return model


def _loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def _logits(model):
    was, _ = model.training, model.eval()
    found = model(input_ids=IDS).logits
    model.train(was)
    return found


class Trained:
    """An adapted model in training. targets: of `attach`; all experts are adapted either way."""

    def __init__(self, model, settings, targets="experts", checkpoint=None):
        settings = dict(settings)
        self.start = _logits(model)
        self.adapted = distlora.attach(model, settings.pop("method"), targets=targets, **settings)
        self.model, self.layers = model.train(), self.adapted.layers
        self.optimizer = torch.optim.AdamW(self.adapted.parameters(), lr=RATE, weight_decay=0.0)
        plan = dict(optimizer=self.optimizer, probe=[IDS], loss=_loss, first_rate=RATE, steps=STEPS)
        if checkpoint is None:
            distlora.initialise(self.adapted, **plan)
        else:
            distlora.load(self.adapted, None, checkpoint, **plan)
        self.reports, self.moved = [], []

    def train(self, steps):
        for _ in range(steps):
            loss = _loss(self.model, IDS)
            loss.backward()
            self.adapted.before_step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            before = _logits(self.model)
            report = self.adapted.after_step(loss.item())
            if report is not None and report.recomposed:
                self.reports.append(report)
                self.moved.append(float((_logits(self.model) - before).abs().max()))
        return self

    def of(self, layer):
        """Everything that training changes in a layer: factors, moments, weight, and what is beside it."""
        found = dict(layer.factors()) | {"weight": layer.whole_weight()}
        for name in layer.method.trains:
            state = self.optimizer.state[getattr(layer, name)]
            found |= {f"{name}.{key}": value for key, value in state.items() if key != "step"}
        return {name: tensor.detach() for name, tensor in found.items()}


# ---------------------------------------------------------------------- as single layers


@pytest.mark.parametrize(("kind", "key"), CASES)
def test_every_expert_is_trained_as_a_layer_of_its_own(kind, key):
    """And where components are replaced, the network's function is kept; only a start of LoRA-SB may take a
    step.
    """
    model = zoo_model(kind)
    alone = Trained(_unstacked(copy.deepcopy(model)), SETTINGS[key], ["*.experts.*"]).train(STEPS)
    stacked = Trained(model, SETTINGS[key]).train(STEPS)
    torch.testing.assert_close(_logits(stacked.model), _logits(alone.model), rtol=1e-4, atol=1e-5)
    for name, layer in stacked.layers.items():
        everything = stacked.of(layer)
        for expert in range(*layer.stack):
            own = alone.of(alone.layers[f"{name}.{expert}"])
            assert own.keys() == everything.keys()
            for what, tensor in of_expert(everything, expert).items():
                scale = max(float(own[what].abs().max()), 1e-12)
                torch.testing.assert_close(tensor, own[what], rtol=1e-3, atol=1e-4 * scale)
    _same_reports(stacked, alone)
    assert len(stacked.moved) == (0 if "dora" in key else 2)
    assert key == "lora_sb" or max(stacked.moved, default=0.0) < 1e-4


def _same_reports(stacked, alone):
    assert len(stacked.reports) == len(alone.reports)
    for here, there in zip(stacked.reports, alone.reports):
        assert here.step == there.step and set(here.names) == set(there.names)
        if here.scores is not None:
            rows = [there.names.index(name) for name in here.names]
            torch.testing.assert_close(here.scores, there.scores[rows], rtol=1e-2, atol=1e-12)
        for name, layer in stacked.layers.items():
            found = here.layers[name]
            own = [there.layers[f"{name}.{expert}"] for expert in range(*layer.stack)]
            assert found.components == tuple(each.components for each in own)
            assert found.sigma == pytest.approx([s for each in own for s in each.sigma], rel=1e-3)
            assert {each.reserve_left for each in own} == {found.reserve_left}
            for norm in ("update_norm", "learned_norm", "delta_norm"):
                together = math.hypot(*(getattr(each, norm) for each in own))
                assert getattr(found, norm) == pytest.approx(together, rel=1e-3)
            for mean in ("effective_rank", "low_half_share"):
                values = [getattr(each, mean) for each in own]
                if values[0] is not None:
                    expected = sum(values) / len(values)
                    assert getattr(found, mean) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_rows_begin_as_those_of_every_expert(kind):
    run = Trained(zoo_model(kind), SETTINGS["dora"], ["q_proj", "experts"])
    torch.testing.assert_close(_logits(run.model), run.start, rtol=1e-4, atol=1e-5)
    for layer in run.layers.values():
        torch.testing.assert_close(layer.m.detach(), layer.whole_weight().norm(dim=-1))


def test_dropout_drops_the_input_of_what_differs_from_the_pretrained_experts():
    adapted = distlora.attach(zoo_model("gpt_oss"), "dora", rank=2, dropout=0.5, targets=["gate_up_proj"])
    layer = next(iter(adapted.layers.values())).train()
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.copy_(torch.rand(factor.shape))
    x, counts = torch.randn(7, layer.in_features), (3, 0, 4, 0)
    torch.manual_seed(5)
    found = layer(x, counts).split(counts)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5).split(counts)
    for expert, own in enumerate(x.split(counts)):
        weight, delta = layer.whole_weight()[expert], layer.B[expert] @ layer.A[expert]
        change = with_row_norms(weight + delta, layer.m[expert]) - weight
        expected = own @ weight.T + layer.bias[expert] + dropped[expert] @ change.T
        torch.testing.assert_close(found[expert], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "key"), [("gpt_oss", "dora"), ("mixtral", "sidecar"), ("qwen3_moe", "lora_sb")]
)
def test_folded_experts_compute_what_the_adapted_ones_do(kind, key):
    run = Trained(zoo_model(kind), SETTINGS[key]).train(STEPS)
    wanted = _logits(run.model)
    with folded(run.adapted.engine):
        torch.testing.assert_close(_logits(run.model), wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- runs that go on, and files


@pytest.mark.parametrize(("kind", "key"), GOING_ON)
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(kind, key, folder, tmp_path):
    def load():
        return AutoModelForCausalLM.from_pretrained(zoo_model_dir(kind, folder), dtype=torch.float32)

    run = Trained(load(), SETTINGS[key], ["q_proj", "experts"]).train(3)
    distlora.save(run.adapted, tmp_path)
    run.train(STEPS - 3)
    again = Trained(load(), SETTINGS[key], ["q_proj", "experts"], tmp_path).train(STEPS - 3)
    for name, layer in run.layers.items():
        expected = run.of(layer)
        for what, tensor in again.of(again.layers[name]).items():
            assert torch.equal(tensor, expected[what]), f"{name}: {what}"
    told = [[report.record()["layers"] for report in each.reports] for each in (run, again)]
    assert told[1] == told[0][len(told[0]) - len(told[1]) :]


@pytest.mark.parametrize(
    ("kind", "key"),
    [("mixtral", "srlora"), ("qwen3_moe", "gradient"), ("gpt_oss", "sidecar"), ("gpt_oss", "lora_sb")],
)
def test_files_hold_what_was_recomposed(kind, key, folder, tmp_path):
    from peft import PeftModel

    base = zoo_model_dir(kind, folder)
    run = Trained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), SETTINGS[key], ["q_proj", "experts"]
    ).train(STEPS)
    wanted, close = _logits(run.model), dict(rtol=1e-3, atol=2e-4)
    distlora.export(run.adapted, tmp_path / "merged", format="merged", base_model=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), wanted, **close)
    distlora.export(run.adapted, tmp_path / "peft", base_model=base)
    pretrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exported = PeftModel.from_pretrained(pretrained, tmp_path / "peft")
    torch.testing.assert_close(_logits(exported), wanted, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_experts_are_merged_and_refused_in_pefts_format(kind, folder, tmp_path):
    base = zoo_model_dir(kind, folder)
    run = Trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), SETTINGS["dora"]).train(3)
    with pytest.raises(distlora.UserError, match="export it with --format merged"):
        distlora.export(run.adapted, tmp_path / "peft", base_model=base)
    assert not (tmp_path / "peft").exists()
    distlora.export(run.adapted, tmp_path / "merged", format="merged", base_model=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), _logits(run.model), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("key", ("srlora", "sidecar"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_has_the_memory_of_every_expert(kind, key, folder, tmp_path):
    base, method = zoo_model_dir(kind, folder), dict(SETTINGS[key])
    content = {
        "model": {"path": str(base), "dtype": "float32"}, "targets": "experts",
        "method": {"name": method.pop("method")} | method, "data": {"task": "gsm8k"},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 4}, "output_dir": "none",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    setup = setup_of(recipe, shapes_of(recipe), 1)
    run = Trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), SETTINGS[key])
    reserve = run.adapted.recomposer.reserve_bytes()
    assert stored.on_the_host(setup) - _ledger_bytes(run, setup) == reserve > 0
    run.train(STEPS)
    assert stored.beside_weights(setup) == run.adapted.recomposer.beside_bytes()
    assert (stored.beside_weights(setup) > 0) == (key == "sidecar")


def _ledger_bytes(run, setup):
    """Of the start and two recompositions, in float32."""
    columns = run.adapted.method.rank + setup.recompositions * setup.columns_of_a_recomposition
    assert setup.recompositions == 2
    return 4 * columns * sum(layer.stack[0] * sum(layer.shape) for layer in run.layers.values())


# ---------------------------------------------------------------------- parts of stacks


@pytest.mark.parametrize("axis", (0, 1))
def test_components_of_a_stack_are_those_of_its_factors_however_it_is_cut(axis):
    shape = (4, 3, 5)
    rank = shape[1 + axis]
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    whole = torch.cat([component_sums(axis, own.flatten(), 0, shape[1:]) for own in scores])
    owners = torch.cat([component_of(axis, 0, 15, shape[1:]) + rank * expert for expert in range(4)])
    for cuts in ((0, 60), (0, 7, 8, 29, 60), (0, 0, 15, 31, 60)):
        parts = list(zip(cuts, cuts[1:]))
        sums = sum(component_sums(axis, scores.flatten()[a:b], a, shape) for a, b in parts)
        torch.testing.assert_close(sums, whole)
        found = torch.cat([component_of(axis, a, b - a, shape) for a, b in parts])
        assert torch.equal(found, owners)


def test_a_core_of_a_stack_belongs_to_the_first_component_of_its_expert():
    assert component_of(None, 3, 6, (3, 2, 2)).tolist() == [0, 2, 2, 2, 2, 4]


def test_norms_of_a_stack_are_those_of_its_matrices():
    draw = torch.Generator().manual_seed(3)
    weight, left, right = (torch.randn(3, *shape, generator=draw) for shape in ((5, 4), (5, 2), (2, 4)))
    expected = torch.stack([row_norms(*own) for own in zip(weight, left, right)])
    assert torch.equal(row_norms(weight, left, right), expected)
    scaled = with_row_norms(weight, expected)
    torch.testing.assert_close(scaled.norm(dim=-1), expected)
    assert pair_norm(LowRank(left, right)) == pytest.approx(float((left @ right).norm()), rel=1e-5)


def test_gradients_of_numbers_for_each_expert_are_right():
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: spread_rows(v, (2, 0, 3)), (values,))
    base, update, scale = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(rows_rescaled, (base, update, scale))


def test_a_picture_of_many_experts_is_no_wider_than_it_may_be():
    for count in (3, WIDEST // PIXELS, WIDEST // 2, WIDEST + 1):
        names = [str(number) for number in range(count)]
        picture = RecompositionReport(1, False, "", torch.rand(count, 2).double(), names).picture()
        assert picture.shape[1] % count == 0 and picture.shape[1] <= max(WIDEST, count)
