"""What launch scripts run before they start ranks:
`python -m distlora.cli.prepare_launch OPTIONS -- FOLDER ARGUMENTS…`.

ARGUMENTS are `train RECIPE …` or `eval RUN …`. The files that are written into FOLDER are listed in
`distlora.cluster.launching`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.cluster.launching import prepare
from distlora.errors import UserError
from distlora.files.confidential import hidden, refuse_secrets

#: What a run leaves in its directory first, see `distlora.training.run_directory`.
_RECIPE = "recipe.yaml"


def main(words: Sequence[str]) -> int:
    options = _parse(words)
    try:
        folder, (verb, subject, *words) = Path(options.folder), options.arguments
        refuse_secrets(words)
        options.file = os.path.join(subject, _RECIPE) if verb == "eval" else subject
        prepare(options, folder)
        (folder / "run").write_text("" if verb == "eval" else _run_directory(subject, words))
    except UserError as error:
        sys.stderr.write(f"{options.script}: {hidden(str(error))}\n")
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


def _run_directory(recipe: str, words: Sequence[str]) -> str:
    """The output directory of RECIPE with its overrides. A mistake in them shows before a host is asked."""
    from distlora.recipe.load import load_recipe

    return load_recipe(recipe, [word for word in words if not word.startswith("-")]).output_dir


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
