"""NEFTune (arXiv 2310.05914): uniform noise on the token embeddings of training passes."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distlora.errors import UserError
from distlora.maths.generators import seed_of
from distlora.models.targets import Batch

LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]


class EmbeddingNoise:
    """Each element of a text's embeddings, (L, d), gets a number from U(-1, 1) · alpha / √(L·d), the paper's
    section 2; padding gets none.

    What is drawn depends on the seed, the step and the text's place in the global batch alone: it is the same
    on any number of ranks and with any micro-batch, and a resumed run draws what it would have drawn. Nothing
    is kept between passes, and no other generator moves. (CPU and CUDA draw other numbers.)
    """

    def __init__(self, alpha: float, seed: int):
        self._alpha, self._seed = alpha, seed

    def of_step(
        self, loss_sum: LossSum, step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> LossSum:
        """The loss with noise, for this rank's passes of one step, in their order; see
        `distlora.data.micro_batches`."""
        passes = itertools.count()

        def noisy(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            first, rows = micro_batch_size * next(passes), len(batch["input_ids"])
            places = [rank + world_size * (first + row) for row in range(rows)]
            with self._added(model, batch["attention_mask"] != 0, step, places):
                return loss_sum(model, batch)

        return noisy

    @contextmanager
    def _added(self, model: nn.Module, mask: Tensor, step: int, places: Sequence[int]) -> Iterator[None]:
        def add(module: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
            if embedded.shape[:-1] != mask.shape:
                raise UserError(
                    f"train.neftune_alpha: {type(model).__name__} does not embed its tokens one by one; set "
                    "it to null",
                    agreed=True,
                )
            return embedded + self.noise(mask, embedded.shape[-1], step, places).to(embedded.dtype)

        handle = model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def noise(self, mask: Tensor, width: int, step: int, places: Sequence[int]) -> Tensor:
        """(batch, length, width) float32. mask: (batch, length), where there are tokens. places: of the rows
        in the global batch."""
        found = torch.zeros(*mask.shape, width, device=mask.device)
        for row, (place, count) in enumerate(zip(places, mask.sum(1).tolist(), strict=True)):
            generator = torch.Generator(mask.device).manual_seed(
                seed_of(self._seed, f"embedding noise {step} {place}")
            )
            drawn = torch.rand(count, width, generator=generator, device=mask.device)
            found[row, mask[row]] = (2 * drawn - 1) * (self._alpha / math.sqrt(max(1, count) * width))
        return found
