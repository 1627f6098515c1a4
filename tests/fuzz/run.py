"""Holds the rule for many examples of a loader."""

from collections import Counter

from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.rule import Loader, outcome


def hold(loader: Loader, examples: int, chosen_by: int | None = None) -> Counter:
    """How often the loader said what, by the first words. Fails with the smallest example that breaks the
    rule.

    chosen_by: the seed of the examples; None: the same ones every time.
    """
    found: Counter = Counter()

    @settings(
        max_examples=examples,
        derandomize=chosen_by is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(loader.examples)
    def rule(example):
        sentence = outcome(loader, example)
        found[sentence and sentence[:40]] += 1

    (rule if chosen_by is None else seed(chosen_by)(rule))()
    return found
