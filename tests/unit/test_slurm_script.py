"""`launch/slurm.sbatch` without a SLURM: what it asks srun and scontrol for, seen by stand-ins of these that
write it down.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"

#: Writes its words down, and plays the look at the nodes, --help, or the ranks.
SRUN = """#!/usr/bin/env bash
[[ $* != *--help* ]] || { echo "$SRUN_HELP"; exit; }
[[ $* != *--chdir=/* ]] || { printf "$NODES_LACK"; exit "${NODES_EXIT:-0}"; }
printf '%s\\0' "$@" >>"$CALLS/srun"
trap 'exit 75' USR1
env >"$CALLS/environment"
[[ -z ${SRUN_WAITS:-} ]] || for i in {1..600}; do [[ ! -e $CALLS/over ]] || break; sleep 0.05; done
exit "${SRUN_EXIT:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$CALLS/scontrol"
exit "${SCONTROL_EXIT:-0}"
"""
SQUEUE = """#!/usr/bin/env bash
echo "${STATE:-RUNNING}"
"""
PYTHON = f"""#!/usr/bin/env bash
[[ $2 != *shlex* ]] || exec {shlex.quote(sys.executable)} "$@"
if [[ $3 == sweep && $* == *--launcher* ]]; then
    printf '%s\\0' "$@" >>"$CALLS/sweep"
    trap 'exit 75' USR1
    [[ -z ${{SRUN_WAITS:-}} ]] || for i in {{1..600}}; do sleep 0.05; done
    exit "${{SRUN_EXIT:-0}}"
fi
case $3 in
    status) printf '%s\\0' "$@" >>"$CALLS/status"; exit "${{STATUS:-1}}" ;;
    sweep) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
CONTAINERS = "--container-image=[USER@][REGISTRY#]IMAGE"


class Desk:
    """A job's first node: what SLURM would set, programs of these names on PATH,
    and what was written down.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("python", PYTHON)):
            self.add(name, text)
        (folder / "recipe.yaml").write_text("output_dir: run\n")
        self.variables = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(folder), "SRUN_HELP": "", "NODES_LACK": "",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1",
            "SLURM_SUBMIT_DIR": str(folder), "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_ON_NODE": "8", "SLURMD_NODENAME": "node1", "PYTHONPATH": str(SCRIPT.parents[1]),
        }  # fmt: skip

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def command(self, *words: str, **variables: str | None) -> dict:
        settings = {name: value for name, value in (self.variables | variables).items() if value is not None}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return dict(args=["bash", str(SCRIPT), *words], env=settings, cwd=self.folder, **pipes)

    def start(self, *words: str, **variables: str | None) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(*words, **variables), timeout=60)

    def called(self, name: str) -> list[str]:
        """The words that the program was given, over all calls."""
        file = self.folder / name
        return file.read_text().split("\0")[:-1] if file.exists() else []

    def ranks(self) -> list[str]:
        """The command of the ranks, without srun's options."""
        words = self.called("srun")
        return words[next(index for index, word in enumerate(words) if not word.startswith("-")) :]


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


# ---------------------------------------------------------------------- the file itself


def test_help_needs_no_slurm_and_lists_every_option(desk):
    done = desk.start("--help", SLURM_JOB_ID=None, PATH="/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: sbatch [")
    read = next(line for line in SCRIPT.read_text().splitlines() if line.strip().startswith("--verb | "))
    options = read.strip().rstrip(")").split(" | ")
    assert len(options) == 9 and all(f"\n  {option} " in done.stdout for option in options)


def test_a_command_line_of_sbatch_overrides_what_the_file_asks_for():
    """SLURM reads lines that begin with #SBATCH up to the first command."""
    lines = SCRIPT.read_text().splitlines()
    asked = [line.split()[1] for line in lines[: lines.index("set -u")] if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=distlora", "--nodes=1", "--requeue", "--signal=B:USR1@120", "--open-mode=append",
        "--output=%x-%j.out",
    ]  # fmt: skip


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        ([], {}, "which recipe?"),
        (["train.lr=1", "recipe.yaml"], {}, "the recipe comes first, before 'train.lr=1'"),
        (["recipe.yaml", "lr"], {}, "unexpected argument 'lr'"),
        (
            ["--nodes=2", "recipe.yaml"],
            {},
            "unknown option --nodes: --help lists them, and sbatch's own stand before the script",
        ),
        (["recipe.yaml", "-N", "2"], {}, "unknown option -N"),
        (["recipe.yaml", "--python"], {}, "--python needs a value"),
        (["recipe.yaml", "--python="], {}, "--python needs a value"),
        (["recipe.yaml", "--max-restarts", "many"], {}, "a whole number, not 'many'"),
        (
            ["recipe.yaml", "--python", "/nowhere/python"],
            {},
            "/nowhere/python is no python with distlora in it",
        ),
        (
            ["recipe.yaml"],
            {"PATH": "/usr/bin:/bin", "PYTHONPATH": None},
            "no python with distlora on PATH or in",
        ),
        (["--verb", "evla", "x"], {}, "--verb must be train, eval or sweep, not 'evla'"),
        (["recipe.yaml", "--verb", "eval"], {}, "--verb stands before 'recipe.yaml'"),
        (["--verb=eval"], {}, "which run? sbatch launch/slurm.sbatch RUN"),
        (["--verb=sweep", "a=b"], {}, "the sweep comes first, before 'a=b'"),
        (["--verb=eval", "--sweep=x", "run"], {}, "--sweep is for --verb train"),
        (["--verb=sweep", "--container=x", "s.yaml"], {}, "outside of containers"),
        (
            ["--verb=eval", "run"],
            {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"},
            "would all eval the same",
        ),
        (["recipe.yaml"], {"SLURMD_NODENAME": None}, "this is a job of SLURM"),  # in a shell of salloc
        (["recipe.yaml"], {"SLURM_JOB_ID": None}, "this is a job of SLURM: sbatch launch/slurm.sbatch"),
        (["recipe.yaml"], {"SLURM_GPUS_ON_NODE": None}, "how many ranks a node? sbatch --gpus-per-node=N"),
        (["recipe.yaml"], {"SLURM_NTASKS_PER_NODE": "1"}, "--ntasks-per-node is 1 and a node's GPUs are 2"),
        (["recipe.yaml"], {"SLURM_GPUS": "3", "SLURM_JOB_NUM_NODES": "2"}, "--gpus=3 is uneven over 2 nodes"),
        (
            ["recipe.yaml"],
            {"SLURM_GPUS_ON_NODE": None, "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"},
            "--ntasks=3 is uneven over the nodes (2,1)",
        ),
        (["recipe.yaml", "--sweep", "s"], {}, "--sweep is for arrays: sbatch --array=0-N"),
        (
            ["recipe.yaml"],
            {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"},
            "the array's tasks would all train the same",
        ),
        (["recipe.yaml", "--interface", "ib7"], {}, "--interface ib7: "),
        (
            ["recipe.yaml", "--container", "x.sif"],
            {},
            "--container needs pyxis (a plugin of srun), apptainer or singularity",
        ),
        (
            ["recipe.yaml", "--container", "x", "--container-runtime", "docker"],
            {},
            "pyxis, apptainer or singularity, not 'docker'",
        ),
        (
            ["recipe.yaml", "--container", "x", "--container-runtime", "apptainer"],
            {},
            "apptainer: it is not on PATH on",
        ),
        (["recipe.yaml", "--container-mounts", "/a:/a"], {}, "need --container IMAGE"),
        (
            ["r.yaml"],
            {"NODES_LACK": "/home/r.yaml\\tnode2\\n/home/r.yaml\\tnode1\\n"},
            "/home/r.yaml is not there on node1,node2",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(desk, words, variables, sentence):
    done = desk.start(*words, **variables)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("slurm.sbatch: ") and sentence in done.stderr
    assert desk.called("srun") == desk.called("scontrol") == []


# ---------------------------------------------------------------------- what the ranks are given


@pytest.mark.parametrize(
    ("variables", "tasks", "each"),
    [
        ({}, 2, 2),
        ({"SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS": "a100:6"}, 6, 2),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4"}, 4, 2),
        ({"SLURM_GPUS_ON_NODE": None, "SLURM_NTASKS_PER_NODE": "3", "SLURM_NTASKS": "3"}, 3, 3),
        (
            {
                "SLURM_GPUS_ON_NODE": None,
                "SLURM_NTASKS": "4",
                "SLURM_TASKS_PER_NODE": "2(x2)",
                "SLURM_JOB_NUM_NODES": "2",
            },
            4,
            2,
        ),
    ],
)
def test_one_task_a_gpu(desk, variables, tasks, each):
    done = desk.start("recipe.yaml", **variables)
    assert done.returncode == 0, done.stderr
    options = desk.called("srun")
    assert {f"--ntasks={tasks}", f"--ntasks-per-node={each}"} <= set(options)
    assert f"{tasks} ranks on node1" in done.stderr
    assert f"OMP_NUM_THREADS={8 // each}\n" in (desk.folder / "environment").read_text(), (
        "of the node's 8 CPUs"
    )


def test_every_task_sees_all_gpus_and_too_few_cpus_are_shared(desk):
    done = desk.start("recipe.yaml", SLURM_GPUS_PER_TASK="1", SLURM_CPUS_ON_NODE="1")
    assert "SLURM_GPUS_PER_TASK" not in (desk.folder / "environment").read_text()
    assert "--overcommit" in desk.called("srun") and "1 CPUs for 2 ranks of a node: they share" in done.stderr


@pytest.mark.parametrize(
    ("there", "each", "taken"),
    [
        ("8", "4", "4"),
        ("8", "2", "2"),
        ("8", "8", "4"),  # asked for one task, the only one that sbatch knew of
        ("1", "1", None),
        ("8", None, None),
    ],
)
def test_cpus_of_a_task(desk, there, each, taken):
    done = desk.start("recipe.yaml", SLURM_CPUS_ON_NODE=there, SLURM_CPUS_PER_TASK=each)
    lines = (desk.folder / "environment").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if "CPUS_PER_TASK" in line)
    assert found == ({"SRUN_CPUS_PER_TASK": taken} if taken else {}), done.stderr
    assert ("sbatch --cpus-per-gpu=8" in done.stderr) == (each == "8")


def test_words_arrive_as_they_are(desk):
    nasty = ["a.b=$(touch evil) `touch evil`; touch evil", "c.d='\"*", "e= \t\n", "f=\\n"]
    (desk.folder / "my $(touch evil) recipe's.yaml").touch()
    done = desk.start("my $(touch evil) recipe's.yaml", *nasty)
    assert done.returncode == 0, done.stderr
    recipe = str(desk.folder / "my $(touch evil) recipe's.yaml")
    assert desk.ranks() == [str(desk.bin / "python"), "-m", "distlora", "train", recipe, *nasty]
    assert not (desk.folder / "evil").exists()


def test_the_python_of_a_project_is_found_where_sbatch_was_called(desk):
    own = desk.folder / ".venv" / "bin"
    own.mkdir(parents=True)
    (desk.bin / "python").rename(own / "python")
    assert desk.start("recipe.yaml").returncode == 0
    assert desk.ranks()[0] == str(own / "python")
    assert f"\nPATH={own}:" in "\n" + (desk.folder / "environment").read_text(), "with its ninja"


@pytest.mark.parametrize("name", ["bin/mine", "./bin/mine", "mine"])
def test_a_python_by_name(desk, name):
    """Nodes look for it from another directory."""
    desk.add("mine", PYTHON)
    assert desk.start("recipe.yaml", DISTLORA_PYTHON=name).returncode == 0
    found = Path(desk.ranks()[0])
    assert found.is_absolute() and found.samefile(desk.bin / "mine")


def test_a_file_for_every_rank(desk):
    done = desk.start("recipe.yaml", "--logs", "my logs")
    assert "--output=my logs/%j-%t.out" in desk.called("srun") and (desk.folder / "my logs").is_dir()
    assert "--label" not in desk.called("srun") and "my logs/7-N.out" in done.stderr


def test_an_interface(desk):
    desk.add("ip", "#!/bin/sh\necho '2: ib0    inet 10.0.0.5/24 brd 10.0.0.255 scope global ib0'\n")
    assert desk.start("recipe.yaml", "--interface", "ib0").returncode == 0
    there = (desk.folder / "environment").read_text()
    assert (
        "MASTER_ADDR=10.0.0.5\n" in there
        and "GLOO_SOCKET_IFNAME=ib0\n" in there
        and "NCCL_SOCKET_IFNAME==ib0\n" in there
    )


# ---------------------------------------------------------------------- arrays


def test_a_task_of_an_array_trains_its_line(desk):
    (desk.folder / "sweep.txt").write_text(
        "# comment\noutput_dir=a\n\n  output_dir='b $(touch evil); c' train.lr=2\n"
    )
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SRUN_EXIT": "75"}
    done = desk.start("recipe.yaml", "--sweep", "sweep.txt", "train.steps=3", **array)
    assert desk.ranks()[4:] == [
        str(desk.folder / "recipe.yaml"),
        "train.steps=3",
        "output_dir=b $(touch evil); c",
        "train.lr=2",
    ]
    assert not (desk.folder / "evil").exists()
    assert desk.called("scontrol") == ["requeue", "7_1"], f"this task alone\n{done.stderr}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("output_dir=a\n", "has no line 1, only 1, counted from 0"),
        ("a=1\nb=2\n", "lines 0 and 1 share the output directory"),
    ],
)
def test_a_wrong_sweep_starts_nothing(desk, text, sentence):
    (desk.folder / "sweep.txt").write_text(text)
    done = desk.start("recipe.yaml", "--sweep", "sweep.txt", SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="7")
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert desk.called("srun") == []


# ---------------------------------------------------------------------- other verbs


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True)])
def test_an_evaluation(desk, code, again):
    """Words behind the run are the program's; its exit code alone says whether another start would go on."""
    words = ["--tasks", "gsm8k,math", "--limit", "9", "data.template=a b"]
    done = desk.start("--verb", "eval", "--logs", "l", "my run/", *words, SRUN_EXIT=str(code), STATUS="75")
    run = str(desk.folder / "my run")
    assert desk.ranks()[1:] == ["-m", "distlora", "eval", run, *words] and done.returncode == code
    assert desk.called("scontrol") == (["requeue", "7"] if again else []) and desk.called("status") == []
    assert "--output=l/%j-%t.out" in desk.called("srun")


def test_a_container_has_the_folder_of_the_run(desk):
    desk.start("--verb=eval", "--container", "image", "my run", SRUN_HELP=CONTAINERS)
    here = str(desk.folder)
    assert f"--container-mounts={here}/my run:{here}/my run,{here}:{here}" in desk.called("srun")


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "7"}])
def test_a_sweep_starts_each_of_its_runs_as_a_step(desk, array):
    done = desk.start("--verb", "sweep", "my sweep.yaml", "a=b c", SRUN_EXIT="75", **array)
    verb, file, override, *point, option, launcher = desk.called("sweep")[2:]
    assert [verb, file, override] == ["sweep", str(desk.folder / "my sweep.yaml"), "a=b c"]
    assert point == (["--point", "5"] if array else []) and option == "--launcher"
    words = shlex.split(launcher)
    assert words[0] == "srun" and words[-3:] == [str(desk.bin / "python"), "-m", "distlora"]
    assert {"--ntasks=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1"} <= set(words)
    assert desk.called("scontrol") == ["requeue", "7_5" if array else "7"], done.stderr
    assert desk.called("srun") == [], "that is the sweep's affair"


# ---------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("code", "status", "again"),
    [
        (0, 75, False),  # done
        (75, 1, True),  # preempted
        (2, 75, False),  # a mistake
        (1, 1, False),  # failed
        (1, 75, True),  # a rank went silent
        (143, 75, True),  # preempted, and a rank was killed before it had ended
        (143, 0, False),  # done, and a rank was killed on its way out
        (137, 1, False),
        (138, 1, False),  # USR1, but not from here
    ],
)
def test_the_job_is_queued_again_only_where_that_would_go_on(desk, code, status, again):
    done = desk.start("recipe.yaml", "a=b c", SRUN_EXIT=str(code), STATUS=str(status))
    assert done.returncode == (code if status or code == 2 else 0), done.stderr
    assert desk.called("scontrol") == (["requeue", "7"] if again else [])
    asked = desk.called("status")
    if asked:
        assert asked[2:6] == ["status", str(desk.folder / "recipe.yaml"), "a=b c", "--since"]
        assert abs(int(asked[6]) - time.time()) < 60


def test_a_run_of_a_host_that_is_down_is_taken_over_on_request(desk):
    assert desk.start("recipe.yaml", "--take-over", "a=b c").returncode == 0
    words = desk.called("srun")
    assert words[-4:] == ["train", str(desk.folder / "recipe.yaml"), "--take-over", "a=b c"]


def test_so_often_and_no_more(desk):
    done = desk.start("recipe.yaml", "--max-restarts=3", SRUN_EXIT="75", SLURM_RESTART_COUNT="2")
    assert desk.called("scontrol") == ["requeue", "7"] and "job 7, start 3: 2 ranks" in done.stderr
    done = desk.start("recipe.yaml", "--max-restarts=3", SRUN_EXIT="75", SLURM_RESTART_COUNT="3")
    assert desk.called("scontrol") == ["requeue", "7"], "no second call"
    assert "not queued again: that was done 3 times" in done.stderr and done.returncode == 75


@pytest.mark.parametrize(("restarts", "again"), [(None, False), ("1", True)])
def test_a_node_that_is_gone(desk, restarts, again):
    """SLURM may not have noticed yet when the job is back. At the first start it is rather the cluster that
    is wrong.
    """
    done = desk.start("recipe.yaml", NODES_EXIT="1", SLURM_RESTART_COUNT=restarts)
    assert done.returncode == 1 and "a node of node1 does not run what it is told to" in done.stderr
    assert desk.called("scontrol") == (["requeue", "7"] if again else []) and desk.called("srun") == []


def test_slurm_may_refuse_to_queue_again(desk):
    done = desk.start("recipe.yaml", SRUN_EXIT="75", SCONTROL_EXIT="1")
    assert done.returncode == 75 and "sbatch the same once more" in done.stderr


@pytest.mark.parametrize(
    ("number", "state", "again"),
    [
        (signal.SIGUSR1, "RUNNING", True),
        (signal.SIGTERM, "COMPLETING", False),  # cancelled, or taken back: then SLURM queues it again
        (signal.SIGTERM, "RUNNING", True),  # as after a node's failure, meant for the job's last start
    ],
)
def test_a_signal_while_the_ranks_run(desk, number, state, again):
    """USR1 is passed on to srun; TERM is SLURM's, which signals the ranks itself."""
    passed_on = number == signal.SIGUSR1
    command = desk.command("recipe.yaml", SRUN_WAITS="1", SRUN_EXIT="1" if passed_on else "75", STATE=state)
    with subprocess.Popen(**command) as process:
        deadline = time.monotonic() + 30
        while not (desk.folder / "environment").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, number)
        if not passed_on:
            (desk.folder / "over").touch()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, f"what srun ended with\n{said}"
    assert desk.called("scontrol") == (["requeue", "7"] if again else []), said


def test_a_signal_just_before_the_ranks_run(desk):
    """After the last look at whether one has come: `date` is what the script asks next,
    and here it signals.
    """
    desk.add("date", '#!/bin/sh\nkill -USR1 $PPID\nexec /bin/date "$@"\n')
    done = desk.start("recipe.yaml", SRUN_WAITS="1", SRUN_EXIT="1")
    assert done.returncode in (75, 138), "what srun ended with, before or after it could hear\n" + done.stderr
    assert desk.called("scontrol") == ["requeue", "7"], done.stderr


# ---------------------------------------------------------------------- containers


def test_pyxis(desk):
    image = ["--container", "ghcr.io#own/image:1", "--container-mounts", "/data:/data"]
    done = desk.start(
        "recipe.yaml", *image, "a=b c", SRUN_HELP=CONTAINERS, DISTLORA_PYTHON="/the/hosts/python"
    )
    assert done.returncode == 0, done.stderr
    here, options = desk.folder, desk.called("srun")
    assert "--container-image=ghcr.io#own/image:1" in options and f"--container-workdir={here}" in options
    assert f"--container-mounts={here}:{here},{here}:{here},/data:/data" in options
    assert desk.ranks() == ["python3", "-m", "distlora", "train", str(here / "recipe.yaml"), "a=b c"]
    assert "PYTHONPATH" not in (here / "environment").read_text(), "the host's packages are not the image's"


def test_apptainer(desk):
    desk.add("apptainer", "#!/bin/sh\n")
    done = desk.start(
        "recipe.yaml", "--container", "an image.sif", "--python", "/opt/venv/bin/python", "a=b c"
    )
    assert done.returncode == 0, done.stderr
    here = desk.folder
    assert desk.ranks() == [
        "apptainer", "exec", "--nv", "--bind", f"{here}:{here},{here}:{here}", "--pwd", str(here),
        "an image.sif", "/opt/venv/bin/python", "-m", "distlora", "train", str(here / "recipe.yaml"), "a=b c",
    ]  # fmt: skip


def test_a_directory_that_cannot_be_mounted(desk):
    (desk.folder / "a:b").mkdir()
    done = desk.start("a:b/recipe.yaml", "--container", "image", SRUN_HELP=CONTAINERS)
    assert (
        done.returncode == 2
        and f"{desk.folder}/a:b as a directory" in done.stderr
        and desk.called("srun") == []
    )


def test_in_a_container_the_outcome_is_asked_there_too(desk):
    desk.start("recipe.yaml", "--container", "image", SRUN_HELP=CONTAINERS, SRUN_EXIT="75", STATUS="1")
    assert desk.called("scontrol") == ["requeue", "7"]
    (desk.folder / "srun").unlink()
    desk.start("recipe.yaml", "--container", "image", SRUN_HELP=CONTAINERS, SRUN_EXIT="1")
    words = desk.called("srun")
    assert words.count("--container-image=image") == 2 and "--relative=0" in words
    assert words[words.index("status") :][:2] == ["status", str(desk.folder / "recipe.yaml")]
