"""Scripts with which shells complete the command line: verbs, options, choices, names, and paths."""

import argparse
from collections.abc import Mapping

from distlora.recipe.shipped import shipped_recipes, shipped_sweeps

#: Verbs whose first word may be the name of something that comes with distlora.
_OF_RECIPES = ("train", "plan", "methods", "recipes", "copy", "fetch", "status")
_OF_SWEEPS = ("sweep", "recipes", "copy")


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """For bash, zsh or fish. parsers: of the verbs, by name."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](_words(parsers))


def _words(parsers: Mapping[str, argparse.ArgumentParser]) -> dict[str, tuple[list[str], list[str]]]:
    """Of each verb its options, and the words that may stand behind it, beside paths."""
    from distlora.methods import registry
    from distlora.tasks import TASKS

    found = {}
    for name, parser in parsers.items():
        options, words = [], list[str]()
        for action in parser._actions:
            if action.help == argparse.SUPPRESS:
                continue
            options += action.option_strings
            words += map(str, action.choices or ()) if not action.option_strings else ()
        words += [*shipped_recipes()] if name in _OF_RECIPES else []
        words += [*shipped_sweeps()] if name in _OF_SWEEPS else []
        words += [*TASKS] if name == "tasks" else []
        words += [f"method.name={method}" for method in registry()] if name == "train" else []
        found[name] = (sorted(set(options)), sorted(set(words)))
    return found


def _bash(verbs: dict[str, tuple[list[str], list[str]]]) -> str:
    cases = "\n".join(
        f'        {name}) words="{" ".join([*options, *words])}" ;;'
        for name, (options, words) in verbs.items()
    )
    return f"""_distlora() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{" ".join(verbs)}" -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current"
        [[ $current == -* ]] || compgen -f -- "$current")
}}
complete -o filenames -F _distlora distlora
"""


def _zsh(verbs: dict[str, tuple[list[str], list[str]]]) -> str:
    cases = "\n".join(
        f"        {name}) words_of=({' '.join([*options, *words])}) ;;"
        for name, (options, words) in verbs.items()
    )
    return f"""#compdef distlora
_distlora() {{
    local -a words_of
    if ((CURRENT == 2)); then
        compadd -- {" ".join(verbs)}
        return
    fi
    case ${{words[2]}} in
{cases}
    esac
    compadd -- $words_of
    [[ ${{words[CURRENT]}} == -* ]] || _files
}}
compdef _distlora distlora
"""


def _fish(verbs: dict[str, tuple[list[str], list[str]]]) -> str:
    lines = [f"complete -c distlora -n __fish_use_subcommand -f -a '{' '.join(verbs)}'"]
    for name, (options, words) in verbs.items():
        within = f"complete -c distlora -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{within} -l {option[2:]}" for option in options if option.startswith("--")]
        lines += [f"{within} -a '{' '.join(words)}'"] if words else []
    return "\n".join(lines) + "\n"
