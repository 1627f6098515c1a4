"""`distlora export`."""

import argparse
import logging
from pathlib import Path

from distlora.cli.arguments import Verbs, decimal, whole
from distlora.cli.progress import progress_shown
from distlora.cli.shared import add_quiet, log_to_terminal
from distlora.errors import UserError
from distlora.sentences import size_text


def add(verbs: Verbs) -> None:
    parser = verbs.add_parser("export", help="write a run's result in a format that other software loads")
    parser.add_argument("run_dir", type=Path, help="the run's output directory")
    parser.add_argument("--format", choices=("peft", "merged"), help="may be left out with --for")
    parser.add_argument(
        "--for", dest="server", choices=("vllm",), help="peft: in the form that this server loads"
    )
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=whole, help="of the checkpoint; default: the newest")
    which.add_argument("--checkpoint", choices=("best", "newest"), help="best: see train.keep_best")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: as the run, or float32 where that loses too much (peft); as the pretrained weights "
        "(merged)",
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
        help="merged: do not load the result to compare it with the run on one batch; peft: do not compute a "
        "batch with weights of which no loss has been seen finite",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also send it to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="--push: a new repository is private")
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Exports a run's result, and prints where it is."""
    log_to_terminal(shown=True, least=logging.WARNING if options.quiet else logging.INFO)
    with progress_shown(not options.quiet):
        _export(options)


def _export(options: argparse.Namespace) -> None:
    import torch

    from distlora.training.export_run import export_run

    if options.format is None and options.server is None:
        raise UserError("--format is missing; give peft or merged, or --for vllm")
    if options.private and options.push is None:
        raise UserError("--private is for --push: give the repository's name, or leave it out")
    if options.push is not None:  # before the work, and not only after it
        from distlora.models.hub_upload import check_upload

        check_upload(options.push, options.private)
    done = export_run(
        options.run_dir,
        options.format or "peft",
        options.out,
        "best" if options.checkpoint == "best" else options.step,
        options.dtype and getattr(torch, options.dtype),
        options.compress_rank,
        options.max_error,
        check=not options.no_check,
        server=options.server,
    )
    print(done.path)
    in_dtype = "" if done.dtype is None else f", tensors in {str(done.dtype).removeprefix('torch.')}"
    print(f"{size_text(done.size)}{in_dtype}")
    if done.compression:
        print(done.compression)
    if done.difference is not None:
        print(f"compared with the run: logits differ by {done.difference:.1e} of the largest")
    if options.push is not None:
        from distlora.models.hub_upload import upload

        print(upload(done.path, options.push, options.private))
