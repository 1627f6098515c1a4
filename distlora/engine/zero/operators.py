"""`python -m distlora.engine.zero.operators NAME…`: builds operators of DeepSpeed, and loads them, where a
run will look for them.
"""

import sys

from deepspeed.accelerator import get_accelerator


def main(names: list[str]) -> int:
    """names: of DeepSpeed's builders, such as CPUAdamBuilder. What this machine's accelerator does not have
    is passed over.
    """
    accelerator = get_accelerator()
    for name in names:
        builder = accelerator.create_op_builder(name)
        if builder is not None:
            builder.load()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
