"""`python3 -m lab exercise NAME`: types what a page says, and compares what is shown then."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lab.errors import LabError
from lab.exercises.hosts import Hosts, prompt
from lab.exercises.page import INTERRUPT, LOOK, Step, read_page
from lab.patience import START_S, Deadline
from lab.processes.child import IMPORT_ROOT

PAGES = IMPORT_ROOT / "docs" / "exercises"
LOOK_S, LONGEST_LOOK_S = 0.1, 1.0
"""A terminal signals nothing when its contents change, so it is looked at in these intervals: soon
after something was typed, then less often, because in an emulated guest a look takes 0.1 s."""


def pages() -> list[Path]:
    """The pages, in order."""
    return sorted(PAGES.glob("[0-9][0-9]-*.md"))


def page_of(name: str) -> Path:
    """The page whose file name begins so. Raises LabError."""
    found = [page for page in pages() if page.name.startswith(name)]
    if len(found) != 1:
        names = ", ".join(page.stem for page in pages())
        raise LabError(f"there is no exercise {name}", f"there are {names}", "name one of them")
    return found[0]


class DiffersError(LabError):
    """A terminal does not show what the page says."""

    exit_status = 1

    def __init__(self, page: Path, step: Step, shown: str) -> None:
        what = f"{page.name}:{step.line}: `{step.typed}` shows something else"
        super().__init__(what, f"the terminal {step.terminal} shows:\n{shown}", "mend the page")


def play(page: Path, hosts: Hosts, follow: bool = False) -> None:
    """Type the steps of a page, one after another. Raises DiffersError, or LabError."""
    for step in read_page(page.read_text()):
        shown = _shown_by(step, hosts, page)
        if follow:
            sign = " " if step.typed in (INTERRUPT, LOOK) else "# "
            print(f"{step.terminal}{sign}{step.typed}\n{shown}", end="", flush=True)


def _shown_by(step: Step, hosts: Hosts, page: Path) -> str:
    """What a step shows, once that is what the page says and the command has ended or goes on."""
    one = hosts.terminal(step.terminal)
    if step.typed != LOOK:
        one.clear()
    if step.typed == INTERRUPT:
        one.press("C-c")
    elif step.typed != LOOK:
        one.type(step.typed)
    deadline = Deadline(START_S)
    look_s = LOOK_S
    while True:
        over = deadline.passed()
        shown = one.screen(whole=True).rstrip("\n") + "\n"
        output, at_prompt = _split(shown, step)
        if (at_prompt or step.goes_on) and step.is_shown_by(output):
            return output
        if over or (at_prompt and not step.goes_on):
            raise DiffersError(page, step, output)
        time.sleep(look_s)
        look_s = min(2 * look_s, LONGEST_LOOK_S)


def _split(shown: str, step: Step) -> tuple[str, bool]:
    """The output alone, without what was typed and the prompt after it; whether the prompt came."""
    waiting = prompt(step.terminal).rstrip()
    # The prompt stands beside the key if the command ended without a word.
    lines = shown.replace(f"{INTERRUPT}{waiting}", f"{INTERRUPT}\n{waiting}").splitlines()
    typed = step.typed if step.typed == INTERRUPT else f"{prompt(step.terminal)}{step.typed}"
    if lines and lines[0].rstrip() in (typed, step.typed):
        del lines[0]
    at_prompt = bool(lines) and lines[-1].rstrip() == waiting
    if at_prompt:
        del lines[-1]
    return "".join(f"{line.rstrip()}\n" for line in lines), at_prompt


def run(arguments: argparse.Namespace) -> int:
    """Play a page on this machine's kernel, and print what the terminals show."""
    page = page_of(arguments.page)
    with Hosts() as hosts:
        play(page, hosts, follow=True)
    return 0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to the lab's command line."""
    parser = subparsers.add_parser(
        "exercise", help="do what a page of docs/exercises says, and compare", description=__doc__
    )
    parser.add_argument("page", metavar="NAME", help="such as 05")
    parser.set_defaults(run=run)
