"""`distlora eval --predictions`: a file of answers that were generated elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.evaluation.judge_file import judge_file

ROWS = [
    {"output": "3 + 4 = 7\nThe answer is: 7", "answer": "7", "id": 1},
    {"output": "The answer is: 9", "answer": "7", "id": "zwei"},
    {
        "output": "#### 1 000",
        "answer": "500 + 500 = <<500+500=1000>>1000\n#### 1,000",
        "more": {"ü": [1, None]},
    },
    {"output": "I am not sure", "answer": 7},
    {"output": "\u2028The answer is €7.\n", "answer": 7.0},
]
RIGHT = [True, False, True, False, True]


@pytest.fixture
def predictions(tmp_path):
    def write(text):
        path = tmp_path / "predictions.jsonl"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_the_same_objects_come_out_in_order_with_right_added(predictions, tmp_path):
    source, target = predictions(lines(ROWS)), tmp_path / "judged.jsonl"
    assert judge_file("gsm8k", source, target) == (3, 5)
    judged = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]]
    assert judged == [row | {"right": right} for row, right in zip(ROWS, RIGHT)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judged.jsonl", "predictions.jsonl"]


def test_empty_lines_and_letters_that_utf8_lacks_do_no_harm(predictions, tmp_path):
    source, target = predictions('\ufeff\n{"output": "\\ud800 #### 7", "answer": "7"}\n\n'), tmp_path / "out"
    assert judge_file("gsm8k", source, target) == (1, 1)
    assert json.loads(target.read_text())["output"] == "\ud800 #### 7"


def test_the_program_prints_the_score_and_loads_no_torch(predictions, tmp_path):
    source, target = predictions(lines(ROWS)), tmp_path / "judged.jsonl"
    words = ["eval", "--task", "gsm8k", "--predictions", str(source), "--out", str(target)]
    program = (
        f"import sys\nfrom distlora.cli.main import main\ncode = main({words})\n"
        "assert not {'torch', 'transformers', 'sympy'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "eval/exact_match 0.600000\neval/right 3 of 5\n"
    assert target.exists()


GOOD = '{"output": "#### 7", "answer": "7"}\n'


@pytest.mark.parametrize(
    "task, text, said",
    [
        ("gsm8", GOOD, "unknown task 'gsm8', did you mean gsm8k?"),
        ("rte", GOOD, "the task rte generates no answers"),
        ("gsm8k", "", "has no predictions: it is empty"),
        ("gsm8k", "\n \n", "has no predictions: it is empty"),
        ("gsm8k", GOOD + "{}\n", "line 2 of {source} has no 'output'"),
        ("gsm8k", GOOD + '\n{"output": "7"}', "line 3 of {source} has no 'answer'"),
        ("gsm8k", GOOD + "[1]", "line 2 of {source} is no JSON object"),
        ("gsm8k", "7", "line 1 of {source} is no JSON object"),
        ("gsm8k", GOOD + '{"output": "7", ', "line 2 of {source} is no JSON object"),
        ("gsm8k", "[" * 100_000, "line 1 of {source} is no JSON object"),
        ("gsm8k", '{"output": null, "answer": "7"}', "line 1 of {source}: 'output' is null"),
        ("gsm8k", '{"output": "7", "answer": ["7"]}', "line 1 of {source}: 'answer' is [\"7\"]"),
    ],
)
def test_what_is_wrong_with_the_predictions_is_one_sentence(task, text, said, predictions, tmp_path, capsys):
    source, target = predictions(text), tmp_path / "judged.jsonl"
    assert main(["eval", "--task", task, "--predictions", str(source), "--out", str(target)]) == 2
    assert said.replace("{source}", str(source)) in _sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--predictions", "in", "--out", "new"], "--predictions needs --task"),
        (["--predictions", "in", "--task", "gsm8k"], "--predictions needs --out"),
        (["--task", "gsm8k", "--out", "new"], "--task goes with --predictions"),
        ([], "name a run's output directory, --model, or --predictions"),
        (["run", "--task", "gsm8k", "--predictions", "in", "--out", "new"], "leave out the run's directory"),
        *(
            (["--task", "gsm8k", "--predictions", "in", "--out", "new", *words], f"leave out {words[0]}")
            for words in (
                ["--model", "m"],
                ["--adapter", "a"],
                ["--tasks", "math"],
                ["--tasks", ""],
                ["--data", "a=b"],
                ["--limit", "0"],
                ["--batch-size", "1"],
                ["--by", "likelihood"],
                ["--merge"],
                ["--fresh"],
            )  # fmt: skip
        ),
        (["--task", "gsm8k", "--predictions", "absent", "--out", "new"], "absent: no such file"),
        (["--task", "gsm8k", "--predictions", ".", "--out", "new"], "cannot be read: Is a directory"),
        (["--task", "gsm8k", "--predictions", "bytes", "--out", "new"], "bytes is no text in UTF-8"),
        (["--task", "gsm8k", "--predictions", "in", "--out", "old"], "old exists already"),
        (["--task", "gsm8k", "--predictions", "in", "--out", "./in"], "is the file with the predictions"),
        (["--task", "gsm8k", "--predictions", "in", "--out", "no/new"], "there is no folder no"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {"in": GOOD.encode(), "old": b"mine", "bytes": b"\xff\xfe\xfd"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    assert main(["eval", *words]) == 2
    assert said in _sentence(capsys)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _sentence(capsys) -> str:
    """What was said, which is one line."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("distlora: ") and err.count("\n") == 1
    return err


def test_a_device_without_an_end_is_not_read(tmp_path):
    with pytest.raises(UserError, match="^/dev/zero is a device; name a file with predictions"):
        judge_file("gsm8k", Path("/dev/zero"), tmp_path / "judged.jsonl")
