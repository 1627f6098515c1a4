"""GSM8K: word problems of grade-school mathematics."""

from distlora.tasks import alpaca, answers, judging
from distlora.tasks.base import Layout, ResponseTask, Row


def _of_llm_adapters(row: Row) -> Row:
    return {"question": row["instruction"], "answer": row["output"], "final answer": row["answer"]}


def final_answer(text: str) -> str | None:
    """What stands behind the last `####`; of a text that is nothing but a number, that."""
    return answers.after_hashes(text) or answers.bare_number(text)


TASKS = {
    "gsm8k": ResponseTask(
        columns={"prompt": "question", "response": "answer", "answer": "final answer"},
        layouts=(Layout(("instruction", "output", "answer"), "answer", _of_llm_adapters),),
        template=alpaca.PROMPT,
        paper=alpaca.PAPER_MATHS_BY_STEPS,
        extract=final_answer,
        judge=judging.by_number,
        numeric=True,
        stops=alpaca.STOPS,
        path="openai/gsm8k:main",
        folder="gsm8k",
    )
}
