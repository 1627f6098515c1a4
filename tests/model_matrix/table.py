"""The table of docs/models.md."""

import tempfile
from pathlib import Path

from tests.model_matrix.columns import COLUMNS, YES, examine
from tests.model_matrix.ranks import cell, under_zero
from tests.model_matrix.subjects import ROWS, STEPS, kind_of, write_inputs
from tests.tiny_zoo import CLASSIFIERS, ZOO

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COMMAND = "python -m tests.model_matrix"
ASK = "distlora methods --model mistralai/Mistral-7B-v0.1"
NOT_TRIED = "–"

_HEAD = f"""# Classes of models

```bash
{ASK}    # which layers of a model would be trained; reads no weights
```

A tiny model of each class was trained in float32 on CPUs. `{COMMAND}` writes this page, and a test
compares it with what it finds. Other classes of transformers may work as well.

| column | what a yes means |
|---|---|
| all-linear | LoRA on `targets: all-linear` trains: all trained tensors have gradients, and the loss falls |
| loss | the loss is that of the class's own forward pass, to 1e-5 |
| ZeRO-3 | {STEPS} steps on two ranks have the losses of one process |
| PEFT, merged | the export, loaded in PEFT or plainly, has the model's logits, to 1e-4 of the largest |

The row "with its experts" trains `[all-linear, experts]`. A dash means: not tried, because something before
it does not work.

"""


def matrix(names=tuple(ROWS)) -> dict[str, dict[str, str]]:
    """The cells by row and column."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        found = {name: examine(name, folder) for name in names}
        able = [name for name, (_, losses) in found.items() if losses]
        zero = under_zero(folder, able)
    return {
        name: cells | ({"ZeRO-3": cell(zero[name], losses)} if losses else {})
        for name, (cells, losses) in found.items()
    }


def page(found: dict[str, dict[str, str]]) -> str:
    """docs/models.md. What is not a yes is a number, and its sentence stands below."""
    notes: dict[str, int] = {}
    lines = ["| model | trained as | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, cells in found.items():
        shown = [_shown(cells.get(column, NOT_TRIED), notes) for column in COLUMNS]
        lines.append(f"| {ROWS[name]} | {_task(name)} | " + " | ".join(shown) + " |")
    below = [f"{number}. {sentence}" for sentence, number in notes.items()]
    return _HEAD + "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def _shown(cell_: str, notes: dict[str, int]) -> str:
    if cell_ in (YES, NOT_TRIED):
        return cell_
    word, _, sentence = cell_.partition(": ")
    return f"{word} ({notes.setdefault(sentence, len(notes) + 1)})"


def _task(name: str) -> str:
    if ZOO[kind_of(name)].tokenizer is None:
        return "classifier of images"
    return "classifier of texts" if name in CLASSIFIERS else "language model"
