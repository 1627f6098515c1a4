"""The device that a rank computes on."""

import torch


def device_of(local_rank: int) -> torch.device:
    """The rank's GPU, which becomes the current one; the CPU of a machine without."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
