"""From a run's directory to what other software loads. Works on files alone, without an engine."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from distlora.checkpoints.best import best_of
from distlora.checkpoints.directory import Checkpoint, newest, of_step
from distlora.checkpoints.soundness import soundness
from distlora.cluster.environment import working_directory
from distlora.data import ends_of_turn
from distlora.errors import UserError
from distlora.exports.card import Form, write_card
from distlora.exports.check import check_finite, check_merged
from distlora.exports.companions import RunTokens
from distlora.exports.draft import bring_back_earlier, new_directory
from distlora.exports.exported import AdapterSource
from distlora.exports.merged import write_merged
from distlora.exports.peft import ADAPTER_WEIGHTS, experts_of, refuse_peft, write_peft_adapter
from distlora.exports.precision import dtype_for
from distlora.exports.sources import CheckpointSource, Compressed, Source, check_compression
from distlora.exports.suffixes import Names, names_in
from distlora.exports.vllm import ForVLLM
from distlora.files.problems import dangling_link, file_errors_explained
from distlora.files.user_paths import user_path
from distlora.methods import HasMagnitude, Method
from distlora.models.base_names import base_name_of
from distlora.models.hub import may_download, resolve_path, without_weights
from distlora.models.loading import load_tokenizer
from distlora.models.stored_names import bare_of_class
from distlora.recipe.load import load_run_recipe
from distlora.recipe.sections import Recipe
from distlora.tasks import ImageTask, ResponseTask, get_task
from distlora.training.about import about_run, scores_of
from distlora.training.objective import conventions_of
from distlora.training.run_directory import why_no_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written where. errors: relative Frobenius error of the update of every layer whose pair was
    compressed. compression: the same in one sentence, None where nothing was compressed. difference: between
    the logits of the merged model and the run's, relative to the largest; None where they were not compared.
    dtype: of an adapter.
    """

    path: Path
    errors: dict[str, float] = field(default_factory=dict)
    compression: str | None = None
    difference: float | None = None
    dtype: torch.dtype | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


def export_run(
    run_dir: str | os.PathLike,
    format: Literal["peft", "merged"],
    out: str | os.PathLike,
    checkpoint: int | Literal["best"] | None = None,
    dtype: torch.dtype | None = None,
    compress_rank: int | None = None,
    max_error: float | None = None,
    check: bool = True,
    server: Literal["vllm"] | None = None,
) -> Exported:
    """Writes what a run has trained to the new directory `out`. Works on files alone, without an engine.

    checkpoint: the step, or the best one that the run has kept; None for the last state that it has left.
    dtype: None for the run's ("peft": float32 where that would change an update by more than its precision
    explains) or that of the pretrained weights ("merged": the sum is made in float32 and cast once).
    compress_rank: the most columns of a layer's pair. max_error: of a layer's update, relative, in the
    Frobenius norm; each layer has the smallest rank that meets it. Without both, what is exported is exact,
    except that a stack of updates is compressed where it is wider than the matrix, or is going to be rounded
    to `dtype`. server: "vllm" for an adapter in the form that vLLM loads. check: whether a merged model is
    loaded, and compared with the run on one batch; and for an adapter, whether weights of which no loss has
    been seen finite are given one batch.
    Errors: UserError for a directory that is no run, one without a complete checkpoint, an `out` that is not
    empty, a format that the method cannot have, a compression that makes no sense, weights whose logits are
    not finite, and a merged model that computes something else than the run.
    """
    run_dir, out = Path(run_dir), Path(out).absolute()
    if format not in ("peft", "merged"):
        raise UserError(f"format is {format}; wanted peft or merged")
    if server is not None and format == "merged":
        raise UserError("--for vllm is for --format peft: vLLM loads a merged model as it is; leave it out")
    check_compression(format, compress_rank, max_error)
    if not (run_dir / "recipe.yaml").is_file():
        link = dangling_link(run_dir / "recipe.yaml")
        raise UserError(link or f"{run_dir} is no run directory: {why_no_run(run_dir)}")
    folder = working_directory(run_dir)
    recipe = recipe_as_started(run_dir, folder)
    if (compress_rank, max_error) != (None, None):
        _refuse_compression(recipe.method, "--max-error" if compress_rank is None else "--compress-rank")
    with file_errors_explained(out), new_directory(out) as draft:
        source, is_proven = (
            _last_state(run_dir, recipe.method)
            if checkpoint is None
            else _of_step(run_dir, checkpoint, recipe.method)
        )
        about = about_run(recipe, scores_of(run_dir, source.step), source.step, folder)
        if format == "merged":
            tokens = _tokens(recipe)
            merged = write_merged(draft, resolve_path(recipe.model.path), source, dtype, tokens)
            difference = check_merged(draft, merged, tokens and tokens.pad_id) if check else None
            form = Form("merged", source.model["class"], dtype=merged.usual_dtype)
            write_card(draft, base_name_of(base_name(recipe.model.path, folder)), about, form)
            return Exported(out, difference=difference)
        refuse_peft(recipe.method, experts_of(source))
        if check and not is_proven:
            _prove(source, recipe)
        if dtype is None:  # of an update that may be off by so much, no more is rounded away
            exact = max_error is not None
            dtype = torch.float32 if exact else dtype_for(source, getattr(torch, recipe.model.dtype))
        compressed = Compressed(source, dtype, compress_rank, max_error)
        base, names = base_name(recipe.model.path, folder), _names(recipe.model.path, source.model["class"])
        written = compressed if server is None else ForVLLM(compressed)
        write_peft_adapter(draft, written, base, recipe.method.dropout, dtype, names, about)
    return Exported(out, compressed.errors, compressed.compression(), dtype=dtype)


