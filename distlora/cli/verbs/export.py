"""`distlora export`."""

import argparse
from pathlib import Path

from distlora.cli.arguments import decimal, whole
from distlora.cli.shared import log_to_terminal


def add(verbs) -> None:
    parser = verbs.add_parser("export", help="write a run's result in a format that other software loads")
    parser.add_argument("run_dir", type=Path, help="the run's output directory")
    parser.add_argument("--format", choices=("peft", "merged"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--step", type=whole, help="of the checkpoint; default: the newest")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: float32 (peft), as the pretrained weights (merged)",
    )
    parser.add_argument(
        "--compress-rank",
        type=whole,
        metavar="K",
        help="peft: at most K columns a layer, by an SVD of its update",
    )
    parser.add_argument(
        "--max-error",
        type=decimal,
        metavar="E",
        help="peft: the smallest rank of each layer whose update is off by at most E, relative, "
        "in the Frobenius norm",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="merged: do not load the result to compare it with the run on one batch",
    )


def run(options: argparse.Namespace) -> None:
    """Exports a run's result, and prints where it is."""
    log_to_terminal(shown=True)
    import torch

    from distlora.training.export_run import export_run

    done = export_run(
        options.run_dir,
        options.format,
        options.out,
        options.step,
        options.dtype and getattr(torch, options.dtype),
        options.compress_rank,
        options.max_error,
        check=not options.no_check,
    )
    print(done.path)
    if done.compression:
        print(done.compression)
    if done.difference is not None:
        print(f"compared with the run: logits differ by {done.difference:.1e} of the largest")
