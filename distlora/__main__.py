"""`python -m distlora`, and through it `torchrun -m distlora` and `deepspeed --module distlora`."""

import sys

from distlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
