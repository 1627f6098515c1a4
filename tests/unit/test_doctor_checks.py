"""What the doctor makes of facts: every failure handed in as facts, and a healthy cluster beside it."""

import copy

import pytest

from distlora.doctor.findings import Finding, Node
from distlora.doctor.subject import Report, judge_nodes
from distlora.doctor.table import table

GIB = 1 << 30


def facts(index: int = 0) -> dict:
    """A healthy node with two accelerators."""
    return {
        "node": {"host": f"node{index}", "machine": f"boot-{index}", "cores": 16,
                 "memory": {"total": 64 * GIB, "free": 60 * GIB}},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "distlora": "0.1.0",
                     "transformers": "5.23.0", "numpy": "2.4.0", "cuda": "12.8", "nccl": "2.27.3"},
        "accelerators": {"devices": [{"name": "H100", "free": 79 * GIB, "total": 80 * GIB}] * 2,
                         "hardware": 2, "hidden": False},
        "network": {"own": [f"10.0.0.{index + 1}"],
                    "interfaces": {"lo": "127.0.0.1", "eth0": f"10.0.0.{index + 1}"}, "asked": {},
                    "master": "node0", "master_addresses": ["10.0.0.1"], "source": f"10.0.0.{index + 1}",
                    "interface": "eth0", "answer": "refused"},
        "port": {"port": 29500, "problem": None, "another": 40001} if index == 0 else {},
        "run_dir": {"path": "/shared/runs", "problem": None},
        "paths": {"recipe": {"path": "r.yaml", "exists": True, "sha256": "aa"}},
        "disk": {"run directory": {"path": "/shared/runs", "free": 500 * GIB, "total": 900 * GIB}},
        "shm": {"free": 30 * GIB, "total": 32 * GIB},
        "hub": {"model": None, "cache": "/home/me/.cache/hub", "cached": False, "needed": True,
                "problem": None},
        "compiler": {"asked": "c++", "compiler": "/usr/bin/c++", "version": "c++ 12.2.0",
                     "ninjas": {"/venv/bin/ninja": "1.13"}, "header": True},
        "extensions": {"path": "/home/me/.cache/torch_extensions", "locks": []},
        "operators": {"state": "built", "seconds": 4.0, "said": ""},
    }  # fmt: skip


def cluster(count: int = 2, **fields) -> list[Node]:
    marks = tuple(f"token-{index}" for index in range(count))
    common = {"slots": 2, "skew": 0.0, "doubt": 0.1, "marks": marks} | fields
    return [
        Node(f"node{index}", facts(index), place=f"hosts:{index + 1}", **common) for index in range(count)
    ]


def change(node: Node, path: str, value) -> None:
    """Sets a fact: "hub.problem"."""
    place = node.facts
    *way, last = path.split(".")
    for key in way:
        place = place[key]
    place[last] = value


def bad(nodes: list[Node]) -> list[Finding]:
    return [finding for finding in judge_nodes(nodes) if finding.level != "ok"]


def test_a_healthy_cluster_has_no_complaint_and_every_check_speaks():
    findings = judge_nodes(cluster())
    assert bad(cluster()) == []
    spoken = {finding.check for finding in findings}
    assert spoken == {
        *(
            "node",
            "versions",
            "route",
            "port",
            "run directory",
            "recipe",
            "clock",
            "accelerators",
            "disk",
            "shared memory",
            "hub",
        ),
        *("compiler", "build lock", "operators"),
    }
    assert Report(findings, []).code == 0


@pytest.mark.parametrize("count", [1, 3])
def test_so_has_a_single_machine_and_three(count):
    assert bad(cluster(count)) == []


