"""What launch/quickstart.sh runs before it starts the ranks:
`python -m distlora.cli.quickstart RECIPE RANKS [dotted.key=value …]`.

Writes the overrides, one a line, with which the recipe's batch divides among RANKS ranks; nothing if it does
already.
"""

import sys
from collections.abc import Sequence

from distlora.errors import UserError
from distlora.recipe.load import load_recipe

GLOBAL, MICRO = "train.global_batch_size", "train.micro_batch_size"


def main(words: Sequence[str]) -> int:
    recipe, ranks, *overrides = words
    for override in batch_overrides(recipe, int(ranks), overrides):
        sys.stdout.write(f"{override}\n")
    return 0


def batch_overrides(path: str, ranks: int, overrides: Sequence[str]) -> list[str]:
    """Overrides for those of the two batch sizes that must change and that the user has not set.

    None for a recipe that is refused: the run says why.
    """
    try:
        train = load_recipe(path, overrides).train
    except UserError:
        return []
    batch, micro = train.global_batch_size, train.micro_batch_size
    given = {override.partition("=")[0].strip() for override in overrides}
    if batch % (micro * ranks) == 0 or {GLOBAL, MICRO} <= given:
        return []
    if MICRO in given:
        return [f"{GLOBAL}={max(1, round(batch / (micro * ranks))) * micro * ranks}"]
    share = max(1, batch // ranks)
    micro = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
    return [f"{MICRO}={micro}", *([] if GLOBAL in given else [f"{GLOBAL}={share * ranks}"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
