"""A run on conversations: trained, resumed on a later day, and evaluated."""

import json
from datetime import date, timedelta
from pathlib import Path

import pytest
import yaml

from distlora.engine.comm import Topology
from distlora.models.loading import load_tokenizer
from distlora.recipe.load import load_recipe, load_run_recipe
from distlora.training import evaluate, run_directory, train
from distlora.training.evaluated import Asked, sections_of, subject_of_run
from distlora.training.export_run import export_run
from distlora.training.objective import conventions_of, objective_of
from tests.tiny_models import tiny_model_dir
from tests.unit.test_chat_templates import messages_of

TEMPLATE = (
    "{{ bos_token + strftime_now('%Y-%m-%d') + '\n' }}{% for message in messages %}{{ '[' + message.role "
    "+ '] ' + message.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}"
    "{% endif %}"
)


@pytest.fixture
def given(tmp_path):
    """The path of a recipe whose tokenizer has a template that reads the clock."""
    model = tiny_model_dir("llama", tmp_path)
    for file in model.glob("chat_template*"):
        file.unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    rows = [{"messages": messages_of([(f"{i}+1?", f"{i + 1}"), ("Sure?", "Yes.")])} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "method": {"name": "lora", "rank": 2},
        "data": {"task": "chat", "path": str(tmp_path / "rows.jsonl"), "split": "train[:4]"},
        "train": {"steps": 2, "global_batch_size": 2, "exact_match_samples": 2, "save_every": 1},
        "output_dir": str(tmp_path / "run"),
    }
    recipe["data"]["eval_split"] = "train[4:]"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


def run(path: Path):
    recipe = load_recipe(path)
    train.check(recipe, Topology(), None)
    return train.train(recipe, Topology(), None)


def test_a_run_on_conversations_keeps_its_day_when_it_is_resumed_later(given, monkeypatch):
    today = date.today()
    summary = run(given)
    assert summary.steps == 2 and summary.before.keys() == summary.after.keys() == {"loss", "exact_match"}

    class Later(date):
        @classmethod
        def today(cls):
            return today + timedelta(days=1)

    monkeypatch.setattr(run_directory, "Date", Later)
    run_dir = given.parent / "run"
    again = run(given)
    assert again.after["loss"] == pytest.approx(summary.after["loss"])
    kept = load_run_recipe(run_dir / "recipe.yaml")
    assert kept.data.chat_date == today.isoformat() and kept.format == 4
    (sample, *_) = objective_of(kept).read("train", tokenizer := load_tokenizer(kept.model)).samples
    assert tokenizer.decode(sample.input_ids).startswith(f"{tokenizer.bos_token}{today}\n[user] 0+1?")

    subject = subject_of_run(run_dir, [])
    scores = evaluate.evaluate(subject, Topology(), Asked(tasks=("chat",)))
    assert scores["chat"].keys() == {"exact_match"}
    answered = [json.loads(line) for line in (run_dir / "eval" / "chat-2.jsonl").read_text().splitlines()]
    assert len(answered) == 2


def test_other_tasks_are_asked_as_the_run_was_trained(given):
    recipe = load_recipe(given)
    Path(recipe.output_dir).mkdir()
    run_directory.claim_run_dir(recipe, None)
    subject = subject_of_run(given.parent / "run", [])
    (section,) = sections_of(subject, Asked(tasks=("arithmetic",))).values()
    assert section.template == "chat" and section.chat_date == date.today().isoformat()
    assert conventions_of(subject.recipe).date == section.chat_date


def test_a_merged_model_stops_where_the_template_ends_a_turn(given, tmp_path):
    """Also where that is not the end of sequence."""
    model = tmp_path / "llama"
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE.replace("eos_token", "'<|reserved|>'")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    run(given)
    out = tmp_path / "merged"
    export_run(tmp_path / "run", "merged", out)
    tokenizer = load_tokenizer(load_recipe(given).model)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|reserved|>")} <= set(ends)
