"""GSM8K: word problems of grade-school mathematics."""

from distlora.tasks import alpaca, answers, judging
from distlora.tasks.base import ResponseTask

TASKS = {
    "gsm8k": ResponseTask(
        columns={"prompt": "question", "response": "answer"},
        template=alpaca.PROMPT,
        extract=answers.after_hashes,
        judge=judging.by_number,
        path="openai/gsm8k:main",
    )
}
