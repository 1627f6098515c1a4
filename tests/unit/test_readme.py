"""What the README shows must work: commands parse, named files exist, YAML is a recipe, verbs and methods are there."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from distlora.cli import main
from distlora.config import load_recipe
from distlora.methods import registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in FENCES if language == "bash" for line in text.splitlines() if line.strip()]
FRAGMENTS = [text for language, text in FENCES if language == "yaml"]


def test_fences_are_known():
    assert README.count("```") == 2 * len(FENCES)
    assert {language for language, _ in FENCES} == {"bash", "yaml", "text"}
    assert len(COMMANDS) >= 10 and len(FRAGMENTS) >= 1


def test_the_two_commands_come_first():
    first, second, *_ = COMMANDS
    assert first.startswith("bash launch/quickstart.sh ")
    assert second.startswith("bash launch/test.sh ")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    result = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_named_files_exist():
    named = set(re.findall(r"(?<![\w/])(?:configs|launch|tests|distlora)/[\w./-]*\w", README))
    assert len(named) >= 6
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_within_the_page_lead_somewhere():
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_fragment_is_a_recipe(fragment, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "recipe.yaml"
    path.write_text(fragment, encoding="utf-8")
    recipe = load_recipe(path)
    assert set(yaml.safe_load(fragment)) == set(type(recipe).model_fields), "the README shows every section"


@pytest.mark.parametrize("command", [line for line in COMMANDS if ".yaml" in line])
def test_recipe_and_overrides_of_a_command(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command.split("#")[0].split()
    start = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
    verb = words[start - 1]
    before_recipe = ("train", "plan", "launch/slurm.sbatch", "hosts", "launch/mpi.sh")
    assert verb in (*before_recipe, "methods", "--recipe", "sweep.txt")
    taken = verb in before_recipe
    load_recipe(words[start], [word for word in words[start + 1 :] if "=" in word] if taken else [])


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpi.sh"])
def test_job_options_exist(script):
    usage = subprocess.run(["bash", str(ROOT / "launch" / script), "--help"], capture_output=True, text=True).stdout
    lines = [line.split("#")[0] for line in COMMANDS if f"launch/{script}" in line]
    shown = {option for line in lines for option in re.findall(r"\s(--?[a-z-]+)", line)}
    assert shown and {option for option in shown if option not in usage} == set()


@pytest.mark.parametrize("verb", sorted({line.split()[1] for line in COMMANDS if line.startswith("distlora ")}))
def test_verb_exists(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"distlora {verb}" in capsys.readouterr().out


def test_methods_table_is_complete():
    table = README.split("## Methods", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(registry())


def test_quickstart_options_exist():
    usage = subprocess.run(["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"], capture_output=True, text=True).stdout
    lines = [line.split("#")[0] for line in COMMANDS if line.startswith("bash launch/quickstart.sh")]
    shown = set(re.findall(r"--[a-z-]+", " ".join(lines)))
    assert len(shown) >= 4
    assert {option for option in shown if option not in usage} == set()


def test_slurm_options_exist():
    usage = subprocess.run(["bash", str(ROOT / "launch" / "slurm.sbatch"), "--help"], capture_output=True, text=True).stdout
    words = [line.split("#")[0].split() for line in COMMANDS if "launch/slurm.sbatch " in line]
    shown = {word for line in words for word in line[line.index("launch/slurm.sbatch") :] if word.startswith("--")}
    assert {"--sweep", "--container"} <= shown and {option for option in shown if f"\n  {option} " not in usage} == set()
