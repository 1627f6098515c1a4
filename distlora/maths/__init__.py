"""Pure functions of tensors, numbers and seeds. Imports nothing else of the package but `errors`.

linalg                    decompositions, norms, small linear systems
low_rank                  `LowRank` pairs (left, right): compression, addition to a part of a weight
functional                the linear map of every layer
grouped                   the linear maps of a stack of experts
known_values              values of tensors on the meta device that follow from numbers alone
rounding                  how weights of low precision are rounded
checksum                  a sum of bits that may be taken in parts
moments                   Adam's moments of components that are younger than the run
blockwise                 numbers of 8 bits
blocks                    how much of a large tensor is worked on at a time
importance                which components matter
recomposition_schedule    when components are replaced
generators                random generators of a seed and a name

Every folder may use every module.
"""