#: fact on node1 -> check, level, and words of what is found and of the remedy
ONE_NODE = [
    ("versions.torch", "2.12.0", "versions", "failure", "torch differs: 2.13.0 on node0, 2.12.0 on node1",
     "same torch"),
    ("versions.python", "3.12.0", "versions", "failure", "python differs", "same python"),
    ("versions.numpy", "2.3.0", "versions", "warning", "numpy differs", "same numpy"),
    ("versions.nccl", None, "versions", "failure", "2.27.3 on node0, none on node1", "nccl"),
    ("node.machine", "boot-0", "hosts", "failure", "one and the same machine", "hosts:1, hosts:2"),
    ("accelerators.devices", [{"name": "H100", "free": 80, "total": 80}], "slots", "failure",
     "hosts:2: slots=2", "slots=1"),
    ("accelerators.hardware", 4, "accelerators", "failure", "4 devices are there, and torch sees 2",
     "driver"),
    ("accelerators.devices", [{"name": "H100", "free": 20 * GIB, "total": 80 * GIB}] * 2, "accelerators",
     "warning", "20.0 G", ""),
    ("accelerators.devices", [{"name": "A100", "free": 1, "total": 1}] * 2, "accelerators", "warning",
     "A100 on node1", "kind"),
    ("accelerators.devices", [], "accelerators", "failure", "none on node1", "one kind"),
    ("network.master_addresses", [], "route", "failure", "node0 of the master means nothing", "resolve"),
    ("network.master_addresses", ["127.0.1.1"], "route", "failure", "loopback address (127.0.1.1)",
     "/etc/hosts"),
    ("network.source", None, "route", "failure", "no route", "network"),
    ("network.answer", "silent", "route", "failure", "does not answer from 10.0.0.2 (eth0)", "firewall"),
    ("network.own", ["127.0.1.1"], "route", "warning", "own name resolves to 127.0.1.1",
     "GLOO_SOCKET_IFNAME=eth0"),
    ("network.own", [], "route", "warning", "own name resolves to nothing", "/etc/hosts"),
    ("network.asked", {"NCCL_SOCKET_IFNAME": "ib0"}, "route", "failure", "NCCL_SOCKET_IFNAME=ib0, but",
     "unset"),
    ("run_dir.problem", "Permission denied", "run directory", "failure", "/shared/runs: Permission denied",
     "every node can write"),
    ("paths.recipe.exists", False, "recipe", "failure", "r.yaml cannot be seen",
     "file system that all nodes share"),
    ("paths.recipe.sha256", "bb", "recipe", "failure", "r.yaml differs between node0 and node1", "copy"),
    ("disk.run directory.free", 5 * GIB, "disk", "warning", "5.0 GiB of 900.0 GiB are free in /shared/runs",
     "room"),
    ("disk.run directory.free", 5 << 20, "disk", "failure", "0.0 GiB", "room"),
    ("shm.free", 512 << 20, "shared memory", "warning", "0.5 GiB of 32.0 GiB", "--shm-size"),
    ("shm.free", 60 << 20, "shared memory", "failure", "0.1 GiB", "--shm-size"),
    ("hub.problem", "HF_HUB_OFFLINE is set", "hub", "warning", "HF_HUB_OFFLINE", "cache"),
    ("compiler.compiler", None, "compiler", "failure", "no C++ compiler", "g++"),
    ("compiler.ninjas", {}, "compiler", "failure", "ninja is not on PATH", "ninja"),
    ("compiler.header", False, "compiler", "failure", "Python.h", "python3-dev"),
    ("compiler.ninjas", {"/a/ninja": "1.13", "/b/ninja": "1.11"}, "compiler", "warning", "/b/ninja (1.11)",
     "anew"),
    ("operators.state", "failed", "operators", "failure", "failed", "distlora.engine.zero.operators"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "check", "level", "found", "remedy"), ONE_NODE, ids=lambda value: str(value)[:30]
)
def test_what_is_wrong_on_one_node(path, value, check, level, found, remedy):
    nodes = cluster()
    change(nodes[1], path, value)
    finding = next(finding for finding in bad(nodes) if finding.check == check and found in finding.found)
    assert finding.level == level and "node1" in finding.nodes and remedy in finding.remedy
    assert all("\n" not in text for text in (finding.found, finding.remedy))
    assert Report(bad(nodes), []).code == (level == "failure")


def test_every_complaint_has_a_remedy():
    for path, value, *_ in ONE_NODE:
        nodes = cluster()
        change(nodes[1], path, value)
        assert all(finding.remedy for finding in bad(nodes)), path


def test_a_node_that_does_not_answer():
    nodes = [
        cluster()[0],
        Node("node1", place="hosts:2", slots=2, problem="cannot be reached through ssh (timed out)"),
    ]
    (finding,) = [finding for finding in bad(nodes) if finding.check == "node"]
    assert (
        finding.nodes == ("node1",)
        and finding.found.startswith("hosts:2: cannot be reached")
        and "`ssh node1 true`" in finding.remedy
    )


