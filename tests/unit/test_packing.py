"""Several samples in a row, or samples of like length in a micro-batch: the same step with less padding."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from distlora.data import Sample, by_length, collate, in_a_row, micro_batches, one_by_one, packed
from distlora.data.arrangement import first_fit
from distlora.engine.comm import Comm, Topology
from distlora.errors import UserError
from distlora.models.losses import hidden_states, response_loss
from distlora.models.packing_check import mixes_packed_samples
from distlora.models.targets import IGNORE, count_targets
from distlora.recipe.load import run_identity
from distlora.training.objective import objective_of
from distlora.training.samples import RunSamples
from distlora.training.train import train
from tests.tiny_models import _draw_parameters, tiny_model_dir
from tests.tiny_zoo import _TEXT, zoo_model, zoo_model_dir
from tests.unit.test_output import model_of
from tests.unit.test_train import short_recipe

ALONE = Comm(Topology(), torch.device("cpu"), distributed=False)


def lengths_of(count, seed=0):
    """Like those of MetaMath's samples."""
    drawn = np.random.default_rng(seed).lognormal(np.log(210), 0.5, count)
    return np.clip(drawn, 24, 512).astype(int).tolist()


# ---------------------------------------------------------------------- which samples go together


def every_place(arrangement):
    return sorted(place for passes in arrangement.ranks for rows in passes for row in rows for place in row)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("micro", [1, 4])
def test_every_sample_is_whole_in_one_row_and_ranks_make_equally_many_passes(count, world_size, micro):
    lengths = lengths_of(count, seed=count)
    accumulation = -(-count // (micro * world_size))
    plain = one_by_one(count, world_size, micro, accumulation)
    for arrangement in (
        packed(lengths, 512, world_size, micro),
        by_length(lengths, world_size, micro),
        plain,
    ):
        assert every_place(arrangement) == list(range(count))
        assert len({len(passes) for passes in arrangement.ranks}) == 1
        assert len(arrangement.ranks[0]) <= accumulation
        for rows in (rows for passes in arrangement.ranks for rows in passes):
            assert len(rows) <= micro and all(sum(lengths[place] for place in row) <= 512 for row in rows)
        assert 0 <= arrangement.padding(lengths) < 1
        assert arrangement.padding(lengths) <= plain.padding(lengths) + 1e-9 or world_size > 1
    assert [
        [
            [[place] for place in part]
            for part in micro_batches(range(count), rank, world_size, micro, accumulation)
        ]
        for rank in range(world_size)
    ] == plain.ranks


def test_the_same_lengths_are_arranged_alike():
    lengths = lengths_of(64)
    assert packed(lengths, 512, 3, 2) == packed(list(lengths), 512, 3, 2)
    assert by_length([5, 5, 5, 9], 1, 2).ranks == [[[[3], [0]], [[1], [2]]]], "equal ones stay in order"


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("count", [16, 32, 128])
def test_ranks_have_alike_many_tokens(count, world_size):
    for seed in range(5):
        lengths = lengths_of(count, seed)
        shares = [
            sum(lengths[place] for rows in passes for row in rows for place in row)
            for passes in packed(lengths, 512, world_size, 4).ranks
        ]
        even = sum(lengths) / world_size
        assert max(shares) <= even + 512 / 2, (shares, even)


def test_a_second_row_is_shared_out_between_two_ranks():
    """First fit alone would leave rows of 512 and of 38 tokens."""
    assert packed([200, 200, 112, 38], 512, 2, 1).ranks == [[[[0, 2]]], [[[1, 3]]]]


def test_rows_are_few_and_padding_is_little():
    lengths = lengths_of(64)
    rows = first_fit(lengths, 512)
    assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / 512) + 6 / 9
    assert packed(lengths, 512, 1, 4).padding(lengths) < 0.05
    assert by_length(lengths, 1, 4).padding(lengths) < 0.1
    assert one_by_one(64, 1, 4, 16).padding(lengths) > 0.3


def test_a_sample_that_is_longer_than_a_row_is_no_mistake_that_passes():
    with pytest.raises(ValueError, match="513 tokens does not fit into a row of 512"):
        packed([12, 513], 512, 1, 1)


# ---------------------------------------------------------------------- rows


def sample(ids, *trained):
    """trained: places of the tokens that have a loss."""
    return Sample(ids, [token if place in trained else IGNORE for place, token in enumerate(ids)], ids[:1])


ROWS = [[sample([5, 6, 7], 1, 2), sample([8, 9], 1)], [sample([10, 11], 1)]]


