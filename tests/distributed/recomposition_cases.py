"""Recomposition on ranks: what `cases` does for plain training, for methods that change frozen weights."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.checkpoints.directory import newest
from distlora.checkpoints.restore import restore
from distlora.checkpoints.save import save
from distlora.engine.owners import open_ledger
from distlora.initialisation.factors import initialise, install_gradient_maps
from distlora.models.losses import response_loss
from distlora.plan import traffic as plan_traffic
from distlora.plan.traffic import ALL_REDUCE, BROADCAST
from distlora.recompose.recomposer import Recomposer
from distlora.training.step import accumulate
from tests.distributed.traffic_cases import planned
from tests.stepping import take_step

SEED = 3
PROBE_SAMPLES = EVALUATED = 6


class Recomposing:
    """A setting whose adapters are initialised from its weights and recomposed while it trains."""

    def __init__(self, setting, steps: int, begin: bool = True):
        self.setting, self.engine, self.attached = setting, setting.engine, setting.attached
        self.losses: list[float] = []
        self.found: dict[str, Tensor] = {}
        open_ledger(self.engine, self.attached, SEED, self.engine.ledger and self.engine.ledger.pretrained)
        reserves = None
        if begin:
            data = setting.probe_data(PROBE_SAMPLES, 1)
            reserves = initialise(self.engine, self.attached, SEED, setting.rate(0), data).reserves
        self.recomposer = Recomposer(
            self.engine,
            self.attached,
            SEED,
            steps,
            reserves,
            lambda number: setting.probe_data(PROBE_SAMPLES, 1),
        )

    def restore(self) -> None:
        """Goes on from the newest checkpoint of the setting."""
        found = newest(self.setting.work, self.setting.comm)
        restore(self.engine, self.attached, found, self.recomposer)
        install_gradient_maps(self.engine, self.attached)

    def steps(self, first: int, last: int) -> None:
        """Training with everything that happens around a step; each swap must keep the function."""
        for step in range(first, last):
            self.engine.set_rate(0.1 * self.setting.rate(step))
            self.losses.append(accumulate(self.engine, self.setting.batches(step), response_loss))
            self.recomposer.on_gradient()
            take_step(self.engine)
            # Nothing is replaced without a schedule, so nothing can move.
            before = self.setting.evaluation(EVALUATED) if self.recomposer.active else None
            report = self.recomposer.after_step(step + 1, self.losses[-1])
            if report is None:
                continue
            if report.scores is not None:
                self.found[f"scores.{step + 1}"] = report.scores.float()
            for name, layer in report.layers.items():
                self.found[f"replaced.{step + 1}.{name}"] = torch.tensor(layer.components)
                self.found[f"learned.{step + 1}.{name}"] = torch.tensor(layer.learned_norm)
            after = self.setting.evaluation(EVALUATED)
            self.losses.append(after)
            if self.keeps_function():
                tolerance = 1e-5 if self.engine.dtype == torch.float32 else 2e-2
                assert abs(after - before) <= tolerance * before, (
                    f"a swap moved the loss from {before} to {after}"
                )

    def keeps_function(self) -> bool:
        """A restart takes a step of its own, and packing a fused weight anew rounds it to its codes."""
        method, packed = (
            self.attached.method,
            any(layer.packing is not None for layer in self.attached.layers.values()),
        )
        return method.refill_from() != "restart" and (not packed or method.fuses_beside(packed))

    def trained(self) -> dict[str, Tensor]:
        """Masters and moments of everything trained, on rank 0."""
        found = {}
        for name in self.engine.trained_shapes():
            for key, tensor in (self.engine.read_trained(name) or {}).items():
                found[f"{name}.{key}"] = tensor
        return found

    def weights(self) -> dict[str, Tensor]:
        """The frozen weights as the forward pass reads them, on rank 0.

        Packed ones are left out: where a number lies between two codes the last bit of a sum decides, and the
        losses tell as much.
        """
        return {
            f"weight.{name}": self.weight(name)
            for name, layer in self.attached.layers.items()
            if layer.packing is None
        }

    def weight(self, name: str) -> Tensor:
        found = self.engine.read_parameter(f"{name}.weight")
        return torch.zeros(0) if found is None else found.clone()  # on a CPU it may be the live one

    def results(self) -> dict[str, Tensor]:
        return (
            {"losses": torch.tensor([*self.losses, self.setting.evaluation()])}
            | self.setting.state()
            | self.found
        )


def swapping(setting, steps: int = 8) -> dict[str, Tensor]:
    """Training through several swaps: losses, scores, choices, factors and weights."""
    run = Recomposing(setting, steps)
    run.steps(0, steps)
    return run.results() | run.weights()


class Collectives(TorchDispatchMode):
    """Counts what the ranks send each other, whoever asks for it, by kind: calls, and bytes."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            self.calls[function._opname] += 1
            self.bytes[function._opname] += sum(map(_nbytes, arguments))
        return function(*arguments, **(keywords or {}))