def base_name(path: str, folder: Path = Path()) -> str:
    """The base model's path for `base_name_of`, where it is one of this machine as an absolute one. folder:
    where a relative path begins.
    """
    if user_path(path, "model.path").is_dir():
        return str(resolve_path(path).absolute())
    found = base_name_of(path, folder)
    return path if found.on_the_hub else found.name


def recipe_as_started(run_dir: Path, folder: Path) -> Recipe:
    """The recipe of a run. The model is found where the run has found it, wherever it is exported."""
    recipe = load_run_recipe(run_dir / "recipe.yaml")
    there = folder / user_path(recipe.model.path, "model.path")
    if not there.is_dir():
        return recipe
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": str(there.absolute())})}
    )


def _names(path: str, model_class: str | None) -> Names | None:
    """The names in the model, of which only the config is read; None where they cannot be known."""
    try:
        model = bare_of_class(resolve_path(without_weights(path)), model_class)
    except UserError as error:  # training needed it, an export does not
        log.info(
            "the adapter calls every layer by its whole name, because the model is not at hand: %s", error
        )
        return None
    return model and names_in(model)


def _tokens(recipe: Recipe) -> RunTokens | None:
    """Those that the run uses, and that end its answers; None where there is no usable tokenizer."""
    task = get_task(recipe.data.task)
    if isinstance(task, ImageTask):
        return None
    try:
        tokenizer = load_tokenizer(recipe.model)
    except UserError:  # training needed it, an export does not
        return None
    answers = isinstance(task, ResponseTask) and tokenizer.eos_token_id is not None
    ends = frozenset({tokenizer.eos_token_id} if answers else ())
    conventions = conventions_of(recipe)
    if recipe.shows_chats and conventions.whole_chat:
        ends |= ends_of_turn(tokenizer, conventions)
    return RunTokens(tokenizer.pad_token, tokenizer.pad_token_id, ends)


def _refuse_compression(method: Method, option: str) -> None:
    if isinstance(method, HasMagnitude):
        raise UserError(
            f"{option} cuts an update that is only added to the weight, and method {method.name} scales rows "
            "as well; leave it out"
        )


def _last_state(run_dir: Path, method: Method) -> tuple[Source, bool]:
    """The newest checkpoint, or the adapter that training wrote at its end if that is of a later step; and
    whether a loss of these weights has been seen finite."""
    found, finished = newest(run_dir), run_dir / "adapter"
    bring_back_earlier(finished)
    sources = [] if found is None else [_of_checkpoint(found, method)]
    if (finished / ADAPTER_WEIGHTS).is_file():
        with file_errors_explained(finished):
            sources.append((AdapterSource(finished), True))  # a run that ends otherwise writes none
    if not sources:
        raise UserError(f"{run_dir} has no complete checkpoint and no adapter; train first")
    return max(sources, key=lambda found: found[0].step)


def _of_step(run_dir: Path, step: int | Literal["best"], method: Method) -> tuple[Source, bool]:
    if step == "best":
        best = best_of(run_dir)
        if best is None:
            raise UserError(
                f"{run_dir} has kept no best checkpoint, since its recipe has no train.keep_best; "
                "leave --checkpoint out, or name one by --step"
            )
        step = best.step
    return _of_checkpoint(of_step(run_dir, step), method)


def _of_checkpoint(checkpoint: Checkpoint, method: Method) -> tuple[Source, bool]:
    """What is not known to be good is looked at, because a run may have been stopped by its weights."""
    with file_errors_explained(checkpoint.path):
        source = CheckpointSource(checkpoint, method)
    is_proven = soundness(checkpoint.path) == "good"
    if not is_proven:
        _refuse_not_finite(source, checkpoint.path)
        log.warning("%s: no loss of these weights has been seen finite yet", checkpoint.path)
    return source, is_proven


def _prove(source: Source, recipe: Recipe) -> None:
    """Raises UserError where the weights give logits that are not finite, if the pretrained model is at
    hand."""
    if may_download(recipe.model.path):
        log.info("what the run's weights compute was not checked: %s is not at hand", recipe.model.path)
        return
    tokens = _tokens(recipe)
    check_finite(resolve_path(recipe.model.path), source, tokens and tokens.pad_id)


def _refuse_not_finite(source: Source, place: Path) -> None:
    name = first_not_finite(source)
    if name is not None:
        raise UserError(
            f"{place}: {name} has numbers that are infinite or not a number; name another checkpoint by "
            "--step"
        )


def first_not_finite(source: Source) -> str | None:
    """The name of a layer or parameter with numbers that are infinite or not a number; None without one."""
    for name, tensor in _numbers(source):
        if tensor is not None and not tensor.isfinite().all():
            return name
    return None


def _numbers(source: Source) -> Iterator[tuple[str, Tensor | None]]:
    """All that an export is made of, with the names of layers and parameters."""
    for layer in source.layers:
        pair = source.low_rank(layer)
        yield layer, pair and pair.left
        yield layer, pair and pair.right
    for layer in source.magnitudes:
        yield layer, source.magnitude(layer)
    for head in source.heads:
        yield head, source.read(head)