def test_positions_begin_anew_with_every_sample_and_with_the_padding():
    batch = collate([in_a_row(row) for row in ROWS], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9], [IGNORE, 11, *[IGNORE] * 3]]
    assert "position_ids" not in collate([], 0) and count_targets(batch) == 4


def samples(count=9, seed=0):
    """Of 2 to 30 tokens, with losses in several places, as those of a conversation have."""
    generator = np.random.default_rng(seed)
    found = []
    for length in generator.integers(2, 31, count).tolist():
        ids = generator.integers(5, 300, length).tolist()
        trained = generator.choice(np.arange(1, length), size=-(-length // 3), replace=False)
        found.append(sample(ids, *trained.tolist()))
    return found


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = response_loss(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batches_of(taken, arrangement, pack):
    made = in_a_row if pack else lambda row: row[0]
    return [
        collate([made([taken[place] for place in row]) for row in rows], 0) for rows in arrangement.ranks[0]
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "qwen3", "gpt_oss", "gpt2", "opt"])
def test_packed_rows_have_the_loss_and_gradients_of_single_samples(name, attention):
    """Windows of eight tokens stay within a sample; classes that make masks without positions get them."""
    model = zoo_model(name)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("the class has no sdpa")
    model.set_attn_implementation(attention)
    taken = samples()
    sizes = [len(each.input_ids) for each in taken]
    loss, gradients = loss_and_gradients(model, batches_of(taken, one_by_one(9, 1, 3, 3), pack=False))
    for arrangement in (packed(sizes, 64, 1, 2), packed(sizes, 30, 1, 4)):
        other, others = loss_and_gradients(model, batches_of(taken, arrangement, pack=True))
        assert other == pytest.approx(loss, rel=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for place, gradient in gradients.items():  # of a bias of keys it is nothing but rounding
            limit = 1e-5 * float(gradient.abs().max()) + 1e-7 * largest
            torch.testing.assert_close(others[place], gradient, rtol=0, atol=limit, msg=place)


# ---------------------------------------------------------------------- flash attention


def one_row_attention(module, query, key, value, attention_mask, position_ids=None, scaling=None, **given):
    """What flash attention makes of one row: it cuts at the positions, and wants no mask."""
    assert attention_mask is None and query.shape[0] == 1 and position_ids.shape[0] == 1
    starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), query.shape[2]]
    parts = []
    for start, stop in zip(starts, starts[1:]):
        part = slice(start, stop)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, part], key[:, :, part], value[:, :, part], is_causal=True, scale=scaling,
                enable_gqa=True,
            )
        )  # fmt: skip
    return torch.cat(parts, 2).transpose(1, 2), None


def test_flash_attention_gets_all_rows_as_one_without_padding():
    model, batch = zoo_model("llama"), collate([in_a_row(row) for row in ROWS], pad_id=0)
    rows, columns = batch["attention_mask"].nonzero(as_tuple=True)
    wanted = hidden_states(model, batch, rows, columns)[0]
    AttentionInterface.register("flash_in_a_test", one_row_attention)
    model.config._attn_implementation = "flash_in_a_test"
    torch.testing.assert_close(hidden_states(model, batch, rows, columns)[0], wanted, rtol=0, atol=1e-5)
    assert not mixes_packed_samples(model)
    loss, count = response_loss(model, batch)
    assert count == 4 and isinstance(loss, Tensor)


# ---------------------------------------------------------------------- models that mix samples


def lfm2():
    sizes = _TEXT | dict(layer_types=["conv", "full_attention"])
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes))
    _draw_parameters(model, torch.Generator().manual_seed(5))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba", "qwen3_5", "recurrent_gemma", "falcon_h1", "lfm2"])
def test_models_with_a_state_mix_samples(name, dtype):
    model = lfm2() if name == "lfm2" else model_of(name)
    assert mixes_packed_samples(model.to(dtype))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mixtral", "qwen2_5_vl", "falcon", "gpt2"])
