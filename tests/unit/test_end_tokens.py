"""Only a classifier may look for the end of a text: nothing else asks its model, which takes two passes."""

import pytest

from distlora.recipe.load import recipe_of
from distlora.training import text_objective
from distlora.training.objective import objective_of
from tests.tiny_zoo import zoo_model_dir


def _objective(kind, folder, **data):
    return objective_of(
        recipe_of(
            {
                "model": {"path": str(zoo_model_dir(kind, folder)), "dtype": "float32"},
                "method": {"name": "lora", "rank": 2}, "output_dir": str(folder / "run"),
                "data": {"path": str(folder / "rows.jsonl"), "max_length": 40, **data},
            },
            "x.yaml",
        )
    )  # fmt: skip


def _classifier(folder):
    fields = {"text": "text", "label": "label"}
    return _objective("bart", folder, task="classification", labels=["bad", "good"], fields=fields)


def test_a_language_model_is_not_asked_for_ends(tmp_path, monkeypatch):
    fields = {"prompt": "prompt", "response": "response"}
    language = _objective("llama", tmp_path, task="text", fields=fields, template="{prompt}")
    monkeypatch.setattr(text_objective, "needs_end", lambda model: pytest.fail("it was asked"))
    assert language._end is None


def test_a_classifier_of_bart_needs_its_end_token(tmp_path):
    assert _classifier(tmp_path)._end == 2
