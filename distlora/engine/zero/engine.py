"""The engine on DeepSpeed ZeRO: one that we make, or one that the user has made."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from distlora.engine import boundary
from distlora.engine.comm import Comm
from distlora.engine.gradient_sums import fill_gradients, sum_in_float32
from distlora.engine.optimizers import OptimizerSpec, set_rate, spec_of
from distlora.engine.protocol import StepInfo, adapter_layers, left_factors, transforming
from distlora.engine.rehearsal import Kept
from distlora.engine.zero.gradients import ZeroGradients
from distlora.engine.zero.layout import base_optimizer, refuse_parameters_outside, refuse_unknown_layout
from distlora.engine.zero.monitors import Monitors, start_monitors, without_monitors
from distlora.errors import UserError

#: What an engine of DeepSpeed, its optimizer wrapper and its clock count.
COUNTERS = (
    "global_steps", "global_samples", "micro_steps", "skipped_steps", "_step_applied", "_global_grad_norm",
    "overflow", "micro_step_count", "global_step_count", "total_elapsed_time", "step_elapsed_time",
    "start_time",
)  # fmt: skip

#: Those of them that count whole steps; `micro_steps` must go on to the next one.
CHANGED_BY_STEP = (
    "global_steps", "global_samples", "skipped_steps", "_step_applied", "_global_grad_norm", "overflow",
)  # fmt: skip

#: DeepSpeed gathers some mixtures of experts as a whole, because ranks might call different experts. Here all
#: experts of a block are parameters of one module, which every rank calls.
NO_LEAVES = {"classes": []}


class _Runner(nn.Module):
    """What DeepSpeed wraps: runs any function of the bare model as one forward pass, so that all of ZeRO's
    hooks see it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *arguments):
        return function(self.model, *arguments)


