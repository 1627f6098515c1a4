"""`python -m tests.fuzz --examples 100000 [--seed N] [LOADER …]`: exit code 1 where the rule is broken."""

import argparse
import random
import sys
import time
import traceback
import warnings

from tests.fuzz.run import hold
from tests.fuzz.table import BY_NAME, EXAMPLES, LOADERS, examples_of


def main() -> int:
    warnings.simplefilter("ignore")  # Pillow tells of all damage that it passes over
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of all loaders together")
    parser.add_argument("--seed", type=int, default=None, help="of the examples; default: another every time")
    parser.add_argument("loaders", nargs="*", metavar="LOADER", choices=[*BY_NAME, []])
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    chosen = [BY_NAME[name] for name in options.loaders] or LOADERS
    print(f"seed {seed}")
    broken = 0
    for loader in chosen:
        begun, count = time.monotonic(), examples_of(loader, options.examples)
        try:
            found = hold(loader, count, seed)
            told = f"{found[None]} read, {sum(found.values()) - found[None]} refused in {len(found)} ways"
        except Exception:
            broken += 1
            told = f"broken\n{traceback.format_exc()}"
        print(f"{loader.name}: {count} examples, {told}, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{broken} of {len(chosen)} loaders break the rule")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
