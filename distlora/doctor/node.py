"""The program that runs on every node: `python -m distlora.doctor.node`.

It reads a request as JSON from its input and writes answers to its output. Every answer is a line that begins
with a mark, because login scripts and libraries write there too.
"""

import json
import os
import sys
import time
from typing import Any

MARK = "distlora-doctor:"


def answer(request: dict[str, Any]) -> list[Any]:
    """The answers to a request, one value a line.

    request: "do" names one of the actions below; the other keys are its arguments.
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
    """The answers in the output of a node."""
    found = []
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                found.append(json.loads(line.removeprefix(MARK)))
            except json.JSONDecodeError:  # the process ended within the line
                continue
    return found


def say(value: Any) -> None:
    """Writes one answer."""
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
    os._exit(0)  # does not wait for collectors and transports that hang


if __name__ == "__main__":
    main(sys.argv[1:])
