"""The launch scripts, up to where they would install something: arguments, and what they refuse."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))

#: What the scripts call before they look at the machine.
COMMON_TOOLS = ["bash", "basename", "cat", "dirname", "env", "sed", "uname"]


def start(script, *arguments, **variables):
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )


@pytest.fixture
def machine(tmp_path):
    """A machine with a few tools only; `machine(name, text)` adds a program.
    Nothing can be installed there.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in COMMON_TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))

    def add(name, text):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    add.link = lambda tool: (programs / tool).symlink_to(shutil.which(tool))
    add.variables = {"PATH": str(programs), "DISTLORA_VENV": str(tmp_path / "venv")}
    add.venv = tmp_path / "venv"
    return add


def assert_refused(result, *parts):
    """Exit code 2, one sentence, and nothing else."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def test_there_are_scripts():
    assert {"quickstart.sh", "test.sh", "deepspeed.sh", "mpi.sh", "slurm.sbatch"} <= {
        path.name for path in SCRIPTS
    }


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_bash_can_read_it(script):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_ci_runs_the_test_script():
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh", "deepspeed.sh", "mpi.sh"])
def test_help(name):
    result = start(LAUNCH / name, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: bash launch/{name}")
    assert result.stderr == ""


def test_help_lists_every_option_that_is_read():
    text = (LAUNCH / "quickstart.sh").read_text()
    usage = start(LAUNCH / "quickstart.sh", "--help").stdout
    read = next(line for line in text.splitlines() if line.strip().startswith("--method | --stage"))
    options = read.strip().rstrip(")").split(" | ")
    assert len(options) == 7
    assert all(option in usage for option in options)


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh", "deepspeed.sh", "mpi.sh"])
def test_a_path_with_spaces_and_another_directory(tmp_path, name):
    copy = tmp_path / "a path with 'signs'"
    shutil.copytree(LAUNCH, copy / "launch")
    result = subprocess.run(
        ["bash", str(copy / "launch" / name), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage:")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--stages", "3"], ["--stages", "--help"]),
        (["--stages=3"], ["--stages", "--help"]),
        (["-x"], ["-x", "--help"]),
        (["lora_sb"], ["lora_sb", "dotted.key=value"]),
        (["--stage", "4"], ["--stage", "'4'"]),
        (["--stage=-1"], ["--stage", "'-1'"]),
        (["--ranks", "0"], ["--ranks", "'0'"]),
        (["--ranks", "two"], ["--ranks", "'two'"]),
        (["--steps", "1.5"], ["--steps", "'1.5'"]),
        (["--seed", "-1"], ["--seed", "'-1'"]),
        (["--method", "LoRA SB"], ["--method", "'LoRA SB'"]),
        (["--output="], ["--output"]),
        (["train.lr=1", "--ranks"], ["--ranks", "value"]),
    ],
)
def test_a_mistake_is_one_sentence(machine, arguments, parts):
    assert_refused(start(LAUNCH / "quickstart.sh", *arguments, **machine.variables), *parts)


RECIPE = "configs/recipes/quickstart.yaml"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["deepspeed.sh"], ["HOSTFILE", "--help"]),
        (["deepspeed.sh", "-"], ["no recipe", "--help"]),
        (["deepspeed.sh", "-", "nope.yaml"], ["nope.yaml", "no such recipe"]),
        (["deepspeed.sh", "--laucher", "pdsh", "-", RECIPE], ["--laucher", "--help"]),
        (["deepspeed.sh", "--launcher=slurm", "-", RECIPE], ["'slurm'", "pdsh or openmpi", "slurm.sbatch"]),
        (["deepspeed.sh", "--launcher"], ["--launcher needs a value"]),
        (["deepspeed.sh", "--no-ssh", "hosts", RECIPE], ["--no-ssh needs --node-rank"]),
        (["deepspeed.sh", "--no-ssh", "--node-rank=0", "-", RECIPE], ["--no-ssh needs a HOSTFILE"]),
        (["deepspeed.sh", "--node-rank=0", "hosts", RECIPE], ["--node-rank is for --no-ssh"]),
        (["deepspeed.sh", "--master-port=70000", "-", RECIPE], ["--master-port", "'70000'"]),
        (["deepspeed.sh", "--ranks", "two", "-", RECIPE], ["--ranks", "'two'"]),
        (["deepspeed.sh", "--grace=0", "-", RECIPE], ["--grace", "'0'"]),
        (["deepspeed.sh", "--verb", "evla", "-", RECIPE], ["--verb must be train, eval or sweep", "'evla'"]),
        (["deepspeed.sh", "--verb=eval", "-", "launch"], ["launch holds no run: it has no recipe.yaml"]),
        (["deepspeed.sh", "--verb=sweep", "-", "nope.yaml"], ["nope.yaml", "no such sweep"]),
        (
            ["deepspeed.sh", "--verb=sweep", "--no-ssh", "--node-rank=0", "hosts", RECIPE],
            ["--verb sweep", "without --no-ssh"],
        ),
        (["mpi.sh", "--verb=eval"], ["no run directory", "--help"]),
        (["mpi.sh"], ["no recipe", "--help"]),
        (["mpi.sh", "-np", "0", RECIPE], ["-np", "'0'"]),
        (["mpi.sh", "--hosts", "x", RECIPE], ["--hosts", "--help"]),
    ],
    ids=lambda value: " ".join(value) if "." in value[0] else "",
)
def test_a_mistake_in_a_job_is_one_sentence(machine, arguments, parts):
    for tool in ("od", "tr", "date"):
        machine.link(tool)
    script, *words = arguments
    assert_refused(start(LAUNCH / script, *words, **machine.variables), *parts)


#: Python that looks whether packages are there, and quotes words; instead of the program it shows these.
SHOWS_WORDS = f"""#!/usr/bin/env bash
case "$*" in
    *find_spec*) exit 0 ;;
    *shlex*) exec {sys.executable} "$@" ;;
