"""Checkpoints: exact resume, nothing lost at any moment of a crash, nothing broken ever loaded."""

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import nn

from distlora.adapter.attach import attach
from distlora.checkpoints.directory import newest, of_step
from distlora.checkpoints.restore import restore
from distlora.checkpoints.save import save
from distlora.cluster.addresses import free_port
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.owners import assign_owners, open_ledger
from distlora.engine.random_state import own_random_state
from distlora.errors import UserError
from distlora.files.atomic import sha256_of
from distlora.files.tensors import TensorFiles, TensorWriter
from distlora.initialisation.factors import initialise
from distlora.maths.low_rank import LowRank
from distlora.methods import registry
from distlora.recompose.recomposer import Recomposer
from tests.stepping import take_step

CPU = torch.device("cpu")
IDENTITY = {"method": {"name": "lora_sb", "rank": 5}, "train": {"lr": 0.01, "betas": [0.9, 0.999]}}
#: What a method needs beside rank and alpha on so small a model.
SETTINGS = {"srlora": {"target_rank": 9}}
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["distlora.checkpoints.save", "distlora.checkpoints.restore", "pytest", "torch._dynamo"]
)


class Net(nn.Module):
    """Three layers to adapt, two with a bias, and a head that is trained whole; dropout draws from the global
    generator.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(13, 31), nn.Linear(31, 17, bias=False)
        self.third, self.head = nn.Linear(17, 11), nn.Linear(11, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = self.dropout(torch.tanh(layer(x)))
        return self.head(x)


def build(
    method="lora_sb",
    dtype=torch.float32,
    rank=5,
    seed=0,
    targets=("first", "second", "third"),
    spec=None,
    comm=None,
):
    """An engine over `Net` that has started, all parameters random (factors too)."""
    generator = torch.Generator().manual_seed(seed)
    model = Net().to(dtype)
    attached = attach(
        model,
        registry()[method](rank=rank, alpha=7.0, **SETTINGS.get(method, {})),
        list(targets),
        {"head.weight", "head.bias"},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    engine = LocalEngine(comm or Comm(Topology(), CPU, distributed=False), dtype, clip=1.0)
    engine.start(model, spec or OptimizerSpec(lr=0.01, weight_decay=0.1))
    return engine, attached


def train(engine, steps):
    engine.train_mode(True)
    for step in steps:
        x = torch.randn(4, 13, generator=torch.Generator().manual_seed(step)).to(engine.dtype)
        engine.backward(engine.module(x).float().square().mean())
        take_step(engine)


def update_weights(engine, attached, numbers, rounding="nearest"):
    """Low-rank updates of all frozen weights, the j-th of j + 1 columns; some have numbers that bfloat16 does
    not hold.
    """
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for layer in attached.layers.values():
            left = torch.randn(layer.out_features, number + 1, generator=generator) * 0.1
            right = torch.randn(number + 1, layer.in_features, generator=generator)
            if number % 2:
                left, right = left.bfloat16().float(), right.bfloat16().float()
            engine.ledger.apply(engine, layer, number, rounding, LowRank(left, right))


def build_with_ledger(*arguments, updates=(), **options):
    """As `build`, with an empty ledger, or one with these updates of the weights."""
    engine, attached = build(*arguments, **options)
    open_ledger(engine, attached, seed=5)
    update_weights(engine, attached, updates)
    return engine, attached


@torch.no_grad()
def other_factors(engine, attached):
    """What a new process has before it restores: the pretrained weights, and nothing else that was there."""
    generator = torch.Generator().manual_seed(77)
    factors = [f"{layer.name}.{factor}" for layer in attached.layers.values() for factor in layer.factors()]
    for name in {*attached.trained, *factors}:
        parameter = engine.module.get_parameter(name)
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def everything(engine):
    """All parameters as the forward pass uses them, all masters and moments."""
    values = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    for name in engine.trained_shapes():
        values |= {f"{name}/{key}": tensor.clone() for key, tensor in engine.read_trained(name).items()}
    return values


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", sorted(registry()))
@pytest.mark.parametrize(
    "spec", [OptimizerSpec(lr=0.01), OptimizerSpec("sgd", lr=0.1, momentum=0.9)], ids=lambda s: s.name
)
def test_resumed_run_is_the_same_to_the_last_bit(run_dir, method, dtype, spec):
    with own_random_state(1, CPU):
        engine, _ = build(method, dtype, spec=spec)
        train(engine, range(6))
        expected, drawn = everything(engine), torch.rand(3)
    with own_random_state(1, CPU):
        engine, attached = build(method, dtype, spec=spec)
        train(engine, range(3))
        save(engine, attached, run_dir, 3, IDENTITY, {"tokens": 12}, split_bytes=1500)
    with own_random_state(2, CPU):
        engine, attached = build(method, dtype, spec=spec, seed=9)
        for name in (name for name in engine.module.state_dict() if name.endswith(("weight", "bias"))):
            if name not in attached.trained:  # what is pretrained is not in a checkpoint
                engine.write_parameter(name, build(method, dtype)[0].read_parameter(name))
        state = restore(engine, attached, newest(run_dir))
        assert (state["step"], state["identity"], state["extra"]) == (3, IDENTITY, {"tokens": 12})
        assert engine.steps_taken() == (3 if spec.name == "adamw" else 0)
        train(engine, range(3, 6))
        assert_same(everything(engine), expected)
        assert torch.equal(torch.rand(3), drawn)


def test_checkpoint_before_the_first_step(run_dir):
    engine, attached = build()
    save(engine, attached, run_dir, 0, IDENTITY)
    other, attached = build(seed=3)
    restore(other, attached, newest(run_dir))
    for name in other.trained_shapes():
        assert_same(engine.read_trained(name), other.read_trained(name))


def test_files_and_names(run_dir):
    engine, attached = build(dtype=torch.bfloat16)
    train(engine, range(2))
    path = save(engine, attached, run_dir, 2, IDENTITY, {"epoch": 0.5})
    assert path == run_dir / "checkpoint-2" and [p.name for p in run_dir.iterdir()] == ["checkpoint-2"]
    assert {p.name for p in path.iterdir()} == {
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    adapter, optimizer = load_file(path / "adapter.safetensors"), load_file(path / "optimizer.safetensors")
    factors = {f"{layer}.{factor}" for layer in ("first", "second", "third") for factor in "ARB"}
    assert set(adapter) == factors | {"head.weight", "head.bias"}
    assert all(torch.equal(value, engine.module.get_parameter(name)) for name, value in adapter.items())
    keys = ("master", "exp_avg", "exp_avg_sq")
    assert set(optimizer) == {f"{name}/{key}" for name in attached.trained for key in keys}
    assert all(value.dtype == torch.float32 for value in optimizer.values())
    state = json.loads((path / "state.json").read_text())
    assert (
        state["step"] == state["optimizer_steps"] == 2
        and state["method"] == "lora_sb"
        and state["extra"] == {"epoch": 0.5}
    )
    assert "rng" not in newest(run_dir).state


def test_large_groups_are_split_with_an_index(run_dir):
    engine, attached = build()
    train(engine, range(1))
    path = save(engine, attached, run_dir, 1, IDENTITY, split_bytes=1000)
    for group in ("adapter", "optimizer"):
        index = json.loads((path / f"{group}.safetensors.index.json").read_text())["weight_map"]
        files = sorted(path.glob(f"{group}-*.safetensors"))
        assert len(files) >= 2 and files[0].name == f"{group}-00001-of-{len(files):05}.safetensors"
        for file in files:
            tensors = load_file(file)
            assert {name for name, home in index.items() if home == file.name} == set(tensors)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 1000
    single = save(engine, attached, run_dir / "single", 1, IDENTITY)
    for group in ("adapter", "optimizer"):
        split = TensorFiles(path, group)
        assert_same(
            {name: split.read(name) for name in split.names}, load_file(single / f"{group}.safetensors")
        )


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(rank=4), "checkpoint-1 is of a run with rank=5 of the method, and this one has 4"),
        (dict(targets=["first", "second"]), "the run has no tensor third.A"),
        (dict(method="lora_xs"), "is of method lora_sb, and the run of lora_xs"),
    ],
)
def test_other_model_is_refused_by_the_name_of_the_tensor(run_dir, other, message):
    save(*build(), run_dir, 1, IDENTITY)
    engine, attached = build(**other)
    before = everything(engine)
    with pytest.raises(UserError, match=message):
        restore(engine, attached, newest(run_dir))
    assert_same(everything(engine), before)


def test_missing_tensor_is_refused(run_dir):
    save(*build(targets=["first", "second"]), run_dir, 1, IDENTITY)
    with pytest.raises(UserError, match="tensor third.A is missing"):
        restore(*build(), newest(run_dir))


# ---------------------------------------------------------------------- damage


def damaged(path, kind):
    size = path.stat().st_size
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, size - 3)
    elif kind == "empty":
        os.truncate(path, 0)
    else:
        data = bytearray(path.read_bytes())
        data[size // 2] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "flipped"])
@pytest.mark.parametrize(
    "name",
    ["adapter.safetensors", "ledger.safetensors", "optimizer.safetensors", "state.json", "manifest.json"],
)
def test_broken_checkpoint_is_named_and_skipped(run_dir, caplog, kind, name):
    engine, attached = build_with_ledger(updates=(0,))
    save(engine, attached, run_dir, 1, IDENTITY)
    damaged(save(engine, attached, run_dir, 2, IDENTITY) / name, kind)
    with caplog.at_level(logging.WARNING):
        assert newest(run_dir).step == 1
    (record,) = caplog.records
    assert "checkpoint-2 is broken and skipped" in record.getMessage()
    # A flipped bit in the manifest may look like one in the file that it speaks of.
    assert name in record.getMessage() or (name, kind) == ("manifest.json", "flipped")
    with pytest.raises(UserError, match="checkpoint-2 is broken"):
        of_step(run_dir, 2)


def test_any_flipped_bit_of_a_manifest_is_seen_or_harmless(run_dir):
    path = save(*build(), run_dir, 3, IDENTITY) / "manifest.json"
    sound, state = path.read_bytes(), newest(run_dir).state
    for position in range(len(sound)):
        data = bytearray(sound)
        data[position] ^= 1 << (position % 7)
        path.write_bytes(data)
        found = newest(run_dir)
        assert found is None or found.state == state


def test_no_checkpoint(run_dir):
    assert newest(run_dir) is None
    run_dir.mkdir()
    (run_dir / "checkpoint-best").mkdir()
    assert newest(run_dir) is None
    with pytest.raises(UserError, match="no checkpoint of step 4; there are: none"):
        of_step(run_dir, 4)


def test_old_ones_go_and_broken_ones_do_not_count(run_dir):
    engine, attached = build()
    for step in (1, 2, 3, 10):
        save(engine, attached, run_dir, step, IDENTITY, keep=3)
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint-2", "checkpoint-3", "checkpoint-10"}
    damaged(run_dir / "checkpoint-10" / "adapter.safetensors", "truncated")
    (run_dir / ".checkpoint-9.partial").mkdir()
    save(engine, attached, run_dir, 11, IDENTITY, keep=2)
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint-3", "checkpoint-11"}


def test_same_step_is_replaced(run_dir):
    engine, attached = build()
    for extra in (1, 2):
        save(engine, attached, run_dir, 5, IDENTITY, {"n": extra}, keep=1)
    assert newest(run_dir).extra == {"n": 2} and [path.name for path in run_dir.iterdir()] == ["checkpoint-5"]


def test_full_disk_is_one_sentence_and_leaves_nothing(run_dir):
    engine, attached = build()
    save(engine, attached, run_dir, 1, IDENTITY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (3000, limits[1])
    )  # the system refuses to write more, as a full disk does
    try:
        with pytest.raises(UserError, match="checkpoint-2: File too large"):
            save(engine, attached, run_dir, 2, IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint-1"] and newest(run_dir).step == 1


def test_run_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        save(*build(), tmp_path / "file", 1, IDENTITY)


# ---------------------------------------------------------------------- updates of frozen weights


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "lora_xs", "pissa"])
def test_every_byte_of_an_updated_weight_comes_back(run_dir, method, dtype, rounding):
    def go_on(engine, attached, steps):
        for step in steps:
            train(engine, [step])
            update_weights(engine, attached, [step], rounding)

    with own_random_state(1, CPU):
        engine, attached = build_with_ledger(method, dtype)
        pretrained = engine.module.first.weight.clone()
        go_on(engine, attached, range(5))
        expected, entries = everything(engine), engine.ledger.describe()
    with own_random_state(1, CPU):
        engine, attached = build_with_ledger(method, dtype)
        go_on(engine, attached, range(3))
        save(engine, attached, run_dir, 3, IDENTITY, split_bytes=1500)
        saved = everything(engine)
    with own_random_state(2, CPU):
        engine, attached = build_with_ledger(method, dtype)
        other_factors(engine, attached)
        assert torch.equal(engine.module.first.weight, pretrained)
        restore(engine, attached, newest(run_dir))
        assert_same(everything(engine), saved)
        assert not torch.equal(engine.module.first.weight, pretrained)
        go_on(engine, attached, range(3, 5))
        assert_same(everything(engine), expected)
    assert engine.ledger.describe() == entries
    save(engine, attached, run_dir, 5, IDENTITY)
    assert newest(run_dir).state["ledger"] == entries, "a resumed run saves what came before it as well"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_weight_is_never_in_a_checkpoint(run_dir, dtype):
    engine, attached = build_with_ledger("pissa", dtype, updates=range(4))
    train(engine, range(2))
    path = save(engine, attached, run_dir, 2, IDENTITY)
    tensors = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    names = {
        f"{layer}/{index}/{side}"
        for layer in attached.layers
        for index in range(4)
        for side in ("left", "right")
    }
    assert set(tensors["ledger.safetensors"]) == names
    shapes = {tuple(tensor.shape) for group in tensors.values() for tensor in group.values()}
    frozen = {layer.shape for layer in attached.layers.values()}
    assert not shapes & (frozen | {shape[::-1] for shape in frozen})
    weights = {
        layer.weight.detach().flatten()[:8].view(torch.uint8).numpy().tobytes()
        for layer in attached.layers.values()
    }
    assert not any(weight in file.read_bytes() for weight in weights for file in path.iterdir())
    kinds = [tensors["ledger.safetensors"][f"first/{index}/left"].dtype for index in range(4)]
    low = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert kinds == [torch.float32, low, torch.float32, low], "as narrow as nothing is lost"


def test_without_updates_there_is_no_file_of_them(run_dir):
    path = save(*build_with_ledger("lora"), run_dir, 1, IDENTITY)
    assert {file.name for file in path.glob("*.safetensors")} == {
        "adapter.safetensors",
        "optimizer.safetensors",
    }
    state = newest(run_dir).state
    assert state["ledger"] == {} and state["recompose"] is None
    restore(*build("lora"), newest(run_dir))


def test_checkpoint_of_a_time_before_ledgers(run_dir):
    path = save(*build("lora"), run_dir, 1, IDENTITY)
    state = json.loads((path / "state.json").read_text())
    del state["ledger"], state["recompose"]
    rewrite(path, "state.json", json.dumps(state).encode())
    engine, attached = build_with_ledger("lora", seed=3)
    restore(engine, attached, newest(run_dir), Remembering(active=False))
    with pytest.raises(UserError, match="does not say how far recomposition was"):
        restore(engine, attached, newest(run_dir), Remembering())


def rewrite(path, name, data):
    """Another content of one file, with a manifest that fits."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256_of(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_ledger(path, change):
    tensors = load_file(path / "ledger.safetensors")
    change(tensors)
    rewrite(path, "ledger.safetensors", save_bytes(tensors))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop("second/1/right"),
            "tensor second/1/right is missing; it was written with another model",
        ),
        (
            lambda tensors: tensors.update({"third/0/left": torch.zeros(11, 2)}),
            r"tensor third/0/left has shape \(11, 2\), and the run's is \(11, 1\)",
        ),
        (
            lambda tensors: tensors.update({"third/7/left": torch.zeros(2)}),
            "the run has no tensor third/7/left",
        ),
        (
            lambda tensors: tensors.update({"first/1/left": torch.zeros(31, 2).half()}),
            "tensor first/1/left is of torch.float16, and state.json says torch.float32",
        ),
    ],
    ids=["missing", "shape", "surplus", "dtype"],
)
def test_wrong_tensor_of_the_ledger_is_named(run_dir, change, sentence):
    path = save(*build_with_ledger(updates=(0, 1)), run_dir, 1, IDENTITY)
    change_ledger(path, change)
    engine, attached = build_with_ledger(seed=3)
    before = everything(engine)
    with pytest.raises(UserError, match=f"checkpoint-1: {sentence}"):
        restore(engine, attached, newest(run_dir))
    assert_same(everything(engine), before)
    assert engine.ledger.describe() == {}


