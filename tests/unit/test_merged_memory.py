"""In which dtype a merged model is compared, when memory is short."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from distlora.exports import check

NUMBERS = 1 << 12
#: What a comparison takes in any case.
FIXED = 256 << 20


def _fitting(folder, tensors, free, monkeypatch, layers=None, base=None):
    """The dtype of the comparison of a model with these tensors, where `free` bytes are left."""
    for name, content in (("draft", tensors), ("base", base or tensors)):
        (folder / name).mkdir(parents=True)
        save_file(content, folder / name / "model.safetensors")
    merged = SimpleNamespace(base=folder / "base", source=SimpleNamespace(layers=layers or {}))
    monkeypatch.setattr(check, "free_host_memory", lambda: free)
    return check._dtype_that_fits(folder / "draft", merged)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask": torch.ones(8, dtype=torch.bool)},
        {"bias": torch.ones(8)},
        {"ids": torch.arange(8), "a": torch.ones(2, dtype=torch.float16)},
    ],
)
def test_the_dtype_of_most_weights_is_the_files_own(more, tmp_path, monkeypatch):
    many = {str(i): torch.ones(NUMBERS, dtype=torch.bfloat16) for i in range(64)}
    room = 64 * NUMBERS * 2 + NUMBERS * 12 + FIXED + (1 << 10)
    assert _fitting(tmp_path, many | more, room, monkeypatch) == torch.bfloat16


def test_files_of_two_dtypes_are_compared_in_float32_or_not_at_all(tmp_path, monkeypatch):
    many = {str(i): torch.ones(NUMBERS, dtype=torch.bfloat16) for i in range(64)}
    wide, room = {name: value.float() for name, value in many.items()}, 64 * NUMBERS * 3 + FIXED
    assert _fitting(tmp_path, many, room, monkeypatch, base=wide) is None


def test_a_stack_of_experts_counts_as_one_weight(tmp_path, monkeypatch):
    """Also where the files hold every expert by itself."""
    many = {str(i): torch.ones(NUMBERS) for i in range(8)}
    room, layers = 8 * NUMBERS * 4 + NUMBERS * 12 + FIXED + (1 << 10), {"experts": (2, 8, NUMBERS // 8, 8)}
    assert _fitting(tmp_path / "a", many, room, monkeypatch) == torch.float32
    assert _fitting(tmp_path / "b", many, room, monkeypatch, layers) is None
