"""What is wrong with `targets` as a whole is one sentence, before any layer is looked for."""

import pytest
import torch
from torch import nn

from distlora import UserError, attach
from distlora.adapter.targets import Choice, Targets
from distlora.methods.lora import LoRA
from tests.tiny_zoo import zoo_model

NAMES = "wanted all-linear, or names and patterns of layers"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (5, f"targets: found 5, {NAMES}"),
        (None, f"targets: found None, {NAMES}"),
        (True, f"targets: found True, {NAMES}"),
        (2.5, f"targets: found 2.5, {NAMES}"),
        ({"include": []}, "targets.include: found [], wanted all-linear, or names and patterns"),
        ({"include": 3}, "targets.include: found 3, wanted all-linear, or names and patterns"),
        ({"exclude": 3}, "targets.exclude: found 3, wanted names and patterns of layers that are left out"),
        ({"layers": True}, "targets.layers: found True, wanted numbers from 0 on"),
        ({"layers": [0, True]}, "targets.layers: found True, wanted numbers from 0 on"),
        ({"layers": 1.5}, "targets.layers: found 1.5, wanted numbers from 0 on"),
        ({"layers": {"a": 1}}, "targets.layers: found {'a': 1}, wanted numbers from 0 on"),
    ],
    ids=str,
)
def test_what_stands_for_no_layers_is_one_sentence(targets, said):
    with pytest.raises(UserError) as caught:
        Targets.of(targets)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_attach_says_so_too():
    with pytest.raises(UserError, match="targets: found 5, wanted all-linear"):
        attach(zoo_model("llama"), "lora", targets=5)


def test_a_mistyped_word_is_told_from_names_of_layers():
    with pytest.raises(UserError, match="all_linear matches no linear layer of .*, did you mean all-linear?"):
        attach(zoo_model("llama"), "lora", targets="all_linear")


class Experts(nn.Module):
    """Of a form that is not known."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4, 3, 3))


@pytest.mark.parametrize("excluded", ["experts", "w1", "experts.*"])
def test_experts_of_an_unknown_form_may_be_excluded(excluded):
    model = nn.ModuleDict({"experts": Experts(), "other": nn.Linear(3, 3)})
    assert list(attach(model, "lora", targets={"exclude": [excluded]}, rank=2).layers) == ["other"]


def test_experts_may_be_excluded_where_there_are_none():
    chosen = attach(zoo_model("llama"), "lora", targets={"exclude": ["experts"]}, rank=2).layers
    assert chosen.keys() == attach(zoo_model("llama"), "lora", rank=2).layers.keys()


def test_what_keeps_several_layers_from_an_adapter_is_said_of_several():
    reached = "is never reached by an input of this task"
    choice = Choice({}, LoRA(rank=2), {reached: ["a.0.q", "a.1.q"]})
    assert choice.lines() == [f"left without an adapter: a.*.q (2 layers) {reached}"]
    choice = Choice(
        {}, LoRA(rank=2), {reached: ["a.q", "b.q"], "is called, but no output depends on it": ["c", "d"]}
    )
    assert choice.lines() == [
        "left without an adapter: a.q, b.q are never reached by an input of this task",
        "left without an adapter: c, d are called, but no output depends on them",
    ]
