"""MetaMathQA: mathematical questions, answered step by step."""

from distlora.tasks import alpaca, answers, judging
from distlora.tasks.base import ResponseTask

TASKS = {
    "metamath": ResponseTask(
        columns={"prompt": "query", "response": "response"},
        template=alpaca.PROMPT,
        paper=alpaca.PAPER_MATHS,
        extract=answers.after_the_answer_is,
        judge=judging.by_mathematics,
        stops=alpaca.STOPS,
        path="meta-math/MetaMathQA",
        eval_split="train",  # it has no other
    )
}
