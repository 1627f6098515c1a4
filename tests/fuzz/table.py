"""The table of all loaders."""

from tests.fuzz import cluster, data, images, recipes, run_directories, saved, words
from tests.fuzz.rule import Loader

SUBJECTS = (recipes, cluster, data, images, words, saved, run_directories)
LOADERS: tuple[Loader, ...] = tuple(loader for subject in SUBJECTS for loader in subject.LOADERS)
BY_NAME = {loader.name: loader for loader in LOADERS}
#: Of all loaders, in the test suite.
EXAMPLES = 1000


def examples_of(loader: Loader, total: int) -> int:
    """The share of a loader in so many examples of all."""
    return max(1, round(total * loader.share / sum(other.share for other in LOADERS)))
