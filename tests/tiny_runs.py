"""Short runs of a tiny classifier on one process: what training with recomposition does, without model files.

Two adapted layers of odd sizes, one with a bias, and a head that trains fully. Everything is drawn from
generators, so equal arguments give equal runs.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distlora.adapter.attach import attach
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.owners import open_ledger
from distlora.initialisation.factors import initialise, install_gradient_maps
from distlora.initialisation.probe import Probe
from distlora.methods import Method, registry
from distlora.recompose.recomposer import Recomposer
from distlora.recompose.report import RecompositionReport
from distlora.training.step import accumulate
from tests.stepping import take_step

FP32, BF16 = torch.float32, torch.bfloat16
SEED, RATE = 11, 1e-2
BATCH, MICRO_BATCH, CLASSES = 12, 6, 7
PROBE_SAMPLES = 6
#: Four recompositions of two components in twenty steps, after steps 4, 8, 12 and 16.
SRLORA = {"name": "srlora", "rank": 4, "target_rank": 12, "gamma": 0.5}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(23, 29)
        self.second = nn.Linear(29, 17, bias=False)
        self.head = nn.Linear(17, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def method_of(settings: dict) -> Method:
    return registry()[settings["name"]](**settings)


def loss_sum(net: nn.Module, batch: dict[str, Tensor], weights: Tensor | None = None) -> tuple[Tensor, int]:
    losses = nn.functional.cross_entropy(net(batch["x"]).float(), batch["labels"], reduction="none")
    return (losses if weights is None else losses * weights).sum(), len(losses)


def samples(number: int, dtype: torch.dtype, count: int = BATCH) -> dict[str, Tensor]:
    """Inputs of which the first few numbers decide the class."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(count, 23, generator=generator)
    return {"x": x.to(dtype), "labels": x[:, :CLASSES].argmax(1)}


