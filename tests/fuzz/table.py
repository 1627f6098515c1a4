"""The table of all loaders."""

from tests.fuzz import recipes, saved
from tests.fuzz.rule import Loader

LOADERS: tuple[Loader, ...] = (*recipes.LOADERS, *saved.LOADERS)
BY_NAME = {loader.name: loader for loader in LOADERS}
EXAMPLES = 2000


def examples_of(loader: Loader, total: int) -> int:
    """The share of a loader in so many examples of all."""
    return max(1, round(total * loader.share / sum(other.share for other in LOADERS)))
