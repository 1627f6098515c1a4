"""The recipe of a run: a YAML file and a DeepSpeed config, read strictly and checked before anything starts.

    load ─► sections (all keys) ─► combination, deepspeed_check (what does not go together)

Other folders use `load` (`load_recipe`, `load_run_recipe`, `dump_recipe`, `run_identity`, `LOOKING_ON`), the
`Recipe` of `sections`, the checks, `shipped` (recipes and other files that come with distlora), and
`deepspeed_config` (every "auto" filled). Folders below are handed plain values and never a `Recipe`.
"""
