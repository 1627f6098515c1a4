"""What launch scripts must know before they start ranks; see `distlora.cli.prepare_launch`.

This reads and checks the hostfile, checks that every host can be reached and has this Python, and writes
these files into FOLDER, which only the user can read:

    hosts          one host a line, as it is given to ssh; absent for this machine alone
    slots          the number of ranks on all hosts, or on this machine, if the hostfile says it
    hostfile       the hosts with their slots, without comments
    environment    the variables that are sent to the hosts, for DS_ENV_FILE; absent with the launcher mpirun
    names          the names of these variables
    withheld       the names of the variables that are not sent because they hold a secret
    master         rank 0's address; absent where DeepSpeed must find it
    program        ARGUMENTS in one word, see `distlora.cluster.packed_command`
    run            the run directory of a training, whose status says how it ended; `prepare_launch` writes it
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distlora.cluster.addresses import addresses, is_loopback
from distlora.cluster.exported_variables import exported_names, withheld
from distlora.cluster.hostfile import Host, read_hostfile, this_machine_alone
from distlora.cluster.packed_command import pack
from distlora.cluster.ssh import explain, python_there
from distlora.errors import UserError

#: Seconds for a host to start Python.
PATIENCE = 60
#: The program that checks a host. Its argument is a file that must be there.
_CHECK = (
    "import os, sys, distlora.cli.as_rank; "
    "os.path.isfile(sys.argv[1]) or sys.exit(f'{sys.argv[1]} is not there')"
)
#: Characters that make DeepSpeed put a value into double quotes for the shell, and characters that need an
#: escape even there.
_NEEDS_QUOTES = re.compile(r"[^\w@%+=:,./-]")
_NOT_PROTECTED = re.compile(r'([\\$`"])')  # also %, which pdsh reads: it is doubled


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes all files but `run` into the folder. options: as `prepare_launch` has parsed them; `file`
    is what every host must find.

    Raises UserError for a mistake in the hostfile or the variables, and for a host that cannot be used.
    """
    (folder / "program").write_text(pack(os.getcwd(), options.arguments))
    if options.hostfile not in ("-", "localhost"):
        _prepare_hosts(options, folder)


def _prepare_hosts(options: argparse.Namespace, folder: Path) -> None:
    hosts = read_hostfile(options.hostfile)
    _warn_if_uneven(hosts, options.script)
    (folder / "slots").write_text(str(sum(host.slots for host in hosts)))
    if this_machine_alone(hosts) and not options.no_ssh:
        return
    _refuse_loopback(hosts)
    (folder / "hostfile").write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))
    (folder / "hosts").write_text("".join(f"{host.name}\n" for host in hosts))
    master = reachable_address(hosts[0].address)
    if master:
        (folder / "master").write_text(master)
    if options.no_ssh:
        return
    if options.launcher == "pdsh" and _NEEDS_QUOTES.search(sys.executable):
        raise UserError(
            f"the path {sys.executable} has a sign that DeepSpeed's launcher does not quote; "
            "put the environment elsewhere"
        )
    names = exported_names(os.environ, options.export)
    (folder / "names").write_text("".join(f"{name}\n" for name in names))
    _withhold(options, folder)
    if options.launcher != "mpirun":
        (folder / "environment").write_text(
            environment_file(os.environ, names, through_shell=options.launcher == "pdsh")
        )
    _refuse_unreachable(hosts, options.file)


# ---------------------------------------------------------------------- hosts


def _warn_if_uneven(hosts: Sequence[Host], script: str) -> None:
    if len({host.slots for host in hosts}) > 1:
        shown = ", ".join(f"{host.address} has {host.slots}" for host in hosts[:8])
        sys.stderr.write(
            f"{script}: uneven slots ({shown}): the slowest link and the fullest host set the pace\n"
        )


def _refuse_loopback(hosts: Sequence[Host]) -> None:
    for host in hosts:
        if is_loopback(host.address):
            raise UserError(
                f"{host.place}: {host.address} is another machine on every host; "
                "write the name by which others reach it"
            )


def _refuse_unreachable(hosts: Sequence[Host], file: str) -> None:
    """Asks all hosts at once whether this Python starts there, and finds this package and the file."""
    command = ["-c", _CHECK, file]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        asked = [
            (host, subprocess.Popen(python_there(host.name, command), text=True, errors="replace", **pipes))
            for host in hosts
        ]
    except OSError as error:
        raise UserError(
            f"there is no {error.filename} here, by which the hosts are reached; install OpenSSH's client"
        ) from error
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(_problem, (process for _, process in asked)))
    problems = [
        f"{host.place}: {host.name}: {problem}" for (host, _), problem in zip(asked, found) if problem
    ]
    if problems:
        more = f" (and {len(problems) - 3} more hosts)" if len(problems) > 3 else ""
        raise UserError(f"{'; '.join(problems[:3])}{more}; see distlora doctor HOSTFILE")


def _problem(process: subprocess.Popen) -> str | None:
    try:
        _, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"no answer within {PATIENCE} s"
    return explain(process.returncode, said) if process.returncode else None


def reachable_address(name: str) -> str | None:
    """An address of a host that other hosts can use; None if its name has only loopback addresses here."""
    return next((address for address in addresses(name) if not is_loopback(address)), None)


# ---------------------------------------------------------------------- variables


def _withhold(options: argparse.Namespace, folder: Path) -> None:
    """Writes the names for the script, which must unset them: DeepSpeed's launcher sends some by itself."""
    names = [] if options.no_ssh else withheld(os.environ, options.export)
    (folder / "withheld").write_text("".join(f"{name}\n" for name in names))
    if names:
        sys.stderr.write(
            f"{options.script}: the ranks do not get {', '.join(names)}: command lines would show a secret "
            "to all users of the hosts (--export NAME sends it nevertheless)\n"
        )


def environment_file(environment: Mapping[str, str], names: Sequence[str], through_shell: bool) -> str:
    """These variables as DeepSpeed reads them from DS_ENV_FILE: one `NAME=value` a line, no blank line.

    through_shell: whether the values pass through a shell on the hosts, as with pdsh. DeepSpeed puts them
    into double quotes where it finds that necessary. Raises UserError for a value that would arrive changed.
    """
    return "".join(f"{name}={_quoted(name, environment[name], through_shell)}\n" for name in names)


def _quoted(name: str, value: str, through_shell: bool) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise UserError(f"{name!r} is no name of a variable that a shell can export; unset it")
    if not value.isprintable() or value != value.strip():
        raise UserError(
            f"{name} has a line break, or a space at its end, which DeepSpeed's launcher loses; "
            "unset or change it"
        )
    if through_shell:
        return _NOT_PROTECTED.sub(r"\\\1", value).replace("%", "%%")
    if _NEEDS_QUOTES.search(value):
        raise UserError(
            f"{name}={value!r} has a sign that only the launcher pdsh can carry; unset or change it"
        )
    return value