esac
printf '%s\\n' "$@"
"""


@pytest.mark.parametrize(
    ("script", "given", "kept"),
    [
        (
            "deepspeed.sh",
            ["--ranks=2", "--verb", "sweep", "--launcher-args", "--mca x 'y'", "my hosts"],
            ["--ranks", "2", "--launcher-args", "--mca x 'y'", "--verb", "{verb}", "my hosts"],
        ),
        ("mpi.sh", ["--verb=sweep", "-np", "3"], ["-np", "3", "--verb", "{verb}"]),
    ],
)
def test_a_sweep_starts_the_script_again_with_the_same_options(machine, script, given, kept):
    for tool in ("od", "tr", "date"):
        machine.link(tool)
    machine("python", SHOWS_WORDS)
    machine("mpirun", "#!/usr/bin/env bash\necho Open MPI\n")
    done = start(LAUNCH / script, *given, RECIPE, "a=b c", "--check", **machine.variables)
    assert done.returncode == 0, done.stderr
    *words, option, launcher = done.stdout.splitlines()
    assert words == ["-m", "distlora", "sweep", RECIPE, "a=b c", "--check"] and option == "--launcher"
    assert shlex.split(launcher) == ["bash", str(LAUNCH / script), *kept]


def test_a_job_that_is_told_to_stop_while_hosts_are_looked_at(tmp_path):
    """Another start is as good; nothing stays behind."""
    asked, private = tmp_path / "asked", tmp_path / "private"
    private.mkdir()
    (tmp_path / "ssh").write_text(f'#!/usr/bin/env bash\necho $$ >"{asked}"; exec sleep 60\n')
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    variables = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TMPDIR": str(private),
    }
    command = ["bash", str(LAUNCH / "deepspeed.sh"), str(tmp_path / "hosts"), str(ROOT / RECIPE)]
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE) as script:
        while not (asked.exists() and asked.read_text()) and script.poll() is None:
            time.sleep(0.02)
        assert len(list(private.iterdir())) == 1
        script.terminate()
        assert script.wait(timeout=20) == 75, script.stderr.read()
    assert list(private.iterdir()) == []
    assert not is_running(int(asked.read_text()))


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_an_old_python_is_refused(machine, name):
    machine("python3", "#!/usr/bin/env bash\necho 3.9\n")
    machine("c++", "#!/usr/bin/env bash\n")
    assert_refused(start(LAUNCH / name, **machine.variables), "Python 3.9 is too old", "3.11 or newer")
    assert not machine.venv.exists()


def test_no_python_is_refused(machine):
    assert_refused(start(LAUNCH / "quickstart.sh", **machine.variables), "no Python", "3.11 or newer")


@pytest.mark.parametrize("missing", ["python3-venv", "python3-dev"])
def test_half_a_python_is_refused(machine, missing):
    answer = "echo 3.12" if missing == "python3-venv" else "echo 3.13"
    machine(
        "python3",
        f'#!/usr/bin/env bash\n[[ $2 == *version_info* ]] && {answer} || echo "the package {missing}"\n',
    )
    machine("c++", "#!/usr/bin/env bash\n")
    assert_refused(start(LAUNCH / "quickstart.sh", **machine.variables), "lacks", missing)


def test_a_missing_compiler_is_refused(machine):
    machine("python3", f'#!/usr/bin/env bash\n[[ $2 == *version_info* ]] && exec "{sys.executable}" "$@"\n')
    assert_refused(start(LAUNCH / "quickstart.sh", CXX="", **machine.variables), "no C++ compiler", "g++")
    assert not machine.venv.exists()


def shell(text, **variables):
    """Runs lines with the functions of _environment.sh."""
    return subprocess.run(
        ["bash", "-c", f'. "{LAUNCH}/_environment.sh"\n{text}'],
        capture_output=True, text=True, timeout=60, env={**os.environ, **variables},
    )  # fmt: skip


def test_an_environment_that_stands_is_not_touched(tmp_path):
    """The stamp is the whole check: no pip call, and it names constraints, setup.py, repository and place."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(shutil.which("true"))
    lines = """
        find_python() { echo python3; }
        require_compiler() { :; }
        make_venv() { echo MADE; exit 5; }
        stamp="$(cat "$REPOSITORY/constraints.txt" "$REPOSITORY/setup.py" | cksum) $REPOSITORY $VENV"
    """
    use = "prepare_environment quickstart; command -v python"
    first = shell(f"{lines}\n{use}", DISTLORA_VENV=str(venv))
    assert (first.returncode, first.stdout) == (5, "MADE\n")
    second = shell(f'{lines}\necho "$stamp" >"$VENV/.distlora-quickstart"\n{use}', DISTLORA_VENV=str(venv))
    assert (second.returncode, second.stdout) == (0, f"{venv}/bin/python\n")
    other = shell(
        f'{lines}\necho "$stamp changed" >"$VENV/.distlora-quickstart"\n{use}', DISTLORA_VENV=str(venv)
    )
    assert other.returncode == 5


