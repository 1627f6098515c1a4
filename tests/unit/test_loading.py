"""Loading, the response loss and generation, on tiny models of the real classes."""

import json
import logging
from fnmatch import fnmatch

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig

from distlora.errors import UserError
from distlora.models import loading
from distlora.models.cross_entropy import OutputHead
from distlora.models.generation import generate
from distlora.models.hub import WANTED_FILES
from distlora.models.loading import load_config, load_model, load_tokenizer
from distlora.models.losses import response_loss
from distlora.models.targets import IGNORE
from distlora.recipe.sections import ModelSection
from tests.tiny_models import NAMES, VOCAB_SIZE, tiny_encoder_config, tiny_model_dir, tiny_tokenizer

PAD = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder in which each test finds the tiny models, made on demand."""
    return tmp_path_factory.mktemp("models")


def section(directory, **more) -> ModelSection:
    return ModelSection(**{"path": str(directory), "dtype": "float32", **more})


def batch(*lengths: int, prompt: int = 2) -> dict[str, torch.Tensor]:
    """Right-padded rows of the given lengths. All but the first `prompt` tokens of each are its response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCAB_SIZE, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    response = real & (torch.arange(max(lengths)) >= prompt)
    return {
        "input_ids": ids.where(real, PAD),
        "attention_mask": real.long(),
        "labels": ids.where(response, IGNORE),
    }


def plain_loss(model, rows, weights):
    """The definition: transformers' own logits, shifted, whole and in float32."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    labels = rows["labels"][:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
    )
    return (losses.sum(1) * weights).sum()


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_response_loss_is_the_models_own(models, name, checkpointing):
    model, _ = load_model(section(tiny_model_dir(name, models), gradient_checkpointing=checkpointing))
    model.train()
    rows = batch(9, 4, 7)
    weights = torch.tensor([1.0, 0.25, 3.0])
    expected = plain_loss(model, rows, weights)
    expected.backward()
    wanted = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()

    loss, tokens = response_loss(model, rows, weights)
    loss.backward()
    assert tokens == 7 + 2 + 5
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for key, parameter in model.named_parameters():  # the head too, tied to the embeddings or not
        assert parameter.grad.any(), key
        torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-4, atol=1e-5)


def test_soft_caps_matter_in_the_test_above(models):
    model, _ = load_model(section(tiny_model_dir("gemma2", models)))
    rows = batch(9, 4)
    capped, _ = response_loss(model, rows)
    model, _ = load_model(section(tiny_model_dir("gemma2", models)))
    model.config.final_logit_softcapping = None
    free, _ = response_loss(model, rows)
    assert abs(capped - free) > 0.01 * capped


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_without_response_has_zero_gradients_everywhere(models, name):
    model, _ = load_model(section(tiny_model_dir(name, models)))
    model.train()
    # What a rank without a sample runs.
    ids = torch.full((1, 2), PAD)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORE)}
    loss, tokens = response_loss(model, rows)
    loss.backward()
    assert (loss.item(), tokens) == (0, 0)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


def test_padding_changes_nothing(models):
    model, _ = load_model(section(tiny_model_dir("gemma2", models)))
    together, _ = response_loss(model, batch(9, 4))
    rows = batch(9, 4)
    alone = [
        response_loss(model, {key: value[i : i + 1, :n] for key, value in rows.items()})[0]
        for i, n in [(0, 9), (1, 4)]
    ]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_and_float32_rotary_buffers(models, name):
    model, new = load_model(section(tiny_model_dir(name, models), dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rotary = {key: buffer.dtype for key, buffer in model.named_buffers() if "rotary" in key}
    assert rotary and set(rotary.values()) == {torch.float32}
    assert not model.training and not new
    loss, _ = response_loss(model.train(), batch(6, 5))
    loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, chosen", [("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager"), ("qwen2", "sdpa")]
)
def test_attention_auto_takes_what_the_class_supports(monkeypatch, models, name, chosen):
    directory = tiny_model_dir(name, models)
    model, _ = load_model(section(directory))
    assert model.config._attn_implementation == chosen
    # Where flash-attn runs: in bfloat16 only.
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose = loading._attention
    assert choose(section(directory, dtype="bfloat16"), model.config) == "flash_attention_2"
    assert choose(section(directory), model.config) == chosen


def test_attention_by_name(models):
    model, _ = load_model(section(tiny_model_dir("llama", models), attention="eager"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="model.attention=sdpa: Gemma2ForCausalLM has only auto, .*eager"):
        load_config(section(tiny_model_dir("gemma2", models), attention="sdpa"))
    with pytest.raises(UserError, match="flash_attention_2 needs the package flash-attn, a GPU and bfloat16"):
        load_config(section(tiny_model_dir("llama", models), attention="flash_attention_2"))
    with pytest.raises(UserError, match="model.attention=fast"):
        load_config(section(tiny_model_dir("llama", models), attention="fast"))


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_is_not_reentrant(models, on):
    model, _ = load_model(section(tiny_model_dir("mistral", models), gradient_checkpointing=on))
    assert model.is_activation_checkpointing == on
    if on:
        assert model.model.layers[1]._gradient_checkpointing_func.keywords == {"use_reentrant": False}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_the_weights_lack_are_named(tmp_path, name):
    directory = tiny_model_dir(name, tmp_path)
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    _, new = load_model(section(directory))
    assert new == {"model.layers.1.mlp.up_proj.weight"}


def test_a_missing_untied_head_is_new_and_a_tied_one_is_not(tmp_path):
    directory = tiny_model_dir("mistral", tmp_path)
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert load_model(section(directory))[1] == {"lm_head.weight"}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert load_model(section(directory))[1] == set()


def test_a_tied_parameter_is_new_only_if_all_its_names_are_missing(models):
    model, _ = load_model(section(tiny_model_dir("qwen2", models)))
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    assert loading._new_parameters(model, {head}) == set()
    assert loading._new_parameters(model, {embeddings}) == set()
    assert loading._new_parameters(model, {embeddings, head, "some.buffer"}) == {embeddings}


@pytest.mark.parametrize("name", NAMES)
def test_the_output_head_keeps_names_and_ties(models, tmp_path, name):
    directory = tiny_model_dir(name, models)
    model, _ = load_model(section(directory))
    assert isinstance(model.get_output_embeddings(), OutputHead)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "mistral")
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(directory / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)


# ---------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    "name, pad", [("llama", "<|end|>"), ("mistral", "<unk>"), ("gemma2", "<pad>"), ("qwen2", "<|endoftext|>")]
)
def test_every_tokenizer_pads_without_growing(models, name, pad):
    directory = tiny_model_dir(name, models)
    size = len(AutoTokenizer.from_pretrained(directory))
    tokenizer = load_tokenizer(section(directory))
    assert tokenizer.pad_token == pad and tokenizer.pad_token_id < VOCAB_SIZE
    assert len(tokenizer) == size
    assert tokenizer.padding_side == "right"
    padded = tokenizer(["Tom has 3", "Tom"], padding=True)
    assert padded["input_ids"][1][-1] == tokenizer.pad_token_id and padded["attention_mask"][1][-1] == 0


def test_a_reserved_pad_token_is_preferred(models, tmp_path):
    directory = tiny_model_dir("llama", tmp_path)
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("<|reserved|>", "<|finetune_right_pad_id|>"))
    tokenizer = load_tokenizer(section(directory))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|finetune_right_pad_id|>", 0)


def test_a_pad_token_without_an_embedding_is_replaced(tmp_path):
    directory = tiny_model_dir("llama", tmp_path)
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(VOCAB_SIZE - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[new pad]"})
    assert tokenizer.pad_token_id == VOCAB_SIZE
    tokenizer.save_pretrained(directory)
    assert load_tokenizer(section(directory)).pad_token == "<|end|>"


@pytest.fixture
def published_deberta(tmp_path):
    """The config and the tokenizer as DeBERTa's third version is published: a SentencePiece model alone."""
    texts = ["Tom has three apples and buys four more. How many apples does Tom have? The answer is 7."] * 20
    (tmp_path / "texts").write_text("\n".join(texts))
    pieces = {
        f"{role}_{what}": value
        for number, role in enumerate(("pad", "bos", "eos", "unk"))
        for what, value in (("id", number), ("piece", ("[PAD]", "[CLS]", "[SEP]", "[UNK]")[number]))
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=36,
        minloglevel=2,
        **pieces,
    )
    tiny_encoder_config("deberta").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    return tmp_path


