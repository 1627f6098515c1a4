"""The prompt of Stanford Alpaca, with which most instruction-tuned models are trained: as it is here, and as
the authors of LoRA-SB (arXiv 2411.19557) write it.
"""

from distlora.tasks.base import PaperPrompts

_HEAD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
_HEAD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
PROMPT = _HEAD + "### Instruction:\n{prompt}\n\n### Response:\n"
WITH_INPUT = _HEAD_WITH_INPUT + "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"

#: What ends an answer: a model that goes on after it begins another instruction.
STOPS = ("### Instruction:", "### Response:")
#: The same in the authors' evaluation, which also names these words with a colon.
PAPER_STOPS = ("Instruction", "Response")

#: MetaMathQA, GSM8K and MATH in the authors' code: nothing stands between the colon and the response, and an
#: evaluation goes on with "Let's think step by step.".
PAPER_MATHS = PaperPrompts(training=PROMPT.rstrip("\n"), stops=PAPER_STOPS)
PAPER_MATHS_BY_STEPS = PaperPrompts(training=PROMPT.rstrip("\n"), by_steps=True, stops=PAPER_STOPS)

_INDENT = " " * 12
#: CommonSense170K in the authors' code: all lines of the prompt but the first are indented in training, and
#: none is in an evaluation.
PAPER_COMMONSENSE = PaperPrompts(
    training=(
        _HEAD + _INDENT + "### Instruction:\n" + _INDENT + "{prompt}\n\n"
        + _INDENT + "### Response:\n" + _INDENT
    ),
    training_with_input=(
        _HEAD_WITH_INPUT + _INDENT + "### Instruction:\n" + _INDENT + "{prompt}\n\n"
        + _INDENT + "### Input:\n" + _INDENT + "{input}\n\n"
        + _INDENT + "### Response:\n" + _INDENT
    ),
    scoring=PROMPT,
    scoring_with_input=WITH_INPUT,
    stops=PAPER_STOPS,
)  # fmt: skip
