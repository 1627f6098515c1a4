"""Looks at the adapter of every layer from time to time, for the monitors: how far it has moved its weight,
and the singular values of its core.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.owners import assign_owners
from distlora.engine.protocol import Engine
from distlora.maths.linalg import effective_rank, low_rank_norm
from distlora.methods import Factors, Method, core_of
from distlora.recompose.stacks import single_factors
from distlora.training import pictures
from distlora.training.monitor import Monitor

#: Looks in the course of a run, beside the one at its start. The pictures of each cost tenths of a second.
LOOKS = 10


@dataclass(frozen=True)
class LayerLooks:
    """layers: of the engine's model. steps: of the whole run. All calls are collective, and do nothing where
    the engine has no monitor, or where there are no factors to look at.
    """

    engine: Engine
    method: Method
    layers: dict[str, AdapterLinear]
    monitor: Monitor
    steps: int

    def after_step(self, step: int) -> None:
        """step: finished steps."""
        if step == self.steps or step % max(1, self.steps // LOOKS) == 0:
            self.look(step)

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Writes scalars and pictures under `method/`."""
        if not (self.engine.monitored and self.method.path and self.layers):
            return
        table = self._table().cpu()
        norms, spectra = table[:, 0], table[:, 1:]
        scalars = {"update_norm": norms.mean()}
        if spectra.shape[1]:
            middle = spectra.shape[1] // 2
            scalars |= {
                "core/largest": spectra[:, 0].mean(), "core/median": spectra[:, middle].mean(),
                "core/smallest": spectra[:, -1].mean(),
                "core/effective_rank": sum(map(effective_rank, spectra)) / len(spectra),
            }  # fmt: skip
        self.monitor.write(step, {f"method/{key}": float(value) for key, value in scalars.items()})
        by_layer = dict(zip(self.layers, norms.tolist()))
        self.engine.on_board(lambda writer: pictures.add_update_norms(writer, by_layer, step))
        if spectra.shape[1]:
            self.engine.on_board(lambda writer: pictures.add_core(writer, spectra, step))

    def _table(self) -> Tensor:
        """(layers, 1 + r) float64 on every rank: the norm of a layer's update of W0, and the singular values
        of its core where the method has one. Each row is computed by the layer's owner. One collective beside
        those that gather the factors.
        """
        core = core_of(self.method)
        owners = assign_owners(self.layers, self.method, self.engine.comm.world_size)
        device = self.engine.comm.device
        table = torch.zeros(
            len(self.layers), 1 + (self.method.rank if core else 0), dtype=torch.float64, device=device
        )
        for row, (name, layer) in zip(table, self.layers.items()):
            factors = self.engine.read(layer)
            if owners[name] == self.engine.comm.rank:
                row[0] = self._update_norm(layer, factors)
                if core:
                    values = torch.linalg.svdvals(factors[core].float())
                    # Of a stack, the mean of its experts.
                    row[1:] = values.reshape(-1, self.method.rank).mean(0)
        return self.engine.comm.all_reduce(table)

    def _update_norm(self, layer: AdapterLinear, factors: Factors) -> float:
        """Of all that was added to W0: what the ledger holds and what the live factors add."""
        kept = zip(*(pair.single() for pair in self.engine.ledger.pairs(layer.name)))
        own = single_factors(layer, factors)
        fused = list(kept) or [()] * len(own)
        squares = 0.0
        for matrix, pairs in zip(own, fused):
            pairs = [self.method.delta(matrix), *pairs]
            left = torch.cat([pair.left.to(self.engine.comm.device, torch.float32) for pair in pairs], 1)
            right = torch.cat([pair.right.to(self.engine.comm.device, torch.float32) for pair in pairs], 0)
            squares += low_rank_norm(left, right) ** 2
        return squares**0.5
