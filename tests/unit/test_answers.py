"""Answers are judged as a careful person reads them: the table in tests/data/answers.jsonl, task by task."""

import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distlora.errors import UserError
from distlora.tasks import TASKS, ResponseTask, is_correct
from distlora.tasks.reading import equivalence, equivalence_worker
from distlora.tasks.reading.equivalence import equivalent
from distlora.tasks.reading.final_answer import final_answer
from distlora.tasks.reading.quantities import quantity

TABLE = Path(__file__).parents[1] / "data" / "answers.jsonl"
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").split("\n")[:-1]]
HOSTILE = "9^{9^{9^{9}}}"


@pytest.mark.parametrize("task", sorted({row["task"] for row in ROWS}))
def test_every_case_of_the_table_is_judged_right(task):
    rows = [row for row in ROWS if row["task"] == task]
    assert {row["right"] for row in rows} == {True, False}
    wrong = [row for row in rows if is_correct(task, row["output"], row["answer"]) is not row["right"]]
    assert wrong == []


def test_every_task_with_generated_answers_is_in_the_table_or_judged_like_one():
    judges = {TASKS[row["task"]].judge for row in ROWS}
    others = {name: task for name, task in TASKS.items() if isinstance(task, ResponseTask)}
    assert [name for name, task in others.items() if task.judge not in judges] == []


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if isinstance(task, ResponseTask)])
@pytest.mark.parametrize(
    "output", ["", " \n", "{" * 500, "\\boxed{" * 300, "\\frac" * 300, "(" * 3000, "7" * 9000, "\ud800"]
)
def test_no_text_breaks_a_judge_or_is_right_by_accident(task, output):
    for text in (output, f"The answer is: {output}", f"#### {output}"):
        assert is_correct(task, text, "5") is False


#: What texts are made of in which a judge may find numbers, marks, options and mathematics.
PIECES = [
    *"0123456789.,:;!?%$&#*_^-+/=<>(){}[]~'|\\ \n xyzane€½²≤∪π√∞٣",
    *"1.000 .000 1,000 e9 answer answer2 true false not is #### Answer: one two half dozen hundred".split(),
    *"The answer is:;out of;million;more than;and;or;dollars;cents;per;third;doubt;Yes;No".split(";"),
    *"\\boxed{ \\frac \\frac{1}{2} \\overline{3} \\sqrt \\text{ \\begin{pmatrix} \\le \\{ \\left( ⇒".split(),
]
DIGITS = "0 1 9 50 . . , / : - e9 % .000 .000 1.000 ,000 1,000".split()


def test_no_judge_raises_on_any_text(monkeypatch):
    """Random texts of a fixed seed. The process that compares mathematics has its tests below."""
    monkeypatch.setattr(equivalence, "_compare", lambda text, expected: False)
    rng = random.Random(0)
    judges = [task.judge for task in TASKS.values() if isinstance(task, ResponseTask)]
    judges = list(dict.fromkeys(judges))
    for turn in range(3000):
        output, answer = (
            rng.choice(("", "", " ")).join(rng.choices(rng.choice((PIECES, DIGITS)), k=rng.randrange(1, 14)))
            for _ in range(2)
        )
        judge = judges[turn % len(judges)]
        assert judge(f"The answer is: {output}", answer) in (True, False), (output, answer)


@pytest.mark.parametrize(
    "text", ["\n" * 20_000, "answer " * 4000, "answer1 or " * 2000, "**" * 9000, " " * 30_000]
)
def test_long_texts_take_no_time(text):
    start = time.process_time()
    for task in ("gsm8k", "boolq", "arc_easy"):
        is_correct(task, text + "The answer is: " + text, "5")
    assert time.process_time() - start < 2.0


# ---------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    "text, values",
    [
        ("50%", {50, 0.5}),
        ("5 dollars and 50 cents", {5.5, 550}),
        ("7 and a half", {7.5}),
        ("3 quarters", {3, 0.75}),
        ("3 more than x", set()),
        ("3 more than 4", {7}),
        ("no number", set()),
        ("9^{9^{9}}", set()),
        ("7/0", set()),
    ],
)
def test_what_a_quantity_may_mean(text, values):
    assert {float(value) for value in quantity(text)} == values


def test_the_final_answer_is_behind_the_last_mark_with_something_behind_it():
    assert final_answer("The answer is: 3\nSo \\boxed{4}.\n#### 5 apples\nThe answer is:").text == "5 apples"
    assert final_answer("\\boxed{\\frac{1}{2}} km").text == "\\frac{1}{2}"
    assert final_answer("It is 7") is None


# ---------------------------------------------------------------------- the process that compares mathematics


def test_an_expression_that_never_ends_is_not_right_and_harms_nothing(caplog, capfd, monkeypatch):
    monkeypatch.setattr(equivalence, "_WORKER", worker := equivalence._Worker())
    handler, alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with caplog.at_level(logging.DEBUG):
        assert worker.ask('["x+1", "1+x"]')
        process = worker._process
        start = time.monotonic()
        assert not equivalent(HOSTILE, "3.5x")
        assert time.monotonic() - start < equivalence_worker.CLOCK_SECONDS + 2
        assert process.returncode == -signal.SIGPROF
        assert equivalent("2y + y", "3y")
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == alarm
    assert caplog.records == [] and capfd.readouterr() == ("", "")
    worker._end()


def test_a_comparison_that_was_not_finished_is_made_again(monkeypatch):
    monkeypatch.setattr(equivalence, "_WORKER", worker := equivalence._Worker())
    with worker._lock:
        worker._running().kill()
        worker._process.wait()
    assert not equivalent("5z + z", "6z")
    assert equivalent("5z + z", "6z")
    worker._end()


def test_a_library_that_does_not_load_is_said_and_not_taken_for_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(equivalence, "_WORKER", equivalence._Worker())
    monkeypatch.setattr(equivalence_worker, "__file__", "/nowhere/equivalence_worker.py")
    with pytest.raises(UserError, match="math-verify does not load"):
        equivalent("p + p", "2p")


def test_threads_share_the_process():
    """The library's own time limit works in the main thread only."""
    found = {}

    def compare(number):
        found[number] = equivalent(f"{number}a + a", f"{number + 1}a"), equivalent(f"{number}a", "a^2")

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: (True, False) for number in range(2, 8)}


def test_the_process_ends_with_the_program_that_started_it():
    """Also where that one is killed: its end closes the input."""
    program = (
        "import os, signal\n"
        "from distlora.tasks.reading import equivalence\n"
        "assert equivalence.equivalent('a + a', '2a')\n"
        "print(equivalence._WORKER._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    for _ in range(100):
        status = Path(f"/proc/{int(done.stdout)}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")
