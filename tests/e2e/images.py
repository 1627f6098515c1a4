"""Images built and run without a container engine's daemon: podman as root, chroot isolation, a base image
made by debootstrap.

The base is Debian's whatever FROM names, so what is shown is a Dockerfile's logic, not its base. Nothing is
pulled. pip inside has the settings of pip outside, by mounts that leave nothing in the image. All storage
lies in one folder.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.program import REPOSITORY, Outcome

PROGRAMS = ("podman", "runc", "netavark", "iptables", "debootstrap")
MIRROR = "http://deb.debian.org/debian"
#: Where pip's index lies unless somebody said otherwise.
PYPI = "https://pypi.org/simple"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def lacking() -> str:
    """Why no image can be built here; empty if one can."""
    if os.geteuid() != 0:
        return "images are built by root only, without an engine's daemon"
    places = os.pathsep.join([os.environ["PATH"], "/usr/lib/podman", "/usr/libexec/podman", "/usr/sbin"])
    missing = [program for program in PROGRAMS if shutil.which(program, path=places) is None]
    return f"there is no {' and no '.join(missing)}" if missing else ""


@dataclass
class Engine:
    """podman with storage, networks and settings of its own in `folder`."""

    folder: Path
    bases: set[str] = field(default_factory=set)

    def __post_init__(self):
        root = self.folder
        (root / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'[network]\nnetwork_config_dir = "{root}/networks"\n'
        )
        (root / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{root}/storage"\nrunroot = "{root}/run"\n'
        )
        self.environment = os.environ | {
            "CONTAINERS_CONF": str(root / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(root / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }  # fmt: skip

    def call(self, *command: object, seconds: float = 240) -> Outcome:
        # A log file, not a pipe: what watches a container keeps the pipe open as long as that lives.
        log = self.folder / "errors.log"
        with log.open("w+") as errors, (self.folder / "output.log").open("w+") as output:
            done = subprocess.run(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                env=self.environment, cwd=REPOSITORY, timeout=seconds,
            )  # fmt: skip
            output.seek(0), errors.seek(0)
            return Outcome(done.returncode, output.read(), errors.read())

    def podman(self, *arguments: object, seconds: float = 240) -> str:
        """Its output; it must succeed."""
        outcome = self.call("podman", *arguments, seconds=seconds)
        assert outcome.code == 0, outcome.out[-3000:] + outcome.err[-3000:]
        return outcome.out

    def compose(self, *arguments: object, seconds: float = 240) -> Outcome:
        return self.call("podman-compose", *arguments, seconds=seconds)

    def _root_file_system(self) -> Path:
        root = self.folder / "base"
        if not root.exists():
            command = [
                "debootstrap",
                "--variant=minbase",
                "--include=ca-certificates",
                "bookworm",
                str(root),
                MIRROR,
            ]
            made = self.call(*command, seconds=900)
            assert made.code == 0, made.out[-2000:]
        return root

    def build(self, dockerfile: str, tag: str) -> None:
        """The image of a Dockerfile in docker/, over the base image that FROM is believed to name."""
        text = (REPOSITORY / "docker" / dockerfile).read_text()
        base = re.search(r"^FROM (\S+) AS base", text, re.MULTILINE)[1].replace("${CUDA_FLAVOUR}", "base")
        if base not in self.bases:
            archive = self.folder / "base.tar"
            subprocess.run(["tar", "-C", self._root_file_system(), "-cf", archive, "."], check=True)
            self.podman("import", archive, f"docker.io/{base if '/' in base else 'library/' + base}")
            archive.unlink()
            self.bases.add(base)
        options = [
            "--isolation=chroot",
            "--format=docker",
            "--pull=never",
            "--layers",
            *_pip_settings(self.folder),
        ]
        self.podman("build", *options, "--file", f"docker/{dockerfile}", "--tag", tag, ".", seconds=3000)

    def close(self) -> None:
        for arguments in (
            ["rm", "--all", "--force", "--time=0"],
            ["volume", "prune", "--force"],
            ["network", "prune", "--force"],
        ):
            self.call("podman", *arguments)
        self.call("podman", "rmi", "--all", "--force")
        self.call("umount", self.folder / "storage" / "overlay")
        shutil.rmtree(self.folder, ignore_errors=True)


def _pip_settings(folder: Path) -> list[str]:
    """Options of `podman build` that give pip the index,
    the wheels and the certificate that it has outside.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^\S*\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if key in ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "proxy"):
            found[key] = value.replace("\\n", " ").split()
    if not found:
        return [f"--build-arg=TORCH_INDEX={CPU_BUILDS}"]
    mounts = {f"{folder}/pip.conf": "/etc/pip.conf"}
    for number, certificate in enumerate(found.get("cert", [])):
        mounts[certificate] = f"/run/pip-certificate-{number}"
        found["cert"] = [mounts[certificate]]
    for place in (
        word for key in ("index-url", "extra-index-url", "find-links") for word in found.get(key, [])
    ):
        # An index may lead to files beside it.
        path = str(Path(place.removeprefix("file://")).parent) if place.startswith("file://") else place
        if path.startswith("/"):
            mounts[path] = path
    (folder / "pip.conf").write_text(
        "[global]\n" + "".join(f"{key} = {' '.join(values)}\n" for key, values in found.items())
    )
    options = [f"--volume={source}:{target}:ro" for source, target in mounts.items() if Path(source).exists()]
    return [*options, f"--build-arg=TORCH_INDEX={found.get('index-url', [PYPI])[0]}"]
