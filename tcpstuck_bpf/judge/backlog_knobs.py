"""What sets the backlog that each server gives to listen(), by the name of its process.

Pure. The servers whose clients wait for a greeting come first (SMTP, IMAP, POP3, FTP, SSH, MySQL):
theirs are the clients that stay stuck. Each row names the place in the server's own source or
manual that says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Knob(NamedTuple):
    """What sets the backlog of one server."""

    names: tuple[str, ...]
    """Names of the processes that hold its socket: /proc/PID/comm, 15 characters at most."""
    setting: str
    """What to set; of a server without a setting, the program."""
    constant: int | None = None
    """What a program without a setting gives to listen()."""
    note: str = ""
    """What is to be known besides: a complete sentence."""
    clients_per_place: int = 1
    places_besides: int = 0
    """The setting is a number of clients: that many give one place, besides these."""

    def value(self, backlog: int) -> int:
        """What the setting needs so that listen() gets that backlog."""
        return self.clients_per_place * max(1, backlog - self.places_besides)


KNOBS = (
    # systemd.socket(5). It made the socket: what the service it hands it to would ask for is moot.
    Knob(("systemd",), "Backlog= of its systemd socket unit"),
    # master/master.c: listen_queue_backlog, 32; master(8). Before Postfix, whose name it shares:
    # its services hold the socket as well.
    Knob(
        ("cyrus-master", "cyrmaster", "imapd", "pop3d", "lmtpd", "nntpd", "timsieved"),
        "-l of Cyrus's master",
    ),
    # src/master/master_listen.c: the greater of the service's maxproc and default_process_limit.
    Knob(
        ("master", "postscreen"),
        "default_process_limit in Postfix's main.cf, or maxproc of the service in master.cf (the "
        "greater of the two is the backlog),",
        note="It bounds the number of processes as well. Where this master is that of Cyrus, the "
        "setting is its option -l.",
    ),
    # usr.sbin/smtpd/smtpd.h: SMTPD_BACKLOG. After Postfix: its smtpd comes with a master.
    Knob(("smtpd",), "OpenSMTPD", constant=5),
    # src/daemon.c: smtp_connect_backlog, 20; the manual's chapter 14.
    Knob(("exim", "exim4"), "smtp_connect_backlog of Exim"),
    # Operations guide, DaemonPortOptions: 10.
    Knob(("sendmail", "sendmail-mta"), "Listen= in Sendmail's DaemonPortOptions"),
    # src/master/service-listen.c: service_get_backlog; up to 2.3 it is 511 at most.
    Knob(
        (
            "dovecot",
            "imap-login",
            "pop3-login",
            "submission-logi",
            "managesieve-log",
            "lmtp",
        ),
        "client_limit x process_limit of Dovecot's service (their product is the backlog)",
        note="Older releases of Dovecot take 511 at most.",
    ),
    Knob(("mariadbd",), "back_log of MariaDB"),
    Knob(("mysqld",), "back_log of MySQL"),
    # lib/MySQL_Thread.cpp: PROXYSQL_LISTEN_LEN.
    Knob(("proxysql",), "ProxySQL", constant=1024),
    # server/core/listener.cc: INT_MAX, so that the kernel's setting is the only bound.
    Knob(("maxscale",), "MaxScale", constant=(1 << 31) - 1),
    # defs.h: VSFTP_LISTEN_BACKLOG.
    Knob(("vsftpd",), "vsftpd", constant=32),
    # doc/modules/mod_core.html.
    Knob(("proftpd",), "TCPBacklog of ProFTPD"),
    # src/ftpd.c: 3U + maxusers / 8U.
    Knob(
        ("pure-ftpd",),
        "MaxClientsNumber of Pure-FTPd (an eighth of it + 3 is the backlog)",
        clients_per_place=8,
        places_besides=3,
    ),
    # ssh.h: SSH_LISTEN_BACKLOG.
    Knob(("sshd",), "OpenSSH", constant=128),
    # src/sysoptions.h: DROPBEAR_LISTEN_BACKLOG is MAX_CHANNELS.
    Knob(("dropbear",), "Dropbear", constant=1000),
    # From here on it is the client that speaks first.
    Knob(("nginx",), "`backlog=` of nginx's listen directive"),
    Knob(("redis-server",), "tcp-backlog of Redis"),
    Knob(("valkey-server",), "tcp-backlog of Valkey"),
    Knob(("haproxy",), "`backlog` of HAProxy's frontend"),
    Knob(("apache2", "httpd"), "ListenBacklog of Apache"),
)
"""The first row with a name among the owners of a socket is the one that counts."""

_UNKNOWN = Knob((), "the backlog that the application gives to listen()")
_RESTART = "then restart the server: both take effect when it calls listen()."
_RESTART_FOR_IT = "then restart the server: it counts when the server calls listen()."


def steps(owners: Iterable[str], advised: int, limit: int, somaxconn: int | None) -> Iterable[str]:
    """What is to be done so that a listener gets the backlog `advised`: complete sentences.

    `owners` are `name (pid N)`; `limit` is what bounds its accept queue now, and `somaxconn` is
    net.core.somaxconn of its namespace, None where that could not be read.
    """
    names = {owner.rpartition(" (pid ")[0] or owner for owner in owners}
    knob = next((one for one in KNOBS if names.intersection(one.names)), _UNKNOWN)
    if knob.constant is not None:
        yield from _of_constant(knob.setting, knob.constant, advised, limit, somaxconn)
        return
    step = f"Set {knob.setting} to {knob.value(advised)} or more"
    if somaxconn is not None and advised > somaxconn:
        more = "" if knob.value(advised) == advised else f" to {advised} or more"
        step += f" and net.core.somaxconn (now {somaxconn}){more} as well"
    elif somaxconn is None:
        step += f" and see that net.core.somaxconn is no less than {advised}"
    yield " ".join(filter(None, (f"{step}, {_RESTART}", knob.note)))


def _of_constant(
    program: str, constant: int, advised: int, limit: int, somaxconn: int | None
) -> Iterable[str]:
    # The kernel keeps the lesser of the two: below net.core.somaxconn it is what listen() got,
    # whatever the source says that this program was built from.
    given = limit if somaxconn is not None and limit < somaxconn else constant
    within = min(advised, given)
    is_bounded = somaxconn is not None and somaxconn < within
    if advised > given:
        helps = "" if is_bounded or somaxconn is None else ": net.core.somaxconn does not help"
        yield (
            f"{program} gives {given} to listen(), a constant in the program. A backlog of "
            f"{advised} needs another build of it{helps}."
        )
    if is_bounded:
        yield f"Set net.core.somaxconn (now {somaxconn}) to {within} or more, {_RESTART_FOR_IT}"
    elif somaxconn is None:
        yield f"See that net.core.somaxconn is {within} or more, {_RESTART_FOR_IT}"
