"""Tokens and logins that a user has around reach no file and no output of a run, and no other host."""

import json
import shutil
from pathlib import Path

import pytest

from distlora.cluster.exported_variables import exported_names, withheld
from tests.e2e.program import call, python, recipe_of, run, write_recipe

PLANTED = "pl4nted"
VARIABLES = {
    "HF_TOKEN": f"hf_{PLANTED}1",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{PLANTED}2",
    "WANDB_API_KEY": f"{PLANTED}3",
    "COMET_API_KEY": f"{PLANTED}4",
    "AWS_SECRET_ACCESS_KEY": f"{PLANTED}5",
    "GITHUB_TOKEN": f"ghp_{PLANTED}6",
    "NCCL_TEST_PASSWORD": f"{PLANTED}7",
    "HF_HUB_PROXY": f"http://user:{PLANTED}8@proxy:3128",
    "https_proxy": f"http://user:{PLANTED}9@proxy:3128",
    "database_url": f"postgres://user:{PLANTED}10@host/db",
    "my_api_key": f"{PLANTED}11",
}


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def recipe(model, data, tmp_path) -> Path:
    content = recipe_of(model, data, tmp_path / "run")
    content["train"] |= {"steps": 2, "eval_every": 0, "save_every": 1, "exact_match_samples": 0}
    content["method"]["init"]["eta"] = 0.01
    content["deepspeed"] = {
        "zero_optimization": {"stage": 0},
        "comet": {"enabled": False, "api_key": f"{PLANTED}20"},
        "tensorboard": {"enabled": True, "output_path": str(tmp_path / "run"), "job_name": "tensorboard"},
    }
    return write_recipe(tmp_path / "recipe.yaml", content)


def leaks(folder: Path, *but: Path) -> list[str]:
    """The files below a folder that hold a planted text."""
    files = [path for path in folder.rglob("*") if path.is_file() and path not in but]
    return [str(path.relative_to(folder)) for path in files if PLANTED.encode() in path.read_bytes()]


def test_nothing_of_them_is_in_what_a_run_leaves_and_says(recipe, tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    verbs = [
        ("eval", run_dir, "deepspeed=null"),
        ("export", run_dir, "--format", "peft", "--out", out / "peft"),
        ("export", run_dir, "--format", "merged", "--out", out / "merged"),
        ("report", run_dir, "--out", out / "report"),
        ("verify", run_dir),
        ("doctor", "--no-build"),
        ("plan", recipe, "--nodes", "1", "--gpus-per-node", "1", "--gpu-memory", "80"),
    ]
    inline = f"{{enabled: false, api_key: {PLANTED}21, workspace: 'http://user:{PLANTED}22@host'}}"
    trained = run(*python("train", recipe, f"deepspeed.comet={inline}", "data.max_new_tokens=3"))
    assert "data.max_new_tokens=3" in (run_dir / "environment.json").read_text()
    assert trained.code == 0 and PLANTED not in trained.out + trained.err, trained.err
    for words in verbs:
        outcome = call(*words)
        assert outcome.code in (0, 1) if words[0] == "doctor" else outcome.code == 0, outcome.err
        assert PLANTED not in outcome.out + outcome.err, words
    assert leaks(tmp_path, recipe) == []


def test_a_run_that_breaks_tells_none_of_them(recipe, tmp_path):
    outcome = call("train", recipe, "train.lr=1e30", "deepspeed=null")
    assert outcome.code == 1 and PLANTED not in outcome.out + outcome.err
    assert (tmp_path / "run" / "logs").is_dir() and leaks(tmp_path, recipe) == []


LOGIN = f"https://user:{PLANTED}30@host/x"


@pytest.mark.parametrize(
    "words",
    [
        ("train", "RECIPE", f"model.path={LOGIN}"),
        ("train", "RECIPE", f"model.path=https://host/x?token={PLANTED}31"),
        ("train", "RECIPE", f"data.path={LOGIN}"),
        ("train", "RECIPE", "targets=null", f"method={{name: lora, from: '{LOGIN}'}}"),
        ("train", "RECIPE", f"deepspeed.comet.api_key=[{PLANTED}32"),
        ("train", "RECIPE", f"deepspeed.comet.api_key=[{PLANTED}32, 1]"),
        ("train", "RECIPE", f"deepspeed={LOGIN}"),
        ("train", LOGIN),
        ("plan", "RECIPE", f"model.path={LOGIN}"),
        ("eval", "--model", LOGIN, "--tasks", "gsm8k"),
        ("export", LOGIN, "--format", "peft", "--out", "out"),
        ("doctor", "--no-build", "--recipe", LOGIN),
    ],
    ids=lambda words: " ".join(words).replace(PLANTED, ""),
)
def test_a_mistake_is_told_without_them_and_leaves_none(words, recipe, tmp_path):
    outcome = call(*(recipe if word == "RECIPE" else word for word in words))
    said = outcome.out + outcome.err
    assert outcome.code in (1, 2) and len(said) > 40 and PLANTED not in said
    assert not (tmp_path / "run").exists()


def test_a_crash_tells_none_of_them(recipe, tmp_path, monkeypatch):
    def break_off(*arguments, **settings):
        raise RuntimeError(f"GET {LOGIN} failed")

    monkeypatch.setattr("distlora.training.loop.run_identity", break_off)
    with pytest.raises(RuntimeError):
        call("train", recipe, "deepspeed=null")
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "RuntimeError: GET https://***@host/x failed" in log
    assert leaks(tmp_path, recipe) == []


def test_none_of_them_is_sent_to_other_hosts():
    names = exported_names(VARIABLES | {"NCCL_DEBUG": "INFO"})
    assert names == ["NCCL_DEBUG"]
    assert set(withheld(VARIABLES)) == {"HF_TOKEN", "NCCL_TEST_PASSWORD", "HF_HUB_PROXY"}


def test_the_search_finds_what_is_planted(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file.json").write_text(json.dumps(VARIABLES))
    assert leaks(tmp_path) == ["deep/file.json"]
    shutil.rmtree(tmp_path / "deep")
