"""The probe's gradients are autograd's, and nothing of the model or the engine remembers that there was a
probe.
"""

import json
import shutil
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from distlora.adapter.attach import attach
from distlora.data import Sample, collate, shard
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.initialisation.probe import _DeviceSums, _HostSums, mean_gradients
from distlora.maths.blocks import GRADIENT_ELEMENTS
from distlora.methods import registry
from distlora.models.loading import load_model
from distlora.models.losses import response_loss
from distlora.models.targets import loss_of_samples, sample_weights
from distlora.recipe.sections import ModelSection
from distlora.training.step import accumulate
from tests.distributed.world import build, samples, write_random_factors
from tests.stepping import train_step
from tests.tiny_models import NAMES, tiny_model_dir

COUNT = 5


class CountingComm(Comm):
    """One rank that notes every block it is asked to reduce, and whether the block before it was gone by
    then.
    """

    def __init__(self):
        super().__init__(Topology(), torch.device("cpu"), distributed=False)
        self.blocks, self.owners, self.alive = [], [], []
        self._last = lambda: None

    def reduce_to(self, tensor, owner):
        self.blocks.append(tuple(tensor.shape))
        self.owners.append(owner)
        self.alive.append(self._last() is not None)
        self._last = weakref.ref(tensor)
        return super().reduce_to(tensor, owner)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def started(directory, dtype=torch.float32, **settings):
    """(engine, attached) with factors that are not zero:
    a probe that ran through the adapters would be seen.
    """
    engine = LocalEngine(CountingComm(), dtype)
    attached = build(engine, directory, **settings)
    write_random_factors(engine, attached)
    return engine, attached


def batches(size=1, rows=None):
    rows = samples(COUNT, 7) if rows is None else rows
    return [collate([rows[i] for i in part], 0) for part in shard(len(rows), 0, 1, size)]


def probe(engine, attached, data=None, count=COUNT, owners=None, **settings):
    owners = owners or dict.fromkeys(attached.layers, 0)
    return mean_gradients(
        engine, attached.layers, owners, data or batches(), count, loss_of_samples(response_loss), **settings
    )


def autograds(directory, names, rows=None, updates=None) -> dict[str, torch.Tensor]:
    """Mean over the samples of the weights' gradients of transformers' own mean loss, in a plain model,
    unpadded.

    updates: what is added to weights first, by layer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, update in (updates or {}).items():
            model.get_parameter(f"{name}.weight").add_(update)
    rows = samples(COUNT, 7) if rows is None else rows
    for row in rows:
        if any(label != -100 for label in row.labels[1:]):
            model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
    return {name: model.get_parameter(f"{name}.weight").grad / len(rows) for name in names}


def assert_near(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert found[name].shape == gradient.shape and found[name].dtype == torch.float32
        error = float((found[name] - gradient).abs().max() / gradient.abs().max())
        assert error < tolerance, f"{name}: off by {error:.2g} of its largest element"


# ---------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_autograds(name, checkpointing, models):
    directory = tiny_model_dir(name, models)
    engine, attached = started(directory, checkpointing=checkpointing)
    assert_near(probe(engine, attached), autograds(directory, attached.layers))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_grouping_the_samples_changes_nothing(size, models):
    engine, attached = started(tiny_model_dir("qwen2", models))
    assert_near(probe(engine, attached, batches(size)), probe(engine, attached, batches(1)))


@pytest.mark.parametrize("elements", [1, 700, 131 * 7])
def test_row_blocks_give_the_same_sum(elements, models):
    engine, attached = started(tiny_model_dir("qwen2", models))
    whole = probe(engine, attached)
    assert_near(probe(engine, attached, block_elements=elements), whole, 1e-6)


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_sum_is_that_of_its_blocks(place):
    """On an accelerator where there is one: from there blocks travel to the host while others are made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = _HostSums(device) if place == "host" else _DeviceSums()
    wanted = {"wide": torch.zeros(4, 70), "high": torch.zeros(60, 5)}
    for name, total in wanted.items():
        store.open(name, tuple(total.shape))
    for _ in range(3):
        for name, total in wanted.items():
            for top, left in ((0, 0), (2, 0), (0, 3), (2, 3)):
                part = total[top : top + 2, left : left + 3]
                block = torch.randn(part.shape)
                part += block
                store.add(name, top, left, block.to(device))
    found = store.close()
    assert found.keys() == wanted.keys() and all(
        torch.equal(found[name].cpu(), total) for name, total in wanted.items()
    )
    assert {total.device.type for total in found.values()} == {"cpu" if place == "host" else device.type}


