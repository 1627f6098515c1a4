"""The torture itself, by name only; and that it would find what it looks for."""

import itertools
import json

import pytest

from tests.torture.__main__ import main
from tests.torture.plan import draw
from tests.torture.trial import Quiet, differences, lines_of


@pytest.mark.torture
def test_runs_end_with_the_same_bytes_whatever_happens_to_them(request, tmp_path):
    option = request.config.getoption
    words = [f"--{name}={option('--torture-' + name)}" for name in ("events", "minutes", "seed")]
    assert main([*words, "--folder", str(tmp_path / "torture")]) == 0


def test_a_seed_draws_the_same_trials_again():
    first, again, other = (list(itertools.islice(draw(seed), 30)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"abc")
    lines = [{"step": 1, "train/loss": 2.5, "train/tokens_per_second": 90}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def _found(run_dir, files=None, lines=None) -> list[str]:
    quiet = Quiet(lines or lines_of(run_dir), files or {"weights": b"abc"}, 1.0)
    return [text for text in differences(quiet, run_dir) if "the status is" not in text]


def test_what_a_clock_measured_may_differ_and_nothing_else(run_dir):
    assert _found(run_dir) == []
    assert "metrics differ" in _found(run_dir, lines=[{"step": 1, "train/loss": 2.6}])[0]
    assert _found(run_dir, files={"weights": b"abd"}) == ["adapter/weights differs"]
    assert _found(run_dir, files={"weights": b"abc", "more": b""}) == ["adapter/more differs"]


def test_drafts_and_a_wrong_status_are_found(run_dir):
    (run_dir / ".metrics.1.partial").write_text("")
    assert "was left over" in _found(run_dir)[0]
    assert any("the status is" in text for text in differences(Quiet([], {}, 1.0), run_dir))