def test_updates_that_the_run_cannot_have(run_dir):
    save(*build_with_ledger("lora", updates=(0,)), run_dir, 1, IDENTITY)
    with pytest.raises(
        UserError, match="holds updates of frozen weights, and the run of lora keeps no ledger"
    ):
        restore(*build("lora"), newest(run_dir))
    path = run_dir / "checkpoint-1"
    state = json.loads((path / "state.json").read_text())
    state["ledger"]["fourth"] = state["ledger"].pop("third")
    rewrite(path, "state.json", json.dumps(state).encode())
    with pytest.raises(UserError, match="the run has no layer fourth"):
        restore(*build_with_ledger("lora"), newest(run_dir))


# ---------------------------------------------------------------------- recomposition


#: Of a recomposer that has done nothing yet.
STORED = {"swaps": 2, "done": 0, "ended": False, "born": {}, "origin": {}, "reserves": {}, "switching": {}}


class Remembering:
    """What a recomposer is to a checkpoint. calls: what was restored, in order, as the engine and this have
    seen it.
    """

    def __init__(self, value=None, active=True, calls=None):
        self.value, self.active, self.calls = value, active, [] if calls is None else calls

    def state(self):
        return dict(STORED)

    def problem_with(self, state, ledger):
        return None

    def wanted(self, state):
        return {} if self.value is None else {"first/scores": tuple(self.value.shape)}

    def tensors(self):
        if self.value is not None:
            yield "first/scores", self.value

    def restore(self, state, read):
        self.calls.append("recomposer")
        self.given, self.read = state, read