def test_in_bfloat16_the_sums_are_float32(models):
    directory = tiny_model_dir("llama", models)
    engine, attached = started(directory, torch.bfloat16)
    assert_near(probe(engine, attached), autograds(directory, attached.layers), 0.05)


def test_one_layer_over_frozen_embeddings_is_reached(models):
    """Neither its input nor any weight requires a gradient there: only the anchor connects it to the loss."""
    directory = tiny_model_dir("llama", models)
    engine, attached = started(directory, targets=["model.layers.0.self_attn.q_proj"])
    assert_near(probe(engine, attached), autograds(directory, ["model.layers.0.self_attn.q_proj"]))


def test_samples_and_batches_without_response_tokens_count_nothing_but_themselves(models):
    directory = tiny_model_dir("qwen2", models)
    engine, attached = started(directory)
    silent = Sample([5, 6, 7], [-100] * 3, [5, 6, 7], None)
    only_first = Sample([5, 6], [5, -100], [5], None)  # nothing predicts the first token
    rows = [*samples(2, 7), silent, only_first]
    wanted = autograds(directory, attached.layers, rows)
    assert_near(probe(engine, attached, batches(3, rows) + [collate([], 0)], len(rows)), wanted)
    zero = probe(engine, attached, [collate([], 0)])
    assert all(gradient.shape == wanted[name].shape and not gradient.any() for name, gradient in zero.items())


def test_sample_weights_are_one_over_the_response_tokens():
    rows = [Sample([1, 2, 3, 4], [-100, -100, 3, 4], [1, 2], None), Sample([1, 2], [1, -100], [1], None)]
    assert sample_weights(collate(rows, 0)).tolist() == [0.5, 0.0]


def test_dropout_of_the_base_is_off(models, tmp_path):
    plain = tiny_model_dir("mistral", models)
    noisy = tmp_path / "noisy"
    shutil.copytree(plain, noisy)
    config = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    engine, attached = started(noisy, checkpointing=True, dropout=0.5)
    with torch.random.fork_rng():
        trained = [engine.run(response_loss, batches()[0])[0].item() for _ in range(2)]
    assert trained[0] != trained[1], "the test's model has no dropout"
    assert_near(probe(engine, attached), autograds(plain, attached.layers))


# ---------------------------------------------------------------------- at the adapted weights


def updates_of(engine, attached):
    """s·B·(R·)A of every layer."""
    pairs = {name: attached.method.delta(engine.read(layer)) for name, layer in attached.layers.items()}
    return {name: pair.left @ pair.right for name, pair in pairs.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("name", "method"), [("qwen2", "lora_sb"), ("mistral", "pissa"), ("gemma2", "lora")])
def test_adapted_the_gradients_are_those_of_the_merged_model(name, method, checkpointing, models):
    directory = tiny_model_dir(name, models)
    engine, attached = started(directory, method=method, alpha=14.0, checkpointing=checkpointing)
    updates = updates_of(engine, attached)
    found = probe(engine, attached, adapted=True)
    assert_near(found, autograds(directory, attached.layers, updates=updates))
    bare = probe(engine, attached)
    assert all((found[n] - bare[n]).norm() > 0.1 * bare[n].norm() for n in bare), (
        "the adapters make a difference"
    )


def test_adapted_dropout_of_the_adapters_is_off(models):
    directory = tiny_model_dir("qwen2", models)
    engine, attached = started(directory, method="pissa", dropout=0.5, checkpointing=True)
    found = probe(engine, attached, adapted=True)
    assert_near(found, autograds(directory, attached.layers, updates=updates_of(engine, attached)))


def test_adapted_no_factor_collects_a_gradient_and_training_goes_on(models):
    curves = []
    for probed in (False, True):
        engine, attached = started(tiny_model_dir("qwen2", models), method="pissa")
        losses = []
        for step in range(4):
            if probed and step == 2:
                before = traces(engine)
                probe(engine, attached, adapted=True)
                assert [
                    name
                    for name, p in engine.module.named_parameters()
                    if p.grad is not None and p.grad.any()
                ] == []
                assert traces(engine) == before
            losses.append(train_step(engine, batches(2), response_loss, 1e-2)[0])
        curves.append(losses)
    assert curves[0] == curves[1]


def test_adapted_waiting_gradients_stay(models):
    engine, attached = started(tiny_model_dir("qwen2", models), method="pissa")
    accumulate(engine, batches(), response_loss)
    waiting = {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}
    probe(engine, attached, adapted=True)
    assert waiting.keys() == set(attached.trained)
    assert all(
        torch.equal(engine.module.get_parameter(name).grad, gradient) for name, gradient in waiting.items()
    )


