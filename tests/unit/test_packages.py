"""Packages that a recipe needs, and monitors that fail: one sentence before the start, and no end."""

import importlib.metadata
import importlib.util
import logging
from types import ModuleType, SimpleNamespace

import pytest

from distlora.engine.zero.monitors import Monitors, start_explained
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


def _code_of(module: str):
    """A function that fails, in a module of this name."""
    made = ModuleType(module)
    exec(compile("def fail():\n    raise RuntimeError('no key\\nlog in')", module, "exec"), made.__dict__)
    return made.fail


@pytest.mark.parametrize("name", ["wandb", "comet", "tensorboard"])
def test_a_monitor_that_cannot_be_started_is_one_sentence(name):
    with pytest.raises(UserError, match=rf"turns {name} on, which cannot be started \(no key\)"):
        with start_explained():
            _code_of(f"deepspeed.monitor.{name}")()
    with pytest.raises(RuntimeError, match="no key"), start_explained():
        _code_of("deepspeed.runtime.engine")()


def test_monitors_that_fail_are_off_and_told_once(caplog, monkeypatch):
    calls = []

    def fail(events):
        calls.append(events)
        raise OSError(28, "No space left on device")

    board = SimpleNamespace(write_events=fail)
    master = SimpleNamespace(enabled=True, write_events=fail, tb_monitor=board)
    monitors = Monitors(SimpleNamespace(monitor=master))
    monkeypatch.setattr(logging.getLogger("distlora"), "propagate", True)
    with caplog.at_level(logging.WARNING, "distlora"):
        monitors.write([("a", 1.0, 1)])
        monitors.write([("a", 2.0, 2)])
        monitors.write_to_board([("b", 1.0, 1)])
    assert len(calls) == 1, "the others are not tried"
    assert len({record.created for record in caplog.records if "are off from" in record.message}) == 1
