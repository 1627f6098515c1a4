"""What vLLM loads of a LoRA in PEFT's format, and an adapter in the form that it does.

Its rules stand in vllm/config/lora.py (ranks), vllm/lora/peft_helper.py (keys of adapter_config.json) and
vllm/lora/lora_model.py (names of tensors). It reads one `r` and one `lora_alpha` for all layers, neither
rank_pattern nor alpha_pattern, and casts tensors to the dtype of its own model.
"""

from torch import Tensor
from torch.nn.functional import pad

from distlora.errors import UserError
from distlora.exports.sources import Source
from distlora.maths.low_rank import LowRank

#: What `--max-lora-rank` may be (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def problem_with_vllm(source: Source) -> str | None:
    """Why vLLM cannot load the adapter, as the end of a sentence about it; None if it can."""
    if source.magnitudes:
        return "has no DoRA"
    if source.heads:
        return f"loads no module that was trained whole, such as {next(iter(source.heads))}"
    experts = next((layer for layer, shape in source.layers.items() if len(shape) == 4), None)
    if experts is not None:
        return f"does not load {experts}, the experts of a layer in one tensor, for every class"
    highest = max(shape[0] for shape in source.layers.values())
    if highest > RANKS[-1]:
        return f"has no rank above {RANKS[-1]}, and this adapter has {highest}"
    return None


def rank_for_vllm(rank: int) -> int:
    """The smallest of vLLM's ranks that is not below this one."""
    return next(allowed for allowed in RANKS if allowed >= rank)


class ForVLLM:
    """Another source with one of vLLM's ranks in all layers: pairs have columns of zeros behind their own.
    The alpha of an export is its rank, so that the update stays what it was.

    Raises UserError for what vLLM cannot load.
    """

    def __init__(self, source: Source):
        problem = problem_with_vllm(source)
        if problem:
            fewer = " (or cut it with --compress-rank 512)" if "rank above" in problem else ""
            raise UserError(f"vLLM {problem}; export the run with --format merged{fewer}")
        self._source = source
        self.rank = rank_for_vllm(max(shape[0] for shape in source.layers.values()))
        self.layers = {layer: (self.rank, *shape[1:]) for layer, shape in source.layers.items()}
        self.step, self.model, self.targets = source.step, source.model, source.targets
        self.stacked, self.magnitudes, self.heads = source.stacked, source.magnitudes, source.heads

    def low_rank(self, layer: str) -> LowRank | None:
        pair = self._source.low_rank(layer)
        if pair is None:
            return None
        more = self.rank - pair.right.shape[0]
        return LowRank(pad(pair.left, (0, more)), pad(pair.right, (0, 0, 0, more)))

    def magnitude(self, layer: str) -> Tensor | None:
        """See `Source`; there are none."""
        return self._source.magnitude(layer)

    def read(self, head: str) -> Tensor | None:
        """See `Source`; there are none."""
        return self._source.read(head)