class Watched(LocalEngine):
    def add_low_rank(self, layer, update, rounding, key):
        self.calls.append("weight")
        return super().add_low_rank(layer, update, rounding, key)

    def write_parameter(self, name, value):
        self.calls.append("factor")
        super().write_parameter(name, value)

    def write_trained(self, name, tensors, steps):
        self.calls.append("trained")
        super().write_trained(name, tensors, steps)


def test_order_of_restoring(run_dir):
    value = torch.arange(6.0).view(2, 3)
    path = save(*build_with_ledger(updates=(0, 1)), run_dir, 1, IDENTITY, recomposer=Remembering(value))
    assert_same(load_file(path / "recompose.safetensors"), {"first/scores": value})
    engine, attached = build_with_ledger()
    engine.__class__, engine.calls = Watched, []
    recomposer = Remembering(value, calls=engine.calls)
    restore(engine, attached, newest(run_dir), recomposer)
    assert torch.equal(recomposer.read("first/scores"), value) and recomposer.given == STORED
    first_seen = list(dict.fromkeys(engine.calls))
    assert first_seen == ["weight", "factor", "trained", "recomposer"]
    assert engine.calls == sorted(engine.calls, key=first_seen.index), (
        "weights before factors, and the recomposer last"
    )
    with pytest.raises(UserError, match="checkpoint-1: tensor second/scores is missing"):
        recomposer.read("second/scores")


