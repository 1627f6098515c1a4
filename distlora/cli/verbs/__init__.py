"""The verbs of the command line: one file each.

A file has `add(verbs)`, which describes the verb's options to argparse, and `run(options)`, which does it,
prints its result, and returns an exit code or None. torch and the libraries are imported within `run`: a
signal must be caught before that, and a mistake in the command line needs none of them.
"""

import argparse
from collections.abc import Callable

from distlora.cli.verbs import (
    completion,
    copy,
    doctor,
    evaluate,
    export,
    fetch,
    init,
    methods,
    monitor,
    plan,
    recipes,
    report,
    status,
    sweep,
    tasks,
    train,
    verify,
)

#: In the order in which `--help` shows them.
VERBS = {
    "init": init,
    "train": train,
    "eval": evaluate,
    "export": export,
    "status": status,
    "plan": plan,
    "report": report,
    "monitor": monitor,
    "doctor": doctor,
    "methods": methods,
    "tasks": tasks,
    "recipes": recipes,
    "copy": copy,
    "fetch": fetch,
    "completion": completion,
    "sweep": sweep,
    "verify": verify,
}

COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    name: verb.run for name, verb in VERBS.items()
}
