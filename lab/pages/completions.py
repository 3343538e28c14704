"""Completions for bash and zsh, generated from the parser's options and their metavars.

shtab 1.5 (Debian 12) is not used, for three reasons. It completes neither `--rescue=VALUE` nor a
list of verdicts. In zsh it treats an optional value as required. The rest would need functions
outside the parser. The metavars are sufficient: `known|all|dry-run` are words, `FILE` is a file,
`VERDICT[,VERDICT]` is a list.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lab.pages.manual import NAME, groups_of, help_of, value_of
from tcpstuck_bpf.judge.rules import VERDICT_NAMES

FUNCTION = "_tcpstuck_trace"
NETWORK_NAMESPACE = "netns"
_NAMED_NAMESPACES = "/run/netns"
_KINDS = {"FILE": "file", "PATH": "file", "SERVER CLIENT": "file", "DIR": "directory"}
"""The kind of completion for each metavar; other metavars in capitals are not completed."""


@dataclass(frozen=True)
class Value:
    """The values that an option accepts."""

    words: tuple[str, ...] = ()
    kind: str = ""
    """`file`, `directory` or NETWORK_NAMESPACE; empty: only `words`."""
    is_list: bool = False
    """Whether the value may be a comma-separated list of words."""
    optional: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is no completion."""
        return not (self.words or self.kind)


def value(action: argparse.Action) -> Value | None:
    """The values that an option accepts; None if it takes no value."""
    shown = value_of(action)
    if not shown:
        return None
    first, is_list = re.subn(r"\[,.*\]$", "", shown)
    parts = first.split("|")
    words = [part for part in parts if not part.isupper()]
    kinds = {_KINDS.get(part, "") for part in parts if part.isupper()}
    kind = kinds.pop() if kinds else ""
    if action.dest == NETWORK_NAMESPACE:
        kind = NETWORK_NAMESPACE
    if first == "VERDICT":
        words = list(VERDICT_NAMES)
    optional = action.nargs == argparse.OPTIONAL
    combined = () if is_list else tuple(_combinations(action, words))
    return Value((*words, *combined), kind, bool(is_list), optional)


def _combinations(action: argparse.Action, words: list[str]) -> Iterator[str]:
    """Pairs of words with a comma that the parser accepts, such as all,dry-run."""
    if not callable(action.type) or action.choices:
        return
    for pair in itertools.permutations(words, 2):
        with contextlib.suppress(argparse.ArgumentTypeError, ValueError):
            action.type(",".join(pair))
            if words.index(pair[0]) < words.index(pair[1]):
                yield ",".join(pair)


_BASH = """\
# bash completion for NAME, generated from its options.

FUNCTION_words() {
	mapfile -t COMPREPLY < <(compgen -W "$1" -- "$word")
}

FUNCTION_list() {
	local head=""
	[[ $word == *,* ]] && head=${word%,*},
	mapfile -t COMPREPLY < <(compgen -P "$head" -W "$1" -- "${word##*,}")
}

FUNCTION_files() {
	compopt -o filenames
	mapfile -t COMPREPLY < <(compgen "$1" -- "$word")
}

FUNCTION_netns() {
	local path
	[[ $word == */* ]] && FUNCTION_files -f && return
	for path in all NAMESPACES/*; do
		path=${path##*/}
		[[ $path != '*' && $path == "$word"* ]] && COMPREPLY+=("$path")
	done
}

FUNCTION() {
	local word=${COMP_WORDS[COMP_CWORD]} option=${COMP_WORDS[COMP_CWORD - 1]} joined=""
	COMPREPLY=()
	# Readline splits --option=value at the =, and makes the = a separate word.
	if [[ $word == = ]]; then
		word="" joined=yes
	elif [[ $option == = ]]; then
		option=${COMP_WORDS[COMP_CWORD - 2]} joined=yes
	elif [[ $word == --*=* ]]; then
		option=${word%%=*} word=${word#*=} joined=yes
	fi
	if [[ $word != -* || $joined ]]; then
		case $option in
CASES
		esac
		[[ $joined ]] && return
	fi
	mapfile -t COMPREPLY < <(compgen -W "OPTIONS" -- "$word")
}

complete -F FUNCTION NAME
"""


_ZSH = """\
#compdef NAME
# zsh completion for NAME, generated from its options.

FUNCTION_netns() {
	local -a names=(all NAMESPACES/*(N:t))
	_alternative 'names:network namespace:compadd -a names' 'files:file:_files'
}

_arguments -s \\
SPECS
"""


def _bash_case(found: Value) -> str:
    if found.empty:
        return "return"
    if found.kind == NETWORK_NAMESPACE:
        return f"{FUNCTION}_netns; return"
    if found.kind:
        return f"{FUNCTION}_files {'-d' if found.kind == 'directory' else '-f'}; return"
    how = "list" if found.is_list else "words"
    return f"{FUNCTION}_{how} '{' '.join(found.words)}'; return"


def _named(text: str) -> str:
    text = text.replace("NAMESPACES", _NAMED_NAMESPACES)
    return text.replace("FUNCTION", FUNCTION).replace("NAME", NAME)


def bash(parser: argparse.ArgumentParser) -> str:
    """The text of the bash completion file."""
    options: list[str] = []
    cases = []
    for _, actions in groups_of(parser):
        for action in actions:
            options += action.option_strings
            found = value(action)
            if found is not None:
                cases.append(f"\t\t{'|'.join(action.option_strings)}) {_bash_case(found)} ;;")
    return _named(_BASH).replace("CASES", "\n".join(cases)).replace("OPTIONS", " ".join(options))


def _zsh_value(action: argparse.Action) -> str:
    found = value(action)
    if found is None:
        return ""
    if found.kind == NETWORK_NAMESPACE:
        how = f"{FUNCTION}_netns"
    elif found.kind:
        how = "_files -/" if found.kind == "directory" else "_files"
    elif found.is_list and found.words:
        how = f" _values -s , {action.dest} {' '.join(found.words)}"
    else:
        how = f"({' '.join(found.words)})" if found.words else " "
    shown = value_of(action).replace(":", "\\:")
    return f"{'::' if found.optional else ':'}{shown}:{how}"


def _zsh_spec(action: argparse.Action, excluded: list[str]) -> str:
    """The _arguments spec of one option: excluded options, names, help and value."""
    takes_value = value(action) is not None
    names = [
        option if not takes_value else f"{option}{'=' if option.startswith('--') else '+'}"
        for option in action.option_strings
    ]
    repeated = isinstance(action, argparse._AppendAction)
    before = "*" if repeated else f"({' '.join(excluded)})"
    told = re.sub(r"([]\\[:])", r"\\\1", help_of(action))
    rest = f"[{told}]{_zsh_value(action)}".replace("'", "'\\''")
    listed = names[0] if len(names) == 1 else f"'{{{','.join(names)}}}'"
    return f"\t'{before}{listed}{rest}'"


def zsh(parser: argparse.ArgumentParser) -> str:
    """The text of the zsh completion file."""
    specs = []
    for _, actions in groups_of(parser):
        for action in actions:
            excluded = list(action.option_strings)
            for group in parser._mutually_exclusive_groups:
                if action in group._group_actions:
                    excluded = [o for one in group._group_actions for o in one.option_strings]
            if action.dest in ("help", "version"):
                excluded = ["-", "*"]
            specs.append(_zsh_spec(action, excluded))
    return _named(_ZSH).replace("SPECS", " \\\n".join(specs))
