"""The outcome of a training run as text for the terminal."""

import shlex
from pathlib import Path

from distlora.sentences import size_text

#: Scores between 0 and 1, which are shown in per cent.
PERCENTAGES = ("accuracy", "f1", "exact_match")


def summary_table(summary) -> str:
    """The run on one screen. summary: as `distlora.training.train.train` returns it."""
    ratio = (
        f"{summary.lora_trained / summary.trained:.1f} times fewer than"
        if summary.trained < summary.lora_trained
        else "beside"
    )
    rows = [("", "before", "after")] if summary.after else []
    for key, value in summary.after.items():
        form = "{:.1%}" if key.rpartition("/")[2] in PERCENTAGES else "{:.4f}"
        before = form.format(summary.before[key]) if key in summary.before else "-"
        rows.append((key.replace("_", " "), before, form.format(value)))
    lines = [f"  {name:<24}{before:>10}{after:>10}" for name, before, after in rows]
    lora = f"({ratio} LoRA's {summary.lora_trained:,} at rank {summary.rank})" if summary.lora_trained else ""
    rate = summary.found_rate
    found = [("learning rate", f"{rate:.3g}, found by the search")] if rate else []
    best = summary.best
    export = f"distlora export {summary.run_dir} --checkpoint best"
    kept = [("best", f"step {best.step}: {best.metric} {best.value:.4f}; see {export}")] if best else []
    facts = [
        ("trained parameters", f"{summary.trained:,} {lora}"),
        ("initialisation", f"{summary.init_seconds:.1f} s"),
        *found,
        ("a step", f"{summary.step_seconds:.2f} s (mean of {summary.steps})"),
        *([("stopped early", f"after step {summary.steps}")] if summary.stopped_early else []),
        *kept,
        ("adapter", _adapter(summary.adapter)),
        (
            "TensorBoard log",
            summary.tensorboard or "none: the DeepSpeed config turns no tensorboard section on",
        ),
        ("metrics", str(summary.run_dir / "metrics.jsonl")),
    ]
    told = [f"  {name:<24}{value}" for name, value in facts]
    return "\n".join(
        ["", *lines, *told, "", *(f"  {name:<24}{command}" for name, command in next_steps(summary)), ""]
    )


def next_steps(summary) -> list[tuple[str, str]]:
    """What can be done with the run: a word for it, and the command with the run's own name."""
    run, merged = shlex.quote(str(summary.run_dir)), shlex.quote(f"{summary.run_dir}-merged")
    score = [("score it on tasks", f"distlora eval {run} --tasks gsm8k")]
    again = [("score it again", f"distlora eval {run}")] if summary.after else []
    return [
        *again,
        *score,
        ("one merged model", f"distlora export {run} --format merged --out {merged}"),
        ("compare with others", f"distlora report {shlex.quote(str(summary.run_dir.parent))} --out report"),
        *([("curves", f"distlora monitor {run}")] if summary.tensorboard else []),
    ]


def _adapter(directory: Path | None) -> str:
    if directory is None:
        return "none: PEFT's format does not hold it; see distlora export --format merged"
    size = sum(path.stat().st_size for path in directory.iterdir()) if directory.is_dir() else None
    return str(directory) if size is None else f"{directory} ({size_text(size)})"
