"""The search for a learning rate: it chooses well, and leaves everything as it was, to the bit."""

import json
import logging
import math

import pytest
import torch

from distlora.cluster.lease import take_lease
from distlora.engine.comm import Comm, Topology
from distlora.engine.optimizers import OptimizerSpec, has_state
from distlora.engine.random_state import own_random_state, random_states
from distlora.engine.rehearsal import Kept
from distlora.errors import Preempted, TrainingError, UserError
from distlora.methods import registry
from distlora.recipe.sections import RateSearchSection
from distlora.training import train
from distlora.training.rate_search import RateSearch, choose, find_rate, finer, search_rate, spread
from distlora.training.samples import trial_indices
from distlora.training.step import accumulate
from distlora.training.writing import Writing
from tests.tiny_models import tiny_model_dir
from tests.tiny_runs import BF16, FP32, Run, loss_sum, samples
from tests.unit.test_lease import ELSEWHERE, write_lease
from tests.unit.test_train import short_recipe

CPU = torch.device("cpu")
ALONE = Comm(Topology(), CPU, distributed=False)
#: Settings that a method cannot do without here.
NEEDED = {"srlora": {"target_rank": 12, "gamma": 0.5}}
SETTINGS = RateSearchSection(lowest=1e-4, highest=1e-1, rates=3, steps=2)
every_method = pytest.mark.parametrize("name", sorted(registry()))


@pytest.fixture(autouse=True)
def generators():
    """The tests' own: dropout draws from them."""
    with own_random_state(5, CPU):
        yield


def run_of(name="lora", dtype=FP32, **more) -> Run:
    settings = {"name": name, "rank": 4, "dropout": 0.2, **NEEDED.get(name, {})}
    run = Run(settings, dtype, **more)
    run.engine.train_mode(True)
    return run


def search(run: Run, settings=SETTINGS, loss=loss_sum) -> RateSearch:
    dtype = run.engine.dtype
    steps = [[samples(2 * i, dtype), samples(2 * i + 1, dtype)] for i in range(settings.steps)]
    return search_rate(run.engine, settings, steps, [samples(70, dtype)], loss)


