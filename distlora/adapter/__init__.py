"""Adapter layers: a method's factors beside a frozen weight, in the model.

attach    puts a method on a model, and packs its weights: `attach`, `pack_linears`, `Attached`
layer     `AdapterLinear`, which engines read and write
passes    what a layer computes in a pass: adapted, bare, tried or tapped; for `layer` alone
packed    weights in few bits: `Packing` and what makes it

Other folders use what is named here but `passes`.
"""