def test_a_node_that_answers_but_lacks_something():
    (finding,) = [
        f
        for f in bad([cluster()[0], Node("node1", problem="No module named torch", slots=2)])
        if f.check == "node"
    ]
    assert "same Python environment" in finding.remedy


def test_a_topic_that_hangs_is_told_and_spoils_no_other():
    nodes = cluster()
    change(nodes[1], "run_dir", {"error": "no answer within 90 s"})
    found = bad(nodes)
    assert [(finding.check, finding.nodes) for finding in found] == [("run_dir", ("node1",))]
    assert "no answer within 90 s" in found[0].found


def test_uneven_slots():
    nodes = cluster()
    change(nodes[1], "accelerators.devices", facts()["accelerators"]["devices"] * 2)
    change(nodes[1], "accelerators.hardware", 4)
    nodes[1] = Node("node1", nodes[1].facts, slots=4, skew=0.0, marks=nodes[0].marks)
    (finding,) = bad(nodes)
    assert (finding.check, finding.level) == (
        "slots",
        "warning",
    ) and "node0 has 2, node1 has 4" in finding.found


def test_more_ranks_than_cores_without_an_accelerator():
    nodes = cluster(slots=32)
    for node in nodes:
        change(node, "accelerators", {"devices": [], "hardware": 0, "hidden": False})
    assert [(finding.check, finding.level, finding.nodes) for finding in bad(nodes)] == [
        ("slots", "warning", ("node0",)), ("slots", "warning", ("node1",)),
    ]  # fmt: skip


def test_a_master_called_localhost_is_wrong_for_two_nodes_and_right_for_one():
    for count, wrong in ((1, False), (2, True)):
        nodes = cluster(count)
        for node in nodes:
            change(node, "network.master", "localhost")
            change(node, "network.master_addresses", ["127.0.0.1"])
        assert any("loopback" in finding.found and len(finding.nodes) == 2 for finding in bad(nodes)) == wrong


def test_an_interface_may_be_a_prefix_or_an_exclusion():
    for asked in ("eth", "=eth0", "ib0,eth0", "^lo,docker0"):
        nodes = cluster()
        change(nodes[1], "network.asked", {"NCCL_SOCKET_IFNAME": asked})
        assert bad(nodes) == [], asked


def test_a_port_in_use():
    nodes = cluster()
    change(nodes[0], "port.problem", "in use")
    (finding,) = bad(nodes)
    assert finding == Finding(
        "port", "failure", ("node0",), "29500 is in use", "take another one: MASTER_PORT or --port 40001"
    )


def test_a_run_directory_that_is_not_shared():
    nodes = cluster()
    nodes[1] = Node("node1", nodes[1].facts, slots=2, skew=0.0, marks=("token-1",))
    (finding,) = bad(nodes)
    assert (
        finding.check == "run directory"
        and finding.nodes == ("node1",)
        and "not one and the same" in finding.found
    )


@pytest.mark.parametrize(
    ("skew", "doubt", "level"),
    [(1.5, 0.1, None), (5.0, 0.1, "warning"), (5.0, 4.0, None), (300.0, 0.1, "failure")],
)
def test_clocks(skew, doubt, level):
    nodes = cluster()
    nodes[1] = Node("node1", nodes[1].facts, slots=2, skew=skew, doubt=doubt, marks=nodes[0].marks)
    found = bad(nodes)
    assert [finding.level for finding in found] == ([level] if level else [])
    if level:
        assert "node1 is at least" in found[0].found and "ahead of node0" in found[0].found


def test_a_lock_that_nobody_holds():
    lock = {"path": "/c/deepspeed shm/lock", "age": 7200.0, "holder": None}
    nodes = cluster()
    change(nodes[1], "extensions.locks", [lock])
    change(nodes[1], "operators", {"state": "skipped", "why": "a lock is in the way"})
    stale, skipped = bad(nodes)
    assert (stale.check, stale.level, stale.nodes) == ("build lock", "failure", ("node1",))
    assert "2 h old, is held by no process: every start would wait" in stale.found
    assert stale.remedy == "rm -f '/c/deepspeed shm/lock'"
    assert (skipped.check, skipped.level) == ("operators", "warning")