def test_the_batch_of_the_quickstart_fits_the_ranks_and_what_the_user_says(tmp_path):
    """What it starts, in an environment that stands."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    answers = (
        "*device_count*) echo 0 ;; *build_shm_op* | *resolve_path*) ;; *operator* | *extension*) mktemp -d ;;"
    )
    stubs = {
        "python": f'case $* in {answers} *) exec {sys.executable} "$@" ;; esac',
        "deepspeed": f'echo "$@" >{tmp_path}/told',
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    variables = {"DISTLORA_VENV": str(tmp_path / "venv"), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    stamp = '"$(cat "$REPOSITORY/constraints.txt" "$REPOSITORY/setup.py" | cksum) $REPOSITORY $VENV"'
    assert shell(f'echo {stamp} >"$VENV/.distlora-quickstart"', **variables).returncode == 0
    words = ["--ranks", "3", "--output", str(tmp_path / "run"), "train.global_batch_size=24"]
    result = start(LAUNCH / "quickstart.sh", *words, **variables)
    assert result.returncode == 0, result.stderr
    told = (tmp_path / "told").read_text().split()
    assert told[told.index("--num_gpus") + 1] == "3"
    assert told[-2:] == ["train.micro_batch_size=8", "train.global_batch_size=24"]


def test_a_foreign_directory_is_never_cleared(tmp_path):
    (tmp_path / "precious").write_text("x")
    result = shell("make_venv python3", DISTLORA_VENV=str(tmp_path))
    assert_refused(result, str(tmp_path), "not a working virtual environment")
    assert (tmp_path / "precious").read_text() == "x"


def test_a_venv_path_that_the_linker_cannot_take_is_refused(tmp_path):
    result = shell("choose_venv_place", DISTLORA_VENV=str(tmp_path / "a venv"))
    assert_refused(result, "DISTLORA_VENV", "a venv")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="processes are looked up in /proc")
def test_only_a_lock_without_a_living_build_is_removed(tmp_path):
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert shell(f'remove_stale_lock "{tmp_path}"').stdout == ""
        assert lock.exists()
    assert "removing the lock" in shell(f'remove_stale_lock "{tmp_path}"').stdout
    assert not lock.exists()


def test_a_failed_step_shows_its_output_and_passes_its_status(tmp_path):
    result = shell("with_progress 'a step' bash -c 'echo the reason; exit 7'", DISTLORA_VENV=str(tmp_path))
    assert result.returncode == 7
    assert "a step … failed" in result.stdout
    assert "the reason" in result.stderr and "this failed: a step" in result.stderr


def test_a_stopped_script_takes_its_children_along(tmp_path):
    """A grandchild too: DeepSpeed's launcher is the child, the ranks are the grandchildren."""
    script = f"""
        start_child bash -c 'sleep 120 & echo $! >"{tmp_path}/pid"; wait'
        until [[ -s "{tmp_path}/pid" ]]; do sleep 0.05; done
        kill -TERM $$
        wait_for_child
    """
    result = shell(script)
    assert result.returncode == 143
    grandchild = int((tmp_path / "pid").read_text())
    assert not is_running(grandchild)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # In a container without an init process the dead stay as zombies.
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


