"""AdamW as bitsandbytes has it: with 8-bit moments, or paged, so that moments move to the host when the
device is full.

What it keeps of a (flat) parameter of n elements:

    state1, state2      (n,)            the moments: float32, or uint8 codes (see `distlora.maths.blockwise`)
    qmap1, qmap2        (256,)          the tables of the codes
    absmax1, absmax2    (⌈n/256⌉,)      the scales of the blocks

Parameters of less than 4096 elements keep float32 moments. On the CPU there are 8-bit moments too, but paging
does nothing.
"""

from collections.abc import Callable

import torch
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import Tensor

from distlora.maths.blockwise import decode, encode, scales_of

#: bitsandbytes' numbers of torch's moments, and of their scales.
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
SCALES = {"exp_avg_scale": 1, "exp_avg_sq_scale": 2}


class BitsandbytesAdamW(Optimizer2State):
    """See `distlora.engine.optimizers.PackedMoments`: between two steps the moments can be had under torch's
    names.
    """

    def __init__(
        self,
        parameters,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bits: int,
        paged: bool,
    ):
        super().__init__("adam", parameters, lr, betas, eps, weight_decay, optim_bits=bits, is_paged=paged)
        self._keys = [*MOMENTS, *SCALES] if bits == 8 else [*MOMENTS]

    def moment_keys(self) -> list[str]:
        return self._keys

    def moment(self, parameter: Tensor, key: str, start: int, length: int) -> Tensor:
        state = self.state[parameter]
        if key in state:  # unpacked
            return state[key].view(-1).narrow(0, start, length)
        number = MOMENTS.get(key) or SCALES[key]
        values = state[f"state{number}"].view(-1).narrow(0, start, length)
        if values.dtype == torch.float32:
            return torch.zeros_like(values) if key in SCALES else values
        scales = scales_of(state[f"absmax{number}"], start, length)
        # Paged codes lie on the host, as torch sees them.
        return scales if key in SCALES else decode(values.to(scales.device), scales, state[f"qmap{number}"])

    @torch.no_grad()
    def forget(self, parameter: Tensor) -> None:
        # Paged memory is never given back to the system: what is there is used again.
        state = self.state.get(parameter, {})
        for key, value in state.items():
            if key == "step":
                state[key] = 0
            elif not key.startswith("qmap"):
                value.zero_()

    @torch.no_grad()
    def unpack(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if "state1" in state:
            whole = {
                key: self.moment(parameter, key, 0, parameter.numel()).to(parameter.device, copy=True)
                for key in self._keys
            }
            self.state[parameter] = {"step": state["step"]} | {
                key: value.view_as(parameter) for key, value in whole.items()
            }

    def step(self, closure: Callable | None = None):
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if "exp_avg" in self.state.get(parameter, ()):
                    self._pack(group, parameter, group_index, index)
        return super().step(closure)

    @torch.no_grad()
    def _pack(self, group: dict, parameter: Tensor, group_index: int, index: int) -> None:
        """The moments of an unpacked parameter in bitsandbytes' form."""
        unpacked = self.state.pop(parameter)
        self.init_state(group, parameter, group_index, index)
        state = self.state[parameter]
        state["step"] = unpacked["step"]
        for (key, number), scale in zip(MOMENTS.items(), SCALES):
            values, kept = unpacked[key], state[f"state{number}"]
            if kept.dtype == torch.uint8:
                values, blocks = encode(
                    values.reshape(-1), unpacked[scale].reshape(-1), state[f"qmap{number}"]
                )
                state[f"absmax{number}"].copy_(blocks)
            kept.copy_(values.view_as(kept))