def test_recomposer_without_tensors(run_dir):
    path = save(*build(), run_dir, 1, IDENTITY, recomposer=Remembering())
    assert not (path / "recompose.safetensors").exists()
    recomposer = Remembering()
    restore(*build(), newest(run_dir), recomposer)
    assert recomposer.given == STORED
    with pytest.raises(UserError, match="checkpoint-1: tensor first/scores is missing"):
        recomposer.read("first/scores")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved_at", [2, 4, 5], ids=lambda step: f"after step {step}")
def test_srlora_goes_on_as_if_nothing_had_happened(run_dir, dtype, saved_at):
    """Two swaps, after steps 2 and 5: a checkpoint right before the second, right after each,
    and in between.
    """

    def start(report=None):
        engine, attached = build_with_ledger("srlora", dtype)
        report = initialise(engine, attached, 7, 0.01) if report else None
        return engine, attached, Recomposer(engine, attached, 7, 8, report and report.reserves)

    def go_on(engine, recomposer, steps):
        engine.train_mode(True)
        swapped = []
        for step in steps:
            x = torch.randn(4, 13, generator=torch.Generator().manual_seed(step)).to(engine.dtype)
            engine.backward(engine.module(x).float().square().mean())
            recomposer.on_gradient()
            take_step(engine)
            decided = recomposer.after_step(step + 1, 1.0)
            swapped += [step + 1] if decided is not None and decided.recomposed else []
        return swapped

    with own_random_state(1, CPU):
        engine, attached, recomposer = start(report=True)
        assert go_on(engine, recomposer, range(8)) == [2, 5]
        expected, entries = everything(engine), engine.ledger.describe()
    with own_random_state(1, CPU):
        engine, attached, recomposer = start(report=True)
        go_on(engine, recomposer, range(saved_at))
        save(engine, attached, run_dir, saved_at, IDENTITY, recomposer=recomposer)
    with own_random_state(2, CPU):
        engine, attached, recomposer = start()
        restore(engine, attached, newest(run_dir), recomposer)
        go_on(engine, recomposer, range(saved_at, 8))
    assert_same(everything(engine), expected)
    assert engine.ledger.describe() == entries


