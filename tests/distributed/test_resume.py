"""A checkpoint knows neither world nor stage: any continues any other's curve, and its own to the last bit.

Two ranks write and read at every stage; three ranks and the plain engine go on from what they left, and the
other way round.
"""

from dataclasses import dataclass, field

import pytest
import torch

from distlora.engine.local import LocalEngine
from tests.distributed.cases import run as run_case
from tests.distributed.cases import solo
from tests.distributed.launch import launch, results_of
from tests.distributed.plan import two_a_step
from tests.distributed.world import save_model

FP32, BF16 = "float32", "bfloat16"
LOCAL = "local"


@dataclass(frozen=True)
class Run:
    """Six steps with a checkpoint after the third; or, of `source`, the last three."""

    world: int
    stage: int
    dtype: str = FP32
    setting: dict = field(default_factory=dict, hash=False)
    source: "Run | str | None" = None
    at: int = 0
    steps: int = 10

    @property
    def swaps(self) -> bool:
        """Whether components are replaced meanwhile: then it is `steps` steps with a checkpoint after step
        `at`.
        """
        return self.at > 0

    @property
    def key(self) -> str:
        key = "-".join(
            [f"world{self.world}-stage{self.stage}-{self.dtype}", *map(str, self.setting.values())]
        ).replace(".", "_")
        key += f"-at{self.at}" if self.swaps else ""
        return f"{key}-from-{getattr(self.source, 'key', self.source)}" if self.source else key