class Run:
    """A run as the training program makes it: started at W0, `initialise`d unless `fresh`,
    and then stepped.
    """

    def __init__(
        self,
        settings: dict,
        dtype: torch.dtype = FP32,
        steps: int = 20,
        spec: OptimizerSpec | None = None,
        clip: float | None = 0.5,
        fresh: bool = False,
    ):
        self.method, self.total, self.done = method_of(settings), steps, 0
        self.spec, self.loss_scale = spec or OptimizerSpec("adamw", RATE), 1.0
        net, generator = Net(), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5
                )
        net.to(dtype)
        self.attached = attach(net, self.method, ["first", "second"], {"head.weight", "head.bias"})
        self.layers = self.attached.layers
        self.engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), dtype, clip)
        self.engine.start(net, self.spec)
        self.first_weights = self.weights()
        self.probes: list[int] = []
        open_ledger(self.engine, self.attached, SEED)
        self.report = None if fresh else initialise(self.engine, self.attached, SEED, RATE, self.probe(0))
        reserves = self.report and self.report.reserves
        self.recomposer = Recomposer(
            self.engine, self.attached, SEED, steps, reserves, self._numbered_probe, lambda step: RATE
        )

    @property
    def ledger(self):
        return self.engine.ledger

    # ------------------------------------------------------------------ training

    def probe(self, number: int) -> Probe:
        data = [samples(500 + number, self.engine.dtype, PROBE_SAMPLES)]
        return Probe(
            lambda: iter(data), lambda: iter(data), PROBE_SAMPLES, lambda net, batch: loss_sum(net, batch)[0]
        )

    def _numbered_probe(self, number: int) -> Probe:
        self.probes.append(number)
        return self.probe(number)

    def backward(self) -> float:
        whole = samples(self.done, self.engine.dtype)
        pieces = zip(*(whole[key].split(MICRO_BATCH) for key in ("x", "labels")))
        return accumulate(
            self.engine, [dict(zip(("x", "labels"), piece)) for piece in pieces], self._scaled_loss_sum
        )

    def _scaled_loss_sum(self, net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        loss, count = loss_sum(net, batch)
        return self.loss_scale * loss, count

    def step(
        self, decide: bool = True, look: Callable[[], object] | None = None
    ) -> tuple[float, RecompositionReport | None]:
        """One step, and what was decided after it. decide: False leaves the decision to a later call.
        look: called between the backward passes and everything that follows."""
        self.loss = self.backward()
        if look is not None:
            look()
        self.recomposer.on_gradient()
        take_step(self.engine)
        self.done += 1
        return self.loss, self.decide() if decide else None

    def decide(self) -> RecompositionReport | None:
        return self.recomposer.after_step(self.done, self.loss)

    def train(self, until: int | None = None) -> tuple[list[float], list[RecompositionReport]]:
        losses, reports = [], []
        while self.done < (self.total if until is None else until):
            loss, report = self.step()
            losses.append(loss)
            reports += [report] if report else []
        return losses, reports

    def to_recomposition(self) -> None:
        """Trains to just before the next recomposition: the step is made, and nothing is decided yet."""
        last = next(step for step in self.recomposer._schedule.steps if step > self.done)
        self.train(last - 1)
        self.step(decide=False)

    # ------------------------------------------------------------------ what can be seen

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.engine.module(samples(999, self.engine.dtype, 32)["x"]).double()

    def weights(self) -> dict[str, Tensor]:
        """Frozen weights, as they are stored."""
        return {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    def used(self, name: str) -> dict[str, Tensor]:
        """Factors of a layer as its forward pass uses them, float64."""
        return {factor: value.detach().double() for factor, value in self.layers[name].factors().items()}

    def adapted(self, name: str) -> Tensor:
        """W + s·B·(R·)A in float64."""
        pair = self.method.delta(self.used(name))
        return self.layers[name].weight.detach().double() + pair.left @ pair.right

    def masters(self) -> dict[str, Tensor]:
        return {name: self.engine.read_trained(name)["master"] for name in self.engine.trained_shapes()}

    def moments(self, key: str) -> dict[str, Tensor]:
        return {name: self.engine.read_trained(name)[key].clone() for name in self.engine.trained_shapes()}

    # ------------------------------------------------------------------ leaving off and going on

    def saved(self) -> dict:
        """All that a checkpoint holds, and nothing that lives on in this run."""
        named = {name: parameter for name, parameter in self.engine.module.named_parameters()}
        return {
            "done": self.done,
            "frozen": {f"{layer}.{name}": named[f"{layer}.{name}"].detach().clone()
                       for layer in self.layers
                       for name in self.method.path if name not in self.method.trains},
            "trained": {name: self.engine.read_trained(name) for name in self.engine.trained_shapes()},
            "optimizer_steps": self.engine.steps_taken(),
            "ledger": (through_json(self.ledger.describe()), copies(self.ledger.tensors())),
            "recompose": (through_json(self.recomposer.state()), copies(self.recomposer.tensors())),
        }  # fmt: skip

    def restore(self, saved: dict) -> "Run":
        """Of a `fresh` run."""
        described, tensors = saved["ledger"]
        self.ledger.replay(self.engine, self.layers, described, tensors.__getitem__)
        for name, value in saved["frozen"].items():
            self.engine.write_parameter(name, value)
        for name, tensors in saved["trained"].items():
            self.engine.write_trained(name, tensors, saved["optimizer_steps"])
        state, tensors = saved["recompose"]
        self.recomposer.restore(state, tensors.__getitem__)
        install_gradient_maps(self.engine, self.attached)
        self.done = saved["done"]
        return self


def through_json(value):
    return json.loads(json.dumps(value))


def copies(tensors) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) for name, value in left.items()
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def change(run: Run, action: Callable[[], object]) -> tuple[float, object]:
    """How far the network's answers move, relative to their size, while `action` is done; and its result."""
    before = run.logits()
    result = action()
    return relative(run.logits(), before), result
