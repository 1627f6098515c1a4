"""Shows that each distributed test fails when the property that it stands for is broken.

    python -m tests.mutations [WORD …]        only the mutations whose name contains one of the words

Each mutation leaves out or spoils one thing in a copy of the working tree and names the cheapest tests that
must notice. All those tests are run on the unspoiled copy first. Takes about half a minute a mutation; exit
code 1 if one survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ZERO, COMPOSE, PROBE, STEP = (
    f"distlora/{name}.py"
    for name in ("engine/zero/engine", "initialisation/factors", "initialisation/probe", "training/step")
)
LAYOUT, TENSORS, GRADIENTS = (
    f"distlora/engine/zero/{name}.py" for name in ("layout", "tensors", "gradients")
)
BOUNDARY = "distlora/engine/boundary.py"
PARITY = "tests/distributed/test_parity.py::test_zero_gives_what_the_plain_engine_gives"
SAME_LAYOUT = "tests/distributed/test_resume.py::test_at_the_same_layout_to_the_last_bit"
OTHER_LAYOUT = "tests/distributed/test_resume.py::test_at_another_layout_the_same_curve"
#: Keys of cases with swaps.
RECOMPOSE, AGES = "distlora/recompose/recomposer.py", "distlora/recompose/ages.py"
#: What both engines share cannot differ between them: it is held by tests of its own.
UNIT = "tests/unit/test_recompose.py"
USUAL = "tests/unit/test_usual_deepspeed_configs.py"
SWAPS = "float32-method=srlora-target_rank=16-gamma=0_5-interval=2-clip=0_5"
TRANSFORMED = "float32-method=lora_pro-alpha=2-clip=0_5-steps=4"
SWAPPED = "tests/distributed/test_resume.py::test_after_swaps_at_the_same_layout_to_the_last_bit"
_KEY = "world2-stage3-bfloat16-srlora-20-0_5-2-0_5-few-stochastic-at8"
KEPT = f"{_KEY}-from-{_KEY}"
TO_ONE = "tests/distributed/test_resume.py::test_on_the_plain_engine_the_same_curve"
CONFIDENTIAL, SECRETS = "distlora/files/confidential.py", "tests/unit/test_confidential.py"
#: Seconds after which ranks that wait for each other for ever are given up, and those of any other run.
PATIENCE, LIMIT = 120, 1800
#: How a run that ended only by a time limit says so.
WAITED = ("the ranks were still running", "Timed out waiting")


@dataclass(frozen=True)
class Mutation:
    """In `file` the text `old`, which is there exactly once, becomes `new`; then each of `tests` must fail.

    hangs: it fails because ranks wait for each other for ever, which only a time limit ends.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    hangs: bool = False


def parity(*keys: str) -> tuple[str, ...]:
    return tuple(f"{PARITY}[{key}]" for key in keys)