DROPOUT = {"dropout": 0.3}
EIGHT_BIT = {"method": "lora", "spec": "adamw8bit_lora_plus"}
WRITTEN = [
    *(Run(2, stage) for stage in (0, 1, 2, 3)),
    Run(2, 0, BF16),
    Run(2, 3, BF16),
    Run(2, 2, setting=DROPOUT),
    Run(2, 3, setting={"method": "pissa", "family": "gpt2"}),
    # Two groups, and 8-bit moments of which several tensors share blocks.
    *(Run(2, stage, setting=EIGHT_BIT) for stage in (2, 3)),
    # 3-D factors of experts.
    Run(2, 3, setting={"method": "pissa", "family": "experts"}),
]
CONTINUED = [Run(run.world, run.stage, run.dtype, run.setting, source=run) for run in WRITTEN]
MOVED = [
    Run(2, 2, source=Run(2, 3)),
    Run(2, 3, source=Run(2, 1)),
    Run(2, 3, source=LOCAL),
    Run(3, 3, source=Run(2, 2)),
    Run(3, 1, source=Run(2, 3)),
]
#: A swap after steps 2, 4, 6 and 8: a checkpoint right after the last of them, and one right before the
#: third.
SRLORA = {"method": "srlora", "target_rank": 20, "gamma": 0.5, "interval": 2, "clip": 0.5, "targets": "few"}
AFTER_A_SWAP, BEFORE_A_SWAP = 8, 5
SWAPPED = [
    *(Run(2, stage, setting=SRLORA, at=AFTER_A_SWAP) for stage in (1, 3)),
    Run(2, 0, BF16, {**SRLORA, "rounding": "stochastic"}, at=AFTER_A_SWAP),
    Run(2, 3, BF16, {**SRLORA, "rounding": "stochastic"}, at=AFTER_A_SWAP),
    Run(2, 2, BF16, SRLORA, at=AFTER_A_SWAP),
    Run(2, 3, setting=SRLORA, at=BEFORE_A_SWAP),
]
SWAPPED_ON = [Run(run.world, run.stage, run.dtype, run.setting, run, run.at) for run in SWAPPED]
SWAPPED_ELSEWHERE = [
    Run(2, 2, setting=SRLORA, source=SWAPPED[1], at=AFTER_A_SWAP),
    Run(3, 3, setting=SRLORA, source=SWAPPED[-1], at=BEFORE_A_SWAP),
]
#: All four swaps and the checkpoint on the plain engine, then twenty steps under ZeRO.
LOCAL_SWAPS = "local swaps"
TWENTY_MORE = Run(2, 2, setting=SRLORA, source=LOCAL_SWAPS, at=AFTER_A_SWAP, steps=AFTER_A_SWAP + 20)
OF_THREE = Run(3, 3)
LEFT_TO_ONE = [Run(2, 0), Run(2, 2), Run(2, 3), OF_THREE]
ALL = [*WRITTEN, *CONTINUED, *MOVED, OF_THREE, *SWAPPED, *SWAPPED_ON, *SWAPPED_ELSEWHERE, TWENTY_MORE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where model, checkpoints and results of this file lie: what a run saves is in `folder / its key`."""
    folder = tmp_path_factory.mktemp("resume")
    save_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def local(folder):
    """The six steps on the plain engine."""
    return run_case("saving", LocalEngine(solo()), folder / "model", folder / LOCAL, {})


@pytest.fixture(scope="module")
def local_swaps(folder):
    """What `TWENTY_MORE` is the end of, on the plain engine."""
    arguments = {"at": TWENTY_MORE.at, "steps": TWENTY_MORE.steps}
    engine = LocalEngine(solo(), torch.float32, SRLORA["clip"])
    return run_case("swap_saving", engine, folder / "model", folder / LOCAL_SWAPS, arguments, **SRLORA)


@pytest.fixture(scope="module")
def results(folder, local, local_swaps, request):
    """What a run answered; the ranks of a world are started when one of its runs is first asked for."""
    wanted = set()
    for item in request.session.items:
        if item.path == request.path:
            wanted |= {
                each
                for run in item.callspec.params.values()
                for each in (run, run.source)
                if isinstance(each, Run)
            }

    def of(run: Run):
        out = folder / f"world{run.world}"
        if not out.exists():
            runs = [each for each in ALL if each.world == run.world and each in wanted]
            for source in {each.source for each in runs if isinstance(each.source, Run)}:
                if source.world != run.world:
                    of(source)
            launch(run.world, folder / "model", out, list(map(case, runs)))
        return results_of(out, run.key)

    def case(run: Run) -> dict:
        return {
            "key": run.key,
            "case": ("swap_" if run.swaps else "") + ("resuming" if run.source else "saving"),
            "engine": {"stage": run.stage, "dtype": run.dtype},
            "setting": {"micro_batch": two_a_step(run.world), **run.setting},
            "arguments": {"at": run.at, "steps": run.steps} if run.swaps else {},
            "work": str(folder / (run.source if isinstance(run.source, str) else (run.source or run).key)),
        }

    return of


def assert_continues(there, whole, tolerance, of_factors):
    """The last three of six losses, and the factors, are those of the run that was never interrupted."""
    torch.testing.assert_close(there["losses"][-3:], whole["losses"][-3:], rtol=tolerance, atol=0)
    assert int(there["steps_taken"]) == int(whole["steps_taken"]) == 6
    for name in whole.keys() - {"losses", "norms", "steps_taken"}:
        allowed = of_factors * float(whole[name].abs().max())
        error = float((there[name] - whole[name]).abs().max())
        assert error <= allowed, f"{name}: off by {error:.3g}, and {allowed:.3g} is allowed"


@pytest.mark.parametrize("run", [*WRITTEN[:4], OF_THREE], ids=lambda run: run.key)
def test_saving_disturbs_nothing(run, results, local):
    assert_continues(results(run), local, tolerance=1e-4, of_factors=1e-3)


@pytest.mark.parametrize("run", CONTINUED, ids=lambda run: run.key)
def test_at_the_same_layout_to_the_last_bit(run, results):
    assert_continues(results(run), results(run.source), tolerance=0, of_factors=0)


@pytest.mark.parametrize("run", MOVED, ids=lambda run: run.key)
def test_at_another_layout_the_same_curve(run, results, local):
    assert_continues(results(run), local, tolerance=1e-4, of_factors=1e-3)


@pytest.mark.parametrize("source", LEFT_TO_ONE, ids=lambda run: run.key)
def test_on_the_plain_engine_the_same_curve(source, results, local, folder):
    results(source)
    found = run_case("resuming", LocalEngine(solo()), folder / "model", folder / source.key, {})
    assert_continues(found, local, tolerance=1e-4, of_factors=1e-3)


@pytest.mark.parametrize("run", SWAPPED_ON, ids=lambda run: run.key)
def test_after_swaps_at_the_same_layout_to_the_last_bit(run, results):
    """Every byte of every frozen weight, as well when it is made again as
    when training has gone on from it.
    """
    there, whole = results(run), results(run.source)
    assert there.keys() - whole.keys() == set(), "the resumed run decided at steps at which the other did not"
    for name, value in there.items():
        whole_value = whole[name] if name != "losses" else whole[name][-len(value) :]
        assert torch.equal(value, whole_value), name


@pytest.mark.parametrize("run", SWAPPED_ELSEWHERE, ids=lambda run: run.key)
def test_after_swaps_at_another_layout_the_same_curve(run, results):
    there, whole = results(run), results(run.source)
    torch.testing.assert_close(there["losses"], whole["losses"][-len(there["losses"]) :], rtol=1e-4, atol=0)
    for name in there:
        if name.startswith("saved."):  # rounded once more at other places: one unit in the last
            torch.testing.assert_close(there[name], whole[name], rtol=2**-22, atol=1e-7)
        if name.startswith("replaced."):
            assert torch.equal(there[name], whole[name])


@pytest.mark.parametrize("run", [TWENTY_MORE], ids=lambda run: run.key)
def test_twenty_steps_after_swaps_of_the_plain_engine(run, results, local_swaps):
    losses, whole = results(run)["losses"], local_swaps["losses"]
    assert len(losses) > 20, "twenty steps, and evaluations"
    torch.testing.assert_close(losses, whole[-len(losses) :], rtol=1e-4, atol=0)
