"""One rank of a distributed test: runs a list of cases in one process, because starting DeepSpeed costs ten seconds.

    python -m tests.distributed.worker PLAN.json        (with RANK, WORLD_SIZE and MASTER_* set)

The plan is {"model": directory, "out": directory, "cases": [{"key", "case", "engine", "setting", "arguments"}, …]}. Rank 0
writes out/<key>.safetensors, or out/<key>.error with the traceback of a failed case.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from distlora.comm import Comm, Topology
from distlora.zero import ZeroEngine
from tests.distributed.cases import run
from tests.distributed.world import deepspeed_config


def main(plan_file: str) -> int:
    torch.set_num_threads(1)
    # DeepSpeed collects garbage at every start of an engine; what the imports left is not worth going through each time.
    gc.freeze()
    plan = json.loads(Path(plan_file).read_text())
    comm = Comm(Topology.from_environment(), torch.device("cpu"), timeout_minutes=3)
    for entry in plan["cases"]:
        out = Path(plan["out"], entry["key"])
        try:
            setting = entry["setting"]
            accumulation = 12 // (setting.get("micro_batch", 1) * comm.world_size)
            config = deepspeed_config(
                world_size=comm.world_size, micro_batch=setting.get("micro_batch", 1), accumulation=accumulation,
                clip=setting.get("clip", 0.0), **entry["engine"],
            )  # fmt: skip
            work = Path(plan["out"], entry.get("work") or entry["key"] + ".work")
            results = run(entry["case"], ZeroEngine(comm, config), Path(plan["model"]), work, entry["arguments"], **setting)
        except Exception:
            # The other ranks may be inside a collective of this case: nothing after it can be trusted.
            out.with_suffix(".error").write_text(traceback.format_exc())
            return 1
        if comm.is_main:
            save_file({name: tensor.contiguous() for name, tensor in results.items()}, out.with_suffix(".safetensors"))
    comm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
