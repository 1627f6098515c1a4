"""A cluster of three hosts on this machine, made of namespaces by `cluster.sh`: head, node1 and node2, with
or without SLURM.

Files are shared. Processes, addresses, /dev/shm and links are each host's own; from here, their processes are
in /proc like any.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.e2e.program import Outcome, run

SCRIPT = Path(__file__).with_name("cluster.sh")
NODES = ("node1", "node2")
HOSTS = ("head", *NODES)

#: Program -> where it comes from, in Debian's names.
SSH_PROGRAMS = {
    "ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "sshd": "openssh-server",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh",
}  # fmt: skip
SLURM_PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
    "munged": "munge",
}
#: A look at everything that `cluster.sh` asks of the kernel, in namespaces that end with it.
_TRIAL = (
    "mount -t tmpfs tmpfs /dev/shm && ip link add one type bridge "
    "&& ip link add two type veth && hostname trial"
)
#: What runs on a host that has nothing to do; srun's and sbatch's own helpers are not among it.
_DAEMONS = {"sshd", "munged", "slurmctld", "slurmscriptd", "slurmd"}


def lacking(slurm: bool = False) -> str | None:
    """Why there can be no cluster here, for a skip; None if there can be."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    wanted = SSH_PROGRAMS | (SLURM_PROGRAMS if slurm else {})
    missing = {name: package for name, package in wanted.items() if shutil.which(name, path=path) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        return (
            f"a cluster of namespaces needs {', '.join(missing)} (Debian and Ubuntu: the packages {packages})"
        )
    trial = [
        "unshare",
        "--net",
        "--uts",
        "--ipc",
        "--pid",
        "--mount",
        "--fork",
        "--mount-proc",
        "bash",
        "-c",
        _TRIAL,
    ]
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.returncode
        return f"a cluster of namespaces needs rights that this machine does not give: {said}"
    return None


class Cluster:
    """The hosts, between `up` and `down`."""

    def __init__(self, folder: Path, name: str, slurm: bool = False):
        """folder: does not exist yet, and has a short path (sockets). name: of no other cluster."""
        self.folder, self.slurm = folder, slurm
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.settings = {
            "TESTBED_DIR": str(folder),
            "TESTBED_NAME": name,
            "TESTBED_OWNER": str(os.getpid()),
            "PATH": path,
        }

    def _script(self, *words: str) -> str:
        done = subprocess.run(
            ["bash", SCRIPT, *words],
            capture_output=True,
            text=True,
            env=os.environ | self.settings,
            timeout=90,
        )
        assert done.returncode == 0, f"cluster.sh {' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def up(self) -> None:
        self._script("up", *(["slurm"] if self.slurm else []))

    def down(self) -> None:
        self._script("down")

    # ------------------------------------------------------------------ commands

    def on(self, host: str, *words: object) -> tuple[object, ...]:
        """The command line that runs `words` there, for `program.run` and `program.started`."""
        own = [f"{name}={self.settings[name]}" for name in ("TESTBED_DIR", "TESTBED_NAME")]
        # Through ssh HOME may become another one, in which DeepSpeed would compile its operator anew.
        extensions = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
        own.append(f"TORCH_EXTENSIONS_DIR={extensions}")
        return ("env", *own, "bash", SCRIPT, "exec", host, *words)

    def run(self, host: str, *words: object, **environment: str) -> Outcome:
        """The command to its end, in the repository, with this process's variables and `environment`."""
        return run(*self.on(host, *words), **environment)

    def processes(self, *hosts: str) -> dict[int, str]:
        """What runs on these hosts, or all, besides their daemons: process id here -> command line."""
        spaces = {_pid_namespace(self.first_process(host)) for host in hosts or HOSTS if self.is_up(host)}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if (
                    _pid_namespace(int(folder.name)) in spaces
                    and (folder / "comm").read_text().strip() not in _DAEMONS
                ):
                    command = (
                        (folder / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                        .strip()
                    )
                    if command:  # a zombie has none
                        found[int(folder.name)] = command
        return found

    def process(self, host: str, words: str) -> int:
        """The one process there whose command line holds `words`; its id here, for os.kill."""
        (found,) = [pid for pid, command in self.processes(host).items() if words in command]
        return found

    # ------------------------------------------------------------------ mishaps

    def is_up(self, host: str) -> bool:
        return (self.folder / f"{host}.pid").exists()

    def first_process(self, host: str) -> int:
        return int((self.folder / f"{host}.pid").read_text())

    def cut(self, host: str) -> None:
        """Packets to and from the host are lost without a word."""
        self._script("cut", host)

    def part(self) -> None:
        """Packets between node1 and node2 are lost without a word; head reaches both."""
        self._script("part")

    def slow(self, host: str, rate: str) -> None:
        """What is sent to the host passes at this rate, such as 4mbit."""
        self._script("slow", host, rate)

    def heal(self, host: str) -> None:
        self._script("heal", host)

    def crash(self, host: str) -> None:
        """As a power failure would: no process says goodbye."""
        self._script("crash", host)

    def boot(self, host: str) -> None:
        self._script("boot", host)

    def repair(self) -> None:
        """Every host up and linked, and without the processes of a test (but SLURM's jobs are SLURM's)."""
        for host in NODES:
            self.heal(host) if self.is_up(host) else self.boot(host)
        for pid in () if self.slurm else self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        """What the hosts' daemons said, for the message of a failed check."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("slurm/log/*")])
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in files)


@contextlib.contextmanager
def cluster(folder: Path, name: str, slurm: bool = False) -> Iterator[Cluster]:
    """A cluster that is gone afterwards, also if making it fails or this process is killed."""
    made = Cluster(folder, name, slurm)
    try:
        made.up()
        yield made
    finally:
        made.down()


def wait_for(
    condition: Callable[[], object], seconds: float, what: str, tell: Callable[[], str] = str
) -> float:
    """Polls until the condition holds; returns the seconds that it took.

    tell: more to say if it never does.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s\n{tell()}"
        time.sleep(0.05)
    return time.monotonic() - began


def _pid_namespace(process: int) -> str:
    return os.readlink(f"/proc/{process}/ns/pid")
