"""The file of predictions: what is left behind is gone on from, and nobody's work is overwritten."""

import json

import pytest

from distlora.errors import UserError
from distlora.evaluation.predictions import Predictions
from distlora.evaluation.spreading import BatchLimit, rounds

SETTINGS = {"data": "a" * 64, "max_new_tokens": 8, "limit": None}
ROWS = [{"index": 3, "output": "vier\n", "right": True}, {"index": 0, "output": "ü", "right": False}]


def begun(folder, settings=SETTINGS) -> Predictions:
    there = Predictions(folder / "eval", "gsm8k", 6, settings, 9, ("right",))
    assert there.found() == {}
    there.begin()
    there.add(ROWS)
    return there


def again(folder, **changes) -> Predictions:
    return Predictions(folder / "eval", "gsm8k", 6, SETTINGS | changes, 9, ("right",))


def test_what_was_answered_is_found_again(tmp_path):
    begun(tmp_path)
    assert list(again(tmp_path).found().values()) == ROWS
    assert again(tmp_path).finished() is None


@pytest.mark.parametrize("tail", ['{"index": 7, "outp', '{"index": 7, "output": ""}', "{\n", "\n", "7\n"])
def test_a_line_that_was_half_written_is_cut_off(tail, tmp_path):
    there = begun(tmp_path)
    whole = there.lines.read_bytes()
    there.lines.write_bytes(whole + tail.encode())
    there = again(tmp_path)
    assert there.found().keys() == {3, 0} and there.lines.read_bytes() == whole + tail.encode()
    there.begin()
    assert there.lines.read_bytes() == whole
    there.add([{"index": 7, "output": "", "right": False}])
    assert again(tmp_path).found().keys() == {3, 0, 7}


NO_PREDICTIONS = [
    "nonsense", "3", "[" * 100_000, '{"index": "x", "output": "", "right": true}',
    '{"index": [1], "output": "", "right": true}', '{"index": true, "output": "", "right": true}',
    '{"index": 9, "output": "", "right": true}', '{"index": 0, "output": ""}', '{"index": 0, "right": true}',
    '{"index": 0, "output": "", "right": 2}',
]  # fmt: skip


@pytest.mark.parametrize("line", NO_PREDICTIONS, ids=range(len(NO_PREDICTIONS)))
def test_a_line_in_the_middle_that_is_no_prediction_is_told(line, tmp_path):
    there = begun(tmp_path)
    there.lines.write_text(line + "\n" + there.lines.read_text())
    with pytest.raises(UserError, match="gsm8k-6.jsonl: line 1 is no prediction"):
        again(tmp_path).found()


@pytest.mark.parametrize("done", [False, True])
def test_predictions_of_another_evaluation_are_refused(done, tmp_path):
    there = begun(tmp_path)
    if done:
        there.finish({"task": "gsm8k", "scores": {}})
    before = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    with pytest.raises(UserError, match=r"\(max_new_tokens is 8 there and 9 here\); --fresh removes"):
        again(tmp_path, max_new_tokens=9).found()
    with pytest.raises(UserError, match=r"\(data is aaaaaaaaaaaa… there and bbbbbbbbbbbb… here\)"):
        again(tmp_path, data="b" * 64).found()
    with pytest.raises(UserError, match=r"\(new is none there and 1 here\)"):
        again(tmp_path, new=1).found()
    assert {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()} == before


def test_predictions_of_nobody_knows_what_are_refused(tmp_path):
    there = begun(tmp_path)
    there._begun.unlink()
    with pytest.raises(UserError, match="nothing says of what"):
        again(tmp_path).found()
    there.forget()
    assert again(tmp_path).found() == {} and list((tmp_path / "eval").iterdir()) == []


@pytest.mark.parametrize("note", ["[1]", "3", "{", '"data"', "[" * 100_000, ""], ids=range(6))
def test_a_note_that_holds_no_settings_says_nothing(note, tmp_path):
    begun(tmp_path)._begun.write_text(note)
    with pytest.raises(UserError, match="nothing says of what; --fresh"):
        again(tmp_path).found()


@pytest.mark.parametrize("content", [[1], 3, {"settings": [1]}, {"settings": None}])
def test_a_summary_that_holds_no_settings_says_nothing(content, tmp_path):
    there = begun(tmp_path)
    there.finish({"scores": {}})
    there.summary.write_text(json.dumps(content))
    with pytest.raises(UserError, match="nothing says of what; --fresh"):
        again(tmp_path).found()


@pytest.mark.parametrize("more", [{}, {"scores": 3}, {"scores": {"exact_match": "x"}}])
def test_a_summary_without_scores_is_told(more, tmp_path):
    there = begun(tmp_path)
    there.summary.write_text(json.dumps({"settings": SETTINGS} | more))
    with pytest.raises(UserError, match="gsm8k-6.json is no summary with scores; --fresh"):
        again(tmp_path).finished()


def test_the_summary_holds_the_settings_and_takes_the_place_of_the_note(tmp_path):
    there = begun(tmp_path)
    there.finish({"task": "gsm8k", "scores": {"exact_match": 0.5}})
    written = json.loads((tmp_path / "eval" / "gsm8k-6.json").read_text())
    assert written == {"task": "gsm8k", "scores": {"exact_match": 0.5}, "settings": SETTINGS}
    assert again(tmp_path).finished() == written and again(tmp_path).found().keys() == {3, 0}
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"gsm8k-6.json", "gsm8k-6.jsonl"}


# ---------------------------------------------------------------------- who answers what


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_questions_are_spread_without_loss_in_batches_that_fit(world, tokens):
    lengths = {index: 3 + index * 7 % 20 for index in range(5, 28)}
    limit, seen = BatchLimit(tokens, rows=4), []
    for shares in rounds(lengths, world, limit):
        assert len(shares) == world
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for share in filter(None, shares):
            longest = max(lengths[index] for index in share)
            assert len(share) <= 4 and (len(share) * longest <= tokens or len(share) == 1)
        seen += [index for share in shares for index in share]
    assert sorted(seen) == sorted(lengths)
    assert [lengths[i] for i in seen][0] == max(lengths.values()), "the longest come first"


def test_a_batch_is_filled_by_tokens():
    fast = [len(shares[0]) for shares in rounds(dict.fromkeys(range(40), 10), 1, BatchLimit(100, 64))]
    slow = [len(shares[0]) for shares in rounds(dict.fromkeys(range(40), 50), 1, BatchLimit(100, 64))]
    assert fast == [10] * 4 and slow == [2] * 20
