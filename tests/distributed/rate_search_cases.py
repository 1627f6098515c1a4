"""The search for a learning rate on any engine."""

import torch
from torch import Tensor

from distlora.data import collate, shard
from distlora.engine.random_state import random_states
from distlora.initialisation.factors import initialise
from distlora.models.losses import response_loss
from distlora.recipe.sections import RateSearchSection
from distlora.training.rate_search import search_rate
from tests.distributed.plan import GLOBAL_BATCH
from tests.distributed.world import samples


def searching(setting, highest: float = 1e-1, steps: int = 2) -> dict[str, Tensor]:
    """From the method's own start: rates, their losses and the choice; this rank's state is the same
    afterwards, to the bit; then two steps of training. highest: a rate that may be too much."""
    engine, comm = setting.engine, setting.comm
    initialise(engine, setting.attached, seed=3, first_rate=1e-3, data=setting.probe_data(10, 1))
    settings = RateSearchSection(lowest=1e-3, highest=highest, rates=2, steps=steps)
    batches = [setting.batches(step) for step in range(steps)]
    held_back = samples(
        GLOBAL_BATCH, 0
    )  # the rows of the first step: nothing is learned of other random ones
    parts = shard(len(held_back), comm.rank, comm.world_size, setting.micro_batch)
    others = [collate([held_back[i] for i in part], 0, comm.device) for part in parts]
    before = _held(setting)
    found = search_rate(engine, settings, batches, others, response_loss)
    after = _held(setting)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
        assert same, f"{name} is {after[name]} after the search, and was {value}"
    assert dict(found.tried)[found.rate] < found.loss_before
    losses, _ = setting.steps(0, 2)
    # A first step is made of signs, and in bfloat16 those of small gradients are a matter of digits.
    factors = setting.factors() if engine.dtype == torch.float32 else {}
    finite = {rate: min(loss, 1e9) for rate, loss in found.tried}
    return {
        "losses": torch.tensor([found.loss_before, *losses]), "rate": torch.tensor(found.rate),
        "rates": torch.tensor(list(finite)), "tried": torch.tensor(list(finite.values())),
    } | factors  # fmt: skip


def _held(setting) -> dict[str, object]:
    """What lies on this rank and what the engine counts, by name."""
    engine = setting.engine
    engine.train_mode(True)
    with engine.probe_pass():  # lets go of what was gathered
        pass
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    for name, layer in setting.attached.layers.items():
        for factor, part in engine.parts(layer).items():
            found[f"{name}.{factor} master"] = part.master.clone()
            found[f"{name}.{factor} moments"] = list(part.moments)
    found |= {f"generator of {name}": state for name, state in random_states(setting.comm.device).items()}
    found |= {"steps": engine.steps_taken(), "engine's steps": engine.engine_steps()}
    found["rates"] = [group["lr"] for group in engine._optimizer.param_groups]
    inner = getattr(engine, "_engine", None)
    if inner is not None:
        names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        found |= {name: getattr(inner, name) for name in names}
        found["boundary"] = inner.is_gradient_accumulation_boundary()
    return found
