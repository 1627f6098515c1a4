"""A sweep as a job array of SLURM: each task runs one point, see launch/slurm.sbatch."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import distlora
from distlora.errors import UserError
from distlora.sentences import first_line
from distlora.sweeps.file import Sweep
from distlora.sweeps.points import Point
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
    most so many tasks run. Raises UserError if sbatch is missing or refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no sbatch here; submit where jobs of SLURM are submitted")
    try:
        options = shlex.split(sbatch)
    except ValueError as error:
        raise UserError(f"--sbatch is not quoted as in a shell: {str(error).lower()}") from None
    folder_of(sweep)
    limit = f"%{at_once}" if at_once else ""
    array = f"--array={','.join(str(point.number) for point in points)}{limit}"
    words = ["sbatch", "--parsable", f"--job-name={sweep.path.stem}", array, *options, str(_script())]
    done = subprocess.run(
        [*words, "--verb", "sweep", str(sweep.path), *overrides],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise UserError(f"--slurm: sbatch refused: {first_line(done.stderr or done.stdout)}")
    return done.stdout.strip().partition(";")[0]


def _script() -> Path:
    """launch/slurm.sbatch of the source tree that is used, or of the one that this was started in."""
    for folder in (Path(distlora.__file__).parents[1], Path()):
        if (folder / SCRIPT).is_file():
            return folder / SCRIPT
    raise UserError(f"--slurm: there is no {SCRIPT} here; start from distlora's source tree")
