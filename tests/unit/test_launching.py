"""What launch scripts know before they start anything: hosts, variables that travel, a command line in one
word.
"""

import os
import shlex
import subprocess
import threading

import pytest
import yaml

from distlora.cli import as_rank, prepare_launch
from distlora.cluster import launching
from distlora.cluster.exported_variables import exported_names, withheld
from distlora.cluster.packed_command import pack, unpack
from distlora.errors import UserError

#: What a shell, pdsh or DeepSpeed's launcher would make something of.
VALUES = [
    "a b",
    "$HOME",
    "`id`",
    '"',
    "\\",
    "'",
    "a;b&c|d",
    "100%",
    "%h",
    "*?[x]{y}",
    "#",
    "~",
    "é",
    "a=b",
    "/usr/bin:/bin",
    "",
]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"path": "some/model"}, "method": {"name": "lora", "rank": 4}, "targets": "all-linear",
        "data": {"task": "gsm8k", "path": "data", "split": "train", "eval_split": None},
        "train": {"steps": 2, "micro_batch_size": 1, "global_batch_size": 2, "lr": 0.1},
        "deepspeed": None, "output_dir": "runs/x",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys, recipe):
    """`prepare(text of a hostfile, …)`: the exit code, what was said, and the folder."""
    monkeypatch.setattr(launching, "_refuse_unreachable", lambda hosts, recipe: None)
    for name in withheld(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setattr(
        launching, "addresses", lambda name: ["127.0.1.1", "10.0.0.7"] if name == "node1" else []
    )
    folder = tmp_path / "private"
    folder.mkdir()

    def call(hostfile: str | None, *options: str, overrides=()):
        (tmp_path / "hosts").write_text(hostfile or "")
        name = "-" if hostfile is None else str(tmp_path / "hosts")
        words = [
            "--script",
            "x.sh",
            "--hostfile",
            name,
            *options,
            "--",
            str(folder),
            "train",
            str(recipe),
            *overrides,
        ]
        return prepare_launch.main(words), capsys.readouterr().err, folder

    return call


# ---------------------------------------------------------------------- one word


@pytest.mark.parametrize("value", [*VALUES, "a\nb"])
def test_any_argument_survives_in_one_word(value):
    word = pack("/w " + value, ["train", value])
    assert unpack(word) == ("/w " + value, ["train", value])
    assert shlex.quote(word) == word and "%" not in word


def test_the_rank_runs_what_was_packed_where_it_was_packed(tmp_path, monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(
        "distlora.cli.main.main", lambda arguments: heard.append((os.getcwd(), list(arguments))) or 75
    )
    monkeypatch.chdir("/")
    monkeypatch.setattr("sys.argv", ["-m"])
    assert as_rank.main(["--local_rank=1", "mark", pack(str(tmp_path), ["train", "r.yaml", "a=$(b)"])]) == 75
    assert heard == [(str(tmp_path), ["train", "r.yaml", "a=$(b)"])]
    assert as_rank.main(["mark", pack(str(tmp_path / "gone"), [])]) == 2
    assert (
        "gone: No such file or directory; start from a directory that all hosts share"
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------------- variables


def as_deepspeed_does(text: str, variables: list[str]) -> dict[str, str]:
    """The values after DeepSpeed's reading and quoting, pdsh's % and a shell."""
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    class Runner(MultiNodeRunner):
        def __init__(self):
            self.exports = {}

        def backend_exists(self):
            return True

        def get_cmd(self, environment, active_resources):
            return []

    runner = Runner()
    for line in text.splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items()).replace("%%", "%")
    wanted = " ".join(f'"${name}"' for name in variables)
    shown = ["bash", "-c", f"{exports} printf '%s\\n' {wanted}"]
    return dict(
        zip(variables, subprocess.run(shown, capture_output=True, text=True, env={}).stdout.split("\n"))
    )


def test_every_value_arrives_through_deepspeed_and_the_shell():
    variables = {f"V{number}": value for number, value in enumerate(VALUES)}
    text = launching.environment_file(variables, list(variables), through_shell=True)
    assert as_deepspeed_does(text, list(variables)) == variables


@pytest.mark.parametrize(
    ("name", "value", "through_shell", "part"),
    [
        ("X", "a\nb", True, "X has a line break"),
        ("X", " a", True, "a space at its end"),
        ("X", "a b", False, "only the launcher pdsh can carry"),
        ("BASH_FUNC_x%%", "() { :; }", True, "no name of a variable"),
    ],
)
def test_what_would_not_arrive_is_refused(name, value, through_shell, part):
    with pytest.raises(UserError, match="unset") as refused:
        launching.environment_file({name: value}, [name], through_shell)
    assert part in str(refused.value)


def test_only_named_variables_travel():
    given = {
        "PATH": "/bin",
        "HF_HOME": "/hf",
        "HF_TOKEN": "hf_x",
        "NCCL_IB_TC": "106",
        "RANK": "3",
        "EDITOR": "vi",
        "MINE": "1",
    }
    assert exported_names(given) == ["PATH", "HF_HOME", "NCCL_IB_TC"]
    assert exported_names(given, ["MINE"]) == ["PATH", "HF_HOME", "NCCL_IB_TC", "MINE"]
    with pytest.raises(UserError, match="--export NOPE: there is no such variable"):
        exported_names(given, ["NOPE"])


def test_caches_and_transports_travel_and_what_belongs_to_one_machine_does_not():
    along = [
        "DISTLORA_CACHE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "TORCH_NCCL_TRACE",
        "FI_PROVIDER",
        "MKL_CBWR",
    ]
    stays = [
        "CUDA_VISIBLE_DEVICES",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "OMPI_COMM_WORLD_RANK",
        "SLURM_PROCID",
        "HOSTNAME",
    ]
    assert exported_names(dict.fromkeys([*stays, *along], "1")) == along
    assert withheld({"HF_TOKEN": "hf_x", "HF_ENDPOINT": "https://me:x@hub.example"}) == [
        "HF_TOKEN",
        "HF_ENDPOINT",
    ]


def test_no_secret_travels_unless_the_user_says_so():
    """Also none that DeepSpeed's launcher would take along by itself."""
    harmless = {
        "MLFLOW_TRACKING_SERVER_CERT_PATH": "/c.pem",
        "NCCL_IB_PKEY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    secret = {
        "MLFLOW_TRACKING_TOKEN": "x",
        "MLFLOW_TRACKING_PASSWORD": "x",
        "MLFLOW_TRACKING_URI": "https://me:x@host/",
    }
    given = {**harmless, **secret, "EDITOR_TOKEN": "x"}
    assert exported_names(given, []) == list(harmless) and withheld(given, []) == list(secret)
    chosen = ["MLFLOW_TRACKING_TOKEN"]
    assert (
        exported_names(given, chosen) == [*harmless, *chosen] and withheld(given, chosen) == list(secret)[1:]
    )


def test_the_script_learns_which_names_deepspeed_must_not_see(prepare, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "SEKRET")
    code, said, folder = prepare("node1 slots=1\nnode2 slots=1\n")
    assert code == 0 and len(said.splitlines()) == 1
    assert said.startswith("x.sh: the ranks do not get MLFLOW_TRACKING_TOKEN: ") and "--export" in said
    assert (folder / "withheld").read_text() == "MLFLOW_TRACKING_TOKEN\n"
    assert all("SEKRET" not in path.read_text() for path in folder.iterdir())


# ---------------------------------------------------------------------- hosts and recipe


def test_what_is_prepared(prepare):
    code, said, folder = prepare(
        "# two\nann@node1 slots=2\n\nnode2 slots=2 # fast\n", overrides=["output_dir=runs/y"]
    )
    assert (code, said) == (0, "")
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert (
        found["hosts"] == "ann@node1\nnode2\n" and found["hostfile"] == "ann@node1 slots=2\nnode2 slots=2\n"
    )
    assert (found["slots"], found["master"], found["run"]) == ("4", "10.0.0.7", "runs/y"), (
        "an address that is not loopback"
    )
    assert f"PATH={os.environ['PATH']}" in found["environment"]
    assert unpack(found["program"])[1][2:] == ["output_dir=runs/y"]


def test_an_evaluation_looks_for_the_runs_recipe_and_has_no_status(tmp_path, monkeypatch, capsys):
    looked = []
    monkeypatch.setattr(launching, "_refuse_unreachable", lambda hosts, file: looked.append(file))
    monkeypatch.setattr(launching, "addresses", lambda name: ["10.0.0.7"])
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    words = ["--script", "x.sh", "--hostfile", str(tmp_path / "hosts"), "--", str(tmp_path)]
    assert prepare_launch.main([*words, "eval", "my run", "--tasks", "gsm8k"]) == 0
    assert looked == ["my run/recipe.yaml"] and (tmp_path / "run").read_text() == ""
    assert unpack((tmp_path / "program").read_text())[1] == ["eval", "my run", "--tasks", "gsm8k"]


def test_this_machine_alone(prepare):
    code, _, folder = prepare("localhost slots=3\n")
    assert code == 0 and {path.name for path in folder.iterdir()} == {"program", "run", "slots"}
    assert (folder / "slots").read_text() == "3"


def test_this_machine_without_a_hostfile(prepare):
    code, _, folder = prepare(None)
    assert code == 0 and {path.name for path in folder.iterdir()} == {"program", "run"}


def test_uneven_slots_are_said(prepare):
    code, said, _ = prepare("node1 slots=1\nnode2 slots=2\n")
    assert code == 0 and said.startswith("x.sh: uneven slots (node1 has 1, node2 has 2)")


@pytest.mark.parametrize(
    ("hostfile", "overrides", "part"),
    [
        ("node1 slots=1\nNODE1 slots=1\n", [], ":2: NODE1 stands in"),
        ("node1 slots=1\n127.0.0.1 slots=1\n", [], "127.0.0.1 is another machine on every host"),
        ("node1 slots=1\nnode2 slots=1\n", ["train.lrr=1"], "train.lrr: unknown key, did you mean lr?"),
        (None, ["train.lrr=1"], "train.lrr: unknown key, did you mean lr?"),
    ],
)
def test_mistakes_show_before_anything_starts(prepare, hostfile, overrides, part):
    code, said, _ = prepare(hostfile, overrides=overrides)
    assert code == 2 and len(said.splitlines()) == 1
    assert said.startswith("x.sh: ") and part in said


def test_hosts_are_looked_at_all_at_once(monkeypatch, tmp_path, recipe):
    """With a stand-in for ssh: its last argument is what is run there."""
    refusal = '[[ " $* " == *" node2 "* ]] && { echo no route >&2; exit 255; }'
    (tmp_path / "ssh").write_text(f'#!/usr/bin/env bash\n{refusal}\nexec bash -c "${{@: -1}}"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hosts = [launching.Host(name, 1, f"hosts:{number}") for number, name in enumerate(("node1", "node2"), 1)]
    with pytest.raises(UserError) as refused:
        launching._refuse_unreachable(hosts, str(recipe))
    assert str(refused.value).startswith("hosts:2: node2: cannot be reached through ssh (no route)")
    launching._refuse_unreachable(hosts[:1], str(recipe))
    with pytest.raises(UserError, match="hosts:1: node1: .*nowhere is not there"):
        launching._refuse_unreachable(hosts[:1], "nowhere")


def test_hosts_that_hang_are_waited_for_all_at_once(monkeypatch):
    waiting = threading.Barrier(4)

    class Ssh:
        def __init__(self, command, **streams):
            self.returncode = None

        def communicate(self, timeout):
            waiting.wait(20)  # until all the others are waited for as well
            raise subprocess.TimeoutExpired("ssh", timeout)

        def kill(self):
            self.returncode = -9

    monkeypatch.setattr(launching.subprocess, "Popen", Ssh)
    hosts = [launching.Host(f"node{number}", 1, f"hosts:{number}") for number in range(4)]
    with pytest.raises(UserError, match="hosts:0: node0: no answer within 60 s; .* \\(and 1 more hosts\\)"):
        launching._refuse_unreachable(hosts, "recipe.yaml")
