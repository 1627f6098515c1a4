"""Methods that give the optimizer other gradients than those of the loss."""

from abc import abstractmethod

from torch import Tensor

from distlora.methods.contract import Factors, Method


class CorrectsGradients(Method):
    """Single gradients are corrected by linear maps, as they appear in the backward pass."""

    @abstractmethod
    def gradient_map(self, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
        """The corrections `{factor: (P, Q)}`: the optimizer is given `P g Q` in place of that factor's
        gradient g.

        A linear map commutes with accumulation and with averaging over ranks, so it is applied to each
        gradient as it appears. factors: as the forward pass uses them (cast). P and Q are float32. {} for no
        correction.
        """


class TransformsGradients(Method):
    """The averaged gradients of a whole layer are transformed together before every optimizer step."""

    @abstractmethod
    def transform_gradients(self, gradients: Factors, factors: Factors) -> Factors:
        """What the optimizer is given in place of one layer's gradients. Leaves its arguments alone.

        gradients: of every trained factor, whole, float32, averaged, not clipped. factors: all of them,
        whole, as the forward pass uses them (cast), in float32. Returns float32 tensors of the same shapes; a
        factor that is left out keeps its gradient. Linear in the gradients: the clipping coefficient goes by
        the norm of `gradients`, and multiplies what is returned.
        """