class ZeroEngine(ZeroGradients):
    """See `distlora.engine.protocol.Engine`. config: a DeepSpeed config without any "auto"."""

    def __init__(self, comm: Comm, config: dict[str, Any]):
        self.comm, self._config = comm, config
        zero = config.get("zero_optimization", {})
        self.stage = int(zero.get("stage", 0))
        self.clip = config.get("gradient_clipping")
        self.dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        self._offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
        # DeepSpeed's own CPU Adam is faster but has to be compiled; the config says whether it must be used.
        self._cpu_adam = self._offload and config.get("zero_force_ds_cpu_optimizer", True)
        # Before the first zero.Init, which would otherwise read the config as for one rank. The process group
        # is there already.
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that an operator was built
            deepspeed.init_distributed(comm.backend, auto_mpi_discovery=False, verbose=False)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    @classmethod
    def around(cls, engine: DeepSpeedEngine, model: nn.Module, clip: float | None = None) -> "ZeroEngine":
        """An engine that the user has made and goes on driving: of this one only the methods that read,
        write, probe and look at gradients are for use. Collective.

        model: the bare one, with its adapter layers. clip: norm to which gradients are clipped outside of the
        engine; None: the engine's own. Errors: UserError for an engine that cannot be worked with.
        """
        self = cls.__new__(cls)
        self.comm = Comm.of_running_group(engine.device)
        refuse_unknown_layout(engine, self.comm.world_size)
        refuse_parameters_outside(engine, model)
        self.stage = engine.zero_optimization_stage()
        self.clip = clip or engine.gradient_clipping() or None
        self.dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
        offload = engine.zero_offload_optimizer()
        self._offload = offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"
        self._call = _directly(model)
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer) and engine.global_steps == 0:
            _forget_first_step(engine)
        self._take_over(engine, model, spec_of(base_optimizer(engine)))
        return self

    # ------------------------------------------------------------------ coming to life

    @contextmanager
    def loading(self, whole: bool = False) -> Iterator[bool]:
        # from_pretrained looks the object up through a weak reference: partitioned loading lasts as long as
        # this variable.
        partitioned = HfDeepSpeedConfig(self._config) if self.stage == 3 and not whole else None
        yield partitioned is not None
        del partitioned

    def attaching(self) -> AbstractContextManager:
        # With hpZ the groups of ranks may be made only once, which loading has done; `start` partitions the
        # factors then.
        if self.stage < 3 or self._config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            return nullcontext()
        # The dtype comes from the config: one that is given here DeepSpeed 0.19 replaces by bfloat16 on a CPU
        # without float16.
        return deepspeed.zero.Init(config_dict_or_path=self._config)

    def start(self, model: nn.Module, optimizer: OptimizerSpec) -> None:
        if self.stage == 3:
            # DeepSpeed places what it partitions; the buffers of a model that was loaded whole are still on
            # the host.
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.comm.device)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        layers = adapter_layers(model)
        # DeepSpeed would clip by the norm of the transformed gradients: who transforms them has clipped.
        config = {**self._config, "gradient_clipping": 0.0} if transforming(layers) else self._config
        if self.stage == 3:
            zero = config["zero_optimization"]
            config = config | {"zero_optimization": {"leaf_module": NO_LEAVES, **zero}}
        built = self._build(optimizer, optimizer.groups(trained, left_factors(layers)))
        engine, *_ = deepspeed.initialize(
            model=_Runner(model), optimizer=built, config=without_monitors(config), dist_init_required=False
        )
        self._monitors = Monitors(start_monitors(self.comm, config))
        if self.stage == 0:  # DeepSpeed has no float32 sums for weights in bfloat16 without ZeRO
            sum_in_float32(trained.values())
        self._call = _through_runner
        _forget_first_step(engine)
        self._take_over(engine, model, optimizer)

    def _build(self, spec: OptimizerSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not self._cpu_adam:
            return spec.build(groups)
        return DeepSpeedCPUAdam(
            groups, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, adamw_mode=True
        )

    # ------------------------------------------------------------------ stepping

    def train_mode(self, on: bool) -> None:
        self._engine.train(on)

    def run(self, function: Callable, *arguments):
        with self.comm.course.passing():
            return self._call(self._engine, function, *arguments)

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        if last is not None:  # else DeepSpeed counts
            self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the accumulation steps and averages over ranks; both are undone, so that
        # gradients add up.
        with self.comm.course.passing():
            if self.stage == 0 and self.at_boundary():  # the ranks' sums are joined after this pass
                fill_gradients(self._trained.values())
            self._engine.backward(loss * (self._engine.gradient_accumulation_steps() * self.comm.world_size))
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()

    def at_boundary(self) -> bool:
        return self._engine.is_gradient_accumulation_boundary()

    def step(self) -> StepInfo:
        # DeepSpeed reports no norm at stage 0 in float32.
        norm = self._plain_norm() if self.stage == 0 and self.dtype == torch.float32 else None
        with self.comm.course.passing():
            self._step_engine()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return StepInfo(float(norm), skipped=not self._engine.was_step_applied())

    def drop_step(self) -> None:
        # Every wrapper keeps gradients elsewhere, and lets go of them in a step alone.
        take_back = self._keep(CHANGED_BY_STEP, amid_run=True)
        self._step_engine()
        take_back()

    def _step_engine(self) -> None:
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(None)  # what `backward` has said was of this step

    def release(self) -> None:
        self._engine.destroy()
        get_accelerator().empty_cache()

    def _plain_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])

    def set_rate(self, rate: float) -> None:
        set_rate(self._optimizer, rate)

    # ------------------------------------------------------------------ steps that are taken back

    @contextmanager
    def rehearsal(self) -> Iterator[Callable[[], None]]:
        take_back = self._keep(COUNTERS)
        yield take_back
        take_back()

    def _keep(self, counters: tuple[str, ...], amid_run: bool = False) -> Callable[[], None]:
        """What takes back all that steps change from here on, with these counters. amid_run: see `Kept`."""
        engine = self._engine
        flats = {id(own.flat): own.flat for own in self._slices.values() if own is not None}
        kept = Kept(self.comm.device, self._optimizer, flats.values(), amid_run)
        for owner in (engine, engine.optimizer, engine.tput_timer):
            kept.keep_attributes(owner, counters)
        low = self._own_storage(name for name, p in self._trained.items() if id(p) not in flats)

        def take_back() -> None:
            kept.put_back()
            self._put_back(low)
            boundary.after_step(self)

        return take_back

    # ------------------------------------------------------------------ passes that train nothing

    @contextmanager
    def probe_pass(self) -> Iterator[None]:
        self._refuse_leaves()
        self._settle()
        yield
        # A frozen embedding stays marked active after a backward pass that did not go through the engine.
        self._settle()

    def _refuse_leaves(self) -> None:
        """A leaf module gives its unused parameters gradients of zero in any backward pass."""
        for name, parameter in self._trained.items():
            leaf = getattr(parameter, "ds_z3_leaf_module", None)
            if leaf is not None:
                raise UserError(
                    f"the DeepSpeed engine treats {type(leaf).__name__}, which holds {name}, as a leaf of "
                    'ZeRO-3, over which gradients cannot be probed; set leaf_module to {"classes": []} in '
                    "the zero_optimization section of its config",
                    agreed=True,
                )

    def run_probe(self, function: Callable, *arguments):
        with self.comm.course.passing():
            return self._call(self._engine.module, function, *arguments)

    @contextmanager
    def whole_model(self) -> Iterator[bool]:
        if self.stage < 3:
            yield True
            return
        self._settle()
        if not self._fits():
            yield False
            self._settle()
            return
        with (
            deepspeed.zero.GatheredParameters(list(self._parameters.values())),
            _without_hooks(self._engine.module),
        ):
            yield True

    def _fits(self) -> bool:
        """Whether every rank can hold the model whole beside what it holds now."""
        if self.comm.device.type == "cpu":
            return True
        free = get_accelerator().available_memory()
        needed = sum(p.ds_numel * p.element_size() for p in self._parameters.values())
        (too_small,) = self.comm.sum(float(needed > 0.8 * free))
        return not too_small

    # ------------------------------------------------------------------ monitors

    @property
    def monitored(self) -> bool:
        return self._monitors.configured

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self._monitors.write(events)

    def on_board(self, action: Callable[[Any], object]) -> None:
        self._monitors.on_board(action)


def _through_runner(module: nn.Module, function: Callable, *arguments):
    return module(function, *arguments)


def _directly(model: nn.Module) -> Callable:
    """The user's functions are given the bare model, whose own call all of ZeRO's hooks see."""
    return lambda module, function, *arguments: function(model, *arguments)


def _forget_first_step(engine: DeepSpeedEngine) -> None:
    """FP16_UnfusedOptimizer takes a step with zero gradients when it is made, which would put Adam's count
    one off."""
    base_optimizer(engine).state.clear()


@contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """Takes every module's hooks away and puts the same ones back: over gathered weights ZeRO's would release
    them.
    """
    tables = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    kept = [(module, table, getattr(module, table)) for module in root.modules() for table in tables]
    try:
        for module, table, hooks in kept:
            setattr(module, table, type(hooks)())
        yield
    finally:
        for module, table, hooks in kept:
            setattr(module, table, hooks)
