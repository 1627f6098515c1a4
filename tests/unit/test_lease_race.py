"""Hosts without a lock in common that take over the lease of the same dead owner at the same moment."""

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from distlora.cluster.lease import LEASE, take_lease
from distlora.files import ownership
from distlora.files.ownership import Owner, owner_of, take


def owner(token: str) -> Owner:
    return Owner(token, "a host", "a place", 1, 1)


def write(path: Path, token: str) -> None:
    path.write_text(json.dumps(asdict(owner(token))))


@pytest.fixture
def contest(tmp_path, monkeypatch):
    """Contestants of which each stands still at a step of `take` until the next has come to its own.

    A lock of its own for each, as between hosts.
    """
    monkeypatch.setattr(ownership, "SETTLING", 0.1)

    def start(name: str) -> tuple[threading.Thread, dict[str, object]]:
        (tmp_path / name).mkdir()
        answers: dict[str, object] = {}

        def go():
            answers[name] = take(
                tmp_path / LEASE, owner(name), lambda found, age: found.token == "dead", tmp_path / name
            )

        return threading.Thread(target=go, name=name), answers

    return start


def test_of_three_hosts_one_gets_the_lease_of_a_dead_owner(tmp_path, contest, monkeypatch):
    """The first reads the dead owner's name and stands still; the second takes the lease; the first renames
    that one's file, and the third takes the empty place."""
    path = tmp_path / LEASE
    write(path, "dead")
    read, taken, renamed = threading.Event(), threading.Event(), threading.Event()
    rename, link = os.rename, os.link

    def late_rename(source, target):
        if threading.current_thread().name == "first":
            read.set()
            assert taken.wait(20)
            rename(source, target)
            third, answers["third"] = contest("third")
            third.start()
            third.join(20)
            renamed.set()
            return
        rename(source, target)

    def told_link(source, target):
        link(source, target)
        if threading.current_thread().name == "second":
            taken.set()
            assert renamed.wait(20)

    monkeypatch.setattr(os, "rename", late_rename)
    monkeypatch.setattr(os, "link", told_link)
    answers = {}
    first, answers["first"] = contest("first")
    second, answers["second"] = contest("second")
    first.start()
    assert read.wait(20)
    second.start()
    for thread in (first, second):
        thread.join(20)
    winners = [name for name, said in answers.items() if said[name] is None]
    assert winners == [owner_of(path).token] == ["third"]
    assert not list(tmp_path.glob(f".{LEASE}.*"))


def test_an_owner_whose_file_is_put_back_goes_on_and_one_whose_file_stays_away_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ownership, "SETTLING", 0.2)
    held = take_lease(tmp_path, "me")
    (tmp_path / LEASE).rename(tmp_path / "aside")
    back = threading.Timer(0.05, (tmp_path / "aside").rename, [tmp_path / LEASE])
    back.start()
    assert held.problem(at_once=True) is None
    back.join()
    (tmp_path / LEASE).unlink()
    assert "its lease is gone" in str(held.problem(at_once=True))
    held.release()


def test_a_directory_without_rivals_is_taken_at_once(tmp_path):
    began = time.monotonic()
    assert take(tmp_path / LEASE, owner("me"), lambda *_: False, tmp_path) is None
    assert time.monotonic() - began < ownership.SETTLING
