"""What known GPUs can compute at most, as their makers' data sheets say: dense matrix products, at the full
clock.
"""

import torch

#: TFLOP/s in bfloat16 with sums in float32, and in float32 without TF32; None where the GPU has no bfloat16.
#: The first entry that is a part of the device's name counts.
PEAKS: dict[str, tuple[float | None, float]] = {
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "A10G": (70.0, 31.5),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (None, 15.7),
    "T4": (None, 8.1),
    "MI300X": (1307.4, 163.4),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the device at most in products of this dtype; None where that is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype, torch.backends.cuda.matmul.allow_tf32)


def peak_of(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """The same of a device by its name. tf32: whether products in float32 are computed in TF32, whose peaks
    are not in the table.
    """
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if known is None or dtype not in (torch.bfloat16, torch.float32) or (dtype == torch.float32 and tf32):
        return None
    peak = known[0] if dtype == torch.bfloat16 else known[1]
    return None if peak is None else peak * 1e12
