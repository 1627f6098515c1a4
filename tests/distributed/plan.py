"""Every distributed case: which engine, which setting, which comparison."""

from dataclasses import dataclass, field

FP32, BF16 = "float32", "bfloat16"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Entry:
    """One case on one world. The same case with the same setting runs on LocalEngine for comparison.

    loss, first_loss: relative tolerance of the losses, and of the first. tensors: of everything else, relative to its largest.
    """

    world: int
    case: str
    stage: int
    dtype: str = FP32
    zero: dict = field(default_factory=dict)
    setting: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    loss: float = 1e-4
    first_loss: float = 1e-5
    tensors: float = 1e-3
    note: str = ""

    @property
    def key(self) -> str:
        name = f"{self.case}-world{self.world}-stage{self.stage}-{self.dtype}"
        extras = [f"{k}={v}" for k, v in {**self.setting, **self.arguments}.items()] + ([self.note] if self.note else [])
        return "-".join([name, *extras]).replace("/", "_").replace(" ", "").replace(".", "_")

    def for_worker(self) -> dict:
        engine = {"stage": self.stage, "dtype": self.dtype, **self.zero}
        return {"key": self.key, "case": self.case, "engine": engine, "setting": self.setting, "arguments": self.arguments}


def entries() -> list[Entry]:
    plan = []
    for world in (1, 2, 3):
        for stage in (0, 1, 2, 3):
            plan.append(Entry(world, "curve", stage, setting={"clip": 0.5}))
            if world > 1:
                plan.append(Entry(world, "writing", stage, setting={"micro_batch": 2}))
                plan.append(Entry(world, "replacing_gradients", stage, setting={"clip": 0.5, "micro_batch": 2}))
                plan.append(Entry(world, "probing", stage))
                plan.append(Entry(world, "short_batch", stage, setting={"micro_batch": 2}))
    for stage in (0, 1, 2, 3):
        # bfloat16 rounds every product: the curves agree to the third digit, not the factors.
        plan.append(Entry(2, "curve", stage, BF16, setting={"micro_batch": 2}, arguments={"steps": 6}, loss=5e-3, first_loss=2e-3, tensors=0.3))
        plan.append(Entry(2, "writing", stage, BF16, setting={"micro_batch": 2}, loss=5e-3, first_loss=2e-3, tensors=0.3))
        for method in ("lora", "lora_xs", "full"):
            plan.append(
                Entry(2, "curve", stage, setting={"method": method, "micro_batch": 2, "clip": 0.5}, arguments={"steps": 6})
            )
        plan.append(Entry(3, "initialising", stage, setting={"method": "lora_sb", "micro_batch": 2}, tensors=5e-2))
        plan.append(Entry(2, "naming_silent_tensors", stage, setting={"micro_batch": 2}))
        plan.append(Entry(2, "saving", stage, setting={"micro_batch": 2}))
    zero3 = {"stage3_param_persistence_threshold": 0}
    plan += [
        Entry(2, "initialising", 3, setting={"method": "lora_xs", "micro_batch": 2}),
        Entry(2, "initialising", 2, setting={"method": "lora", "micro_batch": 2}),
        Entry(3, "curve", 3, zero=zero3, arguments={"steps": 6}, note="persist0"),
        Entry(3, "writing", 3, zero=zero3, setting={"micro_batch": 2}, note="persist0"),
        Entry(3, "probing", 3, zero=zero3, setting={"checkpointing": True}, note="persist0"),
        Entry(2, "probing", 3, setting={"micro_batch": 2}, arguments={"probe_micro_batch": 2}),
        Entry(2, "curve", 3, setting={"checkpointing": True, "micro_batch": 2}, arguments={"steps": 6}),
        Entry(2, "curve", 2, setting={"checkpointing": True, "micro_batch": 2}, arguments={"steps": 6}),
        # Stage 1 in bfloat16 with float32 accumulation is a wrapper of its own, BF16_Optimizer.
        Entry(2, "writing", 1, BF16, {"grad_accum_dtype": "fp32"}, {"micro_batch": 2}, loss=5e-3, first_loss=2e-3, tensors=0.3, note="fp32grads"),
        Entry(
            2, "replacing_gradients", 1, BF16, {"grad_accum_dtype": "fp32"}, {"micro_batch": 2, "clip": 0.5},
            loss=5e-3, first_loss=2e-3, tensors=0.3, note="fp32grads",
        ),
        Entry(2, "curve", 3, setting={"spec": "sgd", "micro_batch": 2}, arguments={"steps": 6}),
        Entry(2, "generating", 3, setting={"micro_batch": 2}),
        Entry(3, "generating", 3, setting={"micro_batch": 2}),
        Entry(2, "generating", 2, setting={"micro_batch": 2}),
    ]
    for stage in (2, 3):
        plan.append(Entry(2, "replacing_gradients", stage, zero=OFFLOAD, setting={"clip": 0.5, "micro_batch": 2}, note="offload"))
        plan.append(Entry(2, "writing", stage, zero=OFFLOAD, setting={"micro_batch": 2}, note="offload"))
    plan.append(Entry(2, "writing", 3, zero={"zero_hpz_partition_size": 2}, setting={"micro_batch": 2}, note="hpz"))
    plan.append(
        Entry(2, "writing", 3, zero={**OFFLOAD, "offload_param": {"device": "cpu"}}, setting={"micro_batch": 2}, note="offloadall")
    )
    return plan
