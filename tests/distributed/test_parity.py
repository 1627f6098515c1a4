"""ZeroEngine at stage s on n ranks gives what LocalEngine gives on one.

Same model, same samples, same global batches, rows of very different length. The ranks of each world are
started once.
"""

import json

import pytest
import torch

from distlora.engine.local import LocalEngine
from tests.distributed.cases import run, solo
from tests.distributed.launch import launch, results_of
from tests.distributed.plan import Entry, entries
from tests.distributed.world import save_model

PLAN = entries()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory)
    return directory


@pytest.fixture(scope="module")
def worlds(model, tmp_path_factory, request):
    """Starts the ranks of a world for the cases that were selected, the first time that one is asked for."""
    selected = [item for item in request.session.items if item.path == request.path]
    wanted = {item.callspec.params["entry"].key for item in selected if "entry" in item.callspec.params}
    started = {}

    def results(entry: Entry):
        if entry.group not in started:
            started[entry.group] = tmp_path_factory.mktemp(f"world{entry.world}")
            chosen = [e.for_worker() for e in PLAN if e.group == entry.group and e.key in wanted]
            launch(entry.world, model, started[entry.group], chosen)
        return results_of(started[entry.group], entry.key)

    return results


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The same case on LocalEngine, once for all stages and worlds that share it."""
    known = {}

    def results(entry: Entry):
        shared = {k: v for k, v in entry.setting.items() if k not in ("micro_batch", "checkpointing")}
        key = json.dumps([entry.case, entry.dtype, shared, entry.arguments], sort_keys=True)
        if key not in known:
            engine = LocalEngine(solo(), getattr(torch, entry.dtype), shared.get("clip") or None)
            work = tmp_path_factory.mktemp("local")
            known[key] = run(entry.case, engine, model, work, entry.arguments, **shared)
        return known[key]

    return results


def _marked(entry: Entry):
    return pytest.param(entry, id=entry.key, marks=pytest.mark.long if entry.is_long else ())


@pytest.mark.parametrize("entry", map(_marked, PLAN))
def test_zero_gives_what_the_plain_engine_gives(entry, worlds, reference):
    there, here = worlds(entry), reference(entry)
    assert there.keys() == here.keys()
    if "losses" in here:
        assert torch.isfinite(here["losses"]).all()
        torch.testing.assert_close(there["losses"][0], here["losses"][0], rtol=entry.first_loss, atol=0)
        torch.testing.assert_close(there["losses"], here["losses"], rtol=entry.loss, atol=0)
    for name in sorted(here.keys() - {"losses"}):
        _assert_near(name, there[name], here[name], entry.tensors)


@pytest.mark.parametrize("world", [2], ids=["failing-world2"])
def test_a_case_that_fails_fails_alone(world, model, tmp_path):
    """New ranks go on behind it; and a rank that fails is heard where rank 0 has a result."""
    quick = Entry(world, "naming_silent_tensors", 0).for_worker()
    cases = [
        quick | {"key": "before"},
        quick | {"key": "wrong", "case": "unheard_of"},
        quick | {"key": "after"},
    ]
    launch(world, model, tmp_path, cases)
    assert results_of(tmp_path, "before").keys() == results_of(tmp_path, "after").keys() == {"right"}
    (tmp_path / "before.rank1.error").write_text("ValueError: only here")
    for key, said in (("wrong", "KeyError: 'unheard_of'"), ("before", "ValueError: only here")):
        with pytest.raises(pytest.fail.Exception, match=said):
            results_of(tmp_path, key)


def _assert_near(name: str, there: torch.Tensor, here: torch.Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest element; whole numbers are equal."""
    assert there.shape == here.shape, name
    if not here.is_floating_point():
        assert torch.equal(there, here), f"{name}: {there.tolist()} and not {here.tolist()}"
        return
    there, here = there.double(), here.double()
    scale = float(here.abs().max()) if here.numel() else 0.0
    error = float((there - here).abs().max()) if here.numel() else 0.0
    assert error <= tolerance * scale, f"{name}: off by {error:.3g}, and its largest element is {scale:.3g}"
