"""Which share of a model's weights has an adapter, and what the rest is, in one line."""

from collections.abc import Collection
from math import prod

from torch import nn

from distlora.adapter.experts import EXPERTS, expert_parameters

#: Parts of the model below this share are told together.
SMALL = 0.005
#: Parts of the model in the line, beside what is told together.
MOST_PARTS = 6


def coverage(
    model: nn.Module, targets: Collection[str], new_parameters: Collection[str] = (), verb: str = "adapted"
) -> str:
    """Of a model that has no adapters yet. targets: names of the layers that get one. new_parameters: those
    that are trained whole. verb: what happens to the targets.

    Parts are called by the last name in the model that is no number; experts in 3-D parameters are always
    among them. Weights are counted once, however many modules share them.
    """
    experts, chosen = expert_parameters(model), set(targets)
    sizes: dict[str, int] = {}
    covered = whole = total = 0
    for name, parameter in model.named_parameters():
        size = prod(getattr(parameter, "ds_shape", parameter.shape))
        total += size
        module = name.rpartition(".")[0]
        if module in chosen or name.removesuffix("_bias") in chosen:
            covered += size
        elif name in new_parameters:
            whole += size
        else:
            part = EXPERTS if name in experts else _part(module or name)
            sizes[part] = sizes.get(part, 0) + size
    line = f"{verb} {len(targets)} layers ({_percent(covered, total)} of the weights)"
    if whole:
        line += f", trained whole: {_percent(whole, total)}"
    rest = _parts(sizes, total)
    return f"{line}; without an adapter: {rest}" if rest and verb == "adapted" else line


def _part(module: str) -> str:
    return next((part for part in reversed(module.split(".")) if not part.isdecimal()), module)


def _parts(sizes: dict[str, int], total: int) -> str:
    ordered = sorted(sizes, key=lambda part: -sizes[part])
    named = [part for part in ordered if sizes[part] >= SMALL * total][:MOST_PARTS]
    if EXPERTS in sizes and EXPERTS not in named:
        named.append(EXPERTS)
    texts = [f"{part} {_percent(sizes[part], total)}" for part in named]
    other = sum(size for part, size in sizes.items() if part not in named)
    return ", ".join([*texts, f"other {_percent(other, total)}"] if other else texts)


def _percent(size: int, total: int) -> str:
    share = 100 * size / total if total else 0.0
    return f"{share:.1f} %" if share >= 0.05 or not size else "below 0.1 %"
