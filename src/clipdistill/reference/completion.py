"""`clipdistill completion bash|zsh`: a script that completes commands, options, their choices and shipped names.

The script is static, so that a Tab costs nothing: write it again after an update.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from clipdistill.commands import COMMANDS, command_parser
from clipdistill.recipes import recipe_names

_SCRIPT = """# completion of clipdistill; in ~/.bashrc or ~/.zshrc:  source <(clipdistill completion {shell})
{head}_clipdistill() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "$command $before" in
{choices}
        *) case "$command" in
{options}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _clipdistill clipdistill
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One word: the shell."""
    parser.add_argument("shell", choices=("bash", "zsh"), help="load it with  source <(clipdistill completion bash)")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    sys.stdout.write(completion_script(arguments.shell))
    return 0


def completion_script(shell: str) -> str:
    """The script for a shell; zsh runs bash's through its own bashcompinit."""
    options, choices = [], []
    for name in COMMANDS:
        words: list[str] = []
        for action in command_parser(name)[1]._actions:
            known = [str(choice) for choice in action.choices or ()]
            if action.dest == "recipe":
                known = recipe_names()
            words += action.option_strings or known
            if known and action.option_strings:
                pattern = "|".join(shlex.quote(f"{name} {option}") for option in action.option_strings)
                choices.append(f"        {pattern}) words={shlex.quote(' '.join(known))} ;;")
        options.append(f"            {name}) words={shlex.quote(' '.join(words))} ;;")
    return _SCRIPT.format(
        shell=shell,
        head="autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh"),
        commands=shlex.quote(" ".join(COMMANDS)),
        choices="\n".join(choices),
        options="\n".join(options),
    )
