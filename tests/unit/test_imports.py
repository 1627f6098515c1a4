"""Who may import whom, and what the library never does: read from the sources."""

import ast
import copy
from functools import cache
from pathlib import Path

import pytest

from distlora import errors

PACKAGE = Path(errors.__file__).parent
EXAMPLES = PACKAGE.parent / "examples"
MODULES = {
    ".".join(("distlora", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

#: A vendor and the only places that may import it, relative to the package.
HOMES = {
    "torch.distributed": {"engine/comm/"},
    "deepspeed": {"engine/zero/"},
    "transformers": {"models/", "engine/zero/engine.py", "integrations/"},
    "accelerate": {"integrations/"},
    "trl": {"integrations/trl.py"},
    "datasets": {"data/"},
    "tensorboard": {"training/board.py", "report/board.py"},
    "torch.utils.tensorboard": {"training/board.py"},
    "bitsandbytes": {"engine/bitsandbytes_adamw.py", "adapter/packed.py"},
    "matplotlib": {"plan/picture.py", "report/drawing.py", "training/pictures.py"},
    "PIL": {"data/"},
    "mpi4py": {"cluster/mpi.py"},
    "math_verify": {"tasks/reading/equivalence_worker.py"},
    "peft": set(),
    # What these read can execute code.
    **dict.fromkeys(("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"), set()),
    # They pickle what they send to their processes.
    **dict.fromkeys(("multiprocessing", "torch.multiprocessing"), set()),
    "concurrent.futures.ProcessPoolExecutor": set(),
}

#: The floors of the house, lowest first: folders, and modules that stand beside them. Each imports from lower
#: floors only; those of one floor do not know each other. Within a folder modules may use each other, but
#: never in a circle.
FLOORS = [
    {"errors", "progress", "sentences"},
    {"files", "maths"},
    {"methods"},
    {"adapter"},
    {"engine"},
    {"initialisation", "models"},
    {"recompose", "tasks"},
    {"checkpoints", "data"},
    {"exports", "evaluation"},
    {"recipe"},
    {"cluster"},
    {"api"},
    {"training", "integrations"},
    {"doctor", "plan", "report", "sweeps"},
    {"cli"},
    {"__main__", "__init__"},
]
#: What a folder does not import, though it lies on a lower floor.
STRANGERS = {
    "cluster": {
        "methods",
        "adapter",
        "initialisation",
        "recompose",
        "checkpoints",
        "exports",
        "models",
        "tasks",
        "data",
        "evaluation",
        "recipe",
    },
    "recipe": {"models", "data", "evaluation", "checkpoints", "exports", "recompose", "initialisation"},
    "evaluation": {"recompose", "checkpoints"},
    "models": {"adapter", "engine"},
    "tasks": {"adapter", "engine", "models"},
    "data": {"adapter", "engine"},
    "integrations": {"cluster", "recipe", "tasks", "evaluation", "checkpoints", "exports", "recompose"},
    "api": {"models", "tasks", "data", "evaluation", "recipe", "cluster"},
    "doctor": {"training", "api"},
    "sweeps": {"api", "models", "adapter", "data"},
}


@cache
def _imports(tree: ast.AST) -> set[str]:
    """Every module, or name in a module, that is imported anywhere in the file, as a dotted name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _dotted(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
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


#: The files of the command line that print. Everything else logs, or returns what is to be shown.
PRINTING = ("cli/verbs/", "cli/ending.py", "examples/")
SEEDING = {
    *("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "random.seed"),
    *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed", "numpy.random.seed"),
    *("set_seed", "transformers.set_seed", "manual_seed"),
}
#: Setting a generator's whole state is for the two places that put states back: around a run, and on resume.
STATES = {
    "torch.set_rng_state",
    "torch.random.set_rng_state",
    "torch.cuda.set_rng_state",
    "torch.cuda.set_rng_state_all",
}
STATES_HOMES = {"engine/random_state.py"}

#: They execute what they are given, or what they read.
EXECUTING = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("eval", "exec", "os.system", "os.popen", "runpy.run_path"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.full_load", "yaml.full_load_all"),
}
#: Collectives and loaders that unpickle what others have sent or stored.
PICKLING = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "read_pickle", "unsafe_load"),
}
#: transformers' ways to make something of a directory or a config.
LOADING = {"from_pretrained", "from_config"}
#: What is made of a directory without weights. Weights must be demanded as safetensors, or come from a GGUF
#: file.
WEIGHTLESS = ("Config", "Tokenizer", "Processor", "Extractor")
#: Keywords that allow code of others to run, and the only value that they have.
DEMANDED = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "use_safetensors": True}


def _aliases(tree: ast.AST) -> dict[str, str]:
    """What the names that are imported here, perhaps under others, are called in full."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _full_name(node: ast.AST, aliases: dict[str, str]) -> str | None:
    first, dot, rest = (_dotted(node) or "").partition(".")
    return f"{aliases.get(first, first)}{dot}{rest}" or None


def _forbidden(tree: ast.AST, file: str) -> list[str]:
    """What is done in this file that the library never does, with the line."""
    found = []
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _full_name(node.func, aliases)
        if name in SEEDING or (name in STATES and file not in STATES_HOMES):
            found.append(f"{file}:{node.lineno} reseeds a global generator")
        if name == "print" and not file.startswith(PRINTING):
            found.append(f"{file}:{node.lineno} prints")
        if name in EXECUTING or (name or "").rpartition(".")[2] in PICKLING:
            found.append(f"{file}:{node.lineno} calls {name}")
        given = {keyword.arg for keyword in node.keywords}
        if name in ("np.load", "numpy.load") and "allow_pickle" not in given:
            found.append(f"{file}:{node.lineno} reads arrays that may hold objects")
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in LOADING
            and "trust_remote_code" not in given
        ):
            found.append(f"{file}:{node.lineno} does not refuse code of a model")
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "from_pretrained"
            and not (_dotted(node.func.value) or "").endswith(WEIGHTLESS)
            and given.isdisjoint(("use_safetensors", "gguf_file"))
            and not file.startswith("examples/")  # short ones: torch reads weights only
        ):
            found.append(f"{file}:{node.lineno} does not refuse pickled weights")
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            if (keyword.arg == "strict" and value is False and name != "zip") or (
                keyword.arg in DEMANDED and value is not DEMANDED[keyword.arg]
            ):
                found.append(f"{file}:{node.lineno} passes {keyword.arg}={value}")
    return found


def _without_type_hints(tree: ast.AST) -> ast.AST:
    """The file as it runs: what stands under `if TYPE_CHECKING:` is imported by no program."""

    class Remove(ast.NodeTransformer):
        def visit_If(self, node):
            return (
                None
                if _dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
                else self.generic_visit(node)
            )

    return Remove().visit(tree)


def _room(module: str) -> str:
    """The folder of a module, or the module itself where it stands beside the folders."""
    return module.split(".")[1] if "." in module else "__init__"


def _floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if _room(module) in rooms)


