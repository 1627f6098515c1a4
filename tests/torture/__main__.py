"""`python -m tests.torture [--events N] [--seed N] [--minutes M] [--folder DIR]`."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.torture.disk import mounted
from tests.torture.plan import draw
from tests.torture.start import warm_up
from tests.torture.trial import Ground, play


def main(words: list[str]) -> int:
    """1 if any run ended otherwise than the quiet one."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--events", type=int, default=500, help="as many in all, at least")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="at most, before the last trial")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where logs stay; a temporary one otherwise")
    options = parser.parse_args(words)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    with mounted(folder / "disk") as disk:
        return torture(Ground(disk, folder), options.events, options.minutes, options.seed)


def torture(ground: Ground, events: int, minutes: float, seed: int) -> int:
    """Prints a line for each trial, and a table of what happened."""
    warm_up()
    began, kinds, runs, wrong = time.monotonic(), Counter(), Counter(), 0
    for number, (subject, planned) in enumerate(draw(seed)):
        if kinds.total() >= events or time.monotonic() - began > 60 * minutes:
            break
        happened, problems = play(ground, subject, planned)
        kinds.update(event.kind for event in happened)
        runs[str(subject)] += 1
        wrong += bool(problems)
        outcome = "; ".join(problems) or "same bytes"
        print(f"{number} {subject}: {', '.join(map(str, happened)) or 'nothing'}: {outcome}", flush=True)
    print(f"\n{kinds.total()} events in {runs.total()} runs, {time.monotonic() - began:.0f} s, seed {seed}")
    print("\n".join(f"  {kind}: {count}" for kind, count in sorted(kinds.items())))
    print("\n".join(f"  {name}: {count} runs" for name, count in sorted(runs.items())))
    print(f"{wrong} of {runs.total()} runs ended otherwise than without them; logs in {ground.folder}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
