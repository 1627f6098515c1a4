"""What happens to which run: drawn from a seed, so that a trial that went wrong can be played again."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KILL, STOP, CUT, FREEZE, FULL_DISK, SECOND_START = (
    "kill",
    "stop",
    "cut",
    "freeze",
    "full disk",
    "second start",
)


@dataclass(frozen=True)
class Subject:
    """A kind of run. stage: of ZeRO; None for the plain engine on one process."""

    name: str
    method: tuple[tuple[str, Any], ...]
    stage: int | None
    world: int

    def __str__(self) -> str:
        engine = "plain" if self.stage is None else f"zero{self.stage} x{self.world}"
        return f"{self.name}, {engine}"


@dataclass(frozen=True)
class Event:
    """moment: share of the quiet run's seconds after the start. rank: whom it strikes, where it strikes one.
    number: of the signal, or of the KiB that a full disk has left.
    """

    kind: str
    moment: float
    rank: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.moment:.2f}"


_PROBE = {"samples": 6, "micro_batch_size": 2, "eta": 0.01}
_METHODS: dict[str, dict[str, Any]] = {
    "lora_sb": {"name": "lora_sb", "rank": 4, "init": _PROBE},
    "lora_sb with recompositions": {
        "name": "lora_sb", "rank": 4, "init": _PROBE, "recompose": {"interval": 3},
    },
    "srlora": {"name": "srlora", "rank": 4, "target_rank": 12, "gamma": 0.5},
    "lora_pro": {"name": "lora_pro", "rank": 4},
    "dora": {"name": "dora", "rank": 4},
    "full": {"name": "full"},
}  # fmt: skip
#: Stage and number of ranks; what stands twice is drawn twice as often.
_LAYOUTS = ((None, 1), (None, 1), (2, 2), (3, 2), (3, 1), (1, 2))
#: The kinds of one process, and those that take several; a freeze costs the whole time limit for silence.
_ALONE = (KILL, KILL, KILL, STOP, STOP, FULL_DISK, SECOND_START)
_TOGETHER = (*_ALONE, *_ALONE, CUT, CUT, CUT, FREEZE)


def draw(seed: int) -> Iterator[tuple[Subject, list[Event]]]:
    """Trials without end: a run, and what happens to it, one start after the other."""
    generator = random.Random(seed)
    while True:
        name = generator.choice(sorted(_METHODS))
        stage, world = generator.choice(_LAYOUTS)
        subject = Subject(name, tuple(_METHODS[name].items()), stage, world)
        yield subject, [_event(generator, world) for _ in range(generator.randint(1, 4))]


def _event(generator: random.Random, world: int) -> Event:
    kind = generator.choice(_ALONE if world == 1 else _TOGETHER)
    number = generator.choice((2, 15)) if kind == STOP else generator.choice((0, 0, 1, 4, 16, 64))
    return Event(kind, generator.uniform(0, 1), generator.randrange(world), number)
