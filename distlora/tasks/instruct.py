"""Instructions in the format of Alpaca and LLM-Adapters: instruction, perhaps an input, output."""

from distlora.tasks import alpaca, answers, judging
from distlora.tasks.base import ResponseTask

INSTRUCT = ResponseTask(
    columns={"prompt": "instruction", "response": "output", "input": "input", "answer": "answer"},
    template=alpaca.PROMPT,
    template_with_input=alpaca.WITH_INPUT,
    extract=answers.choice_or_text,
    judge=judging.by_kind,
    stops=alpaca.STOPS,
)

TASKS = {"instruct": INSTRUCT}