def everything(run: Run) -> dict[str, torch.Tensor]:
    """All that a step may change, by name."""
    engine, optimizer = run.engine, run.engine._optimizer
    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    found |= {f"gradient of {name}": p.grad for name, p in engine.module.named_parameters()}
    found |= {
        f"{name}/{k}": v for name in engine.trained_shapes() for k, v in engine.read_trained(name).items()
    }
    found |= {f"mode of {name}": module.training for name, module in engine.module.named_modules()}
    found |= {"rates": [group["lr"] for group in optimizer.param_groups], "steps": engine.steps_taken()}
    found |= {"states": any(has_state(optimizer, p) for g in optimizer.param_groups for p in g["params"])}
    saved = run.saved()
    found |= {"ledger": saved["ledger"][0], "recomposition": saved["recompose"][0]}
    found |= {f"ledger {name}": value for name, value in saved["ledger"][1].items()}
    found |= {f"recomposition {name}": value for name, value in saved["recompose"][1].items()}
    return found | {f"generator of {name}": state for name, state in random_states(CPU).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, f"{name} is another one"


# ---------------------------------------------------------------------- taken back


@every_method
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_after_the_search_everything_is_as_before(name, dtype):
    """And training goes on as if there had been none: through recompositions, with dropout."""
    run, other = run_of(name, dtype), run_of(name, dtype)
    before, states = everything(run), random_states(CPU)
    found = search(run)
    assert_same(everything(run), before)
    losses, _ = run.train(6)
    torch.set_rng_state(states["cpu"])
    assert losses == other.train(6)[0]
    assert len(found.tried) >= 4 and all(math.isfinite(loss) for _, loss in found.tried)


@every_method
def test_every_method_learns_in_the_trial_steps_and_from_all_its_tensors(name):
    run, seen = run_of(name), []

    def loss(net, batch):
        seen.append({n: float(p.detach().norm()) for n, p in net.named_parameters() if p.requires_grad})
        return loss_sum(net, batch)

    found = search(run, loss=loss)
    assert dict(found.tried)[found.rate] < found.loss_before
    moved = {n for now in seen for n, norm in now.items() if norm != seen[0][n]}
    assert moved == set(run.engine.trained_shapes())


OPTIMIZERS = {
    "sgd": OptimizerSpec("sgd", 1e-2, momentum=0.9, weight_decay=0.01),
    "lora_plus": OptimizerSpec("adamw", 1e-2, weight_decay=0.1, lora_plus_ratio=4.0),
    "paged_adamw": OptimizerSpec("paged_adamw", 1e-2),
    "adamw8bit": OptimizerSpec("adamw8bit", 1e-2),
}


@pytest.mark.parametrize("spec", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_begins_anew(spec):
    run, other = run_of(spec=spec, clip=0.05), run_of(spec=spec, clip=0.05)
    rates = [group["lr"] for group in run.engine._optimizer.param_groups]
    states = random_states(CPU)
    search(run)
    assert [group["lr"] for group in run.engine._optimizer.param_groups] == rates
    losses, _ = run.train(4)
    torch.set_rng_state(states["cpu"])
    assert losses == other.train(4)[0]


@pytest.mark.parametrize("spec", [OPTIMIZERS["adamw8bit"], OPTIMIZERS["paged_adamw"]], ids=["8bit", "paged"])
def test_large_moments_of_bitsandbytes_begin_anew_where_they_lie(spec):
    def stepped(parameter, optimizer, seed):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        return parameter.detach().clone()

    start = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    parameter, fresh = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer, other = spec.build([parameter]), spec.build([fresh])
    kept = Kept(CPU, optimizer, [parameter])
    stepped(parameter, optimizer, 2)
    place = optimizer.state[parameter]["state1"].data_ptr()
    kept.put_back()
    assert torch.equal(parameter, start)
    for seed in (3, 4):
        assert torch.equal(stepped(parameter, optimizer, seed), stepped(fresh, other, seed))
    assert optimizer.state[parameter]["state1"].data_ptr() == place


def test_a_step_that_counts_cannot_be_taken_back():
    run = run_of()
    run.train(1)
    with pytest.raises(ValueError, match="before the optimizer's first"), run.engine.rehearsal():
        pass


# ---------------------------------------------------------------------- what is tried and chosen


def test_equal_starts_make_equal_choices():
    first = search(run_of("lora_sb"))
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
    again = search(run_of("lora_sb"))
    assert (first.rate, first.tried, first.loss_before) == (again.rate, again.tried, again.loss_before)


def test_a_rate_that_was_chosen_has_its_loss_in_a_run_of_the_same_steps():
    """The trial steps are those of training: without dropout and warm-up, at a constant rate."""
    settings = RateSearchSection(lowest=1e-2, highest=1e-1, rates=2, steps=3)
    found = search(_plain(), settings)
    run = _plain()
    for step in range(3):
        run.engine.set_rate(1e-2)
        batches = [samples(2 * step, FP32), samples(2 * step + 1, FP32)]
        accumulate(run.engine, batches, loss_sum)
        run.recomposer.on_gradient()
        run.engine.step()
    run.engine.train_mode(False)
    loss, count = loss_sum(run.engine.module, samples(70, FP32))
    assert dict(found.tried)[1e-2] == pytest.approx(loss.item() / count, rel=1e-6)


def _plain() -> Run:
    return Run({"name": "lora", "rank": 4}, FP32)


@pytest.mark.parametrize("name", ["lora", "lora_pro", "full", "srlora", "dora"])
def test_a_rate_that_diverges_is_the_worst_and_leaves_nothing_behind(name):
    """A loss, a gradient or factors that are not finite."""
    run = run_of(name)
    before = everything(run)
    found = search(run, RateSearchSection(lowest=1e-3, highest=3e37, rates=2, steps=3))
    assert dict(found.tried)[3e37] == math.inf and found.rate == 1e-3
    assert_same(everything(run), before)


def test_a_gradient_that_is_not_finite_counts_as_diverging():
    run = run_of("lora_pro")
    before = everything(run)

    def loss(net, batch):
        total, count = loss_sum(net, batch)
        large = max(float(p.detach().abs().max()) for n, p in net.named_parameters() if p.requires_grad) > 5
        hook = (lambda gradient: gradient * math.nan) if large and total.requires_grad else None
        return total if hook is None else _with_hook(total, hook), count

    found = search(run, RateSearchSection(lowest=1e-3, highest=10.0, rates=2, steps=2), loss)
    assert dict(found.tried)[10.0] == math.inf
    assert_same(everything(run), before)


def _with_hook(total, hook):
    total = total * 1.0
    total.register_hook(hook)
    return total


def test_where_all_diverge_a_sentence_says_so():
    with pytest.raises(TrainingError, match="training diverges at every learning rate from 2e\\+37"):
        search(run_of(), RateSearchSection(lowest=2e37, highest=3e37, rates=2, steps=3))
    with pytest.raises(TrainingError, match="not finite before the first step"):
        search(run_of(), loss=lambda net, batch: (loss_sum(net, batch)[0] * math.nan, 12))


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({1e-4: 1.9, 1e-3: 1.5, 1e-2: 1.8}, 1e-3),
        ({1e-4: 1.52, 1e-3: 1.5, 1e-2: 1.8}, 1e-4),  # all but 4 % of the gain
        ({1e-4: 1.53, 1e-3: 1.5, 1e-2: 1.8}, 1e-3),
        ({1e-3: 1.5, 1e-2: 1.5, 1e-1: 1.5}, 1e-3),  # a tie
        ({1e-4: 2.1, 1e-3: 2.05, 1e-2: 2.0499}, 1e-3),  # nothing helps, and two are equal but for rounding
        ({1e-4: math.inf, 1e-3: 1.9}, 1e-3),
    ],
)
def test_the_smallest_rate_that_is_as_good_as_the_best(tried, expected):
    assert choose(tried, before=2.0) == expected


