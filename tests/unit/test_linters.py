"""What the linters of the languages beside Python say."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for folder in ("launch", "docker", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci" / "run"
)
IMAGES = sorted((ROOT / "docker").glob("Dockerfile*"))


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


def _expect_silence(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