# ---------------------------------------------------------------------- crashes


def save_and_die(run_dir, step, operation):
    """Saves, and ends without any clean-up just before its n-th change to the file system."""
    engine, attached = build_with_ledger(updates=(0, 1))
    count = 0

    def watch(event, arguments):
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == operation:
                os._exit(7)

    sys.addaudithook(watch)
    save(engine, attached, run_dir, step, IDENTITY, {"new": True}, keep=1)
    os._exit(0)


@pytest.mark.parametrize("step", [4, 3], ids=["next step", "same step"])
def test_crash_before_every_file_operation(tmp_path, step):
    engine, attached = build_with_ledger(updates=(0, 1))
    before = everything(engine)
    save(engine, attached, tmp_path / "template", 3, IDENTITY, {"new": False})
    operation, died = 0, 7
    seen = set()
    while died:
        operation += 1
        run_dir = tmp_path / str(operation)
        shutil.copytree(tmp_path / "template", run_dir)
        process = FORK_SERVER.Process(target=save_and_die, args=(run_dir, step, operation))
        process.start()
        process.join()
        died = process.exitcode
        assert died in (0, 7)
        found = newest(run_dir)
        assert found is not None and found.step in (3, step)
        seen.add(found.extra["new"])
        other, other_attached = build_with_ledger()
        other_factors(other, other_attached)
        restore(other, other_attached, found)
        assert_same(everything(other), before)
        save(other, other_attached, run_dir, 5, IDENTITY, keep=1)  # the next save clears the debris away
        assert [path.name for path in run_dir.iterdir()] == ["checkpoint-5"]
    assert operation > 10 and seen == {True, False}


