"""`distlora tasks`."""

import argparse

from distlora.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser("tasks", help="list the tasks, or show one")
    parser.add_argument("name", nargs="?", help="a task: its columns, prompt and data")


def run(options: argparse.Namespace) -> None:
    """Prints all tasks by family, or one in detail."""
    from distlora.cli.listings import task_text, tasks_text

    print(tasks_text() if options.name is None else task_text(options.name))