WORDS = ["-u", "-m", "distlora.cli.as_rank", "MARK", "--local_rank=0"]


@pytest.mark.parametrize(
    ("command", "a_rank"),
    [
        (["/usr/bin/python3", *WORDS], True),
        (["/home/ann/my env's/bin/python", *WORDS], True),
        (["mpirun", "-np", "2", "/home/ann/my env/bin/python", *WORDS], False),
        (["/opt/open mpi/bin/mpirun", "--bind-to", "none", "/usr/bin/python3", *WORDS], False),
        (["bash", "-c", " ".join(["cd /;", "/usr/bin/python3", *WORDS])], False),
        (
            ["ssh", "-o", "BatchMode=yes", "node1", " ".join(["exec env A=b", "/usr/bin/python3", *WORDS])],
            False,
        ),
        (["/usr/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--module", *WORDS[2:]], False),
    ],
)
def test_a_signal_is_for_ranks_whatever_their_python_is_called_and_not_for_who_starts_them(command, a_rank):
    """Nothing of this is run: `echo` stands there under these words, before a pipe that is full."""
    mark = f"mark{os.getpid()}x{time.monotonic_ns()}"
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(1))
    os.set_blocking(writing, True)
    words = [word.replace("MARK", mark) for word in command]
    with subprocess.Popen(words, executable=shutil.which("echo"), stdout=writing) as process:
        lines = (
            f'. "{LAUNCH}/_job.sh"; MARK=$OF_THE_JOB; signal_job TERM ranks; sleep 0.1; signal_job KILL all'
        )
        assert shell(lines, OF_THE_JOB=mark).stderr == ""
        assert process.wait(timeout=20) == (-signal.SIGTERM if a_rank else -signal.SIGKILL)
    os.close(reading)
    os.close(writing)


