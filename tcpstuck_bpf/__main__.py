"""`python -m tcpstuck_bpf` is `tcpstuck-trace`: the entry point of both."""

import signal
import sys


def main() -> int:
    """Run the command; Ctrl-C before its modules are read ends it as it ends any program."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tcpstuck_bpf.cli import main as run

    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
