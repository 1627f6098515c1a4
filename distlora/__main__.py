"""The entry point of `python -m distlora`, `torchrun -m distlora` and `deepspeed --module distlora`."""

import sys

from distlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
