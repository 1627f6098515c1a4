r"""MATH (arXiv 2103.03874): problems of competitions, whose solutions hold the answer in `\boxed{}`."""

from distlora.tasks import alpaca, judging
from distlora.tasks.base import Layout, ResponseTask, Row

_BOXES = ("\\boxed", "\\fbox")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` or `\fbox{…}` of a text, or after `\boxed ` up to a dollar sign.

    None if there is none, or its braces are not closed.
    """
    start, box = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    rest = text[start + len(box) :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for position, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:position].strip() or None
    return None


def _of_instructions(row: Row) -> Row:
    return {"problem": row["instruction"], "solution": row["output"]}


TASKS = {
    "math": ResponseTask(
        columns={"prompt": "problem", "response": "solution", "answer": "answer"},
        layouts=(Layout(("instruction", "output"), "output", _of_instructions),),
        template=alpaca.PROMPT,
        paper=alpaca.PAPER_MATHS_BY_STEPS,
        extract=last_boxed,
        judge=judging.by_mathematics,
        stops=alpaca.STOPS,
        path="HuggingFaceH4/MATH-500",
        folder="math",
    )
}
