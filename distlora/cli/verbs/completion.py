"""`distlora completion`."""

import argparse


def add(verbs) -> None:
    parser = verbs.add_parser(
        "completion",
        help="print a script with which a shell completes words",
        description='bash: eval "$(distlora completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; '
        "fish: distlora completion fish > ~/.config/fish/completions/distlora.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.set_defaults(parsers=verbs.choices)  # filled with all verbs by the time it runs


def run(options: argparse.Namespace) -> None:
    """Prints the script."""
    from distlora.cli.completion import script

    print(script(options.shell, options.parsers), end="")
