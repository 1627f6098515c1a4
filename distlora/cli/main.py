"""The command line: `distlora train RECIPE [dotted.key=value …]` and its sister verbs."""

import argparse
import logging
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from distlora.cli.arguments import size, whole_number, whole_numbers
from distlora.cluster.status import START_AGAIN, read_status
from distlora.cluster.stopping import StopSignals
from distlora.errors import Ending, Preempted, TrainingError, UserError, before_ranks_meet

USER_ERROR, TRAINING_ERROR = 2, 1
#: Seconds that the other ranks give rank 0 to say what is wrong, and its launcher to end them.
PATIENCE = 5.0
#: Scores between 0 and 1 that are shown in per cent.
SHARES = ("accuracy", "f1", "exact_match")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 1 (training broke, or the doctor found a failure), 2 (a
    mistake of the user's, in one sentence) or 75 (asked to stop; the same command goes on)."""
    options = _parse(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        return _sentence(error, USER_ERROR)
    except PermissionError as error:
        return _sentence(UserError(f"{error.filename or 'a file'}: permission denied"), USER_ERROR)
    except TrainingError as error:
        return _sentence(error, TRAINING_ERROR)
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Complains as `_sentence` does of what comes before the ranks meet."""

    def error(self, message: str):
        rank, first = _rank()
        if rank > 0:
            time.sleep(PATIENCE)
        if not first:
            self.exit(USER_ERROR)
        super().error(message)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but overrides may also stand behind an option: `train RECIPE --resume train.lr=1e-3`."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if left and (not hasattr(options, "overrides") or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("distlora", description="Low-rank fine-tuning that is native to DeepSpeed ZeRO.")
    # DeepSpeed's launcher puts --local_rank=N before the verb; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="run a recipe")
    train.add_argument("recipe", help="a YAML file, see configs/recipes")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="changes to the recipe, such as train.lr=1e-3",
    )
    train.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="demand a checkpoint to continue from, or begin anew; by default continue if there is one",
    )
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("eval", help="evaluate a run's newest checkpoint on its evaluation split")
    evaluate.add_argument("run_dir", type=Path, help="the run's output directory")
    evaluate.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    evaluate.set_defaults(run=_evaluate)

    export = verbs.add_parser("export", help="write a run's result in a format that other software loads")
    export.add_argument("run_dir", type=Path, help="the run's output directory")
    export.add_argument("--format", choices=("peft", "merged"), required=True)
    export.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    export.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: float32 (peft), as the pretrained weights (merged)",
    )
    export.add_argument(
        "--compress-rank",
        type=int,
        metavar="K",
        help="peft: at most K columns a layer, by an SVD of its update",
    )
    export.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="peft: the smallest rank of each layer whose update is off by at most E, relative, in the Frobenius norm",
    )
    export.set_defaults(run=_export)

    status = verbs.add_parser(
        "status",
        help="what became of a run",
        description="One line about the newest start of a run. Exit code: 0 done; 75 to be started again (it was asked to stop, or "
        "a rank went silent); 1 failed, still running or killed, or nothing to tell.",
    )
    status.add_argument("recipe", help="a recipe, or a run's output directory")
    status.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="those that the run was started with"
    )
    status.add_argument(
        "--since",
        type=float,
        metavar="SECONDS",
        help="nothing that was written before this time since the epoch",
    )
    status.set_defaults(run=_status)

    plan = verbs.add_parser(
        "plan", help="memory and traffic of a recipe on a cluster, before anything is loaded or started"
    )
    plan.add_argument("recipe", help="a YAML file, see configs/recipes")
    plan.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    plan.add_argument("--nodes", default="1,2,4,8,16,32,64,128", metavar="N[,N…]", help="default: 1 to 128")
    plan.add_argument("--gpus-per-node", default="8", metavar="G", help="default: 8")
    plan.add_argument("--gpu-memory", default="80", metavar="GIB", help="of one GPU; default: 80")
    plan.add_argument("--samples", metavar="N", help="of the training set, where data.split does not say it")
    plan.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw a picture (needs matplotlib)")
    plan.set_defaults(run=_plan)

    doctor = verbs.add_parser(
        "doctor", help="look for what is wrong with the machines, before a run finds out"
    )
    doctor.add_argument(
        "hostfile",
        nargs="?",
        type=Path,
        help="lines of `host slots=N`, asked through ssh; default: this machine, or the job",
    )
    doctor.add_argument(
        "--recipe", type=Path, help="also look for what this run needs: files, model, operators, output_dir"
    )
    doctor.add_argument(
        "--run-dir",
        type=Path,
        help="the directory that all nodes must share; default: the recipe's, or the current one",
    )
    doctor.add_argument("--port", type=int, help="where rank 0 listens; default: MASTER_PORT, or 29500")
    doctor.add_argument(
        "--build", action=argparse.BooleanOptionalAction, default=True, help="build DeepSpeed's operators now"
    )
    doctor.add_argument(
        "--limit", type=float, default=30.0, metavar="SECONDS", help="how long a silent rank is waited for"
    )
    doctor.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    doctor.set_defaults(run=_doctor)

    methods = verbs.add_parser(
        "methods",
        help="compare the methods",
        description="Every method in a line: what it trains, how much that is, what it needs, and what its result can become. "
        "With a recipe or a model the numbers are those of the model, from its config alone; no weight is loaded.",
    )
    methods.add_argument("recipe", nargs="?", help="whose model, targets, rank and optimizer are taken")
    methods.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the recipe")
    methods.add_argument("--rank", type=int, metavar="R", help="of all methods; default: the recipe's, or 8")
    methods.add_argument(
        "--model", metavar="PATH", help="in place of the recipe's: a directory, a hub name, or pypi:<package>"
    )
    methods.set_defaults(run=_methods)

    sweep = verbs.add_parser("sweep", help="check a sweep, and show the overrides of its lines")
    sweep.add_argument(
        "file",
        help="a line of dotted.key=value … for each run, quoted as in a shell, each with its output_dir",
    )
    sweep.add_argument("recipe", help="that the lines change")
    sweep.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="those that come before every line's own"
    )
    sweep.add_argument(
        "--line",
        type=int,
        metavar="N",
        help="only line N, counted from 0: each word with a zero byte behind it",
    )
    sweep.set_defaults(run=_sweep)
    return parser


def _train(options: argparse.Namespace) -> int:
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # below that, stack traces of connections that a dead rank has closed
    with (
        StopSignals() as signals
    ):  # before the libraries are imported: that takes seconds in which a signal may come
        try:
            return _train_until(options, signals)
        except Preempted as error:
            # Inside: from here on a launcher may signal whoever is still there, because others have ended.
            return _sentence(error, START_AGAIN, patience=0)


def _train_until(options: argparse.Namespace, signals: StopSignals) -> int:
    topology = _topology()
    recipe = _recipe(options.recipe, options.overrides)
    from distlora.training import train

    for note in recipe.notes:
        logging.getLogger("distlora").info("%s", note)
    train.check(recipe, topology, options.resume)
    summary = train.train(recipe, topology, options.resume, signals.asked)
    if topology.rank == 0:
        print(_table(summary))
    return 0


def _recipe(path: str | Path, overrides: Sequence[str]):
    from distlora.recipe.load import load_recipe

    with before_ranks_meet():
        return load_recipe(path, overrides)


def _evaluate(options: argparse.Namespace) -> None:
    topology = _topology()
    from distlora.training.run_directory import RECIPE

    with before_ranks_meet():
        if not (options.run_dir / RECIPE).exists():
            raise UserError(f"{options.run_dir} holds no run: it has no {RECIPE}")
    own_name = str(options.run_dir).replace("'", "''")  # a text, whatever YAML would take it for
    recipe = _recipe(options.run_dir / RECIPE, [*options.overrides, f"output_dir='{own_name}'"])
    from distlora.training import train

    train.check(recipe, topology, resume=True)
    for name, value in train.evaluate(recipe, topology).items():
        if topology.rank == 0:
            print(f"eval/{name} {value:.6f}")


def _export(options: argparse.Namespace) -> None:
    _log_to_terminal(shown=True)
    import torch

    from distlora.training.export_run import export_run

    done = export_run(
        options.run_dir,
        options.format,
        options.out,
        options.step,
        options.dtype and getattr(torch, options.dtype),
        options.compress_rank,
        options.max_error,
    )
    print(done.path)
    if done.compression:
        print(done.compression)


def _status(options: argparse.Namespace) -> int:
    run_dir = Path(options.recipe)
    if not run_dir.is_dir():
        run_dir = Path(_recipe(options.recipe, options.overrides).output_dir)
    found = read_status(run_dir)
    if found is None or (options.since is not None and found.seconds < options.since):
        print(f"{run_dir}: no status" + (" since then" if found else ""))
        return TRAINING_ERROR
    print(f"{run_dir}: {found.line}")
    return found.code


def _plan(options: argparse.Namespace) -> None:
    _log_to_terminal(shown=False)
    nodes, gpus = (
        whole_numbers("--nodes", options.nodes),
        whole_number("--gpus-per-node", options.gpus_per_node),
    )
    gpu_memory = size("--gpu-memory", options.gpu_memory)
    samples = None if options.samples is None else whole_number("--samples", options.samples)
    recipe = _recipe(options.recipe, options.overrides)
    from distlora.plan import Plan, side_by_side
    from distlora.plan.picture import check_picture, draw
    from distlora.plan.table import table

    if options.plot:
        check_picture(options.plot)
    columns = side_by_side(recipe, nodes, gpus, samples)
    print(table(columns, gpus, gpu_memory))
    if options.plot:
        draw([plan for _, plan in columns if isinstance(plan, Plan)], gpu_memory, options.plot)
        print(options.plot)


def _doctor(options: argparse.Namespace) -> int:
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "FATAL"
    )  # before torch comes: its stack traces are no news beside the table
    topology = _topology()
    for note in topology.notes:
        logging.getLogger("distlora").info("%s", note)
    from distlora.doctor import examine, table
    from distlora.doctor.ending import unwinding

    with unwinding():
        result = examine.examine(
            topology,
            options.hostfile,
            options.recipe,
            options.run_dir,
            options.port,
            options.build,
            options.limit,
        )
    if result.told:
        print(table.table(result.findings, result.nodes))
    return result.code


def _methods(options: argparse.Namespace) -> None:
    from distlora.report.methods_table import methods_table

    print(methods_table(options.recipe, options.overrides, options.rank, options.model))


def _sweep(options: argparse.Namespace) -> None:
    from distlora.recipe.sweep import check_directories, line_of, read_sweep

    lines = read_sweep(options.file)
    chosen = None if options.line is None else line_of(options.file, options.line, lines)
    check_directories(options.file, lines, options.recipe, options.overrides)
    if chosen is not None:
        print("".join(f"{word}\0" for word in chosen), end="")
        return
    for number, words in enumerate(lines):
        print(number, shlex.join(words))


def _topology():
    from distlora.cluster.topology import topology_from_environment

    topology = topology_from_environment()
    # DeepSpeed calls collectives by names that torch has since replaced; every rank would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _log_to_terminal(shown=topology.rank == 0)
    return topology


def _log_to_terminal(shown: bool) -> None:
    """Rank 0 tells what happens; the others only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(
        logging.INFO if shown else logging.ERROR
    )  # not the logger's: every rank has a log file besides
    logger = logging.getLogger("distlora")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _sentence(error: Ending, code: int, patience: float = PATIENCE) -> int:
    """The error once, from rank 0; from another rank only if rank 0 may not know, and if it is still alive
    after a while.
    """
    rank, first = _rank()
    if rank == 0:
        print(f"distlora: {error}", file=sys.stderr, flush=True)
    else:
        # Launchers end all ranks as soon as one has ended: rank 0 must have spoken by then.
        time.sleep(patience)
        if not (error.agreed or (error.early and not first)):
            print(f"distlora (rank {rank} on {socket.gethostname()}): {error}", file=sys.stderr, flush=True)
    return code


def _rank() -> tuple[int, bool]:
    """This process's rank, and whether it is the first of its node."""
    from distlora.cluster.rendezvous import (
        own_local_rank,
        own_rank,
    )  # without torch: verbs that do without it may fail too

    return own_rank(os.environ), own_local_rank(os.environ) == 0


def _table(summary) -> str:
    """The run on one screen."""
    ratio = (
        f"{summary.lora_trained / summary.trained:.1f} times fewer than"
        if summary.trained < summary.lora_trained
        else "beside"
    )
    rows = [("", "before", "after")] if summary.after else []
    for key, value in summary.after.items():
        form = "{:.1%}" if key in SHARES else "{:.4f}"
        before = form.format(summary.before[key]) if key in summary.before else "-"
        rows.append((key.replace("_", " "), before, form.format(value)))
    lines = [f"  {name:<24}{before:>10}{after:>10}" for name, before, after in rows]
    lora = f"({ratio} LoRA's {summary.lora_trained:,} at rank {summary.rank})" if summary.lora_trained else ""
    facts = [
        ("trained parameters", f"{summary.trained:,} {lora}"),
        ("initialisation", f"{summary.init_seconds:.1f} s"),
        ("a step", f"{summary.step_seconds:.2f} s (mean of {summary.steps})"),
        ("adapter", str(summary.adapter or "none: the weights themselves were trained; see distlora export")),
        (
            "TensorBoard log",
            summary.tensorboard or "none: the DeepSpeed config turns no tensorboard section on",
        ),
        ("metrics", str(summary.run_dir / "metrics.jsonl")),
    ]
    return "\n".join(["", *lines, *(f"  {name:<24}{value}" for name, value in facts), ""])
