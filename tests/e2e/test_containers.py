"""The container files as they are written: pins, users, keys, scripts. No image is built."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tests.e2e.program import REPOSITORY

FOLDER = REPOSITORY / "docker"
COMPOSE = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its text in one line) in order; comments are left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, " ".join(rest.split()))
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


FILES = {name: instructions((FOLDER / name).read_text()) for name in ("Dockerfile", "Dockerfile.cpu")}
each_image = pytest.mark.parametrize("parts", FILES.values(), ids=list(FILES))


def of(parts: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for instruction, rest in parts if instruction == word]


def final_stage(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return parts[max(number for number, (word, _) in enumerate(parts) if word == "FROM") :]


def setup_value(name: str):
    """A literal argument of `setup(…)`."""
    calls = [
        node
        for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
        if isinstance(node, ast.Call)
    ]
    (value,) = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == name]
    return ast.literal_eval(value)


# ---------------------------------------------------------------------- the Dockerfiles


@each_image
def test_everything_is_pinned(parts):
    stages = {stage for line in of(parts, "FROM") for stage in re.findall(r" AS (\w+)$", line)}
    outside = [image for image in (line.split()[0] for line in of(parts, "FROM")) if image not in stages]
    assert outside and all(re.search(r":\d+\.\d+(\.\d+)?-", image) for image in outside), (
        "a whole version, of one release"
    )
    for command in re.findall(r"pip (?:install|wheel) [^&]*", " && ".join(of(parts, "RUN"))):
        pinned = "--constraint constraints.txt" in command or re.search(
            r"--no-deps .*grep '\^[\w-]+=='", command
        )
        assert pinned or command.split()[-1] == ".", command
    for package in re.findall(r"grep '\^([\w-]+)=='", " ".join(of(parts, "RUN"))):
        assert re.search(rf"^{package}==", CONSTRAINTS, re.MULTILINE), package
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', " ".join(of(parts, "RUN")))
    assert set(extras.split(",")) <= set(setup_value("extras_require"))


def test_cuda_is_the_one_that_torch_was_built_with():
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    assert re.search(rf"^nvidia/cuda:{re.escape(torch.version.cuda)}\.", of(FILES["Dockerfile"], "FROM")[0])


@each_image
def test_what_is_copied_is_there_and_not_ignored(parts):
    ignored, *allowed = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    sources = [
        word
        for line in of(parts, "COPY")
        if "--from=" not in line
        for word in line.split()[:-1]
        if word[:2] != "--"
    ]
    assert len(sources) >= 10
    for source in sources:
        assert (REPOSITORY / source).exists() and f"!{source.split('/')[0]}" in allowed, source


@each_image
def test_layers_that_cost_most_come_before_the_source(parts):
    order = [rest for word, rest in parts if word in ("RUN", "COPY")]
    positions = [next(number for number, rest in enumerate(order) if part in rest) for part in (
        "COPY constraints"[5:], "'^torch=='", "--no-build-isolation deepspeed", "setup.py", "bnb,mpi",
        "distlora distlora",
    )]  # fmt: skip
    assert positions == sorted(positions)
    for command in of(parts, "RUN"):
        if "apt-get install" in command:
            assert "--no-install-recommends" in command and "rm -rf /var/lib/apt/lists/*" in command


@each_image
def test_how_a_container_runs(parts):
    last = final_stage(parts)
    assert (
        of(last, "USER") == ["$USER_ID"]
        and int(dict(line.split("=") for line in of(last, "ARG"))["USER_ID"]) > 0
    )
    assert [word for word, _ in last].index("USER") > max(
        n for n, (word, _) in enumerate(last) if word in ("RUN", "COPY")
    )
    (entry,), (command,), (health,) = of(last, "ENTRYPOINT"), of(last, "CMD"), of(last, "HEALTHCHECK")
    installed = re.findall(
        r"docker/([\w.]+) /usr/local/bin/([\w-]+)$", "\n".join(of(last, "COPY")), re.MULTILINE
    )
    assert json.loads(entry) == ["/usr/bin/tini", "--", dict(installed)["entrypoint.sh"]], (
        "a list: no shell holds signals back"
    )
    assert json.loads(command)[0] == "distlora"
    assert json.loads(health.partition("CMD ")[2]) == [dict(installed)["healthcheck.sh"]]
    packages = next(line for line in of(last, "RUN") if "apt-get install" in line).split()
    assert {"openmpi-bin", "pdsh", "openssh-server", "openssh-client", "procps", "tini"} <= set(packages)


@each_image
def test_labels_say_what_it_is(parts):
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', " ".join(of(parts, "LABEL"))))
    assert labels["version"] == setup_value("version")
    assert setup_value("description") in labels["description"]
    base = of(parts, "FROM")[0].split()[0].replace("${CUDA_FLAVOUR}", "base")
    assert labels["base.name"].split("/", 1)[1].removeprefix("library/") == base
    assert labels["revision"] == "$REVISION" and "DISTLORA_REVISION=$REVISION" in of(parts, "ENV")


@each_image
def test_no_secret_is_baked_in(parts):
    names = re.findall(r"(\w+)=", " ".join(of(parts, "ENV") + of(parts, "ARG")))
    assert not [
        name for name in names if re.search("TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", name, re.IGNORECASE)
    ]
    assert "ssh-keygen" not in " ".join(of(parts, "RUN"))
    server = next(line for line in of(parts, "RUN") if "openssh-server" in line)
    assert server.endswith("/etc/ssh/ssh_host_*"), (
        "the keys that the package makes for itself go in the same layer"
    )


def test_both_images_have_one_shape():
    def shape(parts):
        return [
            (word, rest if word == "COPY" else re.sub(r"^.* AS ", "", rest))
            for word, rest in parts
            if word in ("FROM", "COPY", "USER")
        ]

    assert shape(FILES["Dockerfile"]) == shape(FILES["Dockerfile.cpu"])


# ---------------------------------------------------------------------- scripts and ssh


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [shutil.which("bash"), str(FOLDER / name), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"} | environment, timeout=30
    )


def test_the_entrypoint_becomes_the_command():
    result = script("entrypoint.sh", "sh", "-c", "tr '\\0' ' ' </proc/$$/cmdline; exit 7")
    assert result.returncode == 7 and result.stdout.startswith("sh -c ")


@pytest.mark.skipif(Path("/keys").exists(), reason="this machine has a /keys")
@pytest.mark.parametrize("command", ["node", "keys"])
def test_a_node_without_its_keys_says_so(command):
    result = script("entrypoint.sh", command)
    assert result.returncode == 2 and "/keys" in result.stderr and "mount" in result.stderr


def test_health_is_a_run_directory_that_can_be_written(tmp_path):
    assert script("healthcheck.sh", DISTLORA_RUNS=str(tmp_path)).returncode == 0
    assert list(tmp_path.iterdir()) == [], "nothing is left there"
    gone = script("healthcheck.sh", DISTLORA_RUNS=str(tmp_path / "gone"))
    assert gone.returncode == 1 and "cannot write to" in gone.stdout


@pytest.mark.parametrize(("code", "health"), [(0, 0), (9, 1)])
def test_health_is_a_driver_that_answers(tmp_path, code, health):
    (tmp_path / "runs").mkdir()
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 'Failed to initialize NVML'\nexit {code}\n")
    program.chmod(0o755)
    result = script("healthcheck.sh", DISTLORA_RUNS=str(tmp_path / "runs"), PATH=f"{tmp_path}:/usr/bin:/bin")
    assert result.returncode == health and ("Failed to initialize NVML" in result.stdout) == bool(health)


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh")
def test_both_ends_of_ssh_agree():
    shown = subprocess.run(
        ["ssh", "-G", "-F", str(FOLDER / "ssh_config"), "node2"], capture_output=True, text=True, check=True
    )
    client = dict(line.split(" ", 1) for line in shown.stdout.splitlines() if " " in line)
    server = dict(
        line.split(" ", 1)
        for line in (FOLDER / "sshd_config").read_text().splitlines()
        if line and line[0] != "#"
    )
    assert client["port"] == server["Port"] == of(FILES["Dockerfile"], "EXPOSE")[0]
    assert int(server["Port"]) > 1024, "sshd is not root"
    assert client["user"] == server["AllowUsers"]
    assert client["stricthostkeychecking"] in ("true", "yes") and client["batchmode"] == "yes"
    keys = (FOLDER / "entrypoint.sh").read_text()
    for path in (
        client["identityfile"],
        client["userknownhostsfile"],
        server["HostKey"],
        server["AuthorizedKeysFile"],
    ):
        assert path.startswith("/keys/") and path.removeprefix("/keys/") in keys
    assert f'"{client["hostkeyalias"]} ' in keys
    assert {server["PasswordAuthentication"], server["KbdInteractiveAuthentication"], server["UsePAM"]} == {
        "no"
    }


# ---------------------------------------------------------------------- compose.yaml


def test_compose_has_two_nodes_of_one_host_and_keys_made_at_start():
    services = COMPOSE["services"]
    hosts = [line.split()[0] for line in (FOLDER / "hosts").read_text().splitlines()]
    assert hosts == ["node1", "node2"] and set(services) == {*hosts, "keys"}
    for name, service in services.items():
        assert (REPOSITORY / service["build"]["dockerfile"]).exists()
        assert not service.get("privileged") and "user" not in service
        volumes = {
            target: (source, mode)
            for source, target, *mode in (volume.split(":") for volume in service["volumes"])
        }
        for source, _ in volumes.values():
            assert source in COMPOSE["volumes"] or (REPOSITORY / source).is_file(), source
        if name in hosts:
            assert service["command"] == ["node"] and service["hostname"] == name
            assert volumes["/keys"] == ("keys", ["ro"]) and volumes["/workspace/runs"][0] == "runs"
            assert service["depends_on"]["keys"]["condition"] == "service_completed_successfully"
            assert service["shm_size"] == "1gb" and service["stop_grace_period"] == "2m"
    assert services["keys"]["command"] == ["keys"] and services["keys"]["network_mode"] == "none"
