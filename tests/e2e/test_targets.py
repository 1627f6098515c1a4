"""Which layers a run adapts, by the command line: told, refused in time, and the same in all that follows."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

from tests.e2e.program import call, curve, succeed
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)


def saved(config, folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=60, state_size=4, num_hidden_layers=2, **IDS)
    return saved(config, tmp_path_factory.mktemp("models") / "mamba")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=60, n_layer=2, n_head=6, n_positions=64, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("models") / "gpt2")


def adapted_layers(run_dir) -> set[str]:
    names = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


def test_a_layer_whose_weight_is_used_without_a_call(recipe, mamba, tmp_path):
    plain = ["method={name: lora, rank: 4}", "train.steps=2"]
    out = succeed("train", recipe, f"model.path={mamba}", *plain)
    assert "dt_proj (2 layers) is never called: the model multiplies with its weight by itself" in out.err
    assert "adapted 6 layers (" in out.err
    assert {name.rsplit(".", 1)[-1] for name in adapted_layers(tmp_path / "run")} == {
        "in_proj", "x_proj", "out_proj",
    }  # fmt: skip
    unloaded = shutil.copytree(mamba, tmp_path / "mamba")
    (unloaded / "model.safetensors").unlink()
    other = [f"model.path={unloaded}", f"output_dir={tmp_path / 'other'}", "targets=[in_proj, dt_proj]"]
    refused = call("train", recipe, *other, *plain)
    assert refused.code == 2 and "mixer.dt_proj (Linear) is never called" in refused.sentences[0]


def test_exclusions_and_blocks_from_the_command_line(recipe, tmp_path):
    chosen = ["targets.exclude=[mlp, o_proj]", "targets.layers=1-2", "method={name: lora, rank: 4}"]
    out = succeed("train", recipe, *chosen, "train.steps=2", "train.exact_match_samples=0")
    wanted = {f"model.layers.{block}.self_attn.{name}_proj" for block in (1, 2) for name in "qkv"}
    assert adapted_layers(tmp_path / "run") == wanted
    line = next(line for line in out.err.splitlines() if line.startswith("adapted 6 layers ("))
    assert line in succeed("methods", recipe, *chosen).out
    assert (
        "Adapted 6 layers (" in succeed("plan", recipe, *chosen, "--nodes", "1", "--gpus-per-node", "1").out
    )
    succeed("train", recipe, *chosen, "train.steps=2", "train.exact_match_samples=0", "--resume")
    assert "eval/loss" in succeed("eval", tmp_path / "run").out
    for override, said in (
        ("targets.exclued=[mlp]", "override targets.exclued: unknown key, did you mean exclude?"),
        ("targets.layers=2-7", "targets.layers: LlamaForCausalLM has no layer 3-7; it has 0-2"),
        ("targets.layers=all", "override targets.layers: found all, wanted numbers from 0 on"),
        ("targets.exclude=[mpl]", "targets.exclude: mpl matches no linear layer of LlamaForCausalLM"),
    ):
        refused = call("train", recipe, override, f"output_dir={tmp_path / 'other'}")
        assert refused.code == 2 and said in refused.sentences[0]


def test_blocks_that_begin_as_no_change(recipe, model, tmp_path):
    """As LLaMA-Pro adds them: their last projections are zero."""
    expanded = shutil.copytree(model, tmp_path / "expanded")
    weights = load_file(expanded / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()
    save_file(weights, expanded / "model.safetensors", {"format": "pt"})
    own = [f"model.path={expanded}", "train.exact_match_samples=0"]
    succeed("train", recipe, *own, "method={name: lora, rank: 4}")
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in trained.values())
    refused = call("train", recipe, *own, "method={name: pissa, rank: 4}", f"output_dir={tmp_path / 'other'}")
    assert refused.code == 2 and (
        "pissa would never train anything in model.layers.1.mlp.down_proj, model.layers.1.self_attn.o_proj"
        in refused.sentences[0]
    )
    exclude = "targets={exclude: [layers.1.self_attn.o_proj, layers.1.mlp.down_proj]}"
    out = call(
        "train", recipe, *own, "method={name: pissa, rank: 4}", exclude, f"output_dir={tmp_path / 'o'}"
    )
    assert out.code == 1 and "was zero in 5 steps" in out.sentences[0], "they lie behind what is left out"
    succeed(
        "train", recipe, *own, "method={name: pissa, rank: 4}", "targets={layers: [0, 2]}",
        f"output_dir={tmp_path / 'p'}",
    )  # fmt: skip


def test_gpt2_is_trained_continued_evaluated_and_merged(recipe, gpt2, tmp_path):
    srlora = "method={name: srlora, rank: 4, target_rank: 8, interval: 2}"
    own, run_dir = [f"model.path={gpt2}", srlora], tmp_path / "run"
    assert "adapted 8 layers (" in succeed("train", recipe, *own).err
    losses = curve(run_dir)
    shutil.rmtree(run_dir / "checkpoint-6")
    succeed("train", recipe, *own, "--resume")
    assert curve(run_dir) == losses
    plain = succeed("eval", run_dir).out
    succeed("export", run_dir, "--format", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(3, 27).view(2, 12)
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, run_dir / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-3)
        assert (base(ids).logits - AutoModelForCausalLM.from_pretrained(gpt2)(ids).logits).abs().max() > 1e-2
    assert "eval/loss" in plain
