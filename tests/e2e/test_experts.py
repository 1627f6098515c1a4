"""A run that adapts the experts of a mixture, by the command line."""

import json

from tests.e2e.program import call, curve, succeed
from tests.e2e.test_evaluation import on_gsm8k, outputs
from tests.tiny_zoo import zoo_model_dir


def test_experts_are_trained_continued_evaluated_and_merged(recipe, data, tmp_path):
    mixtral, run_dir = zoo_model_dir("mixtral", tmp_path), tmp_path / "run"
    config = json.loads((mixtral / "config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    (mixtral / "config.json").write_text(json.dumps(config))
    own = [f"model.path={mixtral}", "targets=experts", "method={name: pissa, rank: 4}"]
    short = ["train.steps=4", "train.save_every=2", "train.exact_match_samples=0"]

    whole = succeed("train", recipe, *own, *short, f"output_dir={tmp_path / 'whole'}")
    line = next(line for line in whole.err.splitlines() if line.startswith("adapted 4 layers ("))
    assert "experts" not in line.partition("without an adapter:")[2]
    losses, routed = (curve(tmp_path / "whole", f"train/{name}") for name in ("loss", "aux_loss"))
    assert losses.keys() == routed.keys() == {1, 2, 3, 4} and all(value >= 1 for value in routed.values())

    succeed("train", recipe, *own, *short, "train.keep_checkpoints=9")
    for later in (*run_dir.glob("checkpoint-4/*"), run_dir / "metrics.jsonl"):
        later.unlink()
    (run_dir / "checkpoint-4").rmdir()
    succeed("train", recipe, *own, *short, "train.keep_checkpoints=9", "--resume")
    assert curve(run_dir) == {step: losses[step] for step in (3, 4)}

    tasks = [*on_gsm8k(data), "--limit", "3"]
    succeed("eval", run_dir, *tasks)
    succeed("eval", run_dir, *tasks, "--merge", "--out", tmp_path / "folded")
    base = ["--model", mixtral, "--adapter", run_dir / "adapter", "model.dtype=float32", "data.max_length=48"]
    same = ['data.template="{prompt}\\n"', "data.max_new_tokens=4", "--out", tmp_path / "adapter"]
    succeed("eval", *base, *same, *tasks)
    folders = (run_dir, tmp_path / "folded", tmp_path / "adapter")
    answers = [outputs(folder, "gsm8k-4") for folder in folders]
    assert answers[0] == answers[1] == answers[2]
    out = succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged").out
    assert "compared with the run" in out

    frozen = succeed("train", recipe, *own, *short, "targets=all-linear", f"output_dir={tmp_path / 'other'}")
    assert "experts" in frozen.err.partition("without an adapter:")[2]
    refused = call("train", recipe, *own, "method={name: dora}", f"output_dir={tmp_path / 'third'}")
    assert refused.code == 2 and "method dora trains norms of rows" in refused.sentences[0]
