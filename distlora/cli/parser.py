"""The words of the command line as options. Needs neither torch nor DeepSpeed, so a mistyped command ends at
once.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from distlora.cli import ending
from distlora.cluster.rendezvous import DEFAULT_PORT


class _Parser(argparse.ArgumentParser):
    """Complains on the first rank of each node only, because other hosts may have got another command."""

    def error(self, message: str):
        rank, first_on_node = ending.rank_and_first_on_node()
        if rank > 0:
            time.sleep(ending.PATIENCE)
        if not first_on_node:
            self.exit(ending.USER_ERROR)
        super().error(message)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of one verb, whose name is `options.verb`. Exits with code 2 for a mistyped command.

    Unlike argparse alone it takes overrides behind an option too: `train RECIPE --resume train.lr=1e-3`.
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if left and (not hasattr(options, "overrides") or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("distlora", description="Low-rank fine-tuning that is native to DeepSpeed ZeRO.")
    # DeepSpeed's launcher puts --local_rank=N before the verb. It is ignored: the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    _add_train(verbs)
    _add_evaluate(verbs)
    _add_export(verbs)
    _add_status(verbs)
    _add_plan(verbs)
    _add_doctor(verbs)
    _add_methods(verbs)
    _add_sweep(verbs)
    return parser


def _add_train(verbs) -> None:
    parser = verbs.add_parser("train", help="run a recipe")
    parser.add_argument("recipe", help="a YAML file, see configs/recipes")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="changes to the recipe, such as train.lr=1e-3",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="demand a checkpoint to continue from, or begin anew; by default continue if there is one",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_evaluate(verbs) -> None:
    parser = verbs.add_parser("eval", help="evaluate a run's newest checkpoint on its evaluation split")
    parser.add_argument("run_dir", type=Path, help="the run's output directory")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")


def _add_export(verbs) -> None:
    parser = verbs.add_parser("export", help="write a run's result in a format that other software loads")
    parser.add_argument("run_dir", type=Path, help="the run's output directory")
    parser.add_argument("--format", choices=("peft", "merged"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: float32 (peft), as the pretrained weights (merged)",
    )
    parser.add_argument(
        "--compress-rank",
        type=int,
        metavar="K",
        help="peft: at most K columns a layer, by an SVD of its update",
    )
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="peft: the smallest rank of each layer whose update is off by at most E, relative, "
        "in the Frobenius norm",
    )


def _add_status(verbs) -> None:
    parser = verbs.add_parser(
        "status",
        help="what became of a run",
        description="One line about the newest start of a run. Exit code: 0 done; "
        "75 to be started again (it was asked to stop, or a rank went silent); "
        "1 failed, still running or killed, or nothing to tell.",
    )
    parser.add_argument("recipe", help="a recipe, or a run's output directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="those that the run was started with"
    )
    parser.add_argument(
        "--since",
        type=float,
        metavar="SECONDS",
        help="nothing that was written before this time since the epoch",
    )


def _add_plan(verbs) -> None:
    parser = verbs.add_parser(
        "plan", help="memory and traffic of a recipe on a cluster, before anything is loaded or started"
    )
    parser.add_argument("recipe", help="a YAML file, see configs/recipes")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--nodes", default="1,2,4,8,16,32,64,128", metavar="N[,N…]", help="default: 1 to 128")
    parser.add_argument("--gpus-per-node", default="8", metavar="G", help="default: 8")
    parser.add_argument("--gpu-memory", default="80", metavar="GIB", help="of one GPU; default: 80")
    parser.add_argument(
        "--samples", metavar="N", help="of the training set, where data.split does not say it"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw a picture (needs matplotlib)"
    )


def _add_doctor(verbs) -> None:
    parser = verbs.add_parser(
        "doctor", help="look for what is wrong with the machines, before a run finds out"
    )
    parser.add_argument(
        "hostfile",
        nargs="?",
        type=Path,
        help="lines of `host slots=N`, asked through ssh; default: this machine, or the job",
    )
    parser.add_argument(
        "--recipe", type=Path, help="also look for what this run needs: files, model, operators, output_dir"
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        help="the directory that all nodes must share; default: the recipe's, or the current one",
    )
    parser.add_argument(
        "--port", type=int, help=f"where rank 0 listens; default: MASTER_PORT, or {DEFAULT_PORT}"
    )
    parser.add_argument(
        "--build", action=argparse.BooleanOptionalAction, default=True, help="build DeepSpeed's operators now"
    )
    parser.add_argument(
        "--limit", type=float, default=30.0, metavar="SECONDS", help="how long a silent rank is waited for"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_methods(verbs) -> None:
    parser = verbs.add_parser(
        "methods",
        help="compare the methods",
        description="Every method in a line: what it trains, how much that is, what it needs, "
        "and what its result can become. With a recipe or a model the numbers are those of the model, "
        "from its config alone; no weight is loaded.",
    )
    parser.add_argument("recipe", nargs="?", help="whose model, targets, rank and optimizer are taken")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the recipe")
    parser.add_argument("--rank", type=int, metavar="R", help="of all methods; default: the recipe's, or 8")
    parser.add_argument(
        "--model", metavar="PATH", help="in place of the recipe's: a directory, a hub name, or pypi:<package>"
    )


def _add_sweep(verbs) -> None:
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
