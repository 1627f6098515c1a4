"""What the README and the pages of `docs/` show must work: commands and their arguments are read by the
programs themselves, named files exist, links lead somewhere, YAML is a recipe, and no key of a recipe is kept
from the reader."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml
from deepspeed.launcher.runner import parse_args as deepspeed_arguments
from pydantic import BaseModel
from torch.distributed.run import parse_args as torchrun_arguments

from distlora.cli.arguments import size, whole_number, whole_numbers
from distlora.cli.main import main
from distlora.cli.parser import parse
from distlora.cli.verbs import VERBS
from distlora.methods import Method, registry
from distlora.recipe.load import load_recipe, run_identity
from distlora.recipe.sections import Recipe
from distlora.sweeps.file import read_sweep_file
from distlora.tasks import get_task, scored_tasks

ROOT = Path(__file__).parents[2]
#: By path relative to the root. The README comes first; `docs/models.md` is written by the matrix of models.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
}
TEXT = "\n".join(PAGES.values())
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for language, text in FENCES if language == "bash" for line in text.splitlines() if line.strip()
]
FRAGMENTS = [text for language, text in FENCES if language == "yaml"]
#: In the text, with arguments that do not stand for others (RECIPE).
INLINE = [
    command
    for command in re.findall(r"`(distlora \w+ [^`]+)`", TEXT)
    if not re.search(r"\b[A-Z]{2,}\b", command)
]
PROGRAM = [line for line in (*COMMANDS, *INLINE) if "distlora" in shlex.split(line, comments=True)]
SCRIPTED = [line for line in COMMANDS if re.search(r"\blaunch/", line)]
#: What a script says once its arguments are read, on a machine that has nothing. test.sh hands them to
#: pytest.
BEYOND_ARGUMENTS = {
    "quickstart.sh": "no Python",
    "test.sh": "no Python",
    "deepspeed.sh": "no Python here has deepspeed",
    "mpi.sh": "mpirun of Open MPI is needed",
    "slurm.sbatch": "this is a job of SLURM",
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_fences_are_known():
    assert TEXT.count("```") == 2 * len(FENCES)
    assert {language for language, _ in FENCES} == {"bash", "python", "yaml", "text"}
    assert len(COMMANDS) >= 10 and len(FRAGMENTS) == 1


def test_the_two_commands_come_first():
    first, second, *_ = COMMANDS
    assert first.startswith("bash launch/quickstart.sh ")
    assert second.startswith("bash launch/test.sh ")


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_can_read_it(command):
    result = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_named_files_exist():
    named = set(re.findall(r"(?<![\w/])(?:configs|launch|tests|distlora|examples)/[\w./-]*\w", TEXT))
    assert len(named) >= 6
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def headings(text: str) -> set[str]:
    """Anchors of a page's headings."""
    lines = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    words = (
        re.sub(r"[^\w\s-]", "", line.lstrip("# ")).strip().lower() for line in lines if line.startswith("#")
    )
    return {re.sub(r"[\s-]+", "-", word) for word in words}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """mkdocs looks at those between the pages of docs/; these are all, also those of the README."""
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in headings(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_readme_can_be_read_in_a_sitting():
    assert len(PAGES["README.md"].splitlines()) <= 250


# ---------------------------------------------------------------------- commands


def read_by_the_program(command):
    """The program's own options; SystemExit for what it would not take."""
    words = shlex.split(command, comments=True)
    return parse(words[words.index("distlora") + 1 :])


def recipes_of_the_page():
    """By output directory, the recipe files that the page names."""
    paths = sorted(set(re.findall(r"configs/recipes/[\w.-]+\.yaml", TEXT)))
    return {load_recipe(path).output_dir: path for path in paths}


def test_the_program_is_started_in_every_way():
    starters = {line.split()[0] for line in PROGRAM}
    assert {"distlora", "python", "deepspeed", "torchrun", "mpirun", "srun", "docker"} <= starters and len(
        PROGRAM
    ) >= 20


@pytest.mark.parametrize("command", PROGRAM)
def test_the_program_takes_all_arguments(command):
    options = read_by_the_program(command)
    overrides = getattr(options, "overrides", [])
    if getattr(options, "recipe", None):
        load_recipe(options.recipe, overrides)
    if options.verb == "eval" and options.tasks:
        assert scored_tasks(options.tasks.split(",")) and (options.run_dir is None) == bool(options.model)
    elif options.verb == "eval" and options.predictions:
        assert get_task(options.task) and options.out
    elif options.verb == "eval":
        evaluated = load_recipe(recipes_of_the_page()[str(options.run_dir)], overrides)
        assert evaluated.data.eval_split, "a run without one has nothing to be evaluated on"
        promised = "exact match" in command.partition("#")[2]
        assert bool(evaluated.train.exact_match_samples) == promised, "what is not asked for is not printed"
    if options.verb == "sweep" and options.file.endswith(".yaml"):
        assert read_sweep_file(options.file, overrides).points
    if options.verb == "plan":
        assert whole_numbers("--nodes", options.nodes) and whole_number(
            "--gpus-per-node", options.gpus_per_node
        )
        assert size("--gpu-memory", options.gpu_memory)


@pytest.mark.parametrize(
    "command", [line for line in PROGRAM if re.match(r"distlora (eval(?! --task)|export|status) ", line)]
)
def test_a_run_directory_is_that_of_a_recipe_on_the_page(command):
    options = read_by_the_program(command)
    if getattr(options, "model", None):
        return  # in place of a run
    by_directory = recipes_of_the_page()
    assert str(getattr(options, "run_dir", None) or options.recipe) in {*by_directory, *by_directory.values()}


@pytest.mark.parametrize(
    "command", [line for line in PROGRAM if line.startswith(("torchrun ", "deepspeed "))]
)
def test_the_launcher_takes_its_options(command):
    launcher, *words = shlex.split(command, comments=True)
    if launcher == "torchrun":
        options = torchrun_arguments(words)
        assert (
            options.module
            and [options.training_script, *options.training_script_args] == words[words.index("distlora") :]
        )
    else:
        options = deepspeed_arguments(words)
        assert (
            options.module and [options.user_script, *options.user_args] == words[words.index("distlora") :]
        )


@pytest.fixture
def bare_machine(tmp_path):
    """Variables of a machine on which a script can read its arguments, and do nothing else."""
    for tool in ("basename", "cat", "dirname", "env", "sed", "uname", "od", "tr", "date"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(tmp_path), "DISTLORA_VENV": str(tmp_path / "venv")}


def refusal(script, words, machine):
    """The one sentence with which a script ends, exit code 2."""
    bash = shutil.which("bash")
    ended = subprocess.run(
        [bash, str(ROOT / "launch" / script), *words], capture_output=True, text=True, timeout=60, env=machine
    )
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


@pytest.mark.parametrize("command", SCRIPTED)
def test_a_script_takes_all_arguments(command, bare_machine):
    words = shlex.split(command, comments=True)
    at = next(index for index, word in enumerate(words) if word.startswith("launch/"))
    script, words = Path(words[at]).name, words[at + 1 :]
    assert BEYOND_ARGUMENTS[script] in refusal(script, words, bare_machine)
    recipes = (word for word in words if re.match(r"configs/recipes/.*\.yaml", word))
    recipe = next(recipes, "configs/recipes/quickstart.yaml")
    load_recipe(recipe, [word for word in words if "=" in word and not word.startswith("-")])


@pytest.mark.parametrize("script", sorted(BEYOND_ARGUMENTS.keys() - {"test.sh"}))
def test_a_script_refuses_an_option_that_it_does_not_have(script, bare_machine):
    assert "unknown option --no-such" in refusal(script, ["--no-such", "x"], bare_machine)


def test_every_script_is_shown():
    shown = {Path(word).name for line in SCRIPTED for word in line.split() if word.startswith("launch/")}
    assert shown == BEYOND_ARGUMENTS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_is_kept_from_the_reader(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    unshown = {"--help", "--build", "--line"}  # the last one is for slurm.sbatch
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - unshown
    assert {option for option in options if option not in TEXT} == set()
    assert f"`{verb}`" in PAGES["docs/commands.md"]


def test_no_variable_is_kept_from_the_reader():
    sources = [*ROOT.glob("distlora/**/*.py"), *ROOT.glob("launch/*")]
    read = set(re.findall(r"DISTLORA_[A-Z]+", "".join(path.read_text(encoding="utf-8") for path in sources)))
    assert "DISTLORA_CACHE" in read and {name for name in read if f"`{name}`" not in TEXT} == set()


# ---------------------------------------------------------------------- keys


def keys_of(section, prefix=""):
    """Dotted names of all that a section of the recipe may say."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        for part in models_in(field.annotation):
            found |= keys_of(part, f"{prefix}{name}.")
    return found


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def keys_in(content, prefix=""):
    found = set()
    for name, value in content.items() if isinstance(content, dict) else ():
        found |= {prefix + name} | keys_in(value, f"{prefix}{name}.")
    return found


def test_the_fragment_is_the_recipe_that_the_commands_run(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FRAGMENTS[0], encoding="utf-8")
    shown, shipped = load_recipe(path), load_recipe("configs/recipes/mistral-7b-metamath.yaml")
    assert run_identity(shown) == run_identity(shipped) and shown.output_dir == shipped.output_dir


def test_the_fragment_has_every_key():
    assert "train.optimizer.momentum" in keys_of(Recipe) and "model.quantization.double" in keys_of(Recipe)
    in_a_comment = r"(\w+: (?:null|all-linear|cosine)) +# or .*?(\{.*?\})"
    shown = yaml.safe_load(re.sub(in_a_comment, _with_the_mapping, FRAGMENTS[0]))
    assert keys_of(Recipe) - keys_in(shown) == set()


def _with_the_mapping(line: re.Match) -> str:
    return f"{line[1].partition(':')[0]}: {line[2]}  # "


def settings_on_the_page():
    """Of every method in the table of settings: the pieces of YAML in its row."""
    table = PAGES["docs/methods.md"].split("## Settings of the methods", 1)[1].split("\n\n", 3)[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    return {
        name: [yaml.safe_load(piece) for piece in re.findall(r"`([^`]+)`", row)] for name, row in rows.items()
    }


def test_methods_tables_are_complete():
    table = PAGES["docs/methods.md"].partition("\n| ")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(registry())
    with_keys = {name for name, method in registry().items() if keys_of(method) > keys_of(Method)}
    assert settings_on_the_page().keys() == with_keys


@pytest.mark.parametrize("name", settings_on_the_page())
def test_settings_of_a_method_are_complete_and_its_defaults(name):
    method, pieces = registry()[name], settings_on_the_page()[name]
    assert set().union(*map(keys_in, pieces)) == keys_of(method) - keys_of(Method)
    first = {key: value for piece in reversed(pieces) for key, value in piece.items()}
    assert method(**first) == method()
    for piece in pieces:  # also what is no default
        method(**piece)
