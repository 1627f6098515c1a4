"""A directory that is replaced is the old one or the new one, whole, at whatever moment a crash comes."""

import errno
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from distlora.errors import UserError
from distlora.exports import draft as drafts
from distlora.exports.draft import bring_back_earlier, new_directory
from distlora.files import atomic

FORK = multiprocessing.get_context("fork")
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def fill(folder: Path, text: str) -> None:
    for name in FILES:
        (folder / name).write_text(text)


def whole(folder: Path) -> str | None:
    """What the directory holds; None if it is not there. Fails for a mixture."""
    if not folder.exists():
        return None
    texts = {path.read_text() for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir()} == FILES and len(texts) == 1
    return texts.pop()


def export(out: Path, text: str) -> None:
    with new_directory(out, FILES) as draft:
        fill(draft, text)


def die_at(out: Path, step: int, exchanging: bool) -> None:
    """Exports, and ends without any clean-up just before its n-th change to the file system."""
    if not exchanging:
        atomic._exchange = lambda *_: False
    count = 0

    def watch(event, arguments):
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        calls = event == "ctypes.dlopen"
        if writes or calls or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == step:
                os._exit(7)

    sys.addaudithook(watch)
    export(out, "new")
    os._exit(0)


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "two renames"])
def test_killed_before_every_operation_an_export_is_the_old_one_or_the_new_one(tmp_path, exchanging):
    died, step, seen = 7, 0, set()
    while died:
        step += 1
        out = tmp_path / str(step) / "adapter"
        export(out, "old")
        process = FORK.Process(target=die_at, args=(out, step, exchanging))
        process.start()
        process.join()
        died = process.exitcode
        assert died in (0, 7)
        if exchanging:
            assert whole(out) in ("old", "new"), "nobody has to put it right"
        bring_back_earlier(out)
        seen.add(whole(out))
        assert whole(out) in ("old", "new")
        export(out, "next")
        assert whole(out) == "next" and [path.name for path in out.parent.iterdir()] == ["adapter"]
    assert seen == {"old", "new"} and step > 5


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("call", ["fsync", "rename", "unlink", "rmdir"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_disk_that_refuses_leaves_the_old_one_or_the_new_one_and_no_litter(
    tmp_path, monkeypatch, exchanging, call, at
):
    out, original, calls = tmp_path / "adapter", getattr(os, call), []
    export(out, "old")

    def refuse(*given, **more):
        calls.append(given)
        if len(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        return original(*given, **more)

    with monkeypatch.context() as broken:
        if not exchanging:
            broken.setattr(atomic, "_exchange", lambda *_: False)
        broken.setattr(os, call, refuse)
        try:
            export(out, "new")
        except OSError:
            pass
    assert whole(out) in ("old", "new")
    export(out, "next")
    assert whole(out) == "next" and [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_all_files_and_directories_are_flushed_before_the_name_is_given(tmp_path, monkeypatch):
    flushed, done, flush = [], [], os.fsync

    def fsync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    def rename(old, new):
        done.extend(flushed)
        os.replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with new_directory(tmp_path / "out") as draft:
        fill(draft, "new")
        (draft / "more").mkdir()
        (draft / "more" / "file").touch()
    inside = {".", "more", "more/file", *FILES}
    assert {os.path.relpath(path, tmp_path / ".out.partial") for path in done} == inside
    assert flushed[-1] == str(tmp_path), "and the directory that holds the name, afterwards"


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    export(tmp_path / "elsewhere", "old")
    (tmp_path / "adapter").symlink_to("elsewhere")
    export(tmp_path / "adapter", "new")
    assert whole(tmp_path / "adapter") == "new" and whole(tmp_path / "elsewhere") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "elsewhere"]


def test_what_is_no_export_is_not_replaced_by_what_a_crash_has_left(tmp_path):
    (tmp_path / ".out.earlier").mkdir()
    (tmp_path / ".out.earlier" / "precious").touch()
    with pytest.raises(UserError, match="is not an empty directory"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "precious").exists()
    assert drafts._earlier(tmp_path / "out").name == ".out.earlier"


def test_an_export_that_fails_takes_away_the_directories_that_it_made(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError), new_directory(tmp_path / "there" / "a" / "b" / "out") as draft:
        fill(draft, "new")
        raise ValueError
    assert list((tmp_path / "there").iterdir()) == []
    with new_directory(tmp_path / "there" / "a" / "out") as draft:
        fill(draft, "new")
    assert whole(tmp_path / "there" / "a" / "out") == "new"
