"""A sweep as a job array of SLURM: each task runs one point, see launch/slurm.sbatch."""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import distlora
from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.files.user_texts import read_user_text
from distlora.recipe.yaml_text import dump_yaml, parse_yaml
from distlora.sentences import first_line
from distlora.sweeps.file import Sweep
from distlora.sweeps.points import Point
from distlora.sweeps.quoting import words_of
from distlora.sweeps.states import folder_of, state_of

SCRIPT = Path("launch", "slurm.sbatch")


def missing(sweep: Sweep, points: Sequence[Point]) -> list[Point]:
    """The points that are neither done nor being run."""
    return [point for point in points if state_of(sweep, point).state not in ("done", "running")]


def submit(
    sweep: Sweep,
    points: Sequence[Point],
    overrides: Sequence[str],
    sbatch: str = "",
    at_once: int | None = None,
) -> str:
    """Submits these points as one job array, and returns its number.

    overrides: the command line's, of all points. sbatch: its own options, quoted as in a shell. at_once: at
    most so many tasks run. Raises UserError if sbatch is missing or refuses, and for a sweep with a launcher:
    the script has its own.
    """
    if sweep.launcher is not None:
        raise UserError(
            f"--slurm: {SCRIPT} starts the runs by srun, and not by the launcher {sweep.launcher[0]}; leave "
            "--launcher, or the file's launcher, out"
        )
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no sbatch here; submit where jobs of SLURM are submitted")
    options = words_of(sbatch, "--sbatch")
    folder_of(sweep)
    copy = _copy(sweep)
    limit = f"%{at_once}" if at_once else ""
    array = f"--array={','.join(str(point.number) for point in points)}{limit}"
    words = ["sbatch", "--parsable", f"--job-name={sweep.path.stem}", array, *options, str(_script())]
    done = subprocess.run(
        [*words, "--verb", "sweep", str(copy), *overrides],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise UserError(f"--slurm: sbatch refused: {first_line(done.stderr or done.stdout)}")
    return done.stdout.strip().partition(";")[0]


def _copy(sweep: Sweep) -> Path:
    """A copy of the sweep's file, in its directory, for tasks that begin later: points keep their numbers
    only while the file stays as it is.
    """
    content = parse_yaml(read_user_text(sweep.path, "a sweep"), str(sweep.path))
    content |= {"recipe": str(sweep.recipe.absolute()), "output": str(sweep.output)}
    text = dump_yaml(content)
    path = sweep.output / f"submitted-{hashlib.sha256(text.encode()).hexdigest()[:10]}.yaml"
    write_text(path, text)
    return path


def _script() -> Path:
    """launch/slurm.sbatch of the source tree that is used, or of the one that this was started in."""
    for folder in (Path(distlora.__file__).parents[1], Path()):
        if (folder / SCRIPT).is_file():
            return folder / SCRIPT
    raise UserError(f"--slurm: there is no {SCRIPT} here; start from distlora's source tree")
