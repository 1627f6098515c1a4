"""Which checkpoint of a run had the best evaluation: `RUN/best.json`. That one is never pruned."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.files.atomic import write_text
from distlora.files.json_files import checked, is_whole, read_json

BEST = "best.json"


@dataclass(frozen=True)
class Best:
    """metric: of the evaluation. value: of it, after this many steps."""

    metric: str
    value: float
    step: int


def best_of(run_dir: Path) -> Best | None:
    """What a run has written down; None without that, and for a file that is damaged."""
    try:
        found = checked(Best, read_json(run_dir / BEST))
    except (OSError, ValueError):
        return None
    return found if is_whole(found.step) else None


def write_best(run_dir: Path, best: Best | None) -> None:
    """In the place of what was written before; None: there is none. Raises OSError."""
    if best is None:
        (run_dir / BEST).unlink(missing_ok=True)
    elif best_of(run_dir) != best:
        write_text(run_dir / BEST, json.dumps(asdict(best)) + "\n")