def save_forever(run_dir, first):
    engine, attached = build_with_ledger(updates=(0, 1))
    for step in range(first, 10**9):
        save(engine, attached, run_dir, step, IDENTITY, split_bytes=1000)


def test_killed_at_random_moments(run_dir):
    chance, interrupted, last = random.Random(5), 0, 0
    for _ in range(6):
        process = FORK_SERVER.Process(target=save_forever, args=(run_dir, last + 1))
        process.start()
        deadline = time.monotonic() + 60
        while not (run_dir / f"checkpoint-{last + 1}").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += any(run_dir.glob(".checkpoint-*"))
        found = newest(run_dir)
        assert found.step > last
        restore(*build_with_ledger(), found)
        last = found.step
    assert interrupted, "no kill fell into a save"


# ---------------------------------------------------------------------- ranks


class Replica(LocalEngine):
    """Every rank has the whole model; what the protocol gives to rank 0, the others do not get."""

    def read_parameter(self, name):
        self.comm.barrier()
        return super().read_parameter(name) if self.comm.is_main else None

    def read_trained(self, name):
        self.comm.barrier()
        return super().read_trained(name) if self.comm.is_main else None

    def write_parameter(self, name, value):
        assert (value is not None) == self.comm.is_main
        own = torch.zeros_like(self._parameters[name]) if value is None else value.clone()
        super().write_parameter(name, self.comm.broadcast(own, 0))

    def write_trained(self, name, tensors, steps):
        assert (tensors is not None) == self.comm.is_main
        if self.comm.is_main:
            super().write_trained(name, tensors, steps)


