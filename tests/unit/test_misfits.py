"""Tensors in the files of another size than the config's: a new head, or one sentence, before any is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from distlora.errors import UserError
from distlora.models import loading
from distlora.models.loading import load_model
from distlora.models.misfits import left_out, misfits
from distlora.recipe.sections import ModelSection

LABELS = ("a", "b", "c")


@pytest.fixture
def trained(tmp_path):
    """Saves a trained classifier; what is given stands for tensors of its file (None: it has none)."""

    def trained(labels, **tensors):
        config = BertConfig(
            vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, num_labels=labels,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        changed = load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}
        save_file({k: v for k, v in changed.items() if v is not None}, file, {"format": "pt"})
        return ModelSection(path=str(tmp_path), dtype="float32"), model

    return trained


HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("labels", "tensors", "new"),
    [
        (5, {}, HEAD),
        (2, {}, HEAD),
        (1, {}, HEAD),  # a regression's
        (3, {"classifier__bias": None}, {"classifier.bias"}),
        (3, {"classifier__bias": torch.zeros(7)}, {"classifier.bias"}),
        (3, {"classifier__weight": torch.zeros(3, 13)}, {"classifier.weight"}),
        (3, {}, set()),
    ],
)  # fmt: skip
def test_what_does_not_fit_of_a_head_is_new_and_the_rest_is_kept(trained, labels, tensors, new):
    section, before = trained(labels, **tensors)
    model, found = load_model(section, LABELS)
    assert found == new
    assert model.classifier.weight.shape == (3, 12) and model.classifier.bias.shape == (3,)
    kept = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in new:
            assert torch.equal(parameter, kept[name]), name
    if "classifier.bias" in new:
        assert not model.classifier.bias.any()


@pytest.mark.parametrize(
    "tensors",
    [
        {"bert__embeddings__word_embeddings__weight": torch.zeros(40, 12)},
        {"bert__encoder__layer__0__intermediate__dense__bias": torch.zeros(21)},
        {"bert__pooler__dense__weight": torch.zeros(12)},
    ],
)
def test_what_does_not_fit_of_the_base_is_refused_before_any_tensor_is_read(trained, monkeypatch, tensors):
    """By every rank alike: under ZeRO-3 transformers reads tensors on rank 0 alone."""
    section, _ = trained(3, **tensors)
    monkeypatch.setattr(loading, "auto_class", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(loading, "load_config", lambda *_: BertConfig.from_pretrained(section.path))
    with pytest.raises(UserError, match="the sizes of the weights are not those of config.json"):
        load_model(section, LABELS)


def test_a_changed_config_is_refused_like_changed_weights(trained, tmp_path):
    section, _ = trained(3)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 32}))
    with pytest.raises(UserError, match="the sizes of the weights are not those of config.json"):
        load_model(section, LABELS)


def test_misfits_are_named_with_their_tensors_and_left_out(trained, tmp_path):
    _, before = trained(3, classifier__bias=torch.zeros(7))
    found = misfits(tmp_path, before)
    assert found == {"classifier.bias": ["classifier.bias"]}
    assert list(left_out(found)) == [r"^classifier\.bias$"] and left_out({}) is None
