"""Draws the live view with curses and reads its keys, in a thread of its own.

So neither a slow terminal nor a key delays the tracing, and a key is answered while a large table
is read. Only this thread calls curses.

curses (ncurses) is part of Python's standard library, and knows every terminal.
"""

from __future__ import annotations

import contextlib
import curses
import locale
import os
import select
import sys
import threading
from collections.abc import Callable

from tcpstuck_bpf.threads import start_beside
from tcpstuck_bpf.view.frame import Frame, Frames
from tcpstuck_bpf.view.rows import Style
from tcpstuck_bpf.view.snapshot import Snapshot
from tcpstuck_bpf.view.state import Press, State

LOOK_S = 0.25
"""A new snapshot and a new size of the terminal are drawn at most this much later."""
CLOSE_S = 2.0
"""Longest wait for the thread at the end. A terminal that was stopped (Ctrl-S) takes no output."""
_ESCAPE_MS = 25
"""How long an Esc may be the beginning of a function key's bytes; ncurses waits for a second."""

_KEYS = {
    curses.KEY_UP: Press.UP,
    curses.KEY_DOWN: Press.DOWN,
    curses.KEY_PPAGE: Press.PAGE_UP,
    curses.KEY_NPAGE: Press.PAGE_DOWN,
    curses.KEY_HOME: Press.FIRST,
    curses.KEY_END: Press.LAST,
    curses.KEY_ENTER: Press.OPEN,
    curses.KEY_RIGHT: Press.OPEN,
    curses.KEY_LEFT: Press.BACK,
    curses.KEY_BACKSPACE: Press.BACK,
    **{ord(key): Press.OPEN for key in "\r\n "},
    **{ord(key): Press.BACK for key in "\x1b\x7f\b"},
    ord("k"): Press.UP,
    ord("j"): Press.DOWN,
    ord("g"): Press.FIRST,
    ord("G"): Press.LAST,
    ord("f"): Press.FOLD,
    ord("s"): Press.SORT,
    ord("?"): Press.HELP,
    ord("h"): Press.HELP,
    ord("q"): Press.QUIT,
}


class Screen:
    """The terminal, from `start` to `close`.

    `on_quit` is called once, in the thread: when the user quits, when the terminal is gone, or
    after an error, which is then in `failure`.
    """

    def __init__(self, frames: Frames, on_quit: Callable[[], None], *, colour: bool) -> None:
        self.failure: Exception | None = None
        self._frames = frames
        self._on_quit = on_quit
        self._colour = colour
        self._snapshot: Snapshot | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take the terminal over."""
        self._thread = start_beside("live-view", self._run)

    def show(self, snapshot: Snapshot) -> None:
        """Show this snapshot from now on. May be called from any thread."""
        self._snapshot = snapshot

    def close(self) -> None:
        """Give the terminal back. Raises TimeoutError if it does not take the last output."""
        self._closed.set()
        if self._thread is None:
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise TimeoutError("the terminal takes no output")

    def _run(self) -> None:
        try:
            self._draw_until_closed()
        except Exception as error:  # no error of the terminal may end the run without its summary
            self.failure = error
        finally:
            self._on_quit()

    def _draw_until_closed(self) -> None:
        # ncurses encodes text by the locale, which Python sets for LC_CTYPE only.
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, "")
        # Exported by some shells and by libreadline. ncurses would believe them for ever, and not
        # the terminal's new size.
        for name in ("LINES", "COLUMNS"):
            os.environ.pop(name, None)
        window = curses.initscr()
        try:
            self._prepare(window)
            self._loop(window)
        finally:
            curses.endwin()

    def _prepare(self, window: curses.window) -> None:
        curses.noecho()
        curses.cbreak()  # Ctrl-C and Ctrl-Z stay signals
        curses.set_escdelay(_ESCAPE_MS)
        window.keypad(True)
        window.nodelay(True)
        with contextlib.suppress(curses.error):  # a terminal that cannot hide its cursor
            curses.curs_set(0)
        if self._colour and curses.has_colors():
            curses.start_color()
            with contextlib.suppress(curses.error):
                curses.use_default_colors()
                curses.init_pair(1, curses.COLOR_RED, -1)
        else:
            self._colour = False

    def _loop(self, window: curses.window) -> None:
        state = State()
        drawn: tuple[object, ...] = ()
        while not self._closed.is_set():
            height, width = window.getmaxyx()
            snapshot = self._snapshot
            frame, state = self._frames.frame(snapshot, state, width, height)
            if drawn != (frame, height, width):
                drawn = (frame, height, width)
                self._draw(window, frame)
            for key in self._keys(window):
                wanted = _KEYS.get(key)
                if wanted is Press.QUIT:
                    return
                if key == curses.KEY_RESIZE:
                    curses.update_lines_cols()
                    drawn = ()
                if wanted is not None:
                    state = self._frames.press(snapshot, state, wanted, width, height)

    def _keys(self, window: curses.window) -> list[int]:
        """Wait up to LOOK_S for keys, and return those that came.

        Raises EOFError if the terminal is gone: then it is always ready, and never has a key.
        """
        # Not getch() with a time-out: at the end of its input that would return at once, for ever.
        ready = select.select([sys.stdin.fileno()], [], [], LOOK_S)[0]
        keys = []
        while (key := window.getch()) != curses.ERR:
            keys.append(key)
        if ready and not keys and not os.isatty(sys.stdin.fileno()):
            raise EOFError("the terminal is gone")
        return keys

    def _draw(self, window: curses.window, frame: Frame) -> None:
        window.erase()
        for number, row in enumerate(frame.rows):
            style = curses.A_NORMAL if row.style is Style.PLAIN else curses.A_BOLD
            if row.style is Style.RED and self._colour:
                style |= curses.color_pair(1)
            text = row.text
            if number == frame.cursor:
                style |= curses.A_REVERSE
                text = text.ljust(window.getmaxyx()[1])
            # insstr, since addstr fails after the last cell of the screen. An error means that the
            # terminal has become smaller; its new size is drawn next.
            with contextlib.suppress(curses.error):
                window.insstr(number, 0, _encodable(text), style)
        window.refresh()


def _encodable(text: str) -> str:
    r"""The text with \xNN or \uNNNN in place of characters that the locale lacks."""
    encoding = locale.getpreferredencoding(False)
    return text.encode(encoding, "backslashreplace").decode(encoding)
