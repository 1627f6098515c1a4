"""What is told of a decision: scalars, JSON, a picture."""

import json
import math

import pytest
import torch

from distlora.engine.comm import Comm, Topology
from distlora.recompose.report import (
    COLOURS,
    DECADES,
    PIXELS,
    LayerRecomposition,
    RecompositionReport,
    complete,
)
from distlora.training.monitor import Monitor
from tests.boards import Watched
from tests.tiny_runs import BF16, SRLORA, Run

NAMES = ["block.0.q", "block.0.v", "block.1.q"]
#: Three layers, four components; the most important one is number 1, 3 and 0; the layers' scales differ by
#: 10⁶.
SCORES = torch.tensor(
    [[1e-3, 5e-2, 2e-2, 1e-4], [3e-9, 1e-8, 2e-8, 5e-8], [9.0, 0.5, 0.001, 0.0]], dtype=torch.float64
)


def _solo():
    return Comm(Topology(), torch.device("cpu"), distributed=False)


def _report():
    report = RecompositionReport(40, True, "swap 1 of 2", SCORES, NAMES)
    for i, name in enumerate(NAMES):
        layer = LayerRecomposition(
            (0, 3), low_half_share=0.1 * (i + 1), sigma=[3.0 - i, 1.0], reserve_left=4, update_norm=2.0
        )
        layer.learned_norm, layer.delta_norm, layer.effective_rank = 0.5, 7.0, 3.5 + i
        report.layers[name] = layer
    return report


# ---------------------------------------------------------------------- the picture


