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


def test_norms_of_experts_are_trained_evaluated_and_merged(recipe, data, tmp_path):
    """PEFT's format cannot hold them: the run ends without an adapter, and goes on to be useful."""
    mixtral, run_dir = zoo_model_dir("mixtral", tmp_path), tmp_path / "run"
    own = [f"model.path={mixtral}", "targets=experts", "method={name: dora, rank: 4}"]
    trained = succeed("train", recipe, *own, "train.steps=3", "train.exact_match_samples=0")
    assert "none: PEFT's format does not hold it; see distlora export --format merged" in trained.out
    assert not (run_dir / "adapter").exists()
    succeed("eval", run_dir, *on_gsm8k(data), "--limit", "2")
    refused = call("export", run_dir, "--format", "peft", "--out", tmp_path / "peft")
    assert refused.code == 2 and "export it with --format merged" in refused.sentences[0]
    out = succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged").out
    assert "compared with the run" in out


def test_components_of_experts_are_replaced_in_a_run_that_goes_on(recipe, tmp_path):
    mixtral, run_dir = zoo_model_dir("mixtral", tmp_path), tmp_path / "run"
    method = "method={name: srlora, rank: 4, target_rank: 8, gamma: 0.5}"
    own = [f"model.path={mixtral}", "targets=[q_proj, experts]", method, "train.exact_match_samples=0"]
    short = ["train.steps=4", "train.save_every=2", "train.keep_checkpoints=9"]
    succeed("train", recipe, *own, *short, f"output_dir={tmp_path / 'whole'}")
    succeed("train", recipe, *own, *short)
    for later in run_dir.glob("checkpoint-4/*"):
        later.unlink()
    (run_dir / "checkpoint-4").rmdir()
    succeed("train", recipe, *own, *short, "--resume")
    wanted = curve(tmp_path / "whole")
    assert {step: curve(run_dir)[step] for step in (3, 4)} == {step: wanted[step] for step in (3, 4)}
    lines = (run_dir / "recompositions.jsonl").read_text().splitlines()
    layers = [json.loads(line)["layers"] for line in lines]
    assert len(layers) >= 2 and all(
        len(layer["components"]) == 4 for name, layer in layers[0].items() if ".experts." in name
    )
    out = succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged").out
    assert "compared with the run" in out
