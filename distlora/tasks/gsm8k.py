"""GSM8K: word problems of grade-school mathematics."""

from distlora.tasks import alpaca, answers
from distlora.tasks.base import ResponseTask

TASKS = {
    "gsm8k": ResponseTask(
        columns={"prompt": "question", "response": "answer"},
        template=alpaca.PROMPT,
        extract=answers.after_hashes,
        path="openai/gsm8k:main",
    )
}
