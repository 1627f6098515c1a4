"""What one process finds out about a row: the cells of all columns but ZeRO-3, and the losses for that."""

import copy
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from distlora import api
from distlora.adapter.targets import in_short
from distlora.engine.comm import Comm, Topology
from distlora.errors import TrainingError, UserError
from tests.model_matrix.subjects import Subject, kind_of

COLUMNS = ("all-linear", "loss", "ZeRO-3", "PEFT", "merged")
YES = "yes"


def examine(name: str, folder: Path) -> tuple[dict[str, str], list[float]]:
    """The cells by column, and the losses of all steps; none for a model that is refused."""
    subject = Subject(name, folder, Comm(Topology(), torch.device("cpu"), distributed=False))
    cells: dict[str, str] = {}
    try:
        built = subject.start()
    except (UserError, TrainingError) as error:
        return {"all-linear": refusal(error, folder)}, []
    model = built.engine.module
    cells["loss"] = _cell(folder, lambda: _same_loss(subject, built.engine, model))
    losses: list[float] = []

    def train() -> str:
        losses.extend(subject.train(built))
        return trains(subject.silent, losses)

    cells["all-linear"] = _cell(folder, train)
    if len(losses) == 0:
        return cells, losses
    expected = _logits(model, subject)
    base, out = folder / "models" / kind_of(name), folder / "exports" / name
    cells["PEFT"] = _cell(folder, lambda: _from_peft(built, base, out / "peft", subject, expected))
    cells["merged"] = _cell(folder, lambda: _from_merged(built, base, out / "merged", subject, expected))
    return cells, losses


def trains(silent: set[str], losses: list[float]) -> str:
    """The cell of all-linear. silent: trained tensors that never had a gradient."""
    if silent:
        return f"no: without a gradient in {len(losses)} steps: {in_short(sorted(silent))}"
    return YES if losses[-1] < losses[0] else f"no: the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"


def _cell(folder: Path, find) -> str:
    try:
        return find()
    except (UserError, TrainingError) as error:
        return refusal(error, folder)
    except Exception as error:  # a class that does not work at all is a cell, too
        return f"no: {type(error).__name__}: {_sentence(error, folder)}"


def refusal(error: Exception, folder: Path) -> str:
    return f"refused: {_sentence(error, folder)}"


def _sentence(error: Exception, folder: Path) -> str:
    """Its first one: what follows may be in any order."""
    return " ".join(str(error).replace(f"{folder}/", "").split()).partition(". ")[0]


def compared(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> str:
    difference = float((found - expected).abs().max() / expected.abs().max())
    return (
        YES if found.shape == expected.shape and difference <= tolerance else f"no: off by {difference:.1e}"
    )


def _same_loss(subject: Subject, engine, model: nn.Module) -> str:
    """Whether ours is the one of the model's class, before anything is trained."""
    engine.train_mode(False)
    batch = subject.batches[0]
    with torch.no_grad():
        ours, count = subject.objective.loss(model, batch)
        own = model(**batch).loss
    return compared(ours / count, own, 1e-5)


@torch.no_grad()
def _logits(model: nn.Module, subject: Subject) -> Tensor:
    """Of the first batch, without those of padding."""
    batch = {key: value for key, value in subject.batches[0].items() if key != "labels"}
    logits, mask = model.eval()(**batch).logits, batch.get("attention_mask")
    return logits[mask.bool()] if mask is not None and logits.ndim == 3 else logits


def _loaded(model: nn.Module, directory: Path, **settings) -> nn.Module:
    cls = getattr(transformers, type(model).__name__)
    return cls.from_pretrained(directory, dtype=torch.float32, **settings)


def _from_peft(built, base: Path, out: Path, subject: Subject, expected: Tensor) -> str:
    out.parent.mkdir(parents=True, exist_ok=True)
    api.export(built.adapted, out, base_model=base)
    model = built.engine.module
    plain = _loaded(model, base, config=copy.deepcopy(model.config), ignore_mismatched_sizes=True)
    return compared(_logits(PeftModel.from_pretrained(plain, out), subject), expected)


def _from_merged(built, base: Path, out: Path, subject: Subject, expected: Tensor) -> str:
    api.export(built.adapted, out, format="merged", base_model=base)
    return compared(_logits(_loaded(built.engine.module, out), subject), expected)
