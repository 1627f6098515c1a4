"""The public calls: an adapter on any model with linear layers, in any training loop, ours included.

    adapted = distlora.attach(model, "lora_sb", rank=96)
    engine, *_ = deepspeed.initialize(model=model, ...)          # or a torch optimizer, for plain PyTorch
    distlora.initialise(adapted, engine, probe=batches, loss=loss_of)
    for batch in ...:
        engine.backward(loss)
        adapted.before_step(); engine.step(); adapted.after_step(loss)
    distlora.save(adapted, "checkpoints"); distlora.export(adapted, "adapter")

All calls but `attach` are collective: every rank makes them, in the same order, with equal arguments. What
is wrong is a `distlora.UserError` in one sentence.
"""

from distlora.api.adapted import Adapted
from distlora.api.attach import attach
from distlora.api.keep import export, save
from distlora.api.start import initialise, load
from distlora.initialisation.probe import Probe

__all__ = ["Adapted", "Probe", "attach", "export", "initialise", "load", "save"]
