"""A sweep of a real run, in a process of its own."""

import json

from distlora.recipe.yaml_text import dump_yaml
from tests.e2e.program import curve, succeed


def test_a_point_is_trained_once_and_found_done(recipe, tmp_path):
    sweep, points = tmp_path / "sweep.yaml", tmp_path / "points"
    content = {
        "recipe": str(recipe),
        "output": str(points),
        "common": {"train.steps": 2, "train.exact_match_samples": 0},
        "list": [{"method.name": "lora"}],
    }
    sweep.write_text(dump_yaml(content))
    assert "1 done" in succeed("sweep", sweep).out
    (row,) = json.loads((points / "sweep.json").read_text())["points"]
    assert (row["state"], row["step"], row["steps"]) == ("done", 2, 2)
    assert list(curve(points / "method=lora")) == [1, 2]
    said = (points / "points" / "method=lora.log").read_bytes()
    assert "1 done" in succeed("sweep", sweep).out
    assert (points / "points" / "method=lora.log").read_bytes() == said, "no second start"
