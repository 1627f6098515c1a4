"""Who may import whom, and what the library never does: read from the sources."""

import ast
from pathlib import Path

import pytest

from distlora import errors

PACKAGE = Path(errors.__file__).parent
MODULES = {
    ".".join(("distlora", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

#: A vendor and the only files that may import it, relative to the package.
HOMES = {
    "torch.distributed": {"comm.py"},
    "deepspeed": {"zero.py", "deepspeed_check.py", "doctor/operators.py"},
    "transformers": {"model.py", "smollm2.py", "zero.py"},
    "datasets": {"data/"},
    "tensorboard": {"monitor.py"},
    "torch.utils.tensorboard": {"monitor.py"},
    "bitsandbytes": {"bnb_optimizers.py", "quantized.py"},
    "matplotlib": {"plan/picture.py"},
    "mpi4py": {"mpi.py"},
    "peft": set(),
    "pickle": set(),
}

#: The floors of the house, lowest first; a module imports from lower floors only. What is not named lives on the floor of
#: `attach`: there modules may use each other, but never in a circle.
FLOORS = [
    {"errors"},
    {"functional", "linalg", "rounding", "importance", "moments", "switching", "blockwise", "quantized"},
    {"methods"},
    {"bnb_optimizers", "addresses", "nodelist", "mpi"},
    {"rendezvous"},
    {"layer", "comm", "optimizer", "fusing"},
    {"engine"},
    set(),
    {"zero"},
    {"run"},
    {"train"},
    {"cli"},
    {"__main__", "launched"},
]
MIDDLE = FLOORS.index(set())


def _imports(tree: ast.AST) -> set[str]:
    """Every module, or name in a module, that is imported anywhere in the file, as a dotted name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("importlib.import_module", "import_module", "__import__"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        elif isinstance(node, ast.Attribute) and (_dotted(node) or "").startswith("torch.distributed"):
            found.add("torch.distributed")  # reached through `import torch`
    return found


def _dotted(node: ast.AST) -> str | None:
    """`a.b.c` for an attribute of a name, None for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _vendor_breaches(tree: ast.AST, file: str) -> list[str]:
    found = []
    for vendor, homes in HOMES.items():
        at_home = any(file == home or (home.endswith("/") and file.startswith(home)) for home in homes)
        if not at_home and any(_within(name, vendor) for name in _imports(tree)):
            found.append(f"{file} imports {vendor}")
    return found


SEEDING = {
    *("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "random.seed"),
    *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed", "numpy.random.seed"),
    *("set_seed", "transformers.set_seed", "manual_seed"),
}
#: Setting a generator's whole state is for the two places that put states back: around a run, and on resume.
STATES = {"torch.set_rng_state", "torch.random.set_rng_state", "torch.cuda.set_rng_state", "torch.cuda.set_rng_state_all"}
STATES_HOMES = {"rng.py", "checkpoint.py"}


def _forbidden(tree: ast.AST, file: str) -> list[str]:
    """What is done in this file that the library never does, with the line."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        if name in SEEDING or (name in STATES and file not in STATES_HOMES):
            found.append(f"{file}:{node.lineno} reseeds a global generator")
        if name == "print" and file != "cli.py":
            found.append(f"{file}:{node.lineno} prints")
        if name in ("torch.load", "eval", "exec", "os.system"):
            found.append(f"{file}:{node.lineno} calls {name}")
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            if (keyword.arg == "strict" and value is False and name != "zip") or (
                keyword.arg in ("shell", "trust_remote_code") and value is True
            ):
                found.append(f"{file}:{node.lineno} passes {keyword.arg}={value}")
    return found


def _without_type_hints(tree: ast.AST) -> ast.AST:
    """The file as it runs: what stands under `if TYPE_CHECKING:` is imported by no program."""

    class Remove(ast.NodeTransformer):
        def visit_If(self, node):
            return None if _dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else self.generic_visit(node)

    return Remove().visit(tree)


def _floor(module: str) -> int:
    name = module.split(".")[1] if "." in module else "__main__"
    return next((i for i, names in enumerate(FLOORS) if name in names), MIDDLE)


def _own_imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of this package that a module imports, as keys of MODULES."""
    targets = set()
    for name in _imports(tree):
        while name not in MODULES and "." in name:
            name = name.rsplit(".", 1)[0]
        if _within(name, "distlora"):
            targets.add(name)
    return targets - {module, "distlora"}


def _tree(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


every_module = pytest.mark.parametrize("module", MODULES)


@every_module
def test_each_vendor_stays_in_its_home(module):
    assert _vendor_breaches(_tree(module), str(MODULES[module].relative_to(PACKAGE))) == []


def test_of_transformers_the_zero_engine_takes_only_its_deepspeed_config():
    names = {name for name in _imports(_tree("distlora.zero")) if _within(name, "transformers")}
    assert names <= {"transformers.integrations.HfDeepSpeedConfig", "transformers.integrations.deepspeed.HfDeepSpeedConfig"}


@every_module
def test_the_library_does_nothing_forbidden(module):
    assert _forbidden(_tree(module), str(MODULES[module].relative_to(PACKAGE))) == []


@every_module
def test_imports_go_downwards(module):
    above = {
        target
        for target in _own_imports(module, _tree(module))
        if _floor(target) > _floor(module)
        or (_floor(target) == _floor(module) != MIDDLE and target.split(".")[1] != module.split(".")[1])
    }
    assert above == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("distlora.methods.")])
def test_a_method_knows_no_module_rank_device_or_engine(module):
    names = ("functional", "linalg", "rounding", "importance", "switching", "errors", "methods")
    allowed = [f"distlora.{name}" for name in names]
    assert all(any(_within(target, a) for a in allowed) for target in _own_imports(module, _tree(module)))


@pytest.mark.parametrize("module", [f"distlora.{name}" for name in sorted(FLOORS[1])])
def test_mathematics_imports_nothing_of_the_house(module):
    assert _own_imports(module, _tree(module)) <= {"distlora.errors"}


@pytest.mark.parametrize(("module", "vendor"), [("quantized", "bitsandbytes"), ("deepspeed_check", "deepspeed")])
def test_what_takes_seconds_is_loaded_only_when_it_is_needed(module, vendor):
    """Packed weights, and a DeepSpeed config. An installation without bitsandbytes is complete for every other run."""
    tree = _tree(f"distlora.{module}")
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    anywhere = ast.Module([node for node in tree.body if node not in inside], [])
    assert any(_within(name, vendor) for node in inside for name in _imports(node))
    assert not any(_within(name, vendor) for name in _imports(anywhere))


def test_only_training_chooses_the_engine():
    users = {m for m in MODULES if "distlora.zero" in _own_imports(m, _tree(m))}
    assert users <= {"distlora.run"}


def test_every_folder_is_a_package():
    """Without its __init__.py, `find_packages` leaves a folder out of what is installed."""
    folders = {path.parent for path in MODULES.values()} | {PACKAGE}
    assert [folder.name for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_there_are_no_circles():
    edges = {m: _own_imports(m, _without_type_hints(_tree(m))) for m in MODULES}
    # A package's __init__ runs before its files, so what a file asks of its own package is not a circle of ours.
    edges = {m: {t for t in targets if not _within(m, t)} for m, targets in edges.items()}
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in edges[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


# ---------------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import barrier",
        "import torch\ntorch.distributed.barrier()",
        "import deepspeed",
        "from deepspeed.runtime import zero",
        "def f():\n    import transformers",
        "import importlib\nimportlib.import_module('datasets')",
        "from torch.utils.tensorboard import SummaryWriter",
        "import bitsandbytes as bnb",
        "import pickle",
    ],
)
def test_a_vendor_outside_its_home_is_seen(source):
    assert len(_vendor_breaches(ast.parse(source), "layer.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.manual_seed(1)",
        "torch.set_rng_state(s)",
        "np.random.seed(1)",
        "random.seed(1)",
        "print('x')",
        "torch.load(path)",
        "model.load_state_dict(s, strict=False)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_is_seen(source):
    assert len(_forbidden(ast.parse(source), "layer.py")) == 1


@pytest.mark.parametrize(
    "source",
    ["torch.Generator().manual_seed(1)", "zip(a, b, strict=False)", "subprocess.run(c, shell=False)", "log.info('x')"],
)
def test_what_is_allowed_is_not_reported(source):
    assert _forbidden(ast.parse(source), "layer.py") == []


def test_the_modules_were_found_and_their_imports_read():
    assert {"distlora.comm", "distlora.methods", "distlora.methods.lora_sb"} <= set(MODULES)
    assert "distlora.linalg" in _own_imports("distlora.methods.lora_sb", _tree("distlora.methods.lora_sb"))
    assert "torch.distributed" in _imports(_tree("distlora.comm"))
    assert _floor("distlora.methods.lora") < _floor("distlora.engine") < _floor("distlora.attach") < _floor("distlora.train")
