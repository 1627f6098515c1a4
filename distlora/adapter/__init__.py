"""Adapter layers: a method's factors beside a frozen weight, in the model.

attach    puts a method on a model, and packs its weights: `attach`, `pack_linears`, `Attached`
layer     `AdapterLinear`, which engines read and write
passes    what a layer computes in a pass: adapted, bare, tried or tapped; for `layer` alone
packed    weights in few bits: `Packing` and what makes it
linears   what counts as a linear layer, its shape, and which way its weight is stored
targets   the grammar of `targets`, and the layers that it chooses in a model
reach     layers that a forward pass does not call, found without weights
whole     modules that are trained whole beside the adapter
coverage  which share of the weights is adapted, in one line
experts   experts of a mixture that are 3-D parameters and no layers; `expert_layers` adapts them

Other folders use what is named here but `passes`.
"""