def test_models_of_attention_alone_keep_them_apart(name):
    model = model_of(name)
    assert not mixes_packed_samples(model)
    assert not mixes_packed_samples(model.to(torch.bfloat16))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_a_run_of_a_model_that_mixes_samples_is_refused(name, tmp_path):
    """By its class before anything is loaded, or by what the loaded model computes."""
    directory = zoo_model_dir("llama" if name == "lfm2" else name, tmp_path)
    if name == "lfm2":
        lfm2().save_pretrained(directory)
    made = short_recipe(directory, tmp_path)("data.packing=true", "targets=all-linear", "method.name=lora")
    with pytest.raises(UserError, match=r"^data\.packing: in \w+ of .* depends on those that stand before"):
        train(made, Topology())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.packing=true", "data.task=rte", "data.path=null"], "data.packing: of the task rte every row"),
        (
            ["data.packing=true", "data.task=stsb", "data.path=null"],
            "data.packing: of the task stsb every row",
        ),
        (["data.packing=true", "data.task=cifar10", "data.path=null"], "data.packing: of the task cifar10"),
        (["data.group_by_length=true", "data.task=cifar10", "data.path=null"], "are of one size"),
        (["data.packing=true", "data.group_by_length=true"], "set one of them to false"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_sentence(overrides, said, model, tmp_path):
    with pytest.raises(UserError, match=said):
        objective_of(short_recipe(model, tmp_path)(*overrides))


# ---------------------------------------------------------------------- runs


@pytest.fixture
def recipe(model, tmp_path):
    """Six rows of 20 to 26 tokens, in steps of four; two of them have room in one packed row."""
    whole = ("train.steps=4", "train.global_batch_size=4", "data.max_length=64", "train.micro_batch_size=2")
    return lambda *more: short_recipe(model, tmp_path)(*whole, *more)


def told(made):
    """Loss and gradient norm of every step, and what was padding."""
    lines = map(json.loads, (Path(made.output_dir) / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "train/loss" in line]
    return (
        [line["train/loss"] for line in steps],
        [line["train/grad_norm"] for line in steps],
        [line["train/padding"] for line in steps],
    )


def adapter(made):
    return (Path(made.output_dir) / "checkpoint-4" / "adapter.safetensors").read_bytes()


def test_a_run_trains_the_same_however_rows_are_filled_and_goes_on_to_the_bit(recipe, tmp_path):
    """Amid an epoch of two steps: as it was begun, and packed where it was not."""
    made = {
        key: recipe("train.keep_checkpoints=4", f"output_dir={tmp_path}/{key}", f"data.{key}=true")
        for key in ("packing", "group_by_length")
    }
    made["plain"] = recipe("train.keep_checkpoints=4", f"output_dir={tmp_path}/plain")
    for one in made.values():
        train(one, Topology())
    losses, norms, padding = told(made["plain"])
    for key in ("packing", "group_by_length"):
        found = told(made[key])
        assert found[0] == pytest.approx(losses, rel=1e-5) and found[1] == pytest.approx(norms, rel=1e-4)
        assert sum(found[2]) <= sum(padding) + 1e-9
    weights = adapter(made["packing"])
    shutil.rmtree(tmp_path / "packing" / "checkpoint-4")
    train(made["packing"], Topology())
    assert adapter(made["packing"]) == weights
    shutil.rmtree(tmp_path / "plain" / "checkpoint-4")
    train(recipe("train.keep_checkpoints=4", f"output_dir={tmp_path}/plain", "data.packing=true"), Topology())
    assert told(made["plain"])[0] == pytest.approx(losses, rel=1e-5)


def test_packing_is_no_part_of_what_a_run_trains(recipe):
    """As little as the micro-batch is."""
    assert run_identity(recipe()) == run_identity(recipe("data.packing=true"))
    assert run_identity(recipe()) == run_identity(recipe("data.group_by_length=true"))


def test_a_step_counts_the_tokens_of_all_ranks(recipe):
    made = recipe("data.packing=true")
    data = RunSamples(ALONE, made, objective_of(made))
    taken = [data.training[i] for i in data.order.indices(0)]
    amount, padding = data.load_of_step(0)
    assert amount == sum(len(each.input_ids) for each in taken)
    batches = data.of_step(0)
    cells = sum(batch["input_ids"].numel() for batch in batches)
    assert len(batches) == 1 and padding == pytest.approx(1 - amount / cells)
    assert all("position_ids" in batch for batch in batches)


def test_the_first_batches_of_a_search_are_packed_and_probes_are_not(recipe):
    made = recipe("data.packing=true", "train.global_batch_size=2")
    data = RunSamples(ALONE, made, objective_of(made))
    steps, held_back = data.trial(2, 2)
    assert len(steps) == 2 and all("position_ids" in batch for step in steps for batch in step)
    assert all("position_ids" not in batch for batch in held_back)
    assert all("position_ids" not in batch for _, batch in data.rows_of_step(0))
