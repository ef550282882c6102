"""`clipdistill completion bash|zsh`: a script that completes commands, options, settings, their choices, shipped names.

The script is static, so that a Tab costs nothing: write it again after an update.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from clipdistill.commands import COMMANDS, command_parser
from clipdistill.models.known import students
from clipdistill.recipes import recipe_names
from clipdistill.reference.settings import SettingRow, settings
from clipdistill.registry import TERMS

_SHELLS = ("bash", "zsh")
_ONCE = "clipdistill completion {shell} > ~/.clipdistill.{shell}"

_SCRIPT = """# completion of clipdistill:  {once}
# once and after each update, and  source ~/.clipdistill.{shell}  in ~/.{shell}rc
{head}_clipdistill() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} asked=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    local words= keys= start= value=
    case "$word" in  # bash takes key=value apart, zsh leaves it whole
    =) value=1 word= ;;
    *=*) value=1 asked=${{word%%=*}} start=${{word%%=*}}= word=${{word#*=}} ;;
    *) if [ "$asked" = "=" ]; then value=1 asked=${{COMP_WORDS[COMP_CWORD-2]}}; fi ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "$command $asked" in
{choices}
        *) case "$command$value" in
{options}
            esac ;;
        esac
    fi
    if [ -n "$word" ]; then words="$words $keys"; fi
    COMPREPLY=($(compgen -P "$start" -W "$words" -- "$word"))
{tail}"""

_HEAD = {
    "bash": "",
    "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n",
}
_TAIL = {
    "bash": """    case "${COMPREPLY[0]-}" in *=) compopt -o nospace 2> /dev/null || : ;; esac
}
complete -o default -F _clipdistill clipdistill
""",
    "zsh": """}
_clipdistill_zsh() {  # no blank behind the key of a setting, which bashcompinit's complete cannot say
    local -a COMP_WORDS=("${words[@]}") found
    local -i COMP_CWORD=$((CURRENT - 1))
    found=(${(f)"$(emulate -L sh; _clipdistill; printf '%s\\n' "${COMPREPLY[@]}")"})
    compadd -S '' -- ${(M)found:#*=}
    compadd -- ${found:#*=}
    (( $#found )) || _default
}
compdef _clipdistill_zsh clipdistill
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One word: the shell."""
    parser.add_argument("shell", choices=_SHELLS, help="the one you type in")
    lines = (
        f"{_ONCE.format(shell=shell)}      # then  source ~/.clipdistill.{shell}  in ~/.{shell}rc" for shell in _SHELLS
    )
    parser.epilog = "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    sys.stdout.write(completion_script(arguments.shell))
    return 0


def completion_script(shell: str) -> str:
    """The script for a shell; zsh runs bash's through its own bashcompinit."""
    rows = {name: [row for row in settings() if row.commands == which] for name, which in _SETTINGS.items()}
    options, choices = [], []
    for name in COMMANDS:
        words: list[str] = []
        for action in command_parser(name)[1]._actions:
            known = [str(choice) for choice in action.choices or ()] or _shipped(action.dest)
            words += action.option_strings or known
            if action.option_strings and action.nargs != 0:  # what is not known here may be a file
                choices.append(_case([f"{name} {option}" for option in action.option_strings], known))
        choices += [_case([f"{name} {row.key}"], _values(row)) for row in rows.get(name, ()) if _values(row)]
        keys = " ".join(f"{key}=" for row in rows.get(name, ()) for key in _keys(row))
        options.append(f"            {name}) words={shlex.quote(' '.join(words))} keys={shlex.quote(keys)} ;;")
    return _SCRIPT.format(
        shell=shell,
        once=_ONCE.format(shell=shell),
        head=_HEAD[shell],
        tail=_TAIL[shell],
        commands=shlex.quote(" ".join(COMMANDS)),
        choices="\n".join(choices),
        options="\n".join(options),
    )


_SETTINGS = {"demo": "train, ablate", "train": "train, ablate", "ablate": "train, ablate", "cache": "cache"}
"""Commands that take key=value, and the settings they take."""


def _case(asked: list[str], words: list[str]) -> str:
    return f"        {'|'.join(map(shlex.quote, asked))}) words={shlex.quote(' '.join(words))} ;;"


def _shipped(dest: str) -> list[str]:
    """Names that come with the package, for the arguments that take one."""
    return recipe_names() if dest == "recipe" else list(students()) if dest == "student" else []


def _keys(row: SettingRow) -> list[str]:
    if row.key == "objective.weights":
        return [f"{row.key}.{term}" for term in TERMS.names()]
    return [] if row.kind == "section" else [row.key]


def _values(row: SettingRow) -> list[str]:
    named = row.range.partition(";")[0].split(", ") if "choice" in row.kind else []
    return named + ["true", "false"] * ("true or false" in row.kind)
