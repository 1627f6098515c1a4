"""What launch/quickstart.sh asks before it starts the ranks: `python -m distlora.cli.quickstart RECIPE RANKS
[dotted.key=value …]`.

Writes overrides, one a line, under which the recipe's batch divides among so many ranks; nothing where it
does already.
"""

import sys
from collections.abc import Sequence

from distlora.errors import UserError
from distlora.recipe.load import load_recipe

WHOLE, MICRO = "train.global_batch_size", "train.micro_batch_size"


def main(words: Sequence[str]) -> int:
    recipe, ranks, *overrides = words
    for override in batch_overrides(recipe, int(ranks), overrides):
        sys.stdout.write(f"{override}\n")
    return 0


def batch_overrides(path: str, ranks: int, overrides: Sequence[str]) -> list[str]:
    """Of the two sizes of a batch those that must change, and that the user has not set. Nothing for a recipe
    that is refused: the run says why."""
    try:
        train = load_recipe(path, overrides).train
    except UserError:
        return []
    whole, micro = train.global_batch_size, train.micro_batch_size
    given = {override.partition("=")[0].strip() for override in overrides}
    if whole % (micro * ranks) == 0 or {WHOLE, MICRO} <= given:
        return []
    if MICRO in given:
        return [f"{WHOLE}={max(1, round(whole / (micro * ranks))) * micro * ranks}"]
    share = max(1, whole // ranks)
    micro = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
    return [f"{MICRO}={micro}", *([] if WHOLE in given else [f"{WHOLE}={share * ranks}"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
