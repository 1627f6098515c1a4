"""Memory of one pass over a micro-batch, from the sizes of the model: what the backward pass needs, and what
exists only for a moment.

This counts what the layers of `transformers` and of this project save for the backward pass:
- an RMS norm saves its input in float32;
- attention saves queries, keys and values of all heads, and its output; without a fused kernel also the
  scores, once as softmax returns them and once as they are used;
- a gated MLP saves three tensors of its inner width;
- an adapted layer saves its input where the first factor or the weight is trained, and the narrow inputs of
  the other trained factors.
Nothing is saved for a frozen weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from distlora.maths.blocks import LOGIT_ELEMENTS
from distlora.methods import HasMagnitude, TrainsWeight
from distlora.plan.setup import FLOAT32, Setup


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch.

    kept: what stays from the forward pass until the backward pass needs it. block: the most that the backward
    pass of one block adds. loss: the most that the loss adds, forward and backward. forward: the peak of a
    pass without gradients.
    """

    kept: int
    block: int
    loss: int
    forward: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.block, self.loss)


def activations(setup: Setup, micro_batch: int, checkpointed: bool, every_input: bool = False) -> Activations:
    """The activations of one micro-batch of so many samples.

    checkpointed: whether blocks compute their activations again in the backward pass. every_input: whether
    all adapted layers keep their inputs, as in the probe.
    """
    dims = _Dimensions(setup)
    tokens = micro_batch * setup.length
    saved, working = tokens * dims.saved_by_block(every_input), tokens * dims.working()
    stream = tokens * dims.hidden * dims.width
    kept = dims.blocks * (stream if checkpointed else saved)
    rows = micro_batch if setup.shapes.labels else tokens
    return Activations(
        kept + 2 * stream,
        working + (saved if checkpointed else 0),
        dims.loss(rows, backward=True),
        max(working + stream, dims.loss(rows, backward=False)),
    )


class _Dimensions:
    """The sizes of a transformer, and the bytes a token that follow from them."""

    def __init__(self, setup: Setup):
        config, self._setup = setup.shapes.config, setup
        self.width, self.blocks = setup.shapes.width, len(setup.shapes.blocks)
        self.hidden = config.hidden_size
        self.inner = getattr(config, "intermediate_size", None) or 4 * self.hidden
        heads = config.num_attention_heads
        self.heads = heads
        self.query = heads * (getattr(config, "head_dim", None) or self.hidden // heads)
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        self.final_softcap = getattr(config, "final_logit_softcapping", None)
        self.outputs = setup.shapes.labels or config.vocab_size
        self.length = setup.length
        block = next(iter(sorted(setup.shapes.blocks)), None)
        prefix = f"{setup.shapes.names[block]}." if block is not None else ""
        self._own = {name: shape for name, shape in setup.shapes.linears.items() if name.startswith(prefix)}
        self._norms = sum(
            1
            for name, pieces in zip(setup.shapes.names, setup.shapes.modules)
            if name.startswith(prefix) and pieces and max(piece.elements for piece in pieces) <= self.hidden
        )
        self.gated = sum(shape == (self.inner, self.hidden) for shape in self._own.values()) > 1
        targets = set(setup.shapes.attached.targets)
        self._targets = {name for name in self._own if name in targets}
        experts = {name: shape for name, shape in setup.shapes.experts.items() if name.startswith(prefix)}
        #: Experts that compute a token, and (out, in) of their weights: of all, and of the adapted ones.
        self._chosen = getattr(config, "num_experts_per_tok", None) or 1
        self._experts = list(experts.values())
        self._expert_targets = [shape for name, shape in experts.items() if name in targets]
        if experts:
            dense = max((shape[0] for shape in self._own.values() if shape[0] == self.inner), default=0)
            self.inner = dense + self._chosen * min(into for _, into in self._experts)
            self.gated = True

    def saved_by_block(self, every_input: bool) -> float:
        norms = self._norms * self.hidden * FLOAT32
        attention = 4 * self.query * self.width
        if self._setup.shapes.attention == "eager":
            attention += (
                self.heads * self.length * (FLOAT32 + self.width + (self.width if self.softcap else 0))
            )
        mlp = (3 if self.gated else 2) * self.inner * self.width
        return norms + attention + mlp + self._by_adapters(every_input) + self._by_experts(every_input)

    def _by_adapters(self, every_input: bool) -> float:
        """Bytes a token that the adapted layers of one block save.

        Several layers share an input, which counts once: the two normed streams of the block, the output of
        attention (already counted there) and the product within the MLP.
        """
        method = self._setup.method
        narrow = sum(factor in method.trains for factor in method.path[1:]) * method.rank * self.width
        beside = self._scaled(self._own[name] for name in self._targets)
        first_is_trained = bool(method.path) and method.path[0] in method.trains
        wide = every_input or first_is_trained or isinstance(method, TrainsWeight)
        inputs = (2 * self.hidden + self.inner) * self.width if wide else 0
        if method.dropout:
            inputs += sum(self._own[name][1] * (self.width + 1) for name in self._targets)
        return (narrow * len(self._targets) + inputs if self._targets else 0) + beside

    def _by_experts(self, every_input: bool) -> float:
        """Bytes a token that a block's experts save: the routed copies of the token, their results before
        they are weighted, and what their adapters save.
        """
        if not self._experts:
            return 0
        method = self._setup.method
        kept = 2 * self._chosen * self.hidden
        if self._expert_targets:
            narrow = sum(factor in method.trains for factor in method.path[1:]) * method.rank
            kept += self._chosen * narrow * len(self._expert_targets)
            if every_input or (method.path and method.path[0] in method.trains) or method.dropout:
                kept += self._chosen * sum(into for _, into in self._expert_targets)
        # What is scaled, and the scale of every row.
        return kept * self.width + 2 * self._chosen * self._scaled(self._expert_targets)

    def _scaled(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Bytes a token of the outputs whose rows a trained magnitude scales."""
        if not isinstance(self._setup.method, HasMagnitude):
            return 0
        return sum(out * self.width for out, _ in shapes)

    def working(self) -> float:
        """Bytes a token that the backward pass of a block needs for a moment.

        These are the gradients of the MLP's inner tensors, and of the residual stream in float32.
        """
        attention = 0
        if self._setup.shapes.attention == "eager":
            attention = 2 * self.heads * self.length * FLOAT32
        return max(3 * self.inner * self.width, attention) + 3 * self.hidden * FLOAT32

    def loss(self, rows: int, backward: bool) -> int:
        """Bytes of the logits of one block of rows, or of all rows where the model makes them at once: in the
        model's type and in float32, their gradient likewise, and what a soft cap needs.
        """
        if not self._setup.shapes.whole_logits:
            rows = min(rows, max(1, LOGIT_ELEMENTS // self.outputs))
        low = self.width if self.width < FLOAT32 else 0
        each = low + FLOAT32
        if backward:
            each = low + 2 * FLOAT32
        if self.final_softcap:
            each = 2 * low + 4 * FLOAT32 if backward else low + 3 * FLOAT32
        return rows * self.outputs * each
