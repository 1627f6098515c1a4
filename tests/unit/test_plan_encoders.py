"""Classifiers of texts can be planned, whatever form of a mask their class takes."""

import pytest

from distlora.plan import plan_of
from distlora.recipe.load import recipe_of
from tests.tiny_models import tiny_encoder_dir, tiny_model_dir


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "llama"])
def test_a_classifier_of_texts_is_planned(name, tmp_path):
    make = tiny_model_dir if name == "llama" else tiny_encoder_dir
    content = {
        "model": {"path": str(make(name, tmp_path))},
        "method": {"name": "lora", "rank": 2},
        "data": {"task": "rte", "max_length": 16},
        "output_dir": "runs/x",
    }
    setup = plan_of(recipe_of(content, "recipe"), 1, 1).setup
    assert setup.shapes.labels == 2 and len(setup.shapes.attached.targets) >= 10