def test_the_choice_is_the_same_whatever_rounding_does():
    tried = {1e-4: 1.9, 1e-3: 1.5, 1e-2: 1.8}
    for sign in (-1, 1):
        assert choose({rate: loss * (1 + sign * 2e-3 * loss) for rate, loss in tried.items()}, 2.0) == 1e-3


def test_rates_are_spread_evenly_and_finer_around_the_best():
    settings = RateSearchSection()
    rates = spread(settings)
    assert rates == [1e-5, 7.4e-5, 5.48e-4, 4.05e-3, 3e-2]
    assert finer(settings, 4.05e-3) == [1.49e-3, 1.1e-2]
    assert finer(settings, 3e-2) == [1.1e-2] and finer(settings, 1e-5) == [2.72e-5]


def test_the_defaults_take_at_most_three_hundredths_of_a_run_of_1500_steps():
    """An evaluation is a forward pass, a third of a step's passes at most."""
    settings, batch = RateSearchSection(), 32
    trials = settings.rates + 2
    evaluations = (trials + 1) * settings.samples / batch / 3
    assert trials * settings.steps + evaluations <= 0.03 * 1500


# ---------------------------------------------------------------------- the samples


def test_samples_that_decide_are_in_no_step():
    order = list(range(100, 0, -1))
    steps, held_back = trial_indices(order, 4, 8, 32)
    assert [i for step in steps for i in step] == order[:32], "those of the run's own first steps"
    assert held_back == order[-32:]
    steps, held_back = trial_indices(order, 20, 8, 32)
    assert not {i for step in steps for i in step} & set(held_back) and {len(step) for step in steps} == {8}
    assert [i for step in steps for i in step][:68] == order[:68]


@pytest.mark.parametrize(("count", "batch"), [(2, 8), (7, 3), (9, 8)])
def test_few_samples_are_shared_out(count, batch):
    steps, held_back = trial_indices(range(count), 3, batch, 32)
    assert len(held_back) == count // 2 and all(0 < len(step) <= batch for step in steps)
    assert not {i for step in steps for i in step} & set(held_back)


def test_a_single_sample_is_refused():
    with pytest.raises(UserError, match="^train.lr=search holds training samples back"):
        trial_indices([0], 3, 8, 32)


# ---------------------------------------------------------------------- the run directory


FOUND = RateSearch(1e-3, 2.0, [(1e-4, 1.9), (1e-3, 1.5), (1e-2, math.inf)], 3.5)


def _never():
    pytest.fail("searched again")


def test_what_was_found_is_not_searched_again(tmp_path):
    writing, identity = Writing(ALONE), {"train": {"seed": 3}}
    assert find_rate(writing, tmp_path, identity, lambda: FOUND) == FOUND
    assert find_rate(writing, tmp_path, identity, _never) == FOUND
    content = json.loads((tmp_path / "lr_search.json").read_text())
    assert content["rate"] == 1e-3 and content["tried"] == [[1e-4, 1.9], [1e-3, 1.5], [1e-2, None]]


def test_another_runs_file_or_a_broken_one_is_not_believed(tmp_path):
    writing, other = Writing(ALONE), RateSearch(1e-2, 2.0, [(1e-2, 1.5)], 3.5)
    find_rate(writing, tmp_path, {"seed": 3}, lambda: other)
    assert find_rate(writing, tmp_path, {"seed": 4}, lambda: FOUND) == FOUND
    for broken in (b'{"rate": 0.', b"\xff\xfe", b"[]"):
        (tmp_path / "lr_search.json").write_bytes(broken)
        assert find_rate(writing, tmp_path, {"seed": 4}, lambda: FOUND) == FOUND


def test_what_was_found_is_not_written_into_a_directory_that_was_taken_over(tmp_path):
    held = take_lease(tmp_path, "me")

    def search():
        write_lease(tmp_path, **ELSEWHERE, token="another")
        return FOUND

    with pytest.raises(UserError, match="has taken it over"):
        find_rate(Writing(ALONE, held), tmp_path, {"seed": 4}, search)
    assert not (tmp_path / "lr_search.json").exists()
    held.release()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


def test_who_is_stopped_in_the_search_begins_anew(model, tmp_path, caplog):
    caplog.set_level(logging.INFO, "distlora")
    recipe = short_recipe(model, tmp_path)
    searching = recipe("train.lr=search", "train.lr_search={lowest: 1e-3, highest: 1e-2, rates: 2, steps: 1}")
    with pytest.raises(Preempted, match="^asked to stop during the search for the learning rate"):
        train.train(
            searching, Topology(), asked_to_stop=lambda: "loss " in caplog.text.split("initialised")[-1]
        )
    run_dir = tmp_path / "run"
    assert not (run_dir / "lr_search.json").exists() and not list(run_dir.glob("checkpoint-*"))
    train.check(searching, Topology(), None)
    found = train.train(searching, Topology()).found_rate
    assert found == json.loads((run_dir / "lr_search.json").read_text())["rate"]