def test_a_lock_that_a_living_build_holds_on_another_node():
    """The cache is shared: the node that holds it knows."""
    nodes = cluster()
    for node, holder in zip(nodes, (None, 4711)):
        change(node, "extensions.locks", [{"path": "/c/x/lock", "age": 30.0, "holder": holder}])
    assert [(finding.check, finding.level, finding.nodes) for finding in bad(nodes)] == [
        ("build lock", "warning", ("node0", "node1"))
    ]
    nodes = cluster()
    change(nodes[0], "extensions.locks", [{"path": "/c/x/lock", "age": 300.0, "holder": None}])
    assert "unless a node that was not asked" in bad(nodes)[0].found, (
        "it may be young because another job is building"
    )


@pytest.mark.parametrize(
    ("age", "state", "level"),
    [
        (4.0, "built", "warning"),
        (90.0, "running", "warning"),
        (4.0, "skipped", "warning"),  # by a job that nobody was asked about
        (90.0, "skipped", "failure"),
        (7200.0, "built", "failure"),  # in a cache of the node's own that has the same path
    ],
)
def test_a_lock_of_the_build_that_another_node_was_just_asked_for(age, state, level):
    """The cache is shared: the other one has looked for locks before there was this one, and the own
    processes do not hold it.
    """
    nodes = cluster()
    change(
        nodes[0],
        "operators",
        {"state": state, "seconds": 4.0, "said": "", "pid": 9, "log": "x.log", "why": "none is needed"},
    )
    path = "/home/me/.cache/torch_extensions/x/lock"
    change(nodes[1], "extensions.locks", [{"path": path, "age": age, "holder": None}])
    change(nodes[1], "operators", {"state": "skipped", "why": "a lock is in the way"})
    (finding,) = [finding for finding in bad(nodes) if finding.check == "build lock"]
    assert (finding.level, finding.nodes) == (level, ("node1",))
    assert finding.remedy.startswith("rm -f ") == (level == "failure")


def test_on_one_machine_a_young_lock_that_nobody_holds_is_of_a_build_that_was_killed():
    node = cluster()[0]
    change(node, "extensions.locks", [{"path": "/c/x/lock", "age": 4.0, "holder": None}])
    assert [finding.level for finding in bad([node]) if finding.check == "build lock"] == ["failure"]


def test_a_build_that_goes_on():
    nodes = cluster()
    change(nodes[1], "operators", {"state": "running", "pid": 99, "log": "x.log"})
    (finding,) = bad(nodes)
    assert finding.level == "warning" and "process 99" in finding.found and "do not end it" in finding.remedy


def test_the_hub_matters_where_the_model_is_there():
    nodes = cluster()
    for node in nodes:
        change(
            node,
            "hub",
            {"model": "a/b", "cache": "/hub", "cached": False, "needed": True, "problem": "timed out"},
        )
    (finding,) = bad(nodes)
    assert (
        finding.level == "failure"
        and finding.nodes == ("node0", "node1")
        and "a/b is not in /hub" in finding.found
    )
    for node in nodes:
        change(node, "hub.cached", True)
    assert bad(nodes) == []
    for node in nodes:
        change(node, "hub.cached", False)
        change(node, "hub.needed", False)
    assert bad(nodes) == [], "model and data are local"


def test_what_is_said_of_several_nodes_is_one_row():
    nodes = cluster(3)
    for node in nodes[1:]:
        change(node, "compiler.header", False)
    (finding,) = bad(nodes)
    assert finding.nodes == ("node1", "node2")


def test_judging_changes_no_fact():
    nodes = cluster()
    before = copy.deepcopy([node.facts for node in nodes])
    judge_nodes(nodes)
    assert [node.facts for node in nodes] == before


def test_the_table():
    findings = [
        Finding("versions", "ok", ("a", "b"), "torch 2.13"),
        Finding("port", "failure", ("a",), "29500 is in use " + "and more " * 30, "take another one"),
        Finding("hub", "warning", ("b",), "no access", "cache"),
    ]
    lines = table(findings, ["a", "b"]).splitlines()
    assert lines[0].split() == ["check", "node", "result", "found"]
    assert lines[1].split() == ["versions", "all", "ok", "torch", "2.13"]
    assert any(line.strip() == "-> take another one" for line in lines)
    assert lines[-1] == "1 failure, 1 warning, 1 ok"
    assert max(map(len, lines)) <= 132
    assert "a, b and 2 more" in table([Finding("x", "ok", ("a", "b", "c", "d"), "")], list("abcde"))
