"""`distlora train --dry-run`: the recipe, the plan, and what of the first samples is learned."""

import json
import logging

import pytest
import yaml

from distlora.cli import dry_run
from distlora.cli.main import main
from distlora.recipe.load import load_recipe
from distlora.training.preview import Part, Preview, preview
from tests.tiny_images import write_folders
from tests.tiny_models import CHAT_TEMPLATE, tiny_encoder_dir, tiny_model_dir, tiny_vision_dir


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def logger_as_before():
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def write(models, tmp_path):
    """Writes a recipe for rows of a task; returns its path."""

    def write(rows, model=None, **data):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        content = {
            "model": {"path": str(model or tiny_model_dir("llama", models)), "dtype": "float32"},
            "method": {"name": "lora", "rank": 4},
            "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 64, **data},
            "train": {"steps": 3, "global_batch_size": 2},
            "output_dir": str(tmp_path / "run"),
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return tmp_path / "recipe.yaml"

    return write


QUESTIONS = [{"question": f"What is {n}?", "answer": f"It is {n}"} for n in range(6)]


def test_a_dry_run_shows_recipe_plan_and_samples_and_writes_nothing(write, tmp_path, capsys):
    path = write(QUESTIONS, task="gsm8k", template="{prompt}\n")
    there = sorted(tmp_path.iterdir())
    assert main(["train", str(path), "--dry-run", "train.lr=3e-3"]) == 0
    out = capsys.readouterr().out
    recipe, plan, samples = (part.partition("\n")[2] for part in out.split("── ")[1:])
    (tmp_path / "again.yaml").write_text(recipe)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(path, ["train.lr=3e-3"])
    assert "lora: " in plan and "fits into 80 GiB" in plan
    assert "\nWhat is 0?\n⟦It is 0<|end|>⟧" in samples and "What is 1?" in samples
    assert "What is 2?" not in samples and "\x1b" not in out
    assert sorted({*tmp_path.iterdir()} - {tmp_path / "again.yaml"}) == there


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.lrr=1"], "did you mean lr?"),
        (["data.path=none.jsonl"], "none.jsonl"),
        (["method.name=lorra"], "did you mean lora?"),
        (["data.max_length=2", "data.template='{prompt}{prompt}'"], "raise it"),
    ],
)
def test_what_would_end_the_run_ends_the_dry_run(overrides, told, write, capsys):
    assert main(["train", str(write(QUESTIONS, task="gsm8k")), "--dry-run", *overrides]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("distlora: ") and told in last


def test_a_dry_run_is_of_the_deepspeed_config_as_it_would_be(write, capsys):
    path = write(QUESTIONS, task="gsm8k", template="{prompt}\n")
    assert main(["train", str(path), "--dry-run", "deepspeed=configs/zero/zero2.json"]) == 0
    recipe = yaml.safe_load(capsys.readouterr().out.split("── ")[1].partition("\n")[2])
    assert recipe["deepspeed"]["train_batch_size"] == 2 and "auto" not in str(recipe["deepspeed"])


def parts_of(path, *overrides):
    (first, *_) = preview(load_recipe(path, overrides), 2)
    return first, "".join(f"[{part.text}]" if part.trained else part.text for part in first.parts)


def test_of_a_conversation_the_turns_of_the_assistant_are_learned(write, models, tmp_path):
    model = tiny_model_dir("qwen2", tmp_path)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    roles = ("user", "assistant") * 2
    talk = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
    _, text = parts_of(write([{"messages": talk}] * 2, model, task="chat"))
    assert text.startswith("[user] user 0<|im_end|>[assistant][ assistant 1][<|im_end|>]")
    assert text.endswith("[user] user 2<|im_end|>[assistant][ assistant 3][<|im_end|>]")
    _, text = parts_of(tmp_path / "recipe.yaml", "data.train_on=last")
    assert text.startswith("[user] user 0<|im_end|>[assistant] assistant 1<|im_end|>")


def test_of_a_text_all_tokens_are_learned_but_the_first(write):
    _, text = parts_of(write([{"text": "One two."}, {"text": "Three."}], task="completion"))
    assert text == "O[ne two.][<|end|>]"


def test_a_classifier_shows_text_and_label(write, models):
    path = write(
        [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}],
        tiny_encoder_dir("bert", models), task="classification",
        fields={"text": "text", "label": "label"}, labels=["no", "yes"],
    )  # fmt: skip
    first, text = parts_of(path)
    assert first.label == "yes (number 1)" and "good" in text and "[CLS]" in text
    assert not any(part.trained for part in first.parts)


def test_a_classifier_of_images_shows_size_and_label(write, models, tmp_path):
    write_folders(tmp_path / "images", {"cat": 2, "dog": 2}, size=12)
    path = write([], tiny_vision_dir("vit", models), task="images", labels=None)
    first, text = parts_of(path, f"data.path={tmp_path / 'images'}")
    assert first.label == "cat (number 0)" and first.size.startswith("12 × 12 pixels, ") and text == ""


# ---------------------------------------------------------------------- looks

SAMPLE = Preview(
    "4 tokens", (Part("<s>", special=True), Part("a\x1b[2Jb\n"), Part("c", True), Part("d", True, True))
)


def test_text_of_the_data_cannot_command_the_terminal():
    for coloured in (False, True):
        shown = dry_run.sample_text(1, SAMPLE, coloured, "utf-8")
        assert "\x1b[2J" not in shown and "a\\x1b[2Jb" in shown


def test_trained_tokens_are_marked_in_colour_and_without():
    assert "⟦cd⟧" in dry_run.sample_text(1, SAMPLE, False, "utf-8")
    assert "[[cd]]" in dry_run.sample_text(1, SAMPLE, False, "ascii")
    coloured = dry_run.sample_text(1, SAMPLE, True, "utf-8")
    assert "\x1b[32mc\x1b[0m\x1b[32;4md\x1b[0m" in coloured and "\x1b[2;4m<s>\x1b[0m" in coloured
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b[") for line in coloured.split("\n"))


def test_a_long_part_keeps_its_ends():
    long = Preview("many tokens", (Part("a" * 9000), Part("b", True)))
    shown = dry_run.sample_text(1, long, False, "utf-8")
    assert len(shown) < 3000 and "(7,000 characters)" in shown and shown.endswith("a⟦b⟧")


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_when_colours_are_shown(terminal, variables, coloured, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    class Stream:
        isatty = staticmethod(lambda: terminal)

    assert dry_run.in_colour(Stream()) is coloured
