"""Learning-rate schedules: every rate is the one of transformers' scheduler of the same name."""

import pytest
import torch
import yaml
from transformers import get_scheduler

from distlora.engine.schedules import NAMES, Schedule
from distlora.errors import UserError
from distlora.recipe.load import dump_recipe, load_recipe

PEAK, STEPS = 2e-3, 57
WARMUPS = (0.0, 0.1, 0.5)


def wanted(name: str, warmup_steps: int, settings: dict) -> list[float]:
    """The rates of transformers' own scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup_steps, STEPS, settings)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


#: Name, our settings, those of transformers.
CASES = [
    ("cosine", {}, {}),
    ("cosine", {"cycles": 1.5}, {"num_cycles": 1.5}),
    ("linear", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("cosine_with_restarts", {}, {}),
    ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_ratio": 0.1}, {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_ratio": 0.05, "cycles": 1.0}, {"min_lr": 0.05 * PEAK, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_ratio": 0.1}, {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_ratio": 0.1, "first_ratio": 0.3},
     {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3}),
    ("polynomial", {}, {}),
    ("polynomial", {"power": 2.0, "min_ratio": 0.2}, {"power": 2.0, "lr_end": 0.2 * PEAK}),
    ("inverse_sqrt", {}, {}),
    ("inverse_sqrt", {"timescale": 40}, {"timescale": 40}),
    ("warmup_stable_decay", {"decay_ratio": 0.25}, {"num_decay_steps": 15}),
    ("warmup_stable_decay", {"decay_ratio": 0.25, "decay": "linear", "warmup": "cosine", "min_ratio": 0.1},
     {"num_decay_steps": 15, "decay_type": "linear", "warmup_type": "cosine", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"decay_ratio": 0.25, "decay": "1-sqrt", "warmup": "1-sqrt", "cycles": 1.0},
     {"num_decay_steps": 15, "decay_type": "1-sqrt", "warmup_type": "1-sqrt", "num_cycles": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize(("name", "ours", "theirs"), CASES, ids=lambda value: str(value))
def test_every_rate_is_transformers_own(name, ours, theirs, warmup):
    schedule = Schedule(name, PEAK, STEPS, warmup, warmup_from_zero=True, **ours)
    found = [schedule.rate(step) for step in range(STEPS)]
    assert found == pytest.approx(wanted(name, schedule.warmup_steps, theirs), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"cosine", "linear", "constant"}))
def test_the_other_names_warm_up_as_transformers_does_without_being_told(name):
    settings = {"min_ratio": 0.1} if name.endswith("with_min_lr") else {}
    told = Schedule(name, PEAK, STEPS, 0.2, warmup_from_zero=True, **settings)
    assert [Schedule(name, PEAK, STEPS, 0.2, **settings).rate(step) for step in range(STEPS)] == [
        told.rate(step) for step in range(STEPS)
    ]


def test_a_decay_of_the_whole_run_and_a_run_of_one_step():
    for name in NAMES:
        settings = {"min_ratio": 0.1} if name.endswith("with_min_lr") else {}
        assert 0 <= Schedule(name, PEAK, 1, 0.0, **settings).rate(0) <= PEAK
    schedule = Schedule("warmup_stable_decay", PEAK, 10, 0.25, decay_ratio=0.75)
    assert schedule.warmup_steps + schedule.decay_steps == 10


# ---------------------------------------------------------------------- in a recipe


def recipe(tmp_path, schedule, *overrides):
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"path": "org/model"}, "method": {"name": "lora"}, "data": {"task": "gsm8k"},
        "train": {"schedule": schedule}, "output_dir": "out",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return load_recipe(path, overrides)


def test_a_name_stands_for_a_section_and_overrides_reach_its_settings(tmp_path):
    assert recipe(tmp_path, "linear").train.schedule.name == "linear"
    found = recipe(tmp_path, "cosine", "train.schedule.cycles=2").train.schedule
    assert (found.name, found.cycles) == ("cosine", 2)
    again = tmp_path / "again.yaml"
    written = recipe(tmp_path, {"name": "warmup_stable_decay", "decay_ratio": 0.2})
    again.write_text(dump_recipe(written))
    assert load_recipe(again).train == written.train
    schedule = written.train.schedule.of_run(1.0, 10, 0.1)
    assert [schedule.rate(step) for step in (0, 1, 7, 8)] == [0, 1, 1, 1] and schedule.rate(9) == 0.5


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("reduce_lr_on_plateau", "the rates of reduce_lr_on_plateau follow the evaluations"),
        ({"name": "greedy"}, "the rates of greedy follow the loss of each step"),
        ("cosine_with_min_lr", "cosine_with_min_lr needs its least rate"),
        ({"name": "linear", "min_ratio": 0.1}, "min_ratio is for cosine_with_min_lr or"),
        ({"name": "cosine", "num_cycles": 2}, "train.schedule.num_cycles: unknown key"),
        ({"name": "warmup_stable_decay", "decay_ratio": 0.99}, "more than the whole run"),
        ({"name": "polynomial", "power": 0}, "train.schedule.power: found 0, wanted a number above 0"),
        ("cosin", 'train.schedule: found "cosin", wanted cosine, linear, constant'),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_sentence(tmp_path, schedule, says):
    with pytest.raises(UserError, match="train") as refused:
        recipe(tmp_path, schedule)
    assert says in str(refused.value)
