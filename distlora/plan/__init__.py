"""What a recipe takes on a cluster, before anything is started: memory, traffic, sizes."""

from distlora.plan.columns import Plan, plan_of, side_by_side

__all__ = ["Plan", "plan_of", "side_by_side"]
