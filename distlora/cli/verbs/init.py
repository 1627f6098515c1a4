"""`distlora init`."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from distlora.cli.arguments import size, whole
from distlora.cli.shared import log_to_terminal
from distlora.errors import UserError


def add(verbs) -> None:
    parser = verbs.add_parser(
        "init",
        help="write a recipe for a model, data and a machine",
        description="Writes a commented recipe whose plan fits into the machine. On a terminal it asks for "
        "what no option says.",
    )
    parser.add_argument("target", nargs="?", type=Path, default=Path("recipe.yaml"), metavar="FILE",
                        help="that does not exist yet; default: recipe.yaml")  # fmt: skip
    parser.add_argument("--model", metavar="PATH", help="a directory, a name on the hub, or pypi:<package>")
    parser.add_argument(
        "--data", metavar="PATH", help="a file, a folder, a data set of the hub, or a task's name"
    )
    parser.add_argument("--task", help="how rows are learned; by default the columns tell it")
    parser.add_argument("--method", help="default: lora_sb")
    parser.add_argument(
        "--gpus", type=whole, metavar="N", help="of one machine; 0: none; default: of this one"
    )
    parser.add_argument("--memory", metavar="GIB", help="of one GPU; default: of this machine's, or 80")


def run(options: argparse.Namespace) -> None:
    """Writes a recipe, and prints where it is and what to do with it."""
    log_to_terminal(shown=True, least=logging.WARNING)
    from distlora.cli import new_recipe
    from distlora.data.choosing import choose_data

    target = options.target.expanduser()
    new_recipe.refuse_existing(target)
    answers = _answers(options, new_recipe, choose_data)
    fit = new_recipe.written(target, *answers)
    machine, file = answers[-1], shlex.quote(str(target))
    print(target)
    print(fit)
    print(f"look at it:  distlora train {file} --dry-run")
    start = f"deepspeed --num_gpus {machine.gpus} --module distlora" if machine.gpus > 1 else "distlora"
    print(f"train:       {start} train {file}")


def _answers(options: argparse.Namespace, new_recipe, choose_data) -> tuple:
    """Model, data section, method and machine: of the options, and asked for where these are left out."""
    machine = _machine(options, new_recipe)
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if options.model is not None:
        new_recipe.check_model(options.model)
    if options.method is not None:
        new_recipe.check_method(options.method)
    known = options.data is not None or options.task is not None
    data = choose_data(options.data, options.task) if known else None
    if not asks:
        for name, value in (("model", options.model), ("data", data)):
            if value is None:
                raise UserError(
                    f"--{name} is missing, and there is no terminal to ask for it; `distlora init --help`"
                )
        return options.model, data, options.method or new_recipe.METHOD, machine or new_recipe.this_machine()
    model = options.model or new_recipe.ask(
        "model (a directory or a name on the hub)", None, new_recipe.check_model, input
    )
    data = data or new_recipe.ask(
        "data (a file, a folder, or a task such as gsm8k)", None, lambda path: choose_data(path, None), input
    )
    method = options.method or new_recipe.ask(
        "method (`distlora methods` compares them)", new_recipe.METHOD, new_recipe.check_method, input
    )
    here = new_recipe.this_machine()
    default = f"{here.gpus}x{here.memory:.0f}" if here.gpus else "0"
    machine = machine or new_recipe.ask(
        "machine (GPUs x GiB, such as 8x80; 0: no GPU)", default, new_recipe.machine_of, input
    )
    return model, data, method, machine


def _machine(options: argparse.Namespace, new_recipe):
    if options.gpus is None and options.memory is None:
        return None
    memory = None if options.memory is None else size("--memory", options.memory)
    if options.gpus is not None and not 0 <= options.gpus <= 999:
        raise UserError(f"--gpus {options.gpus}: wanted a whole number from 0 to 999, of one machine")
    here = new_recipe.this_machine()
    machine = new_recipe.machine_of(str(here.gpus if options.gpus is None else options.gpus))
    return machine if memory is None else new_recipe.Machine(machine.gpus, memory)
