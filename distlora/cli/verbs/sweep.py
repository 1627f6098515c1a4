"""`distlora sweep`."""

import argparse
import shlex


def add(verbs) -> None:
    parser = verbs.add_parser("sweep", help="check a sweep, and show the overrides of its lines")
    parser.add_argument(
        "file",
        help="a line of dotted.key=value … for each run, quoted as in a shell, each with its output_dir",
    )
    parser.add_argument("recipe", help="that the lines change")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="those that come before every line's own"
    )
    parser.add_argument(
        "--line",
        type=int,
        metavar="N",
        help="only line N, counted from 0: each word with a zero byte behind it",
    )


def run(options: argparse.Namespace) -> None:
    """Checks a sweep. Prints its lines, or only the words of one line for a script."""
    from distlora.recipe.sweep import check_directories, line_of, read_sweep

    lines = read_sweep(options.file)
    chosen = None if options.line is None else line_of(options.file, options.line, lines)
    check_directories(options.file, lines, options.recipe, options.overrides)
    if chosen is not None:
        print("".join(f"{word}\0" for word in chosen), end="")
        return
    for number, words in enumerate(lines):
        print(number, shlex.join(words))
