"""Output that is closed, full, or read by nobody: it ends no work, and there is never a traceback."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlora.cli import main as cli
from distlora.cli.output import Output, lasting_output
from distlora.errors import UserError
from distlora.training.monitor import Progress
from tests.e2e.program import REPOSITORY, call, curve
from tests.unit.test_train import model, short_recipe  # noqa: F401 (a fixture)

CLOSED, FULL = (errno.EPIPE, "Broken pipe"), (errno.ENOSPC, "No space left on device")


class Broken(io.StringIO):
    def __init__(self, code: int, text: str):
        super().__init__()
        self._error = (code, text)

    def write(self, text):
        raise OSError(*self._error)


@pytest.fixture
def streams(monkeypatch):
    """Standard output and error, each broken in a way or whole."""

    def put(out=None, err=None):
        for name, how in (("stdout", out), ("stderr", err)):
            monkeypatch.setattr(sys, name, Broken(*how) if how else io.StringIO())
        return sys.stderr

    return put


@pytest.mark.parametrize("how", [CLOSED, FULL])
def test_writing_never_fails_and_the_first_error_is_known(how):
    stream = Output(Broken(*how))
    assert stream.write("text") == 4
    stream.writelines(["a", "b"])
    stream.flush()
    stream.finish()
    assert stream.error.errno == how[0] and not stream.isatty()


@pytest.mark.parametrize("how", [CLOSED, FULL])
def test_a_progress_bar_goes_on_where_nobody_reads_it(streams, how):
    streams(err=how)
    with lasting_output():
        progress = Progress(steps=3, start=0)
        assert all(progress.advance(1.0, 1e-3, 10) > 0 for _ in range(3))
        progress.close()


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (CLOSED, 141, ""),
        (FULL, 2, "distlora: standard output: No space left on device; make room there\n"),
    ],
)
def test_a_verb_that_only_prints_ends_quietly_or_says_that_nothing_was_printed(
    streams, monkeypatch, how, code, said
):
    monkeypatch.setitem(cli.COMMANDS, "methods", lambda options: print("a table", file=sys.stdout))
    heard = streams(out=how)
    assert cli.main(["methods"]) == code and heard.getvalue() == said


@pytest.mark.parametrize("how", [CLOSED, FULL])
@pytest.mark.parametrize("code", [0, 1, 75])
def test_work_that_is_done_is_done_whoever_reads_of_it(streams, monkeypatch, how, code):
    def work(options):
        print("what it came to", file=sys.stdout)
        return code

    monkeypatch.setitem(cli.COMMANDS, "status", work)
    heard = streams(out=how)
    assert cli.main(["status", "run"]) == code and heard.getvalue() == ""


def test_a_sentence_that_nobody_hears_changes_no_exit_code(streams, monkeypatch):
    def refuse(options):
        raise UserError("no")

    monkeypatch.setitem(cli.COMMANDS, "methods", refuse)
    streams(out=CLOSED, err=CLOSED)
    assert cli.main(["methods"]) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_under_any_verb_is_one_sentence(monkeypatch, code):
    def refuse(options):
        raise OSError(code, os.strerror(code), "out/table.json")

    monkeypatch.setitem(cli.COMMANDS, "methods", refuse)
    outcome = call("methods")
    assert outcome.code == 2
    assert outcome.err.startswith(f"distlora: out/table.json: {os.strerror(code)}; ")
    assert outcome.err.count("\n") == 1


def test_other_errors_of_the_system_are_mistakes_in_the_program(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "methods", lambda options: Path("/none/here").read_text())
    with pytest.raises(FileNotFoundError):
        cli.main(["methods"])


# What the system does beside: Python's own end, descriptors that are not open, libraries below Python.
PROGRAM = """
import contextlib, os, sys
from distlora.cli.output import lasting_output
with lasting_output():
    print("text " * 3000)
    print("text", file=sys.stderr)
    opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.write(number, b"from C")
sys.exit(9)
"""


@pytest.mark.parametrize("redirected", [">&- 2>&-", ">/dev/full 2>/dev/full", ">&- 2>&- <&-"])
def test_a_process_keeps_its_exit_code_and_its_files(tmp_path, redirected):
    file = tmp_path / "file"
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirected}', "_", sys.executable, "-c", PROGRAM, str(file)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")
    assert file.read_bytes() == b"", "nothing that was printed went there"


def test_a_pipe_that_is_closed_amid_the_output(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 9 and done.stderr == "text\nfrom C"


@pytest.mark.parametrize("how", [CLOSED, FULL])
def test_training_goes_on_without_its_terminal(streams, model, tmp_path, how):  # noqa: F811
    short_recipe(model, tmp_path)
    streams(out=how, err=how)
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 0
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    assert list(curve(tmp_path / "run")) == [1, 2, 3]
    assert "initialised" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def in_ascii(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "distlora", *map(str, arguments)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip


def test_an_encoding_without_a_character_ends_nothing():
    told = in_ascii("methods")
    assert told.returncode == 0 and "\\xb7" in told.stdout and told.stderr == ""


def test_a_run_whose_directory_the_terminal_cannot_show_is_done(model, tmp_path):  # noqa: F811
    short_recipe(model, tmp_path)
    told = in_ascii("train", tmp_path / "recipe.yaml", "train.steps=1", f"output_dir={tmp_path}/rün")
    assert told.returncode == 0 and "Traceback" not in told.stderr, told.stderr
    assert "r\\xfcn" in told.stdout and (tmp_path / "rün" / "summary.json").exists()