def _wrong_arrows(module: str, targets: set[str]) -> set[str]:
    """Those of the targets that a module must not import."""
    return {
        target
        for target in targets
        if _room(target) != _room(module)
        and (_floor(target) >= _floor(module) or _room(target) in STRANGERS.get(_room(module), ()))
    }


def _own_imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of this package that a module imports, as keys of MODULES."""
    targets = set()
    for name in _imports(tree):
        while name not in MODULES and "." in name:
            name = name.rsplit(".", 1)[0]
        if _within(name, "distlora"):
            targets.add(name)
    return targets - {module, "distlora"}


@cache
def _tree(module: str) -> ast.Module:
    """Shared by all that ask; not to be changed."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


every_module = pytest.mark.parametrize("module", MODULES)


@every_module
def test_each_vendor_stays_in_its_home(module):
    assert _vendor_breaches(_tree(module), str(MODULES[module].relative_to(PACKAGE))) == []


def test_of_transformers_the_zero_engine_takes_only_its_deepspeed_config():
    names = {name for name in _imports(_tree("distlora.engine.zero.engine")) if _within(name, "transformers")}
    assert names <= {
        "transformers.integrations.HfDeepSpeedConfig",
        "transformers.integrations.deepspeed.HfDeepSpeedConfig",
    }


@every_module
def test_the_library_does_nothing_forbidden(module):
    assert _forbidden(_tree(module), str(MODULES[module].relative_to(PACKAGE))) == []


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_nor_do_the_examples(example):
    tree, file = ast.parse(example.read_text(encoding="utf-8")), f"examples/{example.name}"
    assert _forbidden(tree, file) == []
    dangerous = [vendor for vendor, homes in HOMES.items() if not homes and vendor != "peft"]
    assert not [name for name in _imports(tree) if any(_within(name, vendor) for vendor in dangerous)]


@every_module
def test_imports_go_downwards(module):
    assert _wrong_arrows(module, _own_imports(module, _tree(module))) == set()


@every_module
def test_of_an_arrow_only_one_direction_is_allowed(module):
    """Whichever import is turned round, the one above fails: two rooms that import each other cannot both be
    right.
    """
    for target in _own_imports(module, _tree(module)):
        if _room(target) != _room(module):
            assert _wrong_arrows(target, {module}) == {module}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("distlora.methods.")])
