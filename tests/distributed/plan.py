"""Every distributed case: which engine, which setting, which comparison."""

from dataclasses import dataclass, field

from distlora.methods import registry

FP32, BF16 = "float32", "bfloat16"
#: Rows of a global batch: as many as one, two and three ranks can share.
GLOBAL_BATCH = 12
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
NOTHING: dict = {}
#: Settings that a method cannot do without, or that spare it passes which `initialising` makes at every
#: stage.
NEEDED = {"srlora": {"target_rank": 16, "interval": 2}, "lora_sb": {"init": {"eta": 1e-3}}}

#: The whole runs below stage 3, where every method has one, that are always tried.
WHOLE_RUNS = {
    *(("full", 0), ("pissa", 0), ("full", 1), ("lora_pro", 1)),
    *(("lora", 2), ("lora_sb", 2), ("srlora", 2), ("full", 2)),
}
#: What is always tried in float32 on two ranks where nothing is cut up, and where gradients are cut up as at
#: stage 2.
BELOW_STAGE_2 = {
    0: ("curve", "replacing_gradients", "writing", "swapping", "dropping"),
    1: ("curve", "replacing_gradients"),
}


@dataclass(frozen=True)
class Entry:
    """One case on one world. The same case with the same setting runs on LocalEngine for comparison.

    loss, first_loss: relative tolerance of the losses, and of the first. tensors: of all else, relative to
    its largest.
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
        extras = [f"{k}={v}" for k, v in {**self.setting, **self.arguments}.items()] + (
            [self.note] if self.note else []
        )
        return "-".join([name, *extras]).replace("/", "_").replace(" ", "").replace(".", "_")

    @property
    def is_long(self) -> bool:
        """Whether only runs with `-m long` have this case: a method at a stage, where each method and each
        stage is tried without it.
        """
        if self.case == "whole_run":
            return self.stage != 3 and (self.setting["method"], self.stage) not in WHOLE_RUNS
        if self.world == 3 and self.stage < 2:
            return True
        plain = self.world == 2 and self.stage < 2 and self.dtype == FP32 and not self.zero
        return plain and self.case not in BELOW_STAGE_2[self.stage]

    @property
    def group(self) -> tuple[int, str]:
        """Cases of one group share a start of the ranks. DeepSpeed makes the groups of hpZ only once in a
        process.
        """
        return self.world, self.key if "zero_hpz_partition_size" in self.zero else ""

    def for_worker(self) -> dict:
        engine = {"stage": self.stage, "dtype": self.dtype, **self.zero}
        setting = {"micro_batch": two_a_step(self.world), **self.setting}
        return {
            "key": self.key,
            "case": self.case,
            "engine": engine,
            "setting": setting,
            "arguments": self.arguments,
        }


def two_a_step(world: int) -> int:
    """Rows of a micro-batch where a test does not care: gradients are accumulated over two, and every pass
    takes time.
    """
    return GLOBAL_BATCH // (2 * world)


def entries() -> list[Entry]:
    return [
        *_every_stage(), *_every_method(), *_bfloat16(), *_methods_and_settings(), *_norms(), *_transforms(),
        *_optimizers(),
        *_zero_options(), *_swaps(), *_classifiers(), *_packed(), *_traffic(),
        *_searches(), *_dropped(), *_transposed(), *_experts(), *_other_classes(), *_packed_rows(),
    ]  # fmt: skip


def _every_stage() -> list[Entry]:
    """Float32, in which a curve is followed closely."""
    plan = []
    for stage in (0, 1, 2, 3):
        for world in (1, 2, 3):
            # Micro-batches of two rows, and of one.
            rows = {2: 2, 3: 1}.get(world) if stage > 1 or world == 2 else None
            setting = {"clip": 0.5} | ({"micro_batch": rows} if rows else {})
            plan.append(Entry(world, "curve", stage, setting=setting))
        # At stage 0 nothing is cut up and stage 1 cuts as stage 2 does, so three ranks show nothing new
        # there.
        for world in (2, 3) if stage > 1 else (2,):
            plan.append(Entry(world, "writing", stage))
            plan.append(Entry(world, "replacing_gradients", stage, setting={"clip": 0.5}))
            plan.append(Entry(world, "probing", stage))
            plan.append(Entry(world, "short_batch", stage))
        plan.append(Entry(2, "naming_silent_tensors", stage))
        # Signs of gradients near zero differ, and every sign is an element of the factorised matrix.
        world = 3 if stage == 3 else 2
        plan.append(Entry(world, "initialising", stage, setting={"method": "lora_sb"}, tensors=5e-2))
    return plan


def _every_method() -> list[Entry]:
    """All methods at all stages: what is added to the package is tried here without another line."""
    plan = []
    for name in registry():
        setting = {"method": name, "clip": 0.5, **NEEDED.get(name, {})}
        if name != "full":
            setting["targets"] = "few"
        for stage in (0, 1, 2, 3):
            # Signs of gradients near zero differ, and some starts are made of signs.
            plan.append(Entry(2, "whole_run", stage, setting=setting, tensors=5e-2))
    return plan


def _bfloat16() -> list[Entry]:
    """bfloat16 rounds every product: the curves agree to the third digit, and the factors hardly."""

    def entry(
        case: str, stage: int, zero: dict = NOTHING, arguments: dict = NOTHING, note: str = "", **setting
    ) -> Entry:
        return Entry(
            2, case, stage, BF16, zero, setting, arguments, loss=5e-3, first_loss=2e-3, tensors=0.3, note=note
        )

    # Stage 1 is a wrapper of its own, BF16_Optimizer.
    plan = [
        entry("replacing_gradients", 1, clip=0.5),
        # What stage 2 with offload becomes.
        entry("replacing_gradients", 1, OFFLOAD, note="offload", clip=0.5),
        entry("writing", 1, OFFLOAD, note="offload"),
    ]
    # Stage 0 has none for sums in float32; an offloaded optimizer sums by itself.
    plan += [summing(stage) for stage in (0, 1, 2, 3)] + [summing(1, OFFLOAD)]
    for stage in (0, 1, 2, 3):
        plan += [entry("curve", stage, arguments={"steps": 6}), entry("writing", stage)]
    # What the recipes of large models ask for: the probe, its SVDs and training, all of it with activation
    # checkpointing.
    plan.append(entry("initialising", 3, method="lora_sb", checkpointing=True))
    plan.append(entry("initialising", 2, method="lora_sb", checkpointing=True))
    return plan


def summing(stage: int, zero: dict = NOTHING) -> Entry:
    note = "offload" if zero else ""
    return Entry(2, "summing", stage, BF16, zero, {"targets": "few", "method": "lora"}, tensors=0, note=note)


def _methods_and_settings() -> list[Entry]:
    plan = []
    for stage in (2, 3):
        plan.append(Entry(2, "correcting", stage))
        plan.append(Entry(2, "generating", stage))
        plan.append(Entry(2, "curve", stage, setting={"checkpointing": True}, arguments={"steps": 6}))
        # R has one element: some ranks own nothing of it.
        plan.append(Entry(2, "replacing_gradients", stage, setting={"rank": 1, "clip": 0.5}))
    return plan + [
        Entry(3, "writing", 3, setting={"rank": 1}),
        Entry(2, "probing", 3, arguments={"probe_micro_batch": 2}),
    ]


def _optimizers() -> list[Entry]:
    few = {"arguments": {"steps": 4}}
    plan = [Entry(2, "curve", 3, setting={"spec": "sgd"}, arguments={"steps": 6})]
    for stage in (0, 1, 2, 3):
        setting = {"method": "lora", "spec": "lora_plus", "clip": 0.5}
        plan.append(Entry(2, "curve", stage, setting=setting, **few))
    plan.append(Entry(2, "curve", 2, setting={"method": "lora", "spec": "paged_adamw"}, **few))
    # Tensors that are small alone are large together: ZeRO rounds moments which the plain engine keeps as
    # they are.
    for stage in (2, 3):
        setting = {"method": "lora", "spec": "adamw8bit"}
        plan.append(Entry(2, "curve", stage, setting=setting, loss=2e-2, tensors=0.1, **few))
    return plan


def _experts() -> list[Entry]:
    """A mixture of experts whose 3-D parameters are adapted."""
    never_persistent = {"stage3_param_persistence_threshold": 0}
    lora, steps = {"method": "lora", "clip": 0.5, "family": "experts"}, {"steps": 4}
    return [
        Entry(2, "curve", 2, setting=lora, arguments=steps),
        Entry(2, "curve", 3, setting=lora, zero=never_persistent, arguments=steps, note="persist0"),
        Entry(2, "storing", 3, setting=lora, zero=never_persistent, tensors=2e-2, note="persist0"),
        Entry(2, "initialising", 3, setting={"method": "pissa", "family": "experts"}),
        Entry(2, "initialising", 3, setting={"method": "lora_sb", "family": "experts"}, tensors=5e-2),
        Entry(2, "replacing_gradients", 3, setting={"method": "lora_pro", "family": "experts"}),
        *_experts_replaced(),
    ]


def _experts_replaced() -> list[Entry]:
    """Experts whose components are replaced or whose rows have norms. The first step of a new component is
    the sign of its gradient, and signs of gradients near zero differ. Adam also takes a step of another size
    where the whole gradient of an element is near zero, as it is here of single ones of an expert with few
    tokens.
    """
    never_persistent = {"stage3_param_persistence_threshold": 0}
    experts = {"clip": 0.5, "family": "experts"}
    srlora = experts | {"method": "srlora", "rank": 4, "target_rank": 8, "gamma": 0.5, "interval": 2}
    restarting = experts | {"method": "lora_sb", "recompose": {"times": 2}, "init": {"eta": 1e-3}}
    norms = experts | {"method": "dora"}
    third = {"zero": never_persistent, "note": "persist0"}
    return [
        Entry(2, "swapping", 2, setting=srlora, arguments={"steps": 5}, tensors=3e-2),
        Entry(2, "swapping", 3, setting=srlora, arguments={"steps": 5}, tensors=3e-2, **third),
        Entry(2, "swapping", 3, setting=restarting, arguments={"steps": 6}, loss=1e-2, tensors=0.1, **third),
        Entry(2, "whole_run", 3, setting=srlora, arguments={"steps": 5, "at": 3}, tensors=5e-2, **third),
        Entry(2, "swap_traffic", 3, setting={**srlora, "interval": 4}),
        Entry(2, "curve", 2, setting=norms, arguments={"steps": 4}, tensors=1e-2),
        Entry(2, "curve", 3, setting=norms, arguments={"steps": 4}, tensors=1e-2, **third),
    ]


def _other_classes() -> list[Entry]:
    """A class whose logits only itself can make; and a language model in a wrapper."""
    never_persistent = {"stage3_param_persistence_threshold": 0}
    lora, steps = {"method": "lora", "clip": 0.5}, {"steps": 3}
    wrapped = lora | {"family": "wrapper", "targets": ["*.language_model.*_proj"]}
    own = lora | {"family": "own_logits", "targets": ["query", "decoder"]}
    return [
        Entry(2, "curve", 3, setting=own, zero=never_persistent, arguments=steps, note="persist0"),
        Entry(2, "curve", 3, setting=wrapped, zero=never_persistent, arguments=steps, note="persist0"),
        Entry(2, "later_tokens", 3, setting=wrapped, zero=never_persistent, note="persist0"),
    ]


def _packed_rows() -> list[Entry]:
    never_persistent = {"stage3_param_persistence_threshold": 0}
    setting = {"micro_batch": 1, "clip": 0.5}
    return [
        *(Entry(2, "packed_rows", stage, setting=setting) for stage in (0, 1, 2)),
        Entry(2, "packed_rows", 3, setting=setting, zero=never_persistent, note="persist0"),
        Entry(2, "packed_rows", 2, setting=setting, zero=OFFLOAD, note="offload"),
    ]


def _norms() -> list[Entry]:
    """DoRA: a trained vector a layer, and norms that need the weight whole."""
    dora = {"method": "dora", "alpha": 10}
    never_persistent = {"stage3_param_persistence_threshold": 0}
    steps = {"steps": 4}
    plan = [Entry(2, "norming", stage, setting=dora | {"checkpointing": stage > 1}) for stage in (0, 1, 2, 3)]
    return plan + [
        Entry(2, "initialising", 3, setting=dora, zero=never_persistent, note="persist0"),
        Entry(3, "norming", 3, setting=dora, zero=never_persistent, note="persist0"),
        Entry(
            2,
            "curve",
            2,
            setting=dora | {"clip": 0.5, "dropout": 0.0},
            zero=OFFLOAD,
            arguments=steps,
            note="offload",
        ),
        Entry(2, "curve", 3, BF16, setting=dora, arguments=steps, loss=1e-2, first_loss=5e-3, tensors=0.3),
    ]


def _zero_options() -> list[Entry]:
    never_persistent = {"stage3_param_persistence_threshold": 0}
    everything = {**OFFLOAD, "offload_param": {"device": "cpu"}}
    plan = [
        Entry(2, "storing", 3, zero=never_persistent, tensors=2e-2, note="persist0"),
        Entry(2, "writing", 3, zero=never_persistent, note="persist0"),
        # With gathers in every forward pass: ranks that make fewer passes than others are noticed in an
        # evaluation too.
        Entry(2, "short_batch", 3, zero=never_persistent, note="persist0"),
        Entry(3, "generating", 3, zero=never_persistent, note="persist0"),
        Entry(3, "answering", 3, zero=never_persistent, arguments={"end": 69}, note="persist0"),
        Entry(2, "answering", 3, arguments={"end": 69, "fits": True}),
        Entry(2, "answering", 0, arguments={"end": 69}),
        Entry(3, "curve", 3, zero=never_persistent, arguments={"steps": 6}, note="persist0"),
        Entry(
            3,
            "probing",
            3,
            zero=never_persistent,
            setting={"checkpointing": True},
            arguments={"released": True},
            note="persist0",
        ),
        Entry(2, "writing", 3, zero=everything, note="offloadall"),
    ]
    for stage in (2, 3):
        plan.append(
            Entry(2, "replacing_gradients", stage, zero=OFFLOAD, setting={"clip": 0.5}, note="offload")
        )
        plan.append(Entry(2, "writing", stage, zero=OFFLOAD, note="offload"))
    return plan


def _swaps() -> list[Entry]:
    """Weights that change while DeepSpeed owns them."""
    srlora = {"method": "srlora", "target_rank": 16, "gamma": 0.5, "interval": 2, "clip": 0.5}
    one_at_a_time = {**srlora, "gamma": 0.15, "target_rank": 10}
    plan = []

    def swapping(stage: int, setting: dict = srlora, world: int = 2, **rest) -> Entry:
        # The first step of a new component is the sign of its gradient, and signs of gradients near zero
        # differ.
        return Entry(world, "swapping", stage, setting=setting, **{"tensors": 3e-2, **rest})

    for stage in (0, 1, 2, 3):
        plan.append(swapping(stage, world=3 if stage == 3 else 2))
        plan.append(Entry(2, "swap_traffic", stage, setting={**srlora, "interval": 4}))
    few, twice = {**srlora, "targets": "few"}, {"steps": 5}
    never_persistent = {"stage3_param_persistence_threshold": 0}
    plan += [
        swapping(2, {**one_at_a_time, "targets": "few"}),
        swapping(3, {**few, "refill": "gradient"}, arguments=twice),
        swapping(3, {**few, "checkpointing": True}, zero=never_persistent, arguments=twice, note="persist0"),
        swapping(3, few, zero={"zero_hpz_partition_size": 2}, note="hpz"),
        swapping(
            3, few, zero={**OFFLOAD, "offload_param": {"device": "cpu"}}, arguments=twice, note="offloadall"
        ),
        swapping(2, few, zero=OFFLOAD, arguments=twice, note="offload"),
    ]
    # BF16_Optimizer. All components at once: in bfloat16 which ones have the least importance is a matter of
    # digits.
    all_at_once = {**few, "rank": 5, "gamma": 1.0, "target_rank": 15, "interval": 3}
    loose = {"dtype": BF16, "loss": 5e-3, "first_loss": 1e-3, "tensors": 0.1}
    plan.append(swapping(1, all_at_once, **loose))
    restarting = {"method": "lora_sb", "recompose": {"times": 2}, "init": {"eta": 1e-3}, "targets": "few"}
    plan.append(swapping(3, restarting, loss=1e-2, tensors=0.1))
    return plan


def _transforms() -> list[Entry]:
    """Gradients that the method changes between backward and step, clipped by the norm from before."""
    setting = {"method": "lora_pro", "alpha": 2, "clip": 0.5}

    def training(stage: int, dtype: str = FP32, world: int = 2, **rest) -> Entry:
        return Entry(world, "curve", stage, dtype, setting=setting, arguments={"steps": 4}, **rest)

    rounded = {"loss": 5e-3, "first_loss": 2e-3, "tensors": 0.3}
    return [
        *(training(stage) for stage in (0, 1, 3)),
        training(3, world=3),
        training(2, zero=OFFLOAD, note="offload"),
        training(3, zero=OFFLOAD, note="offload"),
        training(1, BF16, **rounded),
        training(3, BF16, **rounded),
        *(Entry(2, "transform_traffic", stage, setting=setting) for stage in (0, 2, 3)),
        # The head is not the method's, and is clipped with the rest.
        *(Entry(2, "classifying", stage, setting={**setting, "labels": 3}) for stage in (2, 3)),
    ]


def _classifiers() -> list[Entry]:
    """An encoder whose head and pooler the weights lack."""
    setting = {"method": "lora", "labels": 3, "clip": 0.5}
    plan = [Entry(2, "classifying", stage, setting=setting) for stage in (0, 1, 2, 3)]
    for stage in (0, 3):
        plan.append(
            Entry(2, "classifying", stage, BF16, setting=setting, loss=3e-2, first_loss=1e-2, tensors=0.3)
        )
    # Heads in the files that do not fit: of another number of labels, and without their bias.
    for family in ("five_labels", "no_bias"):
        plan.append(Entry(2, "classifying", 3, setting={**setting, "family": family}, arguments={"steps": 2}))
    images = {**setting, "images": True}
    plan += [Entry(2, "classifying_images", stage, setting=images) for stage in (2, 3)]
    return [*plan, Entry(3, "classifying", 3, setting=setting), Entry(1, "classifying", 3, setting=setting)]


def _transposed() -> list[Entry]:
    """GPT-2, whose weights are stored as (in, out): probed, read, written at a swap, and merged."""
    gpt2 = {"family": "gpt2", "clip": 0.5}
    srlora = {**gpt2, "method": "srlora", "target_rank": 16, "gamma": 0.5, "interval": 2}
    return [
        Entry(2, "curve", 3, setting={**gpt2, "method": "dora"}, arguments={"steps": 3}),
        Entry(2, "probing", 3, setting={"family": "gpt2"}),
        Entry(2, "swapping", 3, setting=srlora, arguments={"steps": 5}, tensors=3e-2),
        Entry(2, "merging", 3, setting={**gpt2, "method": "pissa"}),
        Entry(2, "merging", 2, setting={**gpt2, "method": "lora", "quantization": "nf4"}),
    ]


def _packed() -> list[Entry]:
    """Frozen weights in 4 bits, whose blocks ZeRO-3 cuts up, and in 8 bits."""
    never_persistent = {"stage3_param_persistence_threshold": 0}

    def packed(method: str, kind: str = "nf4", **settings) -> dict:
        return {"method": method, "quantization": kind, **settings}

    lora, core = packed("lora", clip=0.5), packed("lora_sb", init={"eta": 1e-3})
    srlora = packed("srlora", target_rank=16, gamma=0.5, interval=2, clip=0.5)
    plan = [Entry(2, "curve", stage, setting=lora, arguments={"steps": 5}) for stage in (0, 1, 2, 3)]
    return plan + [
        Entry(2, "curve", 2, setting=packed("lora", "int8"), arguments={"steps": 5}),
        Entry(
            2,
            "curve",
            3,
            BF16,
            never_persistent,
            lora,
            {"steps": 5},
            loss=5e-3,
            first_loss=2e-3,
            tensors=0.3,
            note="persist0",
        ),
        Entry(2, "storing", 3, zero=never_persistent, setting=lora, tensors=2e-2, note="persist0"),
        Entry(2, "initialising", 3, setting=core, zero=never_persistent, tensors=5e-2, note="persist0"),
        # Some packed layers without an adapter.
        Entry(
            2, "generating", 3, setting=packed("lora_sb", checkpointing=True, targets=["q_proj", "up_proj"])
        ),
        Entry(2, "swapping", 2, setting=packed("pissa"), arguments={"steps": 3}, tensors=3e-2),
        Entry(2, "swapping", 3, setting=packed("pissa"), arguments={"steps": 3}, tensors=3e-2),
        Entry(
            2,
            "swapping",
            3,
            setting=srlora,
            zero=never_persistent,
            arguments={"steps": 5},
            tensors=3e-2,
            note="persist0",
        ),
    ]


def _traffic() -> list[Entry]:
    """What the planner says that ranks send. Norms and biases stay persistent, as in every real model."""
    partitioned = {"stage3_param_persistence_threshold": 100}
    #: Small enough that some weights are gathered again for the backward pass, and some are not.
    tight = {**partitioned, "stage3_max_reuse_distance": 60000, "stage3_prefetch_bucket_size": 5000}

    def step(stage: int, zero: dict = NOTHING, note: str = "", dtype: str = FP32, **setting) -> Entry:
        setting = {"method": "lora", **setting}
        return Entry(2, "sent_in_a_step", stage, dtype, zero, setting, loss=5e-3, first_loss=2e-3, note=note)

    plan = [step(stage) for stage in (0, 1, 2)]
    plan += [step(2, dtype=BF16), step(3, partitioned, "alive"), step(3, partitioned, "alive", method="full")]
    plan += [step(3, tight, "tight"), step(3, tight, "tight", checkpointing=True)]
    probed = {"method": "lora_sb", "init": {"eta": 1e-3, "samples": 6}}
    for stage in (0, 2, 3):
        # Signs of gradients near zero differ.
        zero = tight if stage == 3 else NOTHING
        plan.append(
            Entry(2, "sent_at_the_start", stage, zero=zero, setting=probed, loss=5e-2, first_loss=5e-2)
        )
    srlora = {"method": "srlora", "target_rank": 16}
    plan.append(
        Entry(2, "sent_at_the_start", 3, zero=partitioned, setting=srlora, loss=1e-3, first_loss=1e-3)
    )
    packed = {"quantization": "nf4"}
    plan.append(step(3, tight, "tight", **packed))
    for stage in (2, 3):
        zero, setting = partitioned if stage == 3 else NOTHING, {"method": "pissa", **packed}
        plan.append(
            Entry(2, "sent_at_the_start", stage, zero=zero, setting=setting, loss=1e-2, first_loss=1e-2)
        )
    return plan


def _searches() -> list[Entry]:
    """Steps that are taken back: wherever ZeRO keeps master, moments and what forward passes read."""

    def search(stage: int, method: str = "lora", dtype: str = FP32, zero: dict = NOTHING, **rest) -> Entry:
        setting = {"method": method, "targets": "few", "clip": 0.5, **NEEDED.get(method, {})}
        if method == "full":
            del setting["targets"]
        return Entry(2, "searching", stage, dtype, zero, setting, **{"tensors": 5e-2, **rest})

    rounded = {"dtype": BF16, "loss": 5e-3, "first_loss": 2e-3, "tensors": 0.3}
    return [
        *(search(stage) for stage in (0, 1, 2, 3)),
        search(0, "pissa", **rounded),
        search(1, "lora_pro", **rounded),
        search(2, "srlora", zero=OFFLOAD, note="offload"),
        search(3, "lora_xs", zero={**OFFLOAD, "offload_param": {"device": "cpu"}}, note="offloadall"),
        search(3, "full", zero={"stage3_param_persistence_threshold": 0}, note="persist0"),
        search(3, "dora", arguments={"highest": 3e37}),
    ]


def _dropped() -> list[Entry]:
    """Bad steps that are dropped: every wrapper keeps gradients elsewhere."""

    def drop(stage: int, dtype: str = FP32, zero: dict = NOTHING, note: str = "", **setting) -> Entry:
        setting = {"targets": "few", "clip": 0.5, **setting}
        rounded = {"loss": 5e-3, "first_loss": 2e-3, "tensors": 0.3} if dtype == BF16 else {}
        return Entry(2, "dropping", stage, dtype, zero, setting, note=note, **rounded)

    return [
        *(drop(stage) for stage in (0, 1, 2, 3)),
        drop(0, BF16),
        drop(1, BF16),
        drop(2, zero=OFFLOAD, note="offload"),
        drop(3, BF16, {**OFFLOAD, "offload_param": {"device": "cpu"}}, "offloadall"),
        drop(3, spec="adamw8bit"),
    ]