def test_a_sentencepiece_model_is_a_tokenizer(published_deberta):
    """And the hub's repositories are asked for the file."""
    tokenizer = load_tokenizer(section(published_deberta))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(published_deberta / "spm.model"))
    text = "Tom buys apples. How many?"
    assert tokenizer(text)["input_ids"] == [1, *reference.encode(text), 2]
    assert tokenizer.pad_token_id == 0 and any(fnmatch("spm.model", wanted) for wanted in WANTED_FILES)


def test_a_tokenizer_that_knows_no_word_is_refused(published_deberta):
    """Which transformers makes where the file is missing."""
    (published_deberta / "spm.model").unlink()
    with pytest.raises(UserError, match="no usable tokenizer files"):
        load_tokenizer(section(published_deberta))


def test_a_tokenizer_without_any_special_token_is_refused(tmp_path):
    directory = tiny_model_dir("llama", tmp_path)
    tokenizer = tiny_tokenizer("llama")
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(UserError, match="no pad, unknown, end or first token"):
        load_tokenizer(section(directory))


# ---------------------------------------------------------------------- generation


def by_hand(model, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding without a cache, a batch or padding."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_greedy_and_leaves_the_model_as_it_was(monkeypatch, caplog, recwarn, models, name):
    model, _ = load_model(section(tiny_model_dir(name, models), gradient_checkpointing=True))
    # What instruction-tuned models bring along; none of it is greedy.
    model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.5
    )
    prompts = [[7, 8, 9, 10, 11], [40, 41]]
    with torch.no_grad():
        expected = [by_hand(model, prompt, 12) for prompt in prompts]
    end = expected[0][4]  # an end token that the first answer reaches
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in expected]
    model.train()
    use_cache = model.config.use_cache

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    answers = generate(model, prompts, 12, {end}, PAD)
    assert answers == expected
    assert model.training and model.is_activation_checkpointing
    assert model.generation_config is own and model.config.use_cache == use_cache
    assert not [record.message for record in caplog.records] and not [str(w.message) for w in recwarn.list]


def test_several_end_tokens(models):
    model, _ = load_model(section(tiny_model_dir("llama", models)))
    with torch.no_grad():
        answer = by_hand(model, [7, 8, 9], 6)
    short = generate(model, [[7, 8, 9]], 6, {answer[3], answer[1]}, PAD)
    assert short == [answer[: min(answer.index(answer[3]), answer.index(answer[1]))]]
    assert not model.training
