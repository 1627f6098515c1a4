"""One rank of a distributed test: runs a list of cases in one process, because starting DeepSpeed costs
seconds.

The plan is {"model": directory, "out": directory, "cases": [{"key", "case", "engine", "setting",
"arguments"}, …]}. Rank 0 writes out/<key>.safetensors; a rank on which a case fails writes
out/<key>.rank<rank>.error with the traceback, and ends.
"""

import gc
import json
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from distlora.cluster.topology import topology_from_environment
from distlora.engine.comm import Comm
from distlora.engine.zero.engine import ZeroEngine
from tests.distributed.cases import run
from tests.distributed.plan import GLOBAL_BATCH
from tests.distributed.world import deepspeed_config


def main(plan_file: Path) -> int:
    torch.set_num_threads(1)
    plan = json.loads(plan_file.read_text())
    comm = Comm(topology_from_environment(), torch.device("cpu"), timeout_minutes=3)
    for entry in plan["cases"]:
        out = Path(plan["out"])
        try:
            setting = entry["setting"]
            micro_batch = setting["micro_batch"]
            accumulation = GLOBAL_BATCH // (micro_batch * comm.world_size)
            config = deepspeed_config(
                world_size=comm.world_size, micro_batch=micro_batch, accumulation=accumulation,
                clip=setting.get("clip", 0.0), **entry["engine"],
            )  # fmt: skip
            work = out / (entry.get("work") or entry["key"] + ".work")
            results = run(
                entry["case"],
                ZeroEngine(comm, config),
                Path(plan["model"]),
                work,
                entry["arguments"],
                **setting,
            )
        except Exception:
            # The other ranks may be inside a collective of this case: nothing after it can be trusted in this
            # process.
            (out / f"{entry['key']}.rank{comm.rank}.error").write_text(traceback.format_exc())
            return 1
        if comm.is_main:
            tensors = {name: tensor.contiguous() for name, tensor in results.items()}
            save_file(tensors, out / f"{entry['key']}.safetensors")
        if entry is plan["cases"][0]:
            # DeepSpeed collects garbage at every start of an engine; what imports left is not worth going
            # through each time.
            gc.freeze()
    comm.close()
    return 0
