"""A start whose directory is taken over while it loads: it changes nothing there. And one that is refused."""

from pathlib import Path

import pytest

from distlora.cluster.status import RESERVE, read_status
from distlora.engine.comm import Topology
from distlora.errors import UserError
from distlora.training import train
from tests.unit.test_lease import ELSEWHERE, write_lease
from tests.unit.test_train import model, recipe  # noqa: F401 (fixtures)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stalled(monkeypatch):
    """Lets something happen at a moment of the next start; what is in the directory afterwards is kept."""

    def at(owner: object, name: str, run_dir: Path) -> dict[str, bytes]:
        action, seen = getattr(owner, name), {}

        def late(*given, **more):
            result = action(*given, **more)
            write_lease(run_dir, **ELSEWHERE, token="another")
            (run_dir / "recipe.yaml").write_text("# of the new owner")
            seen.update(contents(run_dir))
            return result

        monkeypatch.setattr(owner, name, late)
        return seen

    return at


@pytest.mark.parametrize("resume", [None, False])
def test_a_start_that_is_superseded_while_it_loads_changes_nothing(recipe, stalled, resume):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    train.train(made, Topology())
    seen = stalled(train, "Run", run)
    with pytest.raises(UserError, match="on node7 has taken it over.* writes nothing more there"):
        train.train(made, Topology(), resume)
    assert contents(run) == seen and any(name.startswith("checkpoint-3") for name in seen)


def test_nor_does_one_that_is_superseded_right_after_its_claim(recipe, stalled):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    seen = stalled(train, "_claim", run)
    with pytest.raises(UserError, match="on node7 has taken it over"):
        train.train(made, Topology())
    assert contents(run) == seen


# ---------------------------------------------------------------------- refused before its claim


def test_a_run_that_is_done_stays_done_when_another_start_is_refused(recipe, tmp_path):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    train.train(made, Topology())
    before = read_status(run)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[::-1]))
    with pytest.raises(UserError, match="in another order"):
        train.train(made, Topology())
    assert read_status(run) == before and before.state == "done" and not (run / RESERVE).exists()


def test_an_error_after_the_claim_is_told(recipe, monkeypatch):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    train.train(made, Topology())

    def refuse(*given):
        raise UserError("no")

    monkeypatch.setattr(train, "claim_run_dir", refuse)
    with pytest.raises(UserError, match="no"):
        train.train(made, Topology())
    assert read_status(run).state == "failed"


def test_what_others_have_put_beside_the_adapter_is_refused_before_the_first_step(recipe):  # noqa: F811
    made = recipe()
    run = Path(made.output_dir)
    train.train(made, Topology())
    train.check(made, Topology(), None)
    for name in ("LICENSE.md", ".cache"):
        (run / "adapter" / name).mkdir()
        with pytest.raises(UserError, match=f"adapter is not an empty directory .holds {name}."):
            train.check(made, Topology(), None)
        train.check(made, Topology(), False)
        (run / "adapter" / name).rmdir()
