"""How long the parts of a step take, without a wait for the device between them."""

import time

import torch

#: In their order: the batches are made; the passes over the micro-batches; what the method does with the
#: gradients; and the optimizer's step.
PARTS = ("data", "forward", "backward", "method", "step")


class StepClock:
    """Measures one step after the other. On a GPU each mark is an event in its queue of work, which is read
    when the step is over, so the seconds are those of the GPU, with the time in which it waited for the host.
    Elsewhere they are the host's.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """A step begins."""
        self._marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        """What was done since the last mark belongs to this part."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Of each of the `PARTS`, and their "total". On a GPU it waits until the last mark is reached: for
        after the optimizer's step, whose norm of the gradient has waited for it already.
        """
        found = dict.fromkeys(PARTS, 0.0)
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:]):
            found[part] += begin.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - begin
        return found | {"total": sum(found.values())}