def test_a_secret_that_does_not_travel_is_kept_from_mpirun_too(tmp_path):
    """It would reach the ranks of mpirun's own host, and no others."""
    told = f'case $1 in --version) echo "mpirun (Open MPI) 4.1.4";; *) env >{tmp_path}/told;; esac'
    for name, text in (("mpirun", told), ("ssh", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("10.0.0.1 slots=1\n10.0.0.2 slots=1\n")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_TOKEN": "hf_x", "HF_HOME": "/hf"}
    words = [
        "--hostfile",
        tmp_path / "hosts",
        ROOT / "configs/recipes/quickstart.yaml",
        f"output_dir={tmp_path}/run",
    ]
    result = start(LAUNCH / "mpi.sh", *map(str, words), **variables)
    assert result.returncode == 0 and "the ranks do not get HF_TOKEN" in result.stderr, result.stderr
    told = (tmp_path / "told").read_text()
    assert "HF_HOME=/hf\n" in told and "hf_x" not in told


#: A job whose launcher says what pdsh says (`$1`) and waits; its ranks answer a signal as `$2` says.
JOB = r"""
. launch/_environment.sh && . launch/_job.sh
PRIVATE=$3 HOSTS=(node1) NAME=x.sh PYTHON=told
signal_job() {
    echo "signal $1 $2" >&2
    [[ $1 != TERM ]] || eval "$answer"
    : >"$PRIVATE/heard-$1"
}
pause() {  # the time that ranks are given: here, until they have been asked
    until [[ $first != TERM* || -e $PRIVATE/heard-TERM ]]; do sleep 0.02; done
}
answer=$2 first=$6
echo "$PRIVATE" >"$PRIVATE/run"
status=0
run_job bash -c 'echo "$0" >&2; read -r -t 20 <> <(:); exit 3' "$1" || status=$?
answers=("$4" "$5")
told() { echo "x: ${answers[0]}"; return "${answers[1]}"; }
end_as_the_run "$status"
"""
SSH = "pdsh@head: node2: ssh exited with exit code"


@pytest.mark.parametrize(
    ("line", "answer", "said", "told", "signals", "code"),
    [
        (
            f"{SSH} 255",
            'kill -TERM -- "-$CHILD"',
            "failed at step 3 of 9: rank 1 went silent",
            75,
            ["TERM ranks", "KILL all"],
            75,
        ),
        (f"{SSH} 255", ":", "running at step 3 of 9", 1, ["TERM ranks", "KILL all"], 75),
        (f"{SSH} 255", ":", "failed at step 3 of 9: a bug", 1, ["TERM ranks", "KILL all"], 1),
        (f"{SSH} 247", ":", "running at step 3 of 9", 1, ["TERM ranks", "KILL all"], 1),
        (f"{SSH} 1", ":", "failed at step 3 of 9: a bug", 1, ["KILL all"], 1),
    ],
)
def test_a_host_that_is_lost_is_a_hint_for_the_ranks_of_the_others(
    tmp_path, line, answer, said, told, signals, code
):
    """They name the silent rank; KILL comes only for what does not answer. What ended without saying why may
    be started again.
    """
    words = ["bash", "-c", JOB, "job", line, answer, str(tmp_path), said, str(told), signals[0]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == code, done.stderr
    heard = [text.removeprefix("signal ") for text in done.stderr.splitlines() if text.startswith("signal ")]
    assert list(dict.fromkeys(heard)) == signals
    assert f"x.sh: x: {said}" in done.stderr
