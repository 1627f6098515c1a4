"""A method is one file: the one that the README shows is put into a copy of the package, and is a method like
the others.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.e2e.program import (
    REPOSITORY,
    curve,
    files_of,
    free_port,
    recipe_of,
    run,
    write_recipe,
)

NAME, STEPS, SAVED = "lora_fa", 4, 2
#: Lines of the file that the README promises to be short.
SHORT = 40


def example() -> str:
    """The file as the README shows it."""
    fences = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    (source,) = (fence for fence in fences if f'"{NAME}"' in fence)
    return source


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with a copy of the package that has the new file."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(REPOSITORY / "distlora", folder / "distlora", ignore=ignored)
    (copy / "methods" / f"{NAME}.py").write_text(example())
    return folder


def run_in(package: Path, *command: object):
    """The command with that copy in place of the repository's package; it must end well."""
    # Without the safe path Python would look into the working directory first, which is the repository.
    outcome = run(*command, PYTHONPATH=str(package), PYTHONSAFEPATH="1")
    assert outcome.code == 0, outcome.err + outcome.out
    return outcome


def one_after_the_other(*commands: list[object]) -> tuple[str, ...]:
    """Several commands of the program in one process: a start takes longer than any of them."""
    words = [list(map(str, command)) for command in commands]
    program = f"from distlora.cli.main import main; assert not any([main(words) for words in {words!r}])"
    return sys.executable, "-c", program


def test_it_trains_resumes_exports_and_is_in_the_table(package, model, data, tmp_path):
    assert len(example().splitlines()) < SHORT
    content, run_dir = recipe_of(model, data, tmp_path / "run"), tmp_path / "run"
    content["method"] = {"name": NAME, "rank": 4, "spread": 0.5}
    content["train"] |= {"steps": STEPS, "save_every": SAVED, "exact_match_samples": 0}
    content["data"]["eval_split"], content["targets"] = None, ["q_proj", "down_proj"]
    content["deepspeed"] = {"zero_optimization": {"stage": 3}}
    recipe = write_recipe(tmp_path / "recipe.yaml", content)

    def train():
        options = ["--hostfile", os.devnull, "--num_gpus", "2", "--master_port", free_port()]
        return run_in(package, "deepspeed", *options, "--module", "distlora", "train", recipe)

    train()
    losses, adapter = curve(run_dir), files_of(run_dir / "adapter")
    assert list(losses) == list(range(1, STEPS + 1)) and losses[STEPS] < losses[1]

    # As after a crash in the third or fourth step.
    shutil.rmtree(run_dir / f"checkpoint-{STEPS}")
    shutil.rmtree(run_dir / "adapter")
    assert f"continuing from {run_dir}/checkpoint-{SAVED}" in train().err
    assert curve(run_dir) == losses and files_of(run_dir / "adapter") == adapter

    exports = [["export", run_dir, "--format", kind, "--out", tmp_path / kind] for kind in ("peft", "merged")]
    told = run_in(package, *one_after_the_other(*exports, ["methods"])).out.splitlines()
    check_exports(model, tmp_path)
    line, about = (line.split(maxsplit=1)[1] for line in told if line.startswith(f"{NAME} "))
    assert line.split() == ["B", "r·out", "-", "yes", "LoRA", "of", "rank", "r"]
    assert about == "LoRA-FA: train B alone; A is random and frozen (arXiv 2308.03303)"


def check_exports(model: Path, folder: Path) -> None:
    """PEFT and transformers load them, and they are the same model, which is not the pretrained one."""

    def load(path: Path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    tokens = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        before, merged = load(model)(tokens).logits, load(folder / "merged")(tokens).logits
        adapted = PeftModel.from_pretrained(load(model), folder / "peft").eval()(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - before).abs().max() > 1e-3


def test_the_contract_tests_find_it(package):
    tests = shutil.copy(REPOSITORY / "tests" / "unit" / "test_contract.py", package)
    plain = ("-q", "-p", "no:cacheprovider", "--rootdir", package, "-k", NAME)
    outcome = run_in(package, sys.executable, "-m", "pytest", *plain, tests)
    assert int(re.search(r"(\d+) passed", outcome.out)[1]) > 30
