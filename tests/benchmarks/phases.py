"""The five things whose memory is compared, each in the project's own code, on any engine."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.owners import assign_owners
from distlora.engine.protocol import Engine
from distlora.initialisation import probe as probe_module
from distlora.initialisation.factors import factorise_all, install_gradient_maps
from distlora.initialisation.probe import Probe, mean_gradients
from distlora.initialisation.search import search_eta
from distlora.models.losses import response_loss
from distlora.models.targets import loss_of_samples
from tests.benchmarks.live_bytes import LiveBytes
from tests.stepping import train_step

#: Blocks that are on their way to the host while the next one is formed: `probe._HostSums` has two buffers.
BLOCKS_UNDER_WAY = 2
#: Micro-batches of every phase. With more, the training step would hold its accumulated gradients in the
#: later ones: 4 MiB for Mistral-7B, which are left out in training's disfavour.
PASSES = 1


@dataclass
class Subject:
    """What is measured: an engine with adapters attached, under a counter, and the one batch that every pass
    uses.
    """

    engine: Engine
    attached: Attached
    counter: LiveBytes
    batch: dict[str, Tensor]

    @property
    def layers(self) -> dict[str, AdapterLinear]:
        return self.attached.layers

    def owners(self) -> dict[str, int]:
        return assign_owners(self.layers, self.attached.method, self.engine.comm.world_size)

    def data(self) -> Probe:
        def batches() -> Iterator[dict[str, Tensor]]:
            return iter([self.batch] * PASSES)

        return Probe(batches, batches, PASSES * self.engine.comm.world_size, loss_of_samples(response_loss))


def probe(subject: Subject) -> Callable[[], object]:
    """Sums of all layers' gradients, on the host."""
    data, under_way = subject.data(), deque(maxlen=BLOCKS_UNDER_WAY)

    def batches() -> Iterator[dict[str, Tensor]]:
        for batch in data.batches():
            under_way.clear()  # they have long arrived when the next forward pass begins
            yield batch

    def run() -> None:
        with _sums_on_host(subject.counter, under_way):
            mean_gradients(
                subject.engine, subject.layers, subject.owners(), batches(), data.samples, data.loss
            )

    return run


def svds(subject: Subject) -> Callable[[], object]:
    """The factors of all layers, from gradients on the host; the values do not matter for the memory."""
    owners, generator = subject.owners(), torch.Generator().manual_seed(0)
    with subject.counter.on_host():
        gradients = {
            name: torch.randn(layer.shape, generator=generator)
            for name, layer in subject.layers.items()
            if owners[name] == 0
        }
    return lambda: factorise_all(subject.engine, subject.attached, owners, gradients, seed=0, eta=1.0)


def search(subject: Subject) -> Callable[[], object]:
    """The line search for the size of the first step."""
    _give_factors(subject)
    factor = subject.attached.method.proportional_to_eta()
    return lambda: search_eta(subject.engine, subject.layers, factor, subject.data(), unit=1.0)


def training(subject: Subject) -> Callable[[], object]:
    """The first full training step, in which the optimizer's state comes about."""
    _give_factors(subject)
    subject.engine.train_mode(True)
    return lambda: train_step(subject.engine, [subject.batch] * PASSES, response_loss, rate=1e-4)


def naive(subject: Subject) -> Callable[[], object]:
    """One backward pass that leaves the gradients of all target weights behind, in the model's type."""
    weights = [layer.weight for layer in subject.layers.values()]
    for weight in weights:
        weight.requires_grad_(True)
    if hasattr(subject.engine, "keep_gradient_shards"):
        subject.engine.keep_gradient_shards(weights)
    subject.engine.train_mode(True)
    return lambda: subject.engine.backward(subject.engine.run(response_loss, subject.batch)[0])


#: By the name in the table. Each prepares the subject and returns what is to be measured.
PHASES: dict[str, Callable[[Subject], Callable[[], object]]] = {
    "training": training,
    "probe": probe,
    "SVDs": svds,
    "search": search,
    "naive": naive,
}


def _give_factors(subject: Subject) -> None:
    """The state in which initialisation leaves the layers, gradient corrections included."""
    generator = torch.Generator().manual_seed(0)
    for layer in subject.layers.values():
        shapes = layer.method.shapes(*layer.shape)
        subject.engine.write(
            layer, {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}
        )
    install_gradient_maps(subject.engine, subject.attached)


@contextmanager
def _sums_on_host(counter: LiveBytes, under_way: deque[Tensor]) -> Iterator[None]:
    """Lets the probe keep its sums as beside an accelerator: booked as host memory, the last blocks still on
    their way there.
    """

    class HostSums(probe_module._DeviceSums):
        def __init__(self, device: torch.device):
            super().__init__()

        def add(self, name: str, top: int, left: int, block: Tensor) -> None:
            under_way.append(block)
            with counter.on_host():
                super().add(name, top, left, block)

    with mock.patch.object(probe_module, "_HostSums", HostSums):
        yield
