"""The words of the command line as options. Needs neither torch nor DeepSpeed, so a mistyped command ends at
once.
"""

import argparse
import time
from collections.abc import Sequence

from distlora.cli import ending
from distlora.cli.arguments import whole
from distlora.cli.verbs import VERBS
from distlora.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Complains on the first rank of each node only, because other hosts may have got another command."""

    def error(self, message: str):
        rank, first_on_node = ending.rank_and_first_on_node()
        if rank > 0:
            time.sleep(ending.PATIENCE)
        if not first_on_node:
            self.exit(ending.USER_ERROR)
        super().error(str(UserError(message)))  # one line of bounded length, whatever the words are


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of one verb, whose name is `options.verb`. Exits with code 2 for a mistyped command.

    Unlike argparse alone it takes overrides behind an option too: `train RECIPE --resume train.lr=1e-3`.
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if left and (not hasattr(options, "overrides") or any(word.startswith("-") for word in left)):
        remedy = _without_dashes(left) or f"; distlora {options.verb} --help lists what it takes"
        parser.error(f"unrecognized arguments: {' '.join(left)}{remedy}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _without_dashes(words: Sequence[str]) -> str:
    """The hint for an override that is written like an option."""
    keys = [word for word in words if word.startswith("--") and "." in word.partition("=")[0]]
    return f"; write overrides without dashes, as in {keys[0].lstrip('-')}" if keys else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("distlora", description="Low-rank fine-tuning that is native to DeepSpeed ZeRO.")
    # DeepSpeed's launcher puts --local_rank=N before the verb. It is ignored: the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=whole, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for verb in VERBS.values():
        verb.add(verbs)
    return parser
