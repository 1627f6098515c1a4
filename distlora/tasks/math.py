"""MATH: problems of mathematics competitions, with solutions in LaTeX."""

from distlora.tasks import alpaca, answers, judging
from distlora.tasks.base import ResponseTask

TASKS = {
    "math": ResponseTask(
        columns={"prompt": "problem", "response": "solution", "answer": "answer"},
        template=alpaca.PROMPT,
        extract=answers.marked,
        judge=judging.by_mathematics,
    )
}
