"""Draws `pipeline.png`, what each rank holds at every stage of a LoRA-SB run on four ranks of ZeRO-3:

python docs/figures/pipeline.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

RANKS = 4
FROZEN, GRADIENT, TRAINED, LEDGER, INK, PALE = (
    "#b8c4d6",
    "#f0a04b",
    "#2f9e6e",
    "#8a63b8",
    "#24303f",
    "#eef1f5",
)
STAGES = [
    ("load", "each rank reads\nits part of W"),
    ("probe", "a layer's gradient is\nsummed, block by block,\non the rank that owns it"),
    ("start", "the owner's truncated SVD\ngives B, A and R;\nall take their parts"),
    ("train", "W, B and A stay as they\nare; R is trained,\nr × r numbers"),
    ("recompose", "every part of W takes in\ns·B·R·A: factors are sent,\nW never is"),
    ("save, export", "factors and updates:\nthe same bytes for\nany layout"),
]
WIDTH, GAP, HEIGHT = 2.25, 0.35, 0.62


def main() -> None:
    figure, axes = plt.subplots(figsize=(15.2, 4.5), dpi=130)
    axes.set_xlim(-0.95, len(STAGES) * (WIDTH + GAP))
    axes.set_ylim(-1.15, 4.95)
    axes.axis("off")
    for rank in range(RANKS):
        axes.text(
            -0.12, _row(rank) + HEIGHT / 2, f"rank {rank}", ha="right", va="center", color=INK, fontsize=11
        )
    for number, (name, text) in enumerate(STAGES):
        left = number * (WIDTH + GAP)
        axes.add_patch(
            FancyBboxPatch(
                (left, -0.1), WIDTH, 3.55, boxstyle="round,pad=0.02,rounding_size=0.08", fc=PALE, ec="none"
            )
        )
        axes.text(left + WIDTH / 2, 4.55, name, ha="center", color=INK, fontsize=13, weight="bold")
        axes.text(
            left + WIDTH / 2, 3.55, text, ha="center", va="bottom", color=INK, fontsize=8.8, linespacing=1.2
        )
        for rank in range(RANKS):
            _rank(axes, name, left, _row(rank), rank)
        if number:
            axes.add_patch(
                FancyArrowPatch(
                    (left - GAP + 0.05, 1.65),
                    (left - 0.05, 1.65),
                    arrowstyle="-|>",
                    mutation_scale=13,
                    color=INK,
                )
            )
    _legend(axes)
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", facecolor="white")


def _row(rank: int) -> float:
    return 2.65 - rank * 0.85


def _box(axes, left: float, low: float, width: float, height: float, color: str, text: str = "") -> None:
    axes.add_patch(Rectangle((left, low), width, height, fc=color, ec="white", lw=1.2))
    if text:
        axes.text(
            left + width / 2,
            low + height / 2,
            text,
            ha="center",
            va="center",
            color=INK if color == FROZEN else "white",
            fontsize=9.5,
        )


def _rank(axes, stage: str, left: float, low: float, rank: int) -> None:
    """What one rank holds. The frozen weight is always its quarter."""
    _box(axes, left + 0.12, low, 0.62, HEIGHT, FROZEN, "W/4")
    second = left + 0.86
    if stage == "probe":
        owner = rank == 1
        _box(axes, second, low, 0.9 if owner else 0.22, HEIGHT, GRADIENT, "Σ G" if owner else "")
        if not owner:
            axes.add_patch(
                FancyArrowPatch(
                    (second + 0.24, low + HEIGHT / 2),
                    (second + 0.6, _row(1) + (0 if rank > 1 else HEIGHT)),
                    arrowstyle="-|>",
                    mutation_scale=9,
                    color=GRADIENT,
                    connectionstyle="arc3,rad=0.2",
                )
            )
    elif stage == "start":
        _box(axes, second, low, 0.34, HEIGHT, TRAINED, "B")
        _box(axes, second + 0.38, low, 0.34, HEIGHT, TRAINED, "A")
        _box(axes, second + 0.76, low, 0.3, HEIGHT, TRAINED, "R")
    elif stage in ("train", "recompose"):
        _box(axes, second, low, 0.34, HEIGHT, FROZEN, "B")
        _box(axes, second + 0.38, low, 0.34, HEIGHT, FROZEN, "A")
        _box(axes, second + 0.76, low, 0.3, HEIGHT, TRAINED, "R")
        if stage == "recompose":
            _box(axes, left + 0.12, low, 0.62, 0.14, LEDGER)
    elif stage.startswith("save") and rank == 0:
        _box(axes, second, low, 0.36, HEIGHT, TRAINED, "R")
        _box(axes, second + 0.4, low, 0.72, HEIGHT, LEDGER, "ledger")


def _legend(axes) -> None:
    entries = [
        (FROZEN, "frozen"),
        (GRADIENT, "gradient of one layer"),
        (TRAINED, "trained or new"),
        (LEDGER, "low-rank updates"),
    ]
    for number, (color, text) in enumerate(entries):
        left = 3.0 + number * 2.7
        _box(axes, left, -0.75, 0.3, 0.3, color)
        axes.text(left + 0.42, -0.6, text, va="center", color=INK, fontsize=10)


if __name__ == "__main__":
    main()
