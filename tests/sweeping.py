"""A sweep whose runs are played by a script, in milliseconds: it writes a run's status as a real one does."""

import json
import sys
from pathlib import Path

from distlora.engine.comm.group import STOPPED as STOPPED_EARLY
from distlora.recipe.yaml_text import dump_yaml
from distlora.sweeps.file import Sweep, read_sweep_file
from distlora.training.evaluate import STOPPED

#: Plays `train` and `eval`. What is in the file `play` says how it ends, by the run directory's name.
PLAYER = """
import datetime, json, os, pathlib, signal, sys, time

verb, words = sys.argv[2], sys.argv[3:]
folder = pathlib.Path(sys.argv[1])
run = pathlib.Path(words[0] if verb == "eval" else words[-1].partition("=")[2].strip('"'))
play = json.loads((folder / "play").read_text()).get(f"{verb} {run.name}", "done")
with (folder / "starts").open("a") as file:
    file.write(json.dumps([verb, run.name, *words]) + "\\n")


def write(state, requeue=False, message=""):
    run.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    status = dict(state=state, step=3, steps=3, requeue=requeue, message=message, start=now, time=now)
    (run / "status.json").write_text(json.dumps(status))


def stop(number, frame):
    write("preempted", True, "SIGTERM")
    sys.exit(75)


if play == "mistake":
    print("noise\\ndistlora: train.lr: wanted a number", file=sys.stderr)
    sys.exit(2)
if verb == "eval":
    options = dict(zip(words[1::2], words[2::2]))
    asked = {key: options.get(key) for key in ("--limit", "--data")}
    for task in options["--tasks"].split(","):
        there = run / f"{task}.json"
        if there.exists() and json.loads(there.read_text()) != asked and words[-1] != "--fresh":
            print("distlora: predictions of another evaluation lie there", file=sys.stderr)
            sys.exit(2)
        there.write_text(json.dumps(asked))
    if play.startswith("stopped"):
        said = "{STOPPED}" if play == "stopped" else "{STOPPED_EARLY}"
        print(f"distlora: {said}", file=sys.stderr)
    sys.exit(0 if play == "done" else 1)
if play == "wait":
    signal.signal(signal.SIGTERM, stop)
    write("running")
    while not (folder / "over").exists():
        time.sleep(0.01)
if play == "killed":
    write("running")
    os.kill(os.getpid(), signal.SIGKILL)
if play == "silent":
    write("failed", True, "rank 1 went silent")
    sys.exit(1)
if play == "failed":
    write("failed", False, "the loss is NaN")
    sys.exit(0)
write("done")
""".replace("{STOPPED}", STOPPED).replace("{STOPPED_EARLY}", STOPPED_EARLY)

RECIPE = {
    "model": {"path": "some/model"},
    "method": {"name": "lora", "rank": 4},
    "data": {"task": "gsm8k", "path": "rows", "split": "train"},
    "train": {"steps": 3, "micro_batch_size": 1, "global_batch_size": 2},
    "output_dir": "runs/own",
}


class Desk:
    """A folder with a recipe, a sweep of it, and the script that plays its runs."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "sweep.yaml"
        (folder / "recipe.yaml").write_text(dump_yaml(RECIPE))
        (folder / "player.py").write_text(PLAYER)
        self.play()
        self.content = {
            "recipe": "recipe.yaml",
            "output": str(folder / "out"),
            "grid": {"train.seed": [1, 2, 3]},
            "launcher": [sys.executable, "-S", str(folder / "player.py"), str(folder)],
        }

    def write(self, **changes) -> Path:
        """The sweep's file, with some keys changed; None leaves one out."""
        content = {key: value for key, value in (self.content | changes).items() if value is not None}
        self.file.write_text(dump_yaml(content))
        return self.file

    def read(self, *overrides: str, **changes) -> Sweep:
        return read_sweep_file(self.write(**changes), overrides)

    def play(self, **ends: str) -> None:
        """How runs end: `train_1="failed"` is the training of seed 1."""
        named = {
            f"{key.partition('_')[0]} train.seed={key.partition('_')[2]}": end for key, end in ends.items()
        }
        (self.folder / "play").write_text(json.dumps(named))

    def starts(self) -> list[list[str]]:
        """The words of every start so far: the verb, the run's name, and its arguments."""
        file = self.folder / "starts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def names(self) -> list[str]:
        return [f"{verb} {name}" for verb, name, *_ in self.starts()]

    def table(self) -> dict[str, str]:
        """State of each point, as the sweep's directory says it."""
        rows = json.loads((self.folder / "out" / "sweep.json").read_text())["points"]
        return {row["point"]: row["state"] for row in rows}
