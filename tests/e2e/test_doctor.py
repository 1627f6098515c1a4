"""The doctor on this machine, whatever that has: from the command line to the table, with the build of
DeepSpeed's operators.
"""

import re
import shutil
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.e2e.program import free_port, python, run


@pytest.fixture
def extensions(tmp_path) -> Path:
    """A cache of extensions with the operator as built before, if it was, and without the lock of a test
    beside this one.
    """
    built = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    shutil.copytree(built, tmp_path / "extensions" / built.name, ignore=shutil.ignore_patterns("lock"))
    return tmp_path / "extensions"


def test_the_doctor_looks_at_this_machine_and_builds_what_a_run_needs(tmp_path, extensions):
    asked = python("doctor", "--run-dir", tmp_path / "runs", "--port", free_port())
    outcome = run(*asked, TORCH_EXTENSIONS_DIR=str(extensions))
    rows = re.findall(r"^(\S.*?)  +\S+  +(ok|warning|failure)  ", outcome.out, re.MULTILINE)
    assert outcome.code == any(level == "failure" for _, level in rows), outcome.out + outcome.err
    fine = {check for check, level in rows if level == "ok"}
    assert {"versions", "run directory", "build lock", "operators", "all-reduce"} <= fine, (
        outcome.out + outcome.err
    )
    assert "built and loaded, in " in outcome.out and f"none in {extensions}" in outcome.out
    assert (extensions / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").exists() and not (
        tmp_path / "runs"
    ).exists()
