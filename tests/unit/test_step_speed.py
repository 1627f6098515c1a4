"""The seconds of a step's parts, the speed of a step, and the utilisation of a device."""

import json

import pytest
import torch

from distlora.engine.comm import Comm, Topology
from distlora.engine.peaks import PEAKS, peak_flops, peak_of
from distlora.models.pass_cost import pass_cost
from distlora.recipe.load import recipe_of
from distlora.training import speed, step_clock
from distlora.training.objective import objective_of
from distlora.training.speed import Speed, training_flops
from distlora.training.step_clock import PARTS, StepClock
from tests.tiny_models import tiny_model_dir

CPU = torch.device("cpu")
ALONE = Comm(Topology(), CPU, distributed=False)
SECONDS = dict.fromkeys(PARTS, 0.1) | {"total": 0.5}


def test_every_second_between_two_marks_belongs_to_the_second_one(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 16.0, 18.0, 21.0, 21.5, 22.0])
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(times))
    clock = StepClock(CPU)
    clock.start()
    for part in ("data", "forward", "backward", "forward", "backward", "method", "step"):
        clock.mark(part)
    assert clock.seconds() == {
        "data": 1.0, "forward": 4.0, "backward": 6.0, "method": 0.5, "step": 0.5, "total": 12.0,
    }  # fmt: skip


class Event:
    """Of a GPU: its time is known only once the queue has reached it."""

    now, waits = 0.0, 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.now += 250.0
        self.at = Event.now

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, other):
        assert Event.waits, "nobody has waited for the queue"
        return other.at - self.at


def test_on_a_gpu_the_clock_waits_once_when_the_step_is_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = StepClock(torch.device("cuda", 0))
    clock.start()
    for part in ("data", *("forward", "backward") * 4, "method", "step"):
        clock.mark(part)
    assert Event.waits == 0, "not in the loop over micro-batches"
    assert clock.seconds() == {
        "data": 0.25, "forward": 1.0, "backward": 1.0, "method": 0.25, "step": 0.25, "total": 2.75,
    }  # fmt: skip
    assert Event.waits == 1


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756.0e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, None),
        ("NVIDIA A10G", torch.float32, False, 31.5e12),
        ("NVIDIA L40S", torch.bfloat16, True, 362.0e12),
        ("NVIDIA L4", torch.bfloat16, False, 121.0e12),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, False, None),
        ("NVIDIA H200", torch.float16, False, None),
        ("Some GPU of 2031", torch.bfloat16, False, None),
    ],
)
def test_the_peak_is_that_of_the_device_and_the_dtype(name, dtype, tf32, peak):
    assert peak_of(name, dtype, tf32) == peak
    assert peak_flops(CPU, dtype) is None


def test_no_device_of_the_table_is_taken_for_another():
    """An entry that is a part of a later one would hide it."""
    names = list(PEAKS)
    for place, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:place]), name


def test_the_speed_is_that_of_the_step_alone():
    found = Speed(ALONE, samples=8).scalars(SECONDS, 1000, "tokens")
    assert found["system/tokens_per_second"] == 2000.0 and found["system/samples_per_second"] == 16.0
    assert 0.01 < found["system/peak_memory_gib"] < 1000
    assert found["system/seconds/total"] == 0.5 and found["system/seconds/data"] == 0.1
    assert "system/model_flops_utilisation" not in found


def test_the_utilisation_is_over_the_peak_of_all_devices():
    two = Comm(Topology(), CPU, distributed=False)
    two.world_size = 2
    found = Speed(two, 8, flops_per_unit=3e6, peak=1e10).scalars(SECONDS, 1000, "tokens")
    assert found["system/model_flops_utilisation"] == pytest.approx(3e9 / (0.5 * 2e10))


@pytest.mark.parametrize(("method", "passes"), [("lora", 2), ("full", 3)])
def test_training_costs_a_forward_pass_and_what_its_gradients_take(method, passes, tmp_path):
    model = tiny_model_dir("llama", tmp_path)
    content = {
        "model": {"path": str(model), "dtype": "float32"}, "method": {"name": method, "rank": 2},
        "data": {"task": "arithmetic"}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    if method == "full":
        del content["method"]["rank"]
    recipe = recipe_of(content, "a test", ())
    objective = objective_of(recipe)
    samples = [type("Sample", (), {"input_ids": [1] * length}) for length in (10, 14)]
    config = json.loads((model / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head = config["head_dim"]
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    linear = hidden * head * (2 * heads + 2 * pairs) + 3 * hidden * inner
    attention = 2 * heads * head * 12
    wanted = 2 * (layers * (linear + attention) + hidden * config["vocab_size"])
    assert training_flops(recipe, objective, samples) == pytest.approx(passes * wanted, rel=1e-3)


def test_a_model_that_cannot_be_counted_has_no_utilisation(tmp_path, monkeypatch):
    model = tiny_model_dir("llama", tmp_path)
    content = {
        "model": {"path": str(model)}, "method": {"name": "lora", "rank": 2},
        "data": {"task": "arithmetic"}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    recipe = recipe_of(content, "a test", ())

    def refuse(model, inputs):
        return pass_cost(torch.nn.Linear(1, 1), {"input": torch.zeros(1, 2, device="meta")})

    monkeypatch.setattr(speed, "pass_cost", refuse)
    assert training_flops(recipe, objective_of(recipe), []) is None
