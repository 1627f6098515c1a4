"""What nodes are examined for, and the report of an examination."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.doctor import cross_checks
from distlora.doctor.findings import Finding, Node, merged
from distlora.doctor.node_checks import NODE_CHECKS
from distlora.files.user_paths import user_path

#: Seconds to wait for the build of operators. A build that takes longer continues.
BUILD_LIMIT = 300.0
#: Seconds for a short request.
SHORT = 40.0

_CROSS_CHECKS: tuple[Callable[[Sequence[Node]], Iterator[Finding]], ...] = (
    cross_checks.check_reachable,
    cross_checks.check_machines,
    cross_checks.check_unknown,
    cross_checks.check_slots,
    cross_checks.check_versions,
    cross_checks.check_alike,
    cross_checks.check_route,
    cross_checks.check_port,
    cross_checks.check_run_dir,
    cross_checks.check_paths,
    cross_checks.check_clocks,
)


@dataclass(frozen=True)
class Subject:
    """What the nodes are examined for.

    run_dir: the directory that all nodes must share. paths: label -> a path that must be visible. model: a
    name on the hub, or None. hub: whether anything may have to be downloaded. operators: names of DeepSpeed's
    builders.
    """

    run_dir: str
    paths: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    hub: bool = True
    operators: tuple[str, ...] = ()

    def request(self, token: str, index: int) -> dict[str, Any]:
        """The request for `facts.collect` on the node with this index. token: of this examination."""
        return {
            "do": "facts", "run_dir": self.run_dir, "mark": f"{token}-{index}", "paths": dict(self.paths),
            "model": self.model, "hub": self.hub, "operators": list(self.operators),
            "build_limit": BUILD_LIMIT,
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The findings, and the names of all nodes. told: whether this process shows the report."""

    findings: list[Finding]
    nodes: list[str]
    told: bool = True

    @property
    def code(self) -> int:
        return int(any(finding.level == "failure" for finding in self.findings))


def subject_of(recipe: Path | None, run_dir: Path | None, build: bool) -> Subject:
    """What a recipe needs; without a recipe, what every run needs. build: whether operators are built."""
    operators = ["ShareMemCommBuilder"]
    if recipe is None:
        return Subject(str((run_dir or Path.cwd()).absolute()), operators=tuple(operators) if build else ())
    from distlora.data.local_files import place_of
    from distlora.methods import start_of
    from distlora.recipe.deepspeed_resolution import look_up
    from distlora.recipe.load import load_recipe
    from distlora.tasks import get_task

    loaded = load_recipe(recipe)
    paths, model = {"recipe": str(recipe)}, None
    rows = loaded.data.path
    file, key = place_of(rows or "")
    for label, path in (("model", loaded.model.path), ("data", rows if key is None else str(file))):
        if path and (user_path(path, label).exists() or path[0] in "./~"):
            paths[label] = path
    start = start_of(loaded.method)
    if start is not None:
        paths["adapter"] = start
    if "model" not in paths and not loaded.model.path.startswith("pypi:"):
        model = loaded.model.path
    data = loaded.data.path or get_task(loaded.data.task).path
    hub = model is not None or (data is not None and "data" not in paths)
    if look_up(loaded.deepspeed or {}, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme"):
        operators.append("CPUAdamBuilder")
    wanted = tuple(operators) if build and loaded.deepspeed is not None else ()
    return Subject(str((run_dir or Path(loaded.output_dir)).absolute()), paths, model, hub, wanted)


def judge_nodes(nodes: Sequence[Node]) -> list[Finding]:
    """The findings of all checks."""
    return merged(finding for check in (*_CROSS_CHECKS, *NODE_CHECKS) for finding in check(nodes))
