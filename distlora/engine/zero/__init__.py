"""The engine on DeepSpeed ZeRO, stages 0 to 3: the only place that knows how ZeRO lays tensors out.

`layout` says where ZeRO keeps the parts of a tensor, `tensors` reads and writes whole ones, `gradients` does
so with averaged gradients before a step, and `engine` runs and steps the model. Others use
`engine.ZeroEngine`, `config_reader` and `operators`.
"""