def test_a_method_knows_no_module_rank_device_or_engine(module):
    allowed = [f"distlora.{name}" for name in ("maths", "errors", "methods")]
    assert all(any(_within(target, a) for a in allowed) for target in _own_imports(module, _tree(module)))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("distlora.maths.")])
def test_mathematics_imports_nothing_of_the_house(module):
    assert {_room(target) for target in _own_imports(module, _tree(module))} <= {"maths", "errors"}


@pytest.mark.parametrize(
    ("module", "vendor"), [("adapter.packed", "bitsandbytes"), ("engine.zero.config_reader", "deepspeed")]
)
def test_what_takes_seconds_is_loaded_only_when_it_is_needed(module, vendor):
    """Packed weights, and a DeepSpeed config. An installation without bitsandbytes is complete for every
    other run.
    """
    tree = _tree(f"distlora.{module}")
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    anywhere = ast.Module([node for node in tree.body if node not in inside], [])
    assert any(_within(name, vendor) for node in inside for name in _imports(node))
    assert not any(_within(name, vendor) for name in _imports(anywhere))


def test_ranks_do_not_ask_the_environment_who_they_are():
    """They are told: `distlora.cluster` knows the launchers."""
    for module in ("group", "roll_call"):
        assert not any(_within(name, "os") for name in _imports(_tree(f"distlora.engine.comm.{module}")))


def test_every_folder_is_a_package():
    """Without its __init__.py, `find_packages` leaves a folder out of what is installed."""
    folders = {path.parent for path in MODULES.values()} | {PACKAGE}
    assert [folder.name for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_there_are_no_circles():
    edges = {m: _own_imports(m, _without_type_hints(copy.deepcopy(_tree(m)))) for m in MODULES}
    # A package's __init__ runs before its files, so what a file asks of its own package is not a circle of
    # ours.
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
        "import pickle as p",
        "from pickle import loads as read",
        "from multiprocessing import Pool",
        "import torch.multiprocessing as mp",
        "from torch import multiprocessing",
        "from concurrent.futures import ProcessPoolExecutor",
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
        "AutoModel.from_pretrained(p, trust_remote_code=True, use_safetensors=True)",
        "yaml.load(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(found, value)",
        "AutoModel.from_pretrained(path, use_safetensors=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=asked, use_safetensors=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=False)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModel.from_config(config)",
        "AutoModel.from_config(config, trust_remote_code=True)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "from yaml import full_load as read\nread(text)",
        "yaml.unsafe_load_all(text)",
        "from numpy import load\nload(path)",
        "from os import system\nsystem(word)",
        "from transformers import set_seed as s\ns(1)",
    ],
)
def test_what_is_forbidden_is_seen(source):
    assert len(_forbidden(ast.parse(source), "layer.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.Generator().manual_seed(1)",
        "zip(a, b, strict=False)",
        "subprocess.run(c, shell=False)",
        "AutoConfig.from_pretrained(p, trust_remote_code=False)",
        "AutoModel.from_pretrained(p, trust_remote_code=False, use_safetensors=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=False, gguf_file=name)",
        "from safetensors.torch import load\nload(data)",
        "from json import load\nload(file)",
        "log.info('x')",
    ],
)
def test_what_is_allowed_is_not_reported(source):
    assert _forbidden(ast.parse(source), "layer.py") == []


def test_an_import_that_is_turned_round_is_seen():
    assert _wrong_arrows("distlora.maths.linalg", {"distlora.methods.lora"}) == {"distlora.methods.lora"}
    assert _wrong_arrows("distlora.engine.local", {"distlora.initialisation.probe"}) == {
        "distlora.initialisation.probe"
    }
    assert _wrong_arrows("distlora.cluster.status", {"distlora.recipe.load"}) == {"distlora.recipe.load"}, (
        "a stranger"
    )
    assert _wrong_arrows("distlora.tasks.metrics", {"distlora.recompose.scores"}) == {
        "distlora.recompose.scores"
    }, "the same floor"


def test_the_modules_were_found_and_their_imports_read():
    assert {"distlora.engine.comm", "distlora.methods", "distlora.methods.lora_sb"} <= set(MODULES)
    assert "distlora.maths.linalg" in _own_imports(
        "distlora.methods.lora_sb", _tree("distlora.methods.lora_sb")
    )
    assert "torch.distributed" in _imports(_tree("distlora.engine.comm.group"))
    assert (
        _floor("distlora.methods.lora") < _floor("distlora.engine.local") < _floor("distlora.training.train")
    )
