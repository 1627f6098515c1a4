"""What launch scripts run before they start ranks:
`python -m distlora.cli.prepare_launch OPTIONS -- FOLDER ARGUMENTS…`.

ARGUMENTS are `train RECIPE …`. The files that are written into FOLDER are listed in
`distlora.cluster.launching`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.cluster.launching import prepare
from distlora.errors import UserError


def main(words: Sequence[str]) -> int:
    options = _parse(words)
    try:
        folder = Path(options.folder)
        prepare(options, folder)
        (folder / "run").write_text(_run_directory(options.arguments[1:]))
    except UserError as error:
        sys.stderr.write(f"{options.script}: {error}\n")
        return 2
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", required=True, help="named in error messages")
    parser.add_argument("--hostfile", required=True)
    parser.add_argument("--launcher", default="pdsh")
    parser.add_argument("--no-ssh", action="store_true")
    parser.add_argument("--export", action="append", default=[])
    parser.add_argument("folder")
    parser.add_argument("arguments", nargs="*")
    return parser.parse_args(words)


def _run_directory(words: Sequence[str]) -> str:
    """The output directory of RECIPE with its overrides. A mistake in them shows before a host is asked."""
    from distlora.recipe.load import load_recipe

    return load_recipe(words[0], [word for word in words[1:] if not word.startswith("-")]).output_dir


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
