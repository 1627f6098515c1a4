"""The worker of `distlora.tasks.reading.equivalence`: a program that compares mathematical expressions.

It writes READY, reads lines of JSON, `[text, expected]` in LaTeX, and answers each with a line: `1` if they
are equal, else `0`.

It is a process of its own because some expressions keep sympy busy for hours, or fill the memory, within one
operation that no Python code can interrupt. Then the system ends the process.
"""

import json
import resource
import signal
import sys

#: Seconds for one comparison, of processor time and by the clock. The clock leaves so much room that what is
#: found right does not depend on what else the machine does.
SECONDS, CLOCK_SECONDS = 3.0, 30.0
#: Bytes of memory for the whole program.
MEMORY = 2 * 2**30
READY = "ready"


def main() -> None:
    """Answers until the input ends."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    latex = [LatexExtractionConfig()]
    _say(READY)
    for line in sys.stdin:
        texts = json.loads(line)
        _limit(SECONDS, CLOCK_SECONDS)
        try:
            found, expected = (
                parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None) for text in texts
            )
            right = bool(found and expected) and verify(
                expected, found, allow_set_relation_comp=True, timeout_seconds=None
            )
        except (Exception, RecursionError, MemoryError):
            right = False
        _limit(0, 0)
        _say("1" if right else "0")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _limit(processor: float, clock: float) -> None:
    """After so many seconds the system ends the process: SIGPROF and SIGALRM have no handlers here."""
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, clock)


if __name__ == "__main__":
    main()
