"""The program that runs on every node: `python -m distlora.doctor.node`, a request as JSON on its input, an
answer on its output.

What it answers stands on lines that begin with a mark, because login scripts and libraries say things too.
"""

import json
import os
import sys
import time
from typing import Any

MARK = "distlora-doctor:"


def answer(request: dict[str, Any]) -> list[Any]:
    """request: "do" names one of the deeds below, the other keys are its own. Returns what to answer, one
    value a line.
    """
    if request["do"] == "facts":
        from distlora.doctor.facts import collect

        return [collect(request)]
    if request["do"] == "ranks":
        from distlora.doctor.reduction import run_ranks

        return [value for line in run_ranks(request) for value in answers(line)]
    from distlora.doctor import storage

    if request["do"] == "look":
        return [
            {
                "time": time.time(),
                "marks": storage.marks(request["run_dir"], request["mark"]) if request["run_dir"] else None,
            }
        ]
    storage.remove_marks(request["run_dir"], request["mark"])
    return [True]


def answers(text: str) -> list[Any]:
    """What a node has said, of all that its output holds."""
    found = []
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                found.append(json.loads(line.removeprefix(MARK)))
            except json.JSONDecodeError:  # cut short by the end of its process
                continue
    return found


def say(value: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(value)}\n")
    sys.stdout.flush()


def main(words: list[str]) -> None:
    if words[:1] == ["rank"]:
        from distlora.doctor.reduction import be_a_rank

        be_a_rank(float(words[1]), say)
    else:
        request = json.loads(sys.stdin.read())
        os.environ.update(request.get("environment", {}))
        for value in answer(request):
            say(value)
    os._exit(0)  # collectors that hang, and transports that linger, hold nobody up


if __name__ == "__main__":
    main(sys.argv[1:])
