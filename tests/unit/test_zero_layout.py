"""Which engines of a user's are refused, and how: no engine is made here."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from distlora.engine.zero.layout import (
    base_optimizer,
    locate,
    refuse_parameters_outside,
    refuse_unknown_layout,
)
from distlora.errors import UserError


def offload(device: str) -> SimpleNamespace:
    return SimpleNamespace(device=device)


OPTIMIZER = SimpleNamespace()


def engine(optimizer=OPTIMIZER, dp_world_size=2, **changes):
    """What is asked of a DeepSpeed engine: one that is welcome unless something is changed."""
    answers = {
        "fp16_enabled": False, "torch_autocast_enabled": False, "autotp_size": 0,
        "managed_gradient_accumulation": True, "bf16_master_weights_and_gradients": False,
        "zero_offload_optimizer": None, "zero_offload_param": offload("cpu"),
        "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False,
    } | changes  # fmt: skip
    methods = {name: lambda answer=answer: answer for name, answer in answers.items()}
    return SimpleNamespace(optimizer=optimizer, dp_world_size=dp_world_size, zenflow=False, **methods)


def test_an_engine_of_the_table_is_welcome():
    refuse_unknown_layout(engine(), 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp16_enabled": True}, "trains in float16"),
        ({"torch_autocast_enabled": True}, "torch_autocast"),
        ({"optimizer": None}, "has no optimizer"),
        ({"autotp_size": 2}, "tensor or sequence parallel"),
        ({"dp_world_size": 1}, "tensor or sequence parallel"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"zero_offload_optimizer": offload("nvme")}, "NVMe"),
        ({"zero_offload_param": offload("nvme")}, "NVMe"),
        ({"zero_quantized_nontrainable_weights": True}, "quantises weights"),
    ],
)
def test_what_cannot_be_worked_with_is_one_sentence(changes, words):
    with pytest.raises(UserError, match=f"^this DeepSpeed engine [^\\n]*{words}[^\\n]*$") as refused:
        refuse_unknown_layout(engine(**changes), 2)
    assert refused.value.agreed, "every rank sees it, so rank 0 alone says it"


def test_a_pipeline_is_refused():
    with pytest.raises(UserError, match="PipelineEngine"):
        refuse_unknown_layout(PipelineEngine.__new__(PipelineEngine), 2)


def test_a_wrapper_whose_layout_is_unknown_is_refused_by_its_name():
    class SuperOffload:
        pass

    with pytest.raises(UserError, match="wrapper SuperOffload, whose layout is not known"):
        locate(SuperOffload(), {}, 0)


def test_a_parameter_that_the_optimizer_lacks_is_named():
    """Whoever attaches after `deepspeed.initialize` has factors that nobody trains."""
    held, forgotten = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([held])
    with pytest.raises(
        UserError, match=r"does not train layer.B \(1 of 2 .*attach before deepspeed.initialize"
    ):
        locate(plain, {"layer.A": held, "layer.B": forgotten}, 0)
    assert locate(plain, {"layer.A": held}, 0)["layer.A"].length == 2


def test_what_an_engine_trains_outside_of_the_adapted_model_is_named():
    model = nn.Linear(2, 2)
    whole = nn.ModuleDict({"model": model, "value_head": nn.Linear(2, 1)})
    refuse_parameters_outside(SimpleNamespace(module=model), model)
    with pytest.raises(UserError, match="also trains value_head.weight, outside of the adapted model"):
        refuse_parameters_outside(SimpleNamespace(module=whole), model)


def test_without_a_wrapper_the_optimizer_is_the_base_optimizer():
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    assert base_optimizer(SimpleNamespace(optimizer=plain)) is plain
    assert base_optimizer(SimpleNamespace(optimizer=SimpleNamespace(optimizer=plain))) is plain