def frozen_weights(attached):
    return [layer.weight.detach().clone() for layer in attached.layers.values()]


def two_ranks(rank, run_dir, results):
    master = "127.0.0.1", int((run_dir.parent / "port").read_text())
    comm = Comm(Topology(rank, 2, rank, master=master), CPU, timeout_minutes=1)
    engine, attached = build_with_ledger(comm=comm)
    engine.__class__ = Replica
    owners = set(assign_owners(attached.layers, attached.method, 2).values())
    update_weights(engine, attached, (0, 1))
    updated = frozen_weights(attached)
    torch.set_rng_state(torch.Generator().manual_seed(100 + rank).get_state())
    save(engine, attached, run_dir, 1, IDENTITY, split_bytes=1000)
    drawn = torch.rand(2)
    torch.rand(50)
    found = newest(run_dir, comm)
    engine, attached = build_with_ledger(comm=comm)
    engine.__class__ = Replica
    other_factors(engine, attached)
    state = restore(engine, attached, found)
    same = torch.equal(torch.rand(2), drawn) and state["step"] == 1 and owners == {0, 1}
    same &= all(map(torch.equal, frozen_weights(attached), updated))
    sentences = []
    for action in (
        lambda: save(engine, attached, run_dir / "checkpoint-1" / "state.json", 2, IDENTITY),
        lambda: restore(engine, attached, of_other_method(found)),
    ):
        try:
            action()
        except UserError as error:
            sentences.append(str(error))
    (results / str(rank)).write_text(json.dumps([same, sentences, str(found.path)]))
    comm.close()


def of_other_method(checkpoint):
    return replace(checkpoint, state=checkpoint.state | {"method": "lora"})


def test_two_ranks_save_restore_and_fail_together(run_dir):
    (run_dir.parent / "port").write_text(str(free_port()))
    processes = [
        FORK_SERVER.Process(target=two_ranks, args=(rank, run_dir, run_dir.parent)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    first, second = (json.loads((run_dir.parent / str(rank)).read_text()) for rank in range(2))
    assert first == second and first[0], "each rank has its own random numbers back"
    assert "state.json" in first[1][0] and "is of method lora" in first[1][1]
    engine, attached = build_with_ledger()
    drawn = torch.get_rng_state()
    restore(engine, attached, newest(run_dir))
    assert torch.equal(torch.get_rng_state(), drawn), "two ranks' random numbers are not one's"


# ---------------------------------------------------------------------- the file format


def test_writer_makes_files_that_the_library_reads(tmp_path):
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "long": torch.arange(7),
        "transposed": torch.randn(4, 6).T,
    }
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "x.safetensors", plan, {"who": "me"}) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    assert_same(load_file(tmp_path / "x.safetensors"), tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    assert header_size % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, (
            "readers map elements where they lie"
        )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_writer_refuses_what_is_not_planned(tmp_path):
    plan = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    path = Path(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="b is not the next"), TensorWriter(path, plan) as writer:
        writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match="as planned"), TensorWriter(path, plan) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="b was not written"), TensorWriter(path, plan) as writer:
        writer.write("a", torch.zeros(2))