def _nbytes(argument) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_nbytes, argument)) if isinstance(argument, (list, tuple)) else 0


def swap_traffic(setting, steps: int = 3) -> dict[str, Tensor]:
    """Of what crosses the network at a swap, not one byte is W's: it is the factors, the new components and a
    few numbers.
    """
    run = Recomposing(setting, steps + 1)
    run.steps(0, steps)
    run.engine.set_rate(0.1 * setting.rate(steps))
    loss = accumulate(run.engine, setting.batches(steps), response_loss)
    run.recomposer.on_gradient()
    take_step(run.engine)
    setting.evaluation()  # leaves weights gathered, as in a real run
    layers, method = run.attached.layers, run.attached.method
    table, rows = 8 * len(layers), 8 * sum(len(layer.matrix_names) for layer in layers.values())
    with Collectives() as seen:
        run.recomposer._recompose(_report(run, loss))
    sides = sum(rows_and_columns(layer) for layer in layers.values())
    expected = {
        # Scores of every matrix; the factors; at the end whether an owner failed, the rounding error and four
        # norms of every layer.
        "allreduce_": method.rank * rows + 4 * method.rank * sides + 16 + 5 * table,
        "broadcast_": 4 * method.replaced_at_once * sides + table,  # new components, and how many there are
    }
    alone = setting.comm.world_size == 1
    assert alone or dict(seen.bytes) == expected, f"{dict(seen.bytes)} and not {expected}"
    planned_for = {ALL_REDUCE: expected["allreduce_"], BROADCAST: expected["broadcast_"]}
    assert alone or plan_traffic.recomposition_traffic(planned(setting)) == planned_for
    assert sum(expected.values()) < sum(4 * layer.elements for layer in layers.values())
    return {"losses": torch.tensor([loss, setting.evaluation()])}


def rows_and_columns(layer) -> int:
    return len(layer.matrix_names) * (layer.in_features + layer.out_features)


def _report(run: Recomposing, loss: float):
    from distlora.recompose.report import RecompositionReport

    names = [name for layer in run.attached.layers.values() for name in layer.matrix_names]
    return RecompositionReport(1, True, "asked for", run.recomposer._scores.table(), names)


def swap_saving(setting, steps: int = 10, at: int = 8) -> dict[str, Tensor]:
    """Training with a checkpoint after step `at`."""
    run = Recomposing(setting, steps)
    run.steps(0, at)
    save(setting.engine, setting.attached, setting.work, at, {}, recomposer=run.recomposer)
    saved = {f"saved.{name}": weight for name, weight in run.weights().items()}
    run.losses.clear()
    run.steps(at, steps)
    return run.results() | run.weights() | saved


def whole_run(setting, steps: int = 3, at: int = 2) -> dict[str, Tensor]:
    """A method's whole life, whatever the method: its own start, training, swaps if it has any, a checkpoint
    after step `at`; and from that checkpoint, on a second engine, to the same end to the last bit."""
    run = Recomposing(setting, steps)
    run.steps(0, at)
    save(setting.engine, setting.attached, setting.work, at, {}, recomposer=run.recomposer)
    told = len(run.losses)
    run.steps(at, steps)
    again = Recomposing(setting.anew(), steps, begin=False)
    again.restore()
    again.steps(at, steps)
    assert again.losses == run.losses[told:], (
        f"{again.losses} after the checkpoint, and not {run.losses[told:]}"
    )
    for kind in (Recomposing.trained, Recomposing.weights):
        ended, ended_again = kind(run), kind(again)
        assert ended.keys() == ended_again.keys()
        for name, tensor in ended.items():
            assert torch.equal(tensor, ended_again[name]), f"{name} is another one after the checkpoint"
    return run.results()


def swap_resuming(setting, steps: int = 10, at: int = 8) -> dict[str, Tensor]:
    """The steps after that checkpoint, from the pretrained weights and what it holds."""
    run = Recomposing(setting, steps, begin=False)
    run.restore()
    saved = {f"saved.{name}": weight for name, weight in run.weights().items()}
    run.steps(at, steps)
    return run.results() | run.weights() | saved
