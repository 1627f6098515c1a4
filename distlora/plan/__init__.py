"""What a recipe needs on a cluster, computed from sizes alone before anything is started: memory and traffic.

shapes, setup                       the model's sizes, and one recipe on one number of ranks
activations, gathering, packed      what a pass over a micro-batch needs
stored, memory                      memory of one rank
traffic                             what the ranks send each other
columns, advice, table, picture     several clusters side by side, for the user

Other folders use the three names below. `table` and `picture` are for the command line. The benchmarks and
the distributed tests compare what they measure with `memory.memory_of` and the functions of `traffic`.
"""

from distlora.plan.columns import Plan, plan_of, side_by_side

__all__ = ["Plan", "plan_of", "side_by_side"]