# ---------------------------------------------------------------------- what it leaves behind


def traces(engine):
    """What a probe may not change: modes of all modules, checkpointing, what requires a gradient, random
    numbers.
    """
    modes = {name: module.training for name, module in engine.module.named_modules()}
    blocks = {
        name: getattr(module, "gradient_checkpointing", None)
        for name, module in engine.module.named_modules()
    }
    wants = {name: parameter.requires_grad for name, parameter in engine.module.named_parameters()}
    passes = [module.present_pass for module in engine.module.modules() if hasattr(module, "present_pass")]
    return modes, blocks, wants, passes, torch.get_rng_state().tolist()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("failing", [False, True], ids=["whole", "broken off"])
def test_modes_checkpointing_and_the_adapters_come_back(failing, checkpointing, models):
    engine, attached = started(tiny_model_dir("qwen2", models), checkpointing=checkpointing)
    engine.module.model.layers[1].eval()  # a mixture, which a plain train(True) would not bring back
    before, loss = traces(engine), engine.run(response_loss, batches()[0])[0].item()
    calls = []

    def loss_of(model, batch):
        calls.append(model.is_activation_checkpointing)
        if failing and len(calls) == 2:
            raise RuntimeError("the loss broke")
        return response_loss(model, batch, sample_weights(batch))[0]

    owners = dict.fromkeys(attached.layers, 0)
    if failing:
        with pytest.raises(RuntimeError, match="the loss broke"):
            mean_gradients(engine, attached.layers, owners, batches(), COUNT, loss_of)
    else:
        mean_gradients(engine, attached.layers, owners, batches(), COUNT, loss_of)
    assert all(calls) and len(calls) == (2 if failing else COUNT)
    assert traces(engine) == before
    assert engine.run(response_loss, batches()[0])[0].item() == loss


def test_no_parameter_collects_a_gradient_and_waiting_ones_stay(models):
    """Heads that train fully neither, whatever was accumulated before the probe."""
    # An untied head and a norm stand for new parameters: they require gradients themselves.
    engine, heads = LocalEngine(CountingComm()), {"lm_head.weight", "model.norm.weight"}
    section = ModelSection(
        path=str(tiny_model_dir("mistral", models)), dtype="float32", gradient_checkpointing=False
    )
    model, _ = load_model(section)
    attached = attach(model, registry()["lora_sb"](rank=7), "all-linear", heads)
    engine.start(model, OptimizerSpec())
    write_random_factors(engine, attached)
    assert heads < set(attached.trained)

    probe(engine, attached)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []

    accumulate(engine, batches(), response_loss)
    waiting = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    probe(engine, attached)
    assert waiting.keys() == set(attached.trained)
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in waiting.items())


def test_training_goes_on_as_if_there_had_been_no_probe(models):
    curves = []
    for probed in (False, True):
        engine, attached = started(tiny_model_dir("qwen2", models))
        losses = []
        for step in range(4):
            if probed and step == 2:
                probe(engine, attached)
            losses.append(train_step(engine, batches(2), response_loss, 1e-2)[0])
        curves.append(losses)
    assert curves[0] == curves[1]


# ---------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("elements", [1, 700, GRADIENT_ELEMENTS])
def test_only_one_block_is_alive_at_a_time(elements, models):
    engine, attached = started(tiny_model_dir("qwen2", models))
    probe(engine, attached, block_elements=elements)
    comm = engine.comm
    rows = {name: max(1, elements // layer.in_features) for name, layer in attached.layers.items()}
    assert len(comm.blocks) == COUNT * sum(
        -(-layer.out_features // rows[name]) for name, layer in attached.layers.items()
    )
    assert all(out * width <= max(elements, width) for out, width in comm.blocks)
    assert not any(comm.alive)


def test_the_activations_are_recomputed_though_the_model_does_not_checkpoint(models):
    engine, attached = started(tiny_model_dir("qwen2", models), checkpointing=False)
    calls = []
    engine.module.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    probe(engine, attached)
    assert len(calls) == 2 * COUNT


def test_gradients_of_others_layers_are_sent_and_forgotten(models):
    engine, attached = started(tiny_model_dir("qwen2", models))
    owners = {name: turn % 3 for turn, name in enumerate(attached.layers)}
    found = probe(engine, attached, owners=owners)
    assert found.keys() == {name for name, owner in owners.items() if owner == 0}
    assert sorted(set(engine.comm.owners)) == [0, 1, 2]
