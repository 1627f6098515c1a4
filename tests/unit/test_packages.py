"""Packages that a recipe needs, and monitors that fail: one sentence before the start, and no end."""

import importlib.metadata
import importlib.util
import logging
import re
from types import ModuleType, SimpleNamespace

import pytest

from distlora.engine.zero import monitors
from distlora.engine.zero.monitors import Monitors, legal_tag, start_monitors, without_monitors
from distlora.errors import UserError
from distlora.files.packages import is_installed
from distlora.recipe.load import recipe_of
from distlora.recipe.packages import check_packages

ON = {"enabled": True}


@pytest.fixture
def installed(monkeypatch):
    """Says which packages are there, by their versions."""

    def say(**versions):
        found = {name: SimpleNamespace(origin=f"{name}/__init__.py") for name in versions}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)

    return say


def recipe(*overrides):
    content = {
        "model": {"path": "x"}, "method": {"name": "lora", "rank": 1}, "data": {"task": "arithmetic"},
        "output_dir": "none", "deepspeed": {},
    }  # fmt: skip
    return recipe_of(content, "a test", overrides)


@pytest.mark.parametrize(
    ("config", "versions"),
    [
        ({}, {}),
        ({name: {"enabled": False} for name in ("tensorboard", "wandb", "comet")}, {}),
        ({"csv_monitor": ON}, {}),
        ({"tensorboard": ON, "wandb": ON}, {"tensorboard": "2", "wandb": "0"}),
        ({"comet": ON}, {"comet_ml": "3.41.0"}),
        ({"comet": ON}, {"comet_ml": "10.1"}),
    ],
)  # fmt: skip
def test_what_is_off_or_there_is_no_problem(installed, config, versions):
    installed(**versions)
    check_packages(recipe(), config)


@pytest.mark.parametrize(
    ("config", "versions", "said"),
    [
        ({"wandb": ON}, {}, "wandb needs the package wandb, which is not installed; pip install wandb, or"),
        ({"tensorboard": ON}, {"wandb": "1"}, "tensorboard needs the package tensorboard, which is not"),
        ({"comet": ON}, {"comet_ml": "3.9.9"}, "comet needs the package comet_ml>=3.41.0, which is not"),
        (
            {"tensorboard": ON, "wandb": ON, "comet": ON}, {},
            "tensorboard needs the package tensorboard, wandb needs the package wandb, comet needs the "
            "package comet_ml>=3.41.0, which are not installed; "
            "pip install tensorboard wandb 'comet_ml>=3.41.0', or",
        ),
    ],
)  # fmt: skip
def test_all_packages_that_are_missing_are_told_at_once(installed, config, versions, said):
    installed(**versions)
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        check_packages(recipe(), config)
    assert f"deepspeed section: {said}" in str(caught.value)


def test_packages_of_optimizer_and_monitors_are_one_sentence(installed):
    installed()
    with pytest.raises(UserError, match="bitsandbytes.*; and .*wandb needs the package wandb"):
        check_packages(recipe("train.optimizer.name=adamw8bit"), {"wandb": ON})


@pytest.mark.parametrize("name", ["wandb", "comet"])
def test_a_folder_of_the_name_is_not_the_package(tmp_path, monkeypatch, name):
    """W&B writes its runs into ./wandb, which Python can import."""
    package = {"wandb": "wandb", "comet": "comet_ml"}[name]
    if is_installed(package):
        pytest.skip(f"{package} is installed")
    (tmp_path / package).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"{name} needs the package {package}"):
        check_packages(recipe(), {name: ON})


# ---------------------------------------------------------------------- monitors that fail


def _refuse():
    raise RuntimeError("no key\nlog in")


def _code_of(module: str, action=_refuse):
    """A function that fails, in a module of this name."""
    made = ModuleType(module)
    made.action = action
    exec(compile("def fail():\n    action()", module, "exec"), made.__dict__)
    return made.fail


class _Group:
    """Of two ranks, as one of them sees it."""

    def __init__(self):
        self.told = []

    def agree(self, error):
        self.told.append(error)
        if error is not None:
            raise error


@pytest.mark.parametrize("modules", [("wandb",), ("comet",), ("tensorboard", "utils"), ("csv_monitor",)])
def test_a_monitor_that_cannot_be_started_is_one_sentence_on_every_rank(monkeypatch, modules):
    """Also where it fails in a helper of all monitors."""
    fail = _code_of(f"deepspeed.monitor.{modules[-1]}")
    for module in modules[-2::-1]:
        fail = _code_of(f"deepspeed.monitor.{module}", fail)
    monkeypatch.setattr(monitors, "MonitorMaster", lambda config: fail())
    group = _Group()
    with pytest.raises(UserError, match=rf"turns {modules[0]} on, which cannot be started \(no key\)"):
        start_monitors(group, {modules[0]: ON})
    assert len(group.told) == 1, "the others learn of it"


def test_monitors_are_started_after_all_ranks_have_an_engine(tmp_path, monkeypatch):
    """In DeepSpeed's start one that fails would leave the other ranks waiting."""
    config = {"train_batch_size": 1, "csv_monitor": ON | {"output_path": str(tmp_path), "job_name": "me"}}
    assert without_monitors(config) == {"train_batch_size": 1}
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    group = _Group()
    started = start_monitors(group, config)
    assert started.enabled and started.csv_monitor is not None and group.told == [None]


def test_monitors_that_fail_are_off_and_told_once(caplog, monkeypatch):
    calls = []

    def fail(told):
        calls.append(told)
        raise OSError(28, "No space left on device")

    board = SimpleNamespace(summary_writer=None, flush=lambda: None)
    guarded = Monitors(SimpleNamespace(enabled=True, write_events=fail, tb_monitor=board))
    monkeypatch.setattr(logging.getLogger("distlora"), "propagate", True)
    with caplog.at_level(logging.WARNING, "distlora"):
        guarded.write([("a", 1.0, 1)])
        guarded.write([("a", 2.0, 2)])
        guarded.on_board(fail)
    assert len(calls) == 1, "the others are not tried"
    assert len({record.created for record in caplog.records if "are off from" in record.message}) == 1
    assert guarded.configured, "the other ranks do not know that it failed, and go on to the same collectives"


@pytest.mark.parametrize("tag", ["eval/my set/loss", "eval/a:b*?/loss", "eval/ö/loss", "eval/" + "x" * 400])
def test_a_tag_is_a_name_for_every_monitor(tag):
    told = []
    master = SimpleNamespace(enabled=True, write_events=told.extend, tb_monitor=None)
    Monitors(master).write([(tag, 1.0, 3)])
    ((legal, value, step),) = told
    assert re.fullmatch(r"eval/[A-Za-z0-9_./-]+", legal) and len(f"{legal}.csv") <= 255
    assert (value, step) == (1.0, 3)


def test_the_usual_tags_stay_as_they_are():
    for tag in ("train/loss", "method/recompose/low_half_share", "eval/exact_match"):
        assert legal_tag(tag) == tag
