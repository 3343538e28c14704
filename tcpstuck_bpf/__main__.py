"""`python -m tcpstuck_bpf` is `tcpstuck-trace`."""

import sys

from tcpstuck_bpf.cli import main

sys.exit(main())
