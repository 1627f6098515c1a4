"""Which missing gradients are waited for, and which end a run."""

import logging

import pytest
import torch
from torch import nn

import distlora
from distlora.api.watch import LEAST, PATIENCE
from distlora.initialisation.dead_starts import can_train
from distlora.methods import LayerInit, NeedsProbe, registry

WIDTH, RANK = 12, 3


class Block(nn.Module):
    """x + out(tanh(first(x))): no change at all where `out` is zero, as a new block of LLaMA-Pro."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(torch.tanh(self.first(x)))


class Net(nn.Module):
    def __init__(self, experts: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))
        self.idle, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x + sum(expert(x) for expert in self.experts[:1]))


def net(zero=(), **sizes) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(**sizes)
    for name in zero:
        nn.init.zeros_(model.get_submodule(name).weight)
        nn.init.zeros_(model.get_submodule(name).bias)
    return model


def settings(method: str) -> dict:
    return {"rank": RANK} | ({"target_rank": 2 * RANK, "schedule": "none"} if method == "srlora" else {})


def started(model, method="lora", targets=("blocks",), rate=1e-2, **options):
    adapted = distlora.attach(model, method, targets=list(targets), **settings(method))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=rate, weight_decay=0.0)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    probe = {"probe": [x], "loss": lambda model, batch: model(batch).square().mean(), "first_rate": rate}
    if not isinstance(adapted.method, NeedsProbe):
        probe = {}
    distlora.initialise(adapted, optimizer=optimizer, **probe, **options)

    def step(rate: float = rate):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(x).square().mean().backward()
        adapted.before_step()
        optimizer.step()
        adapted.after_step()

    return adapted, step


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_ga", "lora_sb", "lora_pro"])
def test_a_block_that_begins_as_no_change_trains(method):
    """Behind a zero projection nothing has a gradient until that projection has moved."""
    adapted, step = started(net(zero=["blocks.1.out"]), method)
    before = {name: value.detach().clone() for name, value in _factors(adapted, "blocks.1.first").items()}
    for _ in range(PATIENCE + 2):
        step()
    for name, value in _factors(adapted, "blocks.1.first").items():
        assert not torch.equal(value, before[name]), name


def test_steps_with_the_rate_zero_are_waited_for():
    adapted, step = started(net(zero=["blocks.1.out"]))
    step(0.0)
    for _ in range(PATIENCE):
        step()
    assert all(value.any() for value in _factors(adapted, "blocks.1.first").values())


def test_what_is_never_called_is_named_at_the_first_step():
    _, step = started(net(), targets=("blocks", "idle"))
    with pytest.raises(
        distlora.TrainingError, match="has not called the layer idle; leave it out of targets"
    ):
        step()


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_xs"])
def test_a_gradient_that_never_comes_is_named_after_some_steps(method):
    """The layer is called, but what follows it is zero and not trained."""
    _, step = started(net(zero=["blocks.0.out"]), method, targets=("first",))
    for _ in range(PATIENCE - 1):
        step()
    with pytest.raises(
        distlora.TrainingError, match=r"blocks\.0\.first\.[ABR] was zero in 5 steps up to step 5"
    ):
        step()


def test_an_expert_that_no_token_chose_yet_is_no_mistake(caplog):
    adapted, step = started(net(experts=3), targets=("experts",))
    with caplog.at_level(logging.WARNING):
        for _ in range(PATIENCE + 1):
            step()
    assert "not called in the first 5 steps: experts.*" in caplog.text
    assert _factors(adapted, "experts.0")["B"].any() and not _factors(adapted, "experts.1")["B"].any()


def test_a_short_run_ends_with_a_line(caplog):
    adapted, step = started(net(zero=["blocks.0.out"]), targets=("first",), steps=2)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        step()
        assert not caplog.text
        step()
    assert "without a gradient in this short run: blocks.0.first" in caplog.text


def test_a_gradient_that_is_not_finite_is_named_at_once():
    model = net()
    _, step = started(model)
    step()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(distlora.TrainingError, match="is not finite at step 2"):
        step()
    assert LEAST == 2


def test_who_does_not_ask_is_not_told():
    _, step = started(net(), targets=("blocks", "idle"), check_gradients=False)
    for _ in range(PATIENCE + 1):
        step()


def _factors(adapted, layer):
    return {name: getattr(adapted.layers[layer], name) for name in adapted.method.trains}


# ---------------------------------------------------------------------- what can never train

FROM_WEIGHT = {"pissa", "srlora", "lora_xs", "dora"}


@pytest.mark.parametrize("method", sorted(set(registry()) - {"full"}))
def test_a_zero_weight_is_named_where_factors_are_made_of_it(method):
    model = net(zero=["blocks.0.out", "blocks.1.out"])
    if method not in FROM_WEIGHT:
        adapted, step = started(model, method)
        for _ in range(PATIENCE + 1):
            step()
        assert any(value.any() for value in _factors(adapted, "blocks.0.out").values())
        return
    with pytest.raises(distlora.UserError) as error:
        started(model, method)
    assert str(error.value) == (
        f"method {method} would never train anything in blocks.*.out (2 layers), since what it starts from, "
        "the weight, is zero there: leave their blocks out (targets.exclude), or take a method that starts "
        "beside the weight, such as lora"
    )


@pytest.mark.parametrize("method", sorted(set(registry()) - {"full"}))
@pytest.mark.parametrize("what", ["whole", "rows", "zero"])
def test_can_train_is_what_steps_show(method, what):
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    if what == "rows":
        weight[:4] = 0
    if what == "zero":
        weight.zero_()
    chosen = registry()[method](**settings(method))
    kind = chosen.source_matrix()
    gradient = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    source = {"weight": weight, "gradient": gradient, None: None}[kind]
    layer = LayerInit((WIDTH, WIDTH), source, torch.Generator().manual_seed(4))
    assert can_train(chosen, layer, chosen.initialise(layer)) == (what != "zero" or method not in FROM_WEIGHT)


def test_rows_that_a_magnitude_keeps_at_zero_are_told(caplog):
    model = net()
    with torch.no_grad():
        model.blocks[1].out.weight[:2] = 0
    with caplog.at_level(logging.WARNING):
        started(model, "dora")
    assert "dora does not train rows of a weight that are zero, as some are in blocks.1.out" in caplog.text


@pytest.mark.parametrize("method", ["lora_sb", "lora_ga"])
def test_a_start_from_no_gradient_is_told(caplog, method):
    with caplog.at_level(logging.WARNING):
        started(net(zero=["blocks.1.out"]), method)
    assert f"the gradient that {method} starts from is zero in blocks.1.first" in caplog.text