def _tiles(picture):
    """(r, layers, 3) of a picture of equal squares."""
    height, width, _ = picture.shape
    squares = picture.view(height // PIXELS, PIXELS, width // PIXELS, PIXELS, 3)
    assert (squares == squares[:, :1, :, :1]).all(), "a square has one colour"
    return squares[:, 0, :, 0].long()


def test_the_picture_has_a_row_for_each_component_and_a_column_for_each_layer():
    picture = _report().picture()
    assert picture.shape == (4 * PIXELS, 3 * PIXELS, 3) and picture.dtype == torch.uint8
    _tiles(picture)


def test_brighter_is_more_important_within_each_layer():
    brightness = (
        _tiles(_report().picture()).double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    ).sum(-1)
    for column, row in enumerate(SCORES):
        assert brightness[:, column].argsort().tolist() == row.argsort().tolist()
    best, worst = (
        torch.tensor([round(255 * part) for part in colour]) for colour in (COLOURS[-1], COLOURS[0])
    )
    tiles = _tiles(_report().picture())
    assert [tiles[k, column].tolist() for column, k in enumerate((1, 3, 0))] == [best.tolist()] * 3
    assert tiles[3, 2].tolist() == worst.tolist()


def test_the_scale_is_logarithmic_over_four_decades():
    """Scores that are evenly spaced in the exponent have the colours of the table."""
    scores = torch.tensor(
        [[10.0 ** (-DECADES * i / (len(COLOURS) - 1)) for i in range(len(COLOURS))]], dtype=torch.float64
    )
    tiles = _tiles(RecompositionReport(1, True, "", scores, ["a"]).picture())
    wanted = torch.tensor(COLOURS[::-1]).mul(255).round().long()
    assert (tiles[:, 0] - wanted).abs().max() <= 1
    below = RecompositionReport(
        1, True, "", torch.tensor([[1.0, 1e-5, 0.0]], dtype=torch.float64), ["a"]
    ).picture()
    assert torch.equal(below[PIXELS], below[2 * PIXELS])


@pytest.mark.parametrize(
    "scores", [torch.zeros(2, 4), torch.full((2, 4), 1e-300), torch.full((1, 1), 3.0)], ids=str
)
def test_scores_without_differences_make_a_picture_too(scores):
    picture = RecompositionReport(1, True, "", scores.double(), ["a", "b"][: len(scores)]).picture()
    assert (picture == picture[0, 0]).all()


def test_without_scores_there_is_no_picture():
    assert RecompositionReport(1, True, "restart", None, NAMES).picture() is None


# ---------------------------------------------------------------------- scalars and JSON


def test_scalars_are_means_and_every_layers_own():
    means, own = _report().means(), _report().by_quantity()
    assert means["recompose/swapped"] == 1.0
    assert means["recompose/low_half_share"] == pytest.approx(0.2)
    assert own["low_half_share"]["block.1.q"] == pytest.approx(0.3)
    assert means["recompose/effective_rank"] == pytest.approx(4.5)
    assert means["recompose/sigma"] == pytest.approx(2.0) and own["sigma"]["block.0.q"] == 3.0
    assert means["recompose/reserve_left"] == 4.0
    for quantity in ("rounding_loss", "rounding_loss_of_learned", "delta_norm"):
        assert "block.0.v" in own[quantity]
    assert all(isinstance(value, float) for value in means.values())
    assert {f"recompose/{quantity}" for quantity in own} == means.keys() - {"recompose/swapped"}
    assert all(list(by_layer) == NAMES for by_layer in own.values())


def test_a_decision_against_a_recomposition_has_one_scalar_and_a_picture():
    report = RecompositionReport(40, False, "keep", SCORES, NAMES)
    assert report.means() == {"recompose/swapped": 0.0} and report.by_quantity() == {}
    assert report.picture() is not None and report.record()["layers"] == {}


def test_what_is_not_known_is_left_out():
    report = RecompositionReport(
        8, True, "restart", None, ["a"], {"a": LayerRecomposition((0, 1))}, {"init/eta": 0.5}
    )
    found = report.means()
    assert "recompose/low_half_share" not in found and "recompose/sigma" not in found
    assert "sigma" not in report.by_quantity()
    assert found["recompose/init/eta"] == 0.5


def test_the_record_is_json_and_has_everything():
    record = json.loads(json.dumps(_report().record()))
    assert (record["step"], record["swapped"], record["reason"]) == (40, True, "swap 1 of 2")
    assert record["layers"]["block.0.v"]["components"] == [0, 3] and record["layers"]["block.0.v"][
        "sigma"
    ] == [2.0, 1.0]
    assert record["layers"].keys() == set(NAMES)


def test_complete_turns_errors_into_relative_losses():
    report = _report()
    complete(_solo(), report, {NAMES[0]: 0.04, NAMES[1]: 0.0, NAMES[2]: 1.0})
    assert [layer.rounding_loss for layer in report.layers.values()] == pytest.approx([0.1, 0.0, 0.5])
    assert [layer.rounding_loss_of_learned for layer in report.layers.values()] == pytest.approx(
        [0.4, 0.0, 2.0]
    )
    assert [layer.effective_rank for layer in report.layers.values()] == [3.5, 4.5, 5.5]


def test_nothing_learned_is_no_division_by_zero():
    report = RecompositionReport(1, True, "", SCORES[:1], NAMES[:1], {NAMES[0]: LayerRecomposition((0,))})
    complete(_solo(), report, {NAMES[0]: 0.04})
    assert report.layers[NAMES[0]].rounding_loss == report.layers[NAMES[0]].rounding_loss_of_learned == 0.0


# ---------------------------------------------------------------------- of a real run


def test_every_decision_of_a_run_is_written_down(tmp_path):
    run = Run(SRLORA, BF16)
    engine = Watched(run.engine.comm)
    monitor = Monitor(engine, tmp_path)
    reports = run.train()[1]
    for report in reports:
        monitor.tell_recomposition(report)
    assert [(tag, step) for tag, step, _ in engine.board.images] == [
        (f"method/recompose/{name}", step) for step in (4, 8, 12, 16) for name in ("importance", "layers")
    ]
    lines = [json.loads(line) for line in (tmp_path / "recompositions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert [line["layers"]["first"]["reserve_left"] for line in lines] == [6, 4, 2, 0]
    assert all(
        len(layer["components"]) == len(layer["sigma"]) == 2
        for line in lines
        for layer in line["layers"].values()
    )
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [4, 8, 12, 16]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert 0 < metrics[-1]["recompose/rounding_loss"] < metrics[-1]["recompose/rounding_loss_of_learned"]
    assert metrics[-1]["recompose/effective_rank"] > metrics[0]["recompose/effective_rank"]
    # A recomposition of a large model has a thousand numbers of single layers, which are for the file and the
    # pictures: a monitor has a file or a chart for each tag.
    tags = {tag for tag, _, _ in engine.events}
    assert tags == {f"method/{tag}" for tag in set().union(*metrics) - {"step"}}
    assert {"method/recompose/sigma", "method/recompose/seconds"} < tags
    assert not any(tag.endswith(("/first", "/second")) for tag in tags)
