"""PEFT as oracle: a whole model with the same factors answers,
learns and steps like PEFT's own, in float32.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distlora.data import collate
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.initialisation.factors import initialise
from distlora.models.losses import response_loss
from distlora.training.step import accumulate
from tests.distributed.cases import solo
from tests.distributed.world import build, random_factors, samples
from tests.stepping import train_step
from tests.tiny_models import tiny_model_dir

peft = pytest.importorskip("peft")

RANK, ALPHA, ROWS, STEPS = 7, 5.0, 6, 5
TOLERANCE = 1e-5
#: Adam divides by |g| + eps: at the usual 1e-8 an element whose gradient is itself a rounding error takes a
#: whole step either way.
ADAMW = OptimizerSpec(lr=1e-3, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.1)
#: What PEFT calls each of them.
PEFTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}
FACTORS = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}

every_method = pytest.mark.parametrize("method", PEFTS)
#: At the start, where lora's B is zero, and from factors of which none is.
every_start = pytest.mark.parametrize("start", ["initial", "random"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model_dir("qwen2", tmp_path_factory.mktemp("models"))


class Twins:
    """Our engine and PEFT's model, initialised by each in its own way, and then given one set of factors:
    ours.
    """

    def __init__(self, directory, method: str, start: str = "initial", **settings):
        self.engine = LocalEngine(solo())
        self.attached = build(
            self.engine, directory, method=method, rank=RANK, alpha=ALPHA, spec=ADAMW, **settings
        )
        initialise(self.engine, self.attached, 3, ADAMW.lr)
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=settings.get("dropout", 0.0),
            target_modules=list(self.attached.layers),
            **PEFTS[method],
        )
        self.theirs = peft.get_peft_model(plain, config).train()
        self.initial = {name: self.of_peft(name).detach().clone() for name in self.attached.trained}
        if start == "random":
            for name, factors in random_factors(self.attached).items():
                self.engine.write(self.attached.layers[name], factors)
        with torch.no_grad():
            for name in self.attached.trained:
                self.of_peft(name).copy_(self.ours(name))

    def ours(self, name: str) -> torch.nn.Parameter:
        return self.engine.module.get_parameter(name)

    def of_peft(self, name: str) -> torch.nn.Parameter:
        """PEFT's tensor of ours, such as `model.layers.0.mlp.up_proj.A`."""
        layer, _, factor = name.rpartition(".")
        return getattr(self.theirs.base_model.model.get_submodule(layer), FACTORS[factor])["default"].weight

    def logits(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = whole_batch(seed)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return self.engine.module(**inputs).logits, self.theirs(**inputs).logits


def whole_batch(seed: int) -> dict[str, torch.Tensor]:
    """For PEFT, whose model takes transformers' own loss: the mean over all response tokens."""
    return collate(samples(ROWS, seed), 0)


def micro_batches(seed: int) -> list[dict[str, torch.Tensor]]:
    """The same rows for us, in micro-batches of different numbers of tokens."""
    rows = samples(ROWS, seed)
    return [collate(rows[first : first + 2], 0) for first in range(0, ROWS, 2)]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    """To TOLERANCE of the largest element."""
    assert float((ours - theirs).detach().abs().max()) <= TOLERANCE * float(theirs.detach().abs().max()), what


@every_method
@every_start
def test_forward_and_gradients(directory, method, start):
    twins = Twins(directory, method, start)
    assert twins.attached.method.scaling != 1.0
    assert_equal(*twins.logits(seed=1))
    loss = accumulate(twins.engine, micro_batches(seed=1), response_loss)
    expected = twins.theirs(**whole_batch(seed=1)).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=TOLERANCE)
    assert len(twins.attached.trained) == len(twins.attached.method.trains) * 7 * 3
    for name in twins.attached.trained:
        assert_equal(twins.ours(name).grad, twins.of_peft(name).grad, name)
    assert {name for name in twins.attached.trained if not twins.of_peft(name).grad.any()} == {
        name
        for name in twins.attached.trained
        if start == "initial" and method != "pissa" and name.endswith(".A")
    }


@every_method
def test_with_dropout_of_the_same_elements(directory, method):
    """Both draw one mask a layer, in the order of the layers, from torch's global generator."""
    twins, batch = Twins(directory, method, "random", dropout=0.3), whole_batch(seed=1)
    losses = []
    for one_pass in (
        lambda: accumulate(twins.engine, [batch], response_loss),
        lambda: twins.theirs(**batch).loss,
    ):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            losses.append(one_pass())
    losses[1].backward()
    assert losses[0] == pytest.approx(losses[1].item(), rel=TOLERANCE)
    for name in twins.attached.trained:
        assert_equal(twins.ours(name).grad, twins.of_peft(name).grad, name)


@every_method
@every_start
def test_five_steps_of_adamw(directory, method, start):
    twins = Twins(directory, method, start)
    before = {name: twins.ours(name).detach().clone() for name in twins.attached.trained}
    trained = [p for p in twins.theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay
    )
    for step in range(STEPS):
        loss, _ = train_step(twins.engine, micro_batches(seed=step), response_loss, ADAMW.lr)
        expected = twins.theirs(**whole_batch(seed=step)).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(expected.item(), rel=TOLERANCE)
    for name in twins.attached.trained:
        assert (twins.ours(name) - before[name]).abs().max() > ADAMW.lr
        torch.testing.assert_close(twins.ours(name), twins.of_peft(name), rtol=0, atol=TOLERANCE)
    assert_equal(*twins.logits(seed=STEPS))


def test_pissa_starts_where_pefts_does(directory):
    """Singular vectors are known up to the sign of a pair; the frozen residual has no such freedom."""
    twins = Twins(directory, "pissa")
    for name, layer in twins.attached.layers.items():
        a, b = twins.initial[f"{name}.A"], twins.initial[f"{name}.B"]
        sign = torch.sign((a * layer.A).sum(1))
        assert_equal(layer.A.detach(), sign[:, None] * a, name)
        assert_equal(layer.B.detach(), b * sign, name)
        assert_equal(layer.weight, twins.theirs.base_model.model.get_submodule(name).base_layer.weight, name)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_lora_starts_where_pefts_does(directory, method):
    """B zero; A drawn by another generator, but within the same bound and with the same spread."""
    twins = Twins(directory, method)
    for name in twins.attached.layers:
        ours, theirs = twins.ours(f"{name}.A").detach(), twins.initial[f"{name}.A"]
        assert not twins.ours(f"{name}.B").any() and not twins.initial[f"{name}.B"].any()
        assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.05)
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.15)


def test_doras_magnitudes_start_where_pefts_do(directory):
    twins = Twins(directory, "dora")
    for name in twins.attached.layers:
        assert_equal(twins.ours(f"{name}.m").detach(), twins.initial[f"{name}.m"], name)
