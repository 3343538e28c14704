"""The entry point of `tcpstuck-trace` and of `python -m tcpstuck_bpf`."""

import signal
import sys


def main() -> int:
    """Run the command. Ctrl-C while modules are imported ends it like any other program."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tcpstuck_bpf.cli import main as run

    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
