"""The instrument of the memory benchmark counts what it says,
and the simulated rank holds what a rank holds.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM

from distlora.adapter.attach import ALL_LINEAR, attach
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.methods.lora_sb import LoRASB
from distlora.models.cross_entropy import OutputHead
from tests.benchmarks.live_bytes import DEVICE, HOST, LiveBytes
from tests.benchmarks.phases import PHASES, Subject
from tests.benchmarks.rebuild_drift import table
from tests.benchmarks.simulated import Guesses, OneRankOfZero3, SilentComm
from tests.tiny_models import tiny_config

KIB = 1024


@pytest.fixture(params=["real", "fake"])
def counter(request):
    if request.param == "real":
        with LiveBytes() as counter:
            yield counter
    else:
        with FakeTensorMode(), LiveBytes() as counter:
            yield counter


def test_a_tensor_counts_until_it_is_freed(counter):
    first = torch.zeros(256)
    second = torch.zeros(512)
    assert counter.now[DEVICE] == 3 * KIB
    del first
    assert (counter.now[DEVICE], counter.peak[DEVICE]) == (2 * KIB, 3 * KIB)
    del second
    assert (counter.now[DEVICE], counter.peak[DEVICE]) == (0, 3 * KIB)


def test_views_and_changes_in_place_count_nothing(counter):
    whole = torch.zeros(16, 16)
    half = whole[:8].T
    whole.add_(1).mul_(2)
    assert (counter.now[DEVICE], counter.peak[DEVICE]) == (KIB, KIB)
    del whole
    assert counter.now[DEVICE] == KIB, "a view keeps its whole storage alive"
    del half
    assert counter.now[DEVICE] == 0


def test_a_temporary_shows_in_the_peak_only(counter):
    x = torch.zeros(256)
    total = (x + 1).sum()
    assert counter.peak[DEVICE] == 2 * KIB + total.element_size()
    assert counter.now[DEVICE] == KIB + total.element_size()


def test_what_backward_keeps_counts_until_backward_is_over(counter):
    x = torch.zeros(256, requires_grad=True)
    y = x.exp().exp()
    assert counter.now[DEVICE] == 3 * KIB
    y.sum().backward()
    del y
    assert counter.now[DEVICE] == 2 * KIB  # x and its gradient


def test_host_memory_has_its_own_account(counter):
    with counter.on_host():
        sums = torch.zeros(256)
    sums += torch.ones(256)
    assert (counter.now[HOST], counter.now[DEVICE], counter.peak[DEVICE]) == (KIB, 0, KIB)


def test_a_new_peak_starts_from_what_is_alive(counter):
    kept = torch.zeros(256)
    torch.zeros(2560)
    assert counter.peak[DEVICE] == 11 * KIB
    counter.reset_peak()
    assert counter.peak[DEVICE] == KIB
    assert counter.largest_at_peak(1) == [("aten.zeros.default (256,) float32", 1, KIB)]
    del kept


def test_tensors_made_elsewhere_count_once_they_are_watched():
    layer = nn.Linear(16, 16, bias=False)
    with LiveBytes() as counter:
        assert counter.now[DEVICE] == 0
        counter.watch(layer.parameters())
        counter.watch(layer.parameters())
        assert counter.now[DEVICE] == KIB


def _tiny_subject(engine, counter) -> Subject:
    model = AutoModelForCausalLM.from_config(tiny_config("mistral"), dtype=torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.set_output_embeddings(OutputHead(model.get_output_embeddings()))
    attached = attach(model, LoRASB(rank=4), ALL_LINEAR)
    engine.start(model, OptimizerSpec())
    counter.watch(model.parameters())
    ids = torch.arange(1, 9)[None]
    return Subject(
        engine,
        attached,
        counter,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()},
    )


def _peak(subject: Subject, phase: str) -> int:
    run = PHASES[phase](subject)
    subject.counter.reset_peak()
    run()
    return subject.counter.peak[DEVICE]


def test_all_gradients_at_once_show_and_the_probe_does_not_keep_them():
    def peak(phase: str) -> tuple[int, int]:
        with LiveBytes() as counter:
            engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False))
            subject = _tiny_subject(engine, counter)
            weights = sum(4 * out * into for out, into in (layer.shape for layer in subject.layers.values()))
            return _peak(subject, phase), weights

    (naive, weights), (probe, _) = peak("naive"), peak("probe")
    assert naive - probe > 0.5 * weights


@pytest.mark.parametrize("phase", PHASES)
def test_a_simulated_rank_runs_every_phase_and_holds_its_share(phase):
    def idle_and_peak(world_size: int) -> tuple[int, int]:
        with FakeTensorMode(), Guesses(response=7), LiveBytes() as counter:
            subject = _tiny_subject(
                OneRankOfZero3(SilentComm(world_size), torch.float32, persistent=60), counter
            )
            idle = counter.now[DEVICE]
            return idle, _peak(subject, phase)

    (whole, whole_peak), (share, share_peak) = idle_and_peak(1), idle_and_peak(4)
    assert share < 0.3 * whole
    assert share < share_peak < whole_peak


def test_a_simulated_rank_gathers_one_module_at_a_time():
    with FakeTensorMode(), Guesses(response=7), LiveBytes() as counter:
        subject = _tiny_subject(OneRankOfZero3(SilentComm(4), torch.float32, persistent=60), counter)
        weights = {name: layer.weight for name, layer in subject.layers.items()}
        seen = []

        def look(module, *_):
            seen.append([name for name, weight in weights.items() if weight.numel() > 0] == [module.name])

        for layer in subject.layers.values():
            tap = layer.forward
            layer.forward = lambda x, layer=layer, tap=tap: (look(layer), tap(x))[1]
        PHASES["training"](subject)()
        assert len(seen) == 2 * len(weights) and all(seen)  # forward and recomputation
        assert all(weight.numel() == 0 for weight in weights.values())


def test_roundings_of_swaps_add_up_like_independent_errors():
    """The start and three swaps: four roundings,
    of which stochastic ones cost the square root of two more.
    """
    weight = torch.randn(120, 96, generator=torch.Generator().manual_seed(0)) / 10
    number, nearest, stochastic, *_ = list(table({"weight": weight}, rank=4, swaps=3, learned=0.1))[
        -1
    ].split()
    assert number == "3"
    assert float(nearest) == pytest.approx(4**0.5, rel=0.05) and float(stochastic) == pytest.approx(
        7**0.5, rel=0.05
    )