MUTATIONS = [
    # ------------------------------------------------------------------ writing: every copy
    Mutation(
        "low-precision copy not written",
        TENSORS,
        "        self._write_low_precision(self._parameters[name], value)\n",
        "",
        parity("writing-world2-stage2-float32", "writing-world2-stage3-bfloat16"),
    ),
    Mutation(
        "master not written",
        TENSORS,
        "            own.master.copy_(value.reshape(-1)[own.start : own.start + own.length])\n"
        "\n    def _write_low",
        "            pass\n\n    def _write_low",
        parity("writing-world2-stage2-float32", "writing-world2-stage0-bfloat16"),
    ),
    Mutation(
        "no re-gather before a write at stage 3",
        TENSORS,
        "            self._settle()\n        start, length = shard_of(parameter, self.comm.rank)\n"
        "        yield start",
        "            pass\n        start, length = shard_of(parameter, self.comm.rank)\n        yield start",
        parity("writing-world2-stage3-float32"),
    ),
    Mutation(
        "shards not cut at the tensor's end",
        LAYOUT,
        "    return start, min(size, parameter.ds_numel - start)\n",
        "    return start, size\n",
        parity("curve-world2-stage3-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "padding not cut off after a gather",
        TENSORS,
        "        return shards.view(-1)[: parameter.ds_numel]\n",
        "        return shards.view(-1)[-parameter.ds_numel :]\n",
        parity("correcting-world2-stage3-float32"),
    ),
    Mutation(
        "shards are taken to begin at 0 on every rank",
        LAYOUT,
        "    start = min(rank * size, parameter.ds_numel)\n",
        "    start = 0\n",
        parity("curve-world2-stage3-float32-clip=0_5-micro_batch=2"),
    ),
    # ------------------------------------------------------------------ norms: kept until something changes
    *(
        Mutation(
            name,
            file,
            old,
            new,
            parity("norming-world2-stage3-float32-method=dora-alpha=10-checkpointing=True"),
        )
        for name, file, old, new in (
            ("norms survive a step", BOUNDARY, "        layer.changed()\n", "        pass\n"),
            ("norms survive a write", TENSORS, "        tell_changed(self.layers, name)\n", ""),
            (
                "norms survive an addition",
                TENSORS,
                "        layer.changed()\n        if self.stage < 3:\n",
                "        if self.stage < 3:\n",
            ),
        )
    ),
    Mutation(
        "a transposed weight is written as any other",
        "distlora/adapter/layer.py",
        "        return add_low_rank(part, start, self.as_stored(update), rounding, key, device)\n",
        "        return add_low_rank(part, start, update, rounding, key, device)\n",
        parity(
            "swapping-world2-stage3-float32-family=gpt2-clip=0_5-method=srlora-target_rank=16-gamma=0_5-"
            "interval=2-steps=5"
        ),
    ),
    # ------------------------------------------------------------------ reading
    Mutation(
        "masters not summed over ranks when read",
        TENSORS,
        "            return self.comm.all_reduce(flat).view(self._shape(name))\n",
        "            return flat.view(self._shape(name))\n",
        parity("curve-world2-stage2-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "at stage 0 every rank adds its whole copy",
        TENSORS,
        "        return self._slices[name] is not None and (self.stage > 0 or self.comm.is_main)\n",
        "        return self._slices[name] is not None\n",
        parity("curve-world2-stage0-float32-clip=0_5-micro_batch=2"),
    ),
    # ------------------------------------------------------------------ gradients
    Mutation(
        "gradient scale without the world",
        ZERO,
        "loss * (self._engine.gradient_accumulation_steps() * self.comm.world_size)",
        "loss * self._engine.gradient_accumulation_steps()",
        parity("curve-world2-stage0-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "gradient scale without the accumulation",
        ZERO,
        "loss * (self._engine.gradient_accumulation_steps() * self.comm.world_size)",
        "loss * self.comm.world_size",
        parity("curve-world2-stage3-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "R's gradient not corrected after a restore",
        COMPOSE,
        "        layer.map_gradients(gradient_maps(layer, factors))\n",
        "        pass\n",
        parity("correcting-world2-stage3-float32"),
    ),
    Mutation(
        "R's gradient corrected on rank 0 only",
        COMPOSE,
        "        layer.map_gradients(gradient_maps(layer, factors))\n",
        "        layer.map_gradients(attached.method.gradient_map(factors) if engine.comm.is_main else {})\n",
        parity("curve-world2-stage2-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "gradients to be replaced not summed over ranks",
        GRADIENTS,
        "        self.comm.all_reduce(flat)\n",
        "",
        parity("replacing_gradients-world2-stage2-float32-clip=0_5", f"curve-world2-stage1-{TRANSFORMED}"),
    ),
    Mutation(
        "replaced gradients not kept",
        GRADIENTS,
        '                self._set_gradient(f"{layer.name}.{factor}", gradient.float())\n',
        "                pass\n",
        parity("replacing_gradients-world2-stage0-float32-clip=0_5"),
    ),
    Mutation(
        "stage 3: replaced gradient without its padding",
        GRADIENTS,
        "            safe_set_local_grad(parameter, padded)\n",
        "            safe_set_local_grad(parameter, part)\n",
        parity("replacing_gradients-world2-stage3-float32-clip=0_5"),
    ),
    Mutation(
        "offload: the norm not renewed",
        GRADIENTS,
        "                wrapper.norm_for_param_grads[wrapper.get_param_id(parameter)] = "
        "part.double().norm(2)\n",
        "                pass\n",
        parity("replacing_gradients-world2-stage2-float32-clip=0_5-offload"),
    ),
    Mutation(
        "BF16_Optimizer: the fragment taken for the own slice",
        LAYOUT,
        "fragment.narrow(0, own.start, own.length) if fragment.numel() == parameter.numel() else fragment\n",
        "fragment\n",
        parity("replacing_gradients-world2-stage1-bfloat16-clip=0_5"),
    ),
    Mutation(
        "factors not gathered for a transformation",
        GRADIENTS,
        "                view[start : start + length] = self._parameters[name].ds_tensor.data[:length]\n",
        "                pass\n",
        parity(f"curve-world2-stage3-{TRANSFORMED}"),
    ),
    Mutation(
        "clipped by the norm of the transformed gradients",
        ZERO,
        '{**self._config, "gradient_clipping": 0.0} if transforming(layers) else self._config',
        "self._config",
        parity(f"curve-world2-stage0-{TRANSFORMED}", f"curve-world2-stage3-{TRANSFORMED}-offload"),
    ),
    Mutation(
        "the head not clipped with transformed gradients",
        GRADIENTS,
        "                self._set_part(name, factor * gradient)\n",
        "                pass\n",
        parity("classifying-world2-stage2-float32-method=lora_pro-alpha=2-clip=0_5-labels=3"),
    ),
    Mutation(
        "silent tensors judged by rank 0 alone",
        GRADIENTS,
        "zip(self._trained, self.comm.all_reduce(counts).tolist())",
        "zip(self._trained, counts.tolist())",
        parity("naming_silent_tensors-world2-stage2-float32"),
    ),
    Mutation(
        "stage 0 in float32: the norm of one tensor only",
        ZERO,
        "[p.grad for p in self._trained.values() if p.grad is not None])",
        "[p.grad for p in self._trained.values() if p.grad is not None][:1])",
        parity("curve-world2-stage0-float32-clip=0_5-micro_batch=2"),
    ),
    # ------------------------------------------------------------------ the step
    Mutation(
        "targets not counted over ranks",
        STEP,
        "    (targets,) = engine.comm.sum(sum(map(count_targets, batches)))\n",
        "    targets = sum(map(count_targets, batches)) * engine.comm.world_size\n",
        parity("curve-world2-stage0-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "loss not summed over ranks",
        STEP,
        "        total += engine.comm.sum_or_stop(float(loss.detach()))[0]\n",
        "        total += float(loss.detach()) * engine.comm.world_size\n",
        parity("curve-world2-stage0-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "evaluation loss not summed over ranks",
        STEP,
        "        loss, count = engine.comm.sum_or_stop(float(loss), count)\n",
        "        loss = float(loss)\n",
        parity("writing-world2-stage0-float32"),
    ),
    Mutation(
        "no training pass of weight zero",
        STEP,
        "    for number, batch in enumerate(batches, start=1):\n",
        "    for number, batch in enumerate(filter(count_targets, batches), start=1):\n",
        parity("short_batch-world2-stage3-float32"),
        hangs=True,
    ),
    Mutation(
        "no evaluation pass of weight zero",
        STEP,
        "    for batch in batches:\n        loss, count = engine.run(loss_sum, batch)\n",
        "    for batch in filter(count_targets, batches):\n"
        "        loss, count = engine.run(loss_sum, batch)\n",
        parity("short_batch-world2-stage3-float32-persist0"),
        hangs=True,
    ),
    Mutation(
        "learning rate not set",
        ZERO,
        "        set_rate(self._optimizer, rate)\n",
        "        pass\n",
        parity("curve-world2-stage2-float32-clip=0_5-micro_batch=2"),
    ),
    Mutation(
        "LoRA+ without a group of its own",
        ZERO,
        "optimizer.groups(trained, left_factors(layers))",
        "optimizer.groups(trained)",
        parity("curve-world2-stage2-float32-method=lora-spec=lora_plus-clip=0_5-steps=4"),
    ),
    Mutation(
        "the wrapper's dummy step not forgotten",
        ZERO,
        "    base_optimizer(engine).state.clear()\n",
        "    pass\n",
        parity("curve-world2-stage0-bfloat16-steps=6"),
    ),
    # ------------------------------------------------------------------ probe and initialisation
    Mutation(
        "probe not reduced over ranks",
        PROBE,
        "                comm.reduce_to(block, owner)\n",
        "",
        parity("probing-world2-stage0-float32"),
    ),
    Mutation(
        "no probe pass of weight zero",
        PROBE,
        "            for batch in batches:\n",
        '            for batch in (batch for batch in batches if batch["labels"].max() >= 0):\n',
        parity("probing-world2-stage0-float32"),
        hangs=True,
    ),
    Mutation(
        "probe leaves weights gathered",
        ZERO,
        "        # A frozen embedding stays marked active after a backward pass "
        "that did not go through the engine.\n"
        "        self._settle()\n",
        "",
        parity("probing-world3-stage3-float32-checkpointing=True-released=True-persist0"),
    ),
    Mutation(
        "probe's loss not summed over ranks",
        "distlora/initialisation/search.py",
        "    return float(engine.comm.all_reduce(total)) / data.samples\n",
        "    return float(total) / data.samples\n",
        parity("initialising-world2-stage0-float32-method=lora_sb"),
    ),
    Mutation(
        "factors stay on their owner",
        COMPOSE,
        "        factors[name] = comm.broadcast(value, owner)\n",
        "        factors[name] = value\n",
        parity("whole_run-world2-stage2-float32-method=lora-clip=0_5-targets=few"),
    ),
    Mutation(
        "reported numbers of the own layers only",
        COMPOSE,
        "    comm.all_reduce(table)\n",
        "",
        parity("initialising-world2-stage0-float32-method=lora_sb"),
    ),
    Mutation(
        "weight for the owner assembled from its own shard",
        TENSORS,
        "        joined = self._joined(weight)\n",
        "        joined = weight.ds_tensor.detach().repeat(self.comm.world_size)[: weight.ds_numel]\n",
        parity("whole_run-world2-stage3-float32-method=lora_xs-clip=0_5-targets=few"),
    ),
    # ------------------------------------------------------------------ recomposition
    Mutation(
        "swap: second moments keep the old age",
        AGES,
        "            own_age(",
        "            (lambda *_: None)(",
        (f"{UNIT}::test_after_a_late_recomposition_new_components_take_no_step_above_one_and_a_half_rates",),
    ),
    Mutation(
        "swap: first moments not forgotten",
        AGES,
        "                    part.moments[key][mask.to(part.moments[key].device)] = 0.0\n",
        "                    pass\n",
        (f"{UNIT}::test_first_moments_of_the_replaced_are_zero_and_nothing_else_is_touched",),
    ),
    Mutation(
        "swap: the reserve gives the same components again",
        "distlora/recompose/reserve.py",
        "        rest = pair.part(slice(count, None))\n",
        "        rest = pair\n",
        (f"{UNIT}::test_the_reserve_is_used_in_descending_order_and_never_twice",),
    ),
    Mutation(
        "swap: scores not summed over ranks",
        "distlora/recompose/scores.py",
        "        return self._comm.all_reduce(table).cpu()\n",
        "        return table.cpu()\n",
        parity(f"swapping-world3-stage3-{SWAPS}"),
    ),
    Mutation(
        "swap: scores not forgotten",
        RECOMPOSE,
        "            self._scores.start()\n",
        "            pass\n",
        (f"{UNIT}::test_scores_are_the_papers_and_start_anew_after_a_recomposition",),
    ),
    Mutation(
        "swap: the weight is not updated",
        "distlora/engine/ledger.py",
        "            return engine.add_low_rank(\n"
        "                layer, update, entry.rounding, rounding_key(self.seed, layer.name, entry.number)\n"
        "            )\n",
        "            return 0.0\n",
        parity(f"swapping-world2-stage2-{SWAPS}"),
    ),
    Mutation(
        "swap: every shard takes the first rows",
        TENSORS,
        "            return layer.add_to_part(shard, start, update, rounding, key, device)\n",
        "            return layer.add_to_part(shard, 0, update, rounding, key, device)\n",
        parity(f"swapping-world3-stage3-{SWAPS}"),
    ),
    Mutation(
        "swap: secondary copy (hpZ) not forgotten",
        TENSORS,
        "        parameter.ds_secondary_tensor = None\n",
        "",
        parity(f"swapping-world2-stage3-{SWAPS}-targets=few-hpz"),
    ),
    Mutation(
        "swap: W gathered on the way",
        RECOMPOSE,
        "        self._engine.write(layer, after)\n",
        "        self._engine.write(layer, after)\n        self._engine.weight_at_owner(layer, 0)\n",
        parity(f"swap_traffic-world2-stage3-{SWAPS.replace('interval=2', 'interval=4')}"),
    ),
    Mutation(
        "ledger: replayed in another order",
        "distlora/engine/ledger.py",
        "            for index, fields in enumerate(entries):\n",
        "            for index, fields in reversed(list(enumerate(entries))):\n",
        (f"{SWAPPED}[{KEPT}]",),
    ),
    Mutation(
        "ledger: another seed at the replay",
        "distlora/engine/ledger.py",
        "                self._change(engine, layer, entry, update)\n",
        "                self._change(engine, layer, "
        'Entry(**fields | {"number": entry.number + 1}), update)\n',
        (f"{SWAPPED}[{KEPT}]",),
    ),
    Mutation(
        "restart: what a core learned counts from nothing",
        "distlora/recompose/initial_values.py",
        "        return [[LowRank(-pair.left, pair.right)] for pair in pairs]\n",
        "        return [[] for pair in pairs]\n",
        ("tests/unit/test_lora_sb.py::test_what_a_core_learned_is_what_it_gained_since_its_start",),
    ),
    Mutation(
        "restart: starts not brought together",
        "distlora/recompose/shards.py",
        "    return comm.reduce_to(flat, owner).view(shape)\n",
        "    return flat.view(shape)\n",
        parity(
            "swapping-world2-stage3-float32-method=lora_sb-recompose={'times':2}-init={'eta':0_001}-targets=few"
        ),
    ),
    # ------------------------------------------------------------------ packed weights
    Mutation(
        "packed weight: new scales stay on their owner",
        TENSORS,
        "        for tensor in (stored, *layer.packing.scales()):\n",
        "        for tensor in (stored,):\n",
        parity("swapping-world2-stage3-float32-method=pissa-quantization=nf4-steps=3"),
    ),
    Mutation(
        "packed weight: new bytes stay on their owner",
        TENSORS,
        "        for tensor in (stored, *layer.packing.scales()):\n",
        "        for tensor in layer.packing.scales():\n",
        parity("swapping-world2-stage3-float32-method=pissa-quantization=nf4-steps=3"),
    ),
    # ------------------------------------------------------------------ the whole model
    Mutation(
        "whole model with ZeRO's hooks on",
        ZERO,
        "            _without_hooks(self._engine.module),\n",
        "",
        parity("generating-world3-stage3-float32-persist0"),
        hangs=True,
    ),
    Mutation(
        "hooks not put back",
        ZERO,
        "        for module, table, hooks in kept:\n            setattr(module, table, hooks)\n",
        "        pass\n",
        parity("generating-world2-stage3-float32"),
    ),
    Mutation(
        "model loaded whole on every rank",
        ZERO,
        "HfDeepSpeedConfig(self._config) if self.stage == 3 and not whole else None",
        "None",
        parity("storing-world2-stage3-float32-persist0"),
    ),
    # ------------------------------------------------------------------ checkpoints
    Mutation(
        "moments not saved",
        TENSORS,
        "        moments = self.optimizer.moments() if stateful else ()\n",
        "        moments = ()\n",
        (f"{SAME_LAYOUT}[world2-stage2-float32-from-world2-stage2-float32]",),
    ),
    Mutation(
        "moments not restored",
        TENSORS,
        "                own.moment(self._optimizer, key).copy_(value[own.start : own.start + own.length])\n",
        "                pass\n",
        (
            f"{SAME_LAYOUT}[world2-stage0-float32-from-world2-stage0-float32]",
            f"{OTHER_LAYOUT}[world2-stage2-float32-from-world2-stage3-float32]",
        ),
    ),
    Mutation(
        "step count not restored",
        TENSORS,
        "            restore_state(self._optimizer, own.flat, moments, steps)\n",
        "            restore_state(self._optimizer, own.flat, moments, 0)\n",
        (f"{OTHER_LAYOUT}[world2-stage2-float32-from-world2-stage3-float32]",),
    ),
    Mutation(
        "only rank 0's part is saved",
        TENSORS,
        "        return self.comm.reduce_to(flat, 0).view(self._shape(name)).cpu()\n",
        "        return flat.view(self._shape(name)).cpu()\n",
        (f"{TO_ONE}[world2-stage2-float32]",),
    ),
    Mutation(
        "only rank 0 restores",
        TENSORS,
        "        return self.comm.broadcast(value, 0)\n",
        "        return value\n",
        (f"{OTHER_LAYOUT}[world2-stage3-float32-from-local]",),
    ),
    Mutation(
        "frozen factors not restored",
        TENSORS,
        "        self._overwrite(name, self.comm.broadcast(whole, 0))\n",
        "        self.comm.broadcast(whole, 0)\n",
        (f"{OTHER_LAYOUT}[world2-stage3-float32-from-local]",),
    ),
    Mutation(
        "random-number states not restored",
        "distlora/checkpoints/restore.py",
        "    restore_random_states(states, comm.device)\n",
        "    pass\n",
        (f"{SAME_LAYOUT}[world2-stage2-float32-0_3-from-world2-stage2-float32-0_3]",),
    ),
    # ------------------------------------------------------------------ classifiers
    Mutation(
        "new heads stay as the model's class drew them",
        "distlora/initialisation/heads.py",
        "        if name in names and len(shape) > 1:\n",
        "        if False:\n",
        parity("classifying-world2-stage3-float32-method=lora-labels=3-clip=0_5"),
    ),
    Mutation(
        "predicted labels not brought together",
        "distlora/evaluation/scoring.py",
        "    predicted = comm.all_reduce(predicted).cpu()\n",
        "    predicted = predicted.cpu()\n",
        parity("classifying-world2-stage3-float32-method=lora-labels=3-clip=0_5"),
    ),
    # ------------------------------------------------------------------ steps that are taken back
    Mutation(
        "what forward passes read is not put back",
        TENSORS,
        "                with self._shard_for_writing(parameter) as (_, shard):\n"
        "                    shard.copy_(value)\n",
        "                pass\n",
        parity("searching-world2-stage3-float32-method=full-clip=0_5-persist0"),
    ),
    Mutation(
        "DeepSpeed's counters are not put back",
        ZERO,
        "            kept.keep_attributes(owner, counters)\n",
        "            pass\n",
        parity("searching-world2-stage2-float32-method=lora-targets=few-clip=0_5"),
    ),
    # ------------------------------------------------------------------ what users write
    Mutation(
        "a key of a recipe that is given twice",
        "distlora/recipe/yaml_text.py",
        """    if event.value in mapping:
        raise _Refused(f"key {event.value} is given twice", event)
""",
        "",
        ("tests/unit/test_hostile_texts.py::test_what_is_made_to_break_the_parser_is_one_sentence",),
    ),
    Mutation(
        "a DeepSpeed step at every micro-batch",
        "distlora/recipe/deepspeed_keys.py",
        '    ("managed_gradient_accumulation", (True,),\n',
        '    ("managed_gradient_accumulation", (True, False),\n',
        ("tests/unit/test_deepspeed_keys.py::test_what_would_break_a_promise_is_refused_in_one_sentence",),
    ),
    Mutation(
        "a value in the place of a section of DeepSpeed's",
        "distlora/recipe/deepspeed_check.py",
        "    if value is not None and not isinstance(value, dict) and names_in(key) is not None:\n",
        "    if False:\n",
        (f"{USUAL}::test_what_is_no_section_is_refused_in_the_words_of_the_config",),
    ),
    Mutation(
        "values under the names of DeepSpeed's fields lost",
        "distlora/recipe/deepspeed_config.py",
        '        r.set(key, value, "under its documented name")\n',
        "",
        (f"{USUAL}::test_names_of_deepspeeds_fields_are_written_as_the_documented_keys",),
    ),
    Mutation(
        "sums in bfloat16 with an offloaded optimizer",
        "distlora/recipe/deepspeed_config.py",
        "    if r.get(stage) == 2 and accumulation > 1 and",
        "    if False and",
        ("tests/unit/test_plan_stage.py::test_a_stage_in_the_place_of_the_configs_is_told",),
    ),
    Mutation(
        "gradients summed in the dtype of the weights",
        "distlora/engine/gradient_sums.py",
        "            parameter.grad_dtype = torch.float32\n",
        "            pass\n",
        ("tests/unit/test_gradient_sums.py::test_64_micro_batches_add_up_as_in_float64",),
    ),
    Mutation(
        "a head of another size not seen",
        "distlora/models/misfits.py",
        "        if own.get(name, shape) != shape\n",
        "        if name not in own\n",
        ("tests/unit/test_misfits.py::test_misfits_are_named_with_their_tensors_and_left_out",),
    ),
    # ------------------------------------------------------------------ bad steps, and runs that stand still
    *(
        Mutation(name, file, old, new, (f"tests/unit/{test}",))
        for name, file, old, new, test in (
            (
                "bad steps: a multiple of zero counts",
                "distlora/training/bad_steps.py",
                "        if not usual or loss <=",
                "        if loss <=",
                "test_bad_ends.py::test_nothing_is_a_multiple_of_a_median_of_zero",
            ),
            (
                "bad steps: the files of the highest steps stay",
                "distlora/training/bad_batches.py",
                "sorted(files, key=_age)",
                "sorted(files, key=_order)",
                "test_bad_ends.py::test_the_file_of_an_earlier_step_stays_if_it_is_the_newest",
            ),
            (
                "bad steps: a step made again ends a row",
                "distlora/training/bad_steps.py",
                "        self.losses = [*self.losses, loss][-WINDOW:]\n        if step >= self.latest:\n",
                "        self.losses = [*self.losses, loss][-WINDOW:]\n        if step:\n",
                "test_bad_steps.py::test_only_a_step_that_comes_further_ends_a_row",
            ),
            (
                "bad steps: a mark holds for other files",
                "distlora/checkpoints/soundness.py",
                'found.get("manifest") == sha256_of(directory / MANIFEST)',
                '"manifest" in found',
                "test_bad_steps.py::test_a_mark_is_of_the_very_files_that_it_was_made_for",
            ),
            (
                "bad steps: a row that has ended a run stays left out",
                "distlora/training/run.py",
                "        if len(self.bad_steps.row) >= self.recipe.train.bad_steps_limit:\n",
                "        if False:\n",
                "test_bad_steps_again.py::test_a_row_that_ends_the_run_is_met_again_and_a_higher_limit_leads"
                "_past_it[skip]",
            ),
            (
                "bad steps: batches that the weights have passed are met again",
                "distlora/training/bad_steps.py",
                "if batch < passed or batch not in self.row]",
                "if batch not in self.row]",
                "test_bad_steps_again.py::test_what_is_met_again_is_not_what_the_weights_have_passed",
            ),
            (
                "bad steps: what a checkpoint has passed is decided anew",
                "distlora/training/bad_steps.py",
                "        before = [batch for batch in known if batch < passed]\n",
                "        before = []\n",
                "test_bad_steps_again.py::test_a_checkpoint_knows_what_it_has_passed_and_the_file_what_comes",
            ),
            (
                "bad steps: a checkpoint that was refused counts as resumed",
                "distlora/training/restoring.py",
                "lambda: note_resumed(self.run_dir, self.checkpoint.step)",
                "lambda: note_resumed(self.run_dir, 6)",
                "test_bad_steps_again.py::test_the_environment_names_the_checkpoint_that_was_really_resumed",
            ),
            (
                "setbacks: the norm of the gradient is not looked at",
                "distlora/training/setbacks.py",
                '        if problem is None and settings.on_bad_step != "stop":\n',
                "        if False:\n",
                "test_bad_steps.py::test_what_follows_is_what_a_run_trains_that_has_never_had_the_batch"
                "[lora_xs-skip-inf]",
            ),
            (
                "setbacks: gradients of a bad batch stay",
                "distlora/training/setbacks.py",
                "            self._engine.drop_step()\n",
                "            pass\n",
                "test_bad_steps.py::test_what_follows_is_what_a_run_trains_that_has_never_had_the_batch"
                "[lora_xs-skip-inf]",
            ),
            (
                "proofs: a bad batch condemns the weights",
                "distlora/training/proofs.py",
                "    for ahead in range(step, step + ATTEMPTS):\n",
                "    for ahead in range(step, step + 1):\n",
                "test_bad_steps.py::test_a_run_that_was_stopped_by_a_bad_batch_goes_on_without_it",
            ),
            (
                "proofs: a loss is taken for that of other weights",
                "distlora/training/proofs.py",
                "self._waiting[1] == self._seen:",
                "True:",
                "test_bad_steps.py::test_weights_that_the_last_step_ruins_are_not_exported",
            ),
            (
                "proofs: the score of a model is not looked at",
                "distlora/training/evaluate.py",
                "    check_scores(scores, evaluated.place, data)\n",
                "",
                "test_not_finite.py::test_the_loss_of_a_run_that_is_no_number_ends_its_evaluation",
            ),
            (
                "proofs: an answer is chosen by what is no number",
                "distlora/models/generation.py",
                "        usable = logits.gather(-1, tokens).isfinite()\n",
                "        usable = tokens >= 0\n",
                "test_not_finite.py::test_one_question_among_others_is_named[Generation]",
            ),
            (
                "proofs: an adapter that nothing has proven is exported",
                "distlora/training/export_run.py",
                "        if check and not is_proven:\n",
                "        if False:\n",
                "test_not_finite.py::test_they_are_not_exported[None-peft]",
            ),
            (
                "verify: checksums are not compared",
                "distlora/training/verified.py",
                "        problem = problem_with(path)\n        if problem:\n",
                "        problem = None\n        if problem:\n",
                "test_verify.py::test_one_changed_byte_is_found[state]",
            ),
            (
                "verify: a mark is not told",
                "distlora/training/verified.py",
                '        if soundness(path) == "bad":\n',
                "        if False:\n",
                "test_verify.py::test_what_is_missing_cut_or_marked_bad_is_found",
            ),
            (
                "verify: an adapter's numbers are not looked at",
                "distlora/training/verified.py",
                "        if not tensor.isfinite().all():\n            raise UserError(_NOT",
                "        if False:\n            raise UserError(_NOT",
                "test_verify.py::test_numbers_that_no_export_may_have_are_found[nan]",
            ),
            (
                "search: a row of data is not named",
                "distlora/training/rate_search.py",
                "            found += [] if math.isfinite(float(loss)) else [number]\n",
                "",
                "test_rate_search_rows.py::test_a_bad_row_is_named_wherever_the_search_meets_it[0]",
            ),
            (
                "search: trial steps are not taken back where all rates diverge",
                "distlora/training/rate_search.py",
                "        if math.isfinite(min(tried.values())):\n",
                "        if True:\n",
                "test_rate_search_rows.py::test_rates_that_all_diverge_are_named_and_the_rows_are_not_to_blame",
            ),
            (
                "progress: a slow file system is a halt",
                "distlora/cluster/progress.py",
                "course.patient or bool(outside), outside,",
                "course.patient, outside,",
                "test_progress_outside.py::test_a_breakpoint_is_no_halt",
            ),
            (
                "progress: who is brought tensors waits for its file system",
                "distlora/cluster/progress.py",
                "        if found and not (waits and what == FILES):\n",
                "        if found:\n",
                "test_progress_outside.py::test_who_writes_and_waits_for_the_tensors_of_others_waits_for_these",
            ),
            (
                "progress: a stopped process has stood still",
                "distlora/cluster/progress.py",
                "            self._since += gap  # the whole process was stopped\n",
                "            pass\n",
                "test_progress.py::test_a_process_that_was_stopped_as_a_whole_has_not_stood_still",
            ),
            (
                "progress: a child's work is not seen",
                "distlora/cluster/progress.py",
                ' + sum(map(_processor_seconds, _descendants("self")))',
                "",
                "test_progress.py::test_a_child_that_computes_is_seen",
            ),
        )
    ),
    # ------------------------------------------------------------------ secrets
    Mutation(
        "secrets: a login with a slash in its password shown",
        CONFIDENTIAL,
        r"(?:[^\s/:@\[]*:(?!\d{1,5}/)(?:(?!://)[^\s\0])*|[^\s\0/]*)@",
        r"[^\s\0/]*@",
        (f"{SECRETS}::test_no_text_shows_a_secret[https://user:pa/pl4nted@host:80/x]",),
    ),
    Mutation(
        "secrets: only texts hidden",
        CONFIDENTIAL,
        "    if value is None or isinstance(value, bool):\n        return value\n",
        "    if not isinstance(value, str | dict | list):\n        return value\n",
        (f"{SECRETS}::test_configs_lose_their_secrets_of_any_type_at_any_depth",),
    ),
    Mutation(
        "secrets: mappings within a word not searched",
        CONFIDENTIAL,
        """return f"{inner['name']} in {key}" if equals else inner["name"]""",
        "return None",
        (
            f"{SECRETS}::test_launch_scripts_refuse_a_secret_on_their_command_line"
            "[deepspeed={comet: {api_key: pl4nted}}]",
        ),
    ),
    Mutation(
        "secrets: tracebacks in logs shown as they are",
        "distlora/cluster/logs.py",
        "return hidden(super().format(record))",
        "return super().format(record)",
        (f"{SECRETS}::test_logs_show_no_secret_nor_do_the_tracebacks_in_them",),
    ),
    Mutation(
        "secrets: a value repeated that YAML refuses",
        "distlora/recipe/yaml_text.py",
        'if secret or any(is_secret_name(outer.key or "") for outer in open_values):',
        "if secret:",
        (f"{SECRETS}::test_a_mistake_in_a_secret_of_the_file_does_not_repeat_it",),
    ),
    # ------------------------------------------------------------------ exports
    Mutation(
        "exports: magnitudes under PEFT's old name",
        "distlora/exports/sources.py",
        'MAGNITUDE = ".lora_magnitude_vector.weight"',
        'MAGNITUDE = ".lora_magnitude_vector"',
        ("tests/unit/test_export_forms.py::test_transformers_loads_the_adapter_by_itself[dora]",),
    ),
    Mutation(
        "exports: a folder that is there taken for an owner on the hub",
        "distlora/models/base_names.py",
        'return odd or ("/" in path and directory.parent.is_dir())',
        "return odd",
        ("tests/unit/test_export_forms.py::test_relative_paths_begin_where_the_run_was_started",),
    ),
    Mutation(
        "exports: a public repository taken for a private one",
        "distlora/models/hub_upload.py",
        "    check_upload(name, private)\n",
        "    check_upload(name)\n",
        ("tests/unit/test_hub_upload.py::test_what_shall_be_private_does_not_become_public",),
    ),
    Mutation(
        "exports: vLLM's rank cut in place of filled",
        "distlora/exports/vllm.py",
        "next(allowed for allowed in RANKS if allowed >= rank)",
        "max(allowed for allowed in RANKS if allowed <= rank)",
        ("tests/unit/test_export_forms.py::test_the_next_rank_of_vllm_is_taken[96-128]",),
    ),
    Mutation(
        "exports: an ending that also means other layers",
        "distlora/exports/suffixes.py",
        "set(names) - set(wanted)",
        "set[str]()",
        ("tests/unit/test_peft_suffixes.py::test_the_fewest_entries_mean_the_wanted_names_alone",),
    ),
    Mutation(
        "exports: a rank of the recipe beside the adapter's",
        "distlora/exports/starting.py",
        "if key in given and asked is not None and asked != own:",
        "if False:",
        ("tests/unit/test_adapter_start.py::test_what_is_given_must_be_the_same",),
    ),
]


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    if not chosen:
        print(f"no mutation has {' or '.join(words)} in its name")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "tree")
        shutil.copytree(
            REPOSITORY,
            copy,
            ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"),
        )
        for mutation in chosen:
            count = (copy / mutation.file).read_text().count(mutation.old)
            if count != 1:
                print(f"{mutation.name}: its text is {count} times in {mutation.file}, and should be once")
                return 1
        verdict, why = _run(copy, sorted({test for mutation in chosen for test in mutation.tests}), LIMIT)
        print(f"without a mutation: {verdict} {why}", flush=True)
        if verdict != "passed":
            return 1
        outcomes = [_try(copy, mutation) for mutation in chosen]
    caught = outcomes.count("caught")
    print(f"{len(chosen)} mutations, {caught} caught")
    return 0 if caught == len(chosen) else 1


def _try(copy: Path, mutation: Mutation) -> str:
    """Prints one line of the table, and returns its verdict: "caught", "SURVIVED" or "UNDECIDED"."""
    file, began = copy / mutation.file, time.monotonic()
    text = file.read_text()
    patience = PATIENCE if mutation.hangs else LIMIT
    # A busy machine may need as long as a hang: then the unspoiled code is not in time either.
    in_time = not mutation.hangs or _run(copy, mutation.tests, patience)[0] == "passed"
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        verdicts = [_run(copy, [test], patience) for test in mutation.tests]
    finally:
        file.write_text(text)
    passed = [
        test for test, (verdict, _) in zip(mutation.tests, verdicts, strict=True) if verdict == "passed"
    ]
    waited = any(word in why for _, why in verdicts for word in WAITED)
    if passed:
        verdict, why = "SURVIVED", ", ".join(map(_short, passed))
    elif waited and not (mutation.hangs and in_time):
        verdict, why = "UNDECIDED", verdicts[0][1]
    else:
        verdict, why = "caught", verdicts[0][1]
    print(f"{mutation.name:53} {time.monotonic() - began:5.0f} s  {verdict:9} {why}", flush=True)
    return verdict


def _run(copy: Path, tests: Sequence[str], patience: float) -> tuple[str, str]:
    """("passed" or "failed", why) of these tests in the copy; any other end is a mistake in the list."""
    environment = os.environ | {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "DISTLORA_TEST_PATIENCE": str(patience),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "--tb=short", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode} over {tests}:\n{done.stdout}{done.stderr}")
    # The innermost sentence: of an assertion in the test, else of the traceback that the ranks left.
    sentence = r"^(?:E\s+)?((?:\w+\.)*\w*(?:Error|Exception)\b.*|the ranks were still running.*)"
    said = re.findall(sentence, done.stdout, re.MULTILINE)
    return ("failed", said[-1][:100] if said else "no result") if done.returncode else ("passed", "")


def _short(test: str) -> str:
    return test.partition("[")[2][:-1] or test.rpartition("::")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
