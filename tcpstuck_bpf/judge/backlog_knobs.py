"""The setting for the backlog that each server passes to listen(), by the name of its process.

Pure. The servers whose clients wait for a greeting come first (SMTP, IMAP, POP3, FTP, MySQL),
because their clients stay stuck. Each row refers to the server's own source or manual.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Knob(NamedTuple):
    """The setting for the backlog of one server."""

    names: tuple[str, ...]
    """Names of the processes that hold the socket: /proc/PID/comm, at most 15 characters."""
    setting: str
    """Name of the setting; name of the program if it has no setting."""
    constant: int | None = None
    """Backlog that a program without a setting passes to listen()."""
    note: str = ""
    """Additional advice, a complete sentence."""
    clients_per_place: int = 1
    places_besides: int = 0
    """backlog = setting / clients_per_place + places_besides, if the setting counts clients."""

    def value(self, backlog: int) -> int:
        """Value of the setting for which listen() gets this backlog."""
        return self.clients_per_place * max(1, backlog - self.places_besides)


KNOBS = (
    # systemd.socket(5). systemd made the socket, so the service's own setting has no effect.
    Knob(("systemd",), "Backlog= of its systemd socket unit"),
    # master/master.c: listen_queue_backlog, 32; master(8). This row comes before Postfix, whose
    # process has the same name; Cyrus's services hold the socket too.
    Knob(
        ("cyrus-master", "cyrmaster", "imapd", "pop3d", "lmtpd", "nntpd", "timsieved"),
        "-l of Cyrus's master",
    ),
    # src/master/master_listen.c: the greater of the service's maxproc and default_process_limit.
    Knob(
        ("master", "postscreen"),
        "default_process_limit in Postfix's main.cf, or maxproc of the service in master.cf (the "
        "greater of the two is the backlog),",
        note="This setting also limits the number of processes. If this master belongs to Cyrus, "
        "use its option -l instead.",
    ),
    # usr.sbin/smtpd/smtpd.h: SMTPD_BACKLOG. This row comes after Postfix, whose smtpd has a master.
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
        note="Older releases of Dovecot allow at most 511.",
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
    # In the remaining protocols the client speaks first.
    Knob(("nginx",), "`backlog=` of nginx's listen directive"),
    Knob(("redis-server",), "tcp-backlog of Redis"),
    Knob(("valkey-server",), "tcp-backlog of Valkey"),
    Knob(("haproxy",), "`backlog` of HAProxy's frontend"),
    Knob(("apache2", "httpd"), "ListenBacklog of Apache"),
)
"""The first row with a name among a socket's owners applies."""

_UNKNOWN = Knob((), "the backlog that the application passes to listen()")
_RESTART = "then restart the server: both take effect when it calls listen()."
_RESTART_FOR_IT = "then restart the server: it takes effect when the server calls listen()."


def steps(owners: Iterable[str], advised: int, limit: int, somaxconn: int | None) -> Iterable[str]:
    """How to give a listener the backlog `advised`, in complete sentences.

    `owners` are `name (pid N)`, `limit` is the current limit of its accept queue, and `somaxconn`
    is net.core.somaxconn of its namespace, None if it could not be read.
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
        step += f" and make sure that net.core.somaxconn is {advised} or more"
    yield " ".join(filter(None, (f"{step}, {_RESTART}", knob.note)))


def _of_constant(
    program: str, constant: int, advised: int, limit: int, somaxconn: int | None
) -> Iterable[str]:
    # The kernel keeps the smaller of the backlog and net.core.somaxconn. A limit below
    # net.core.somaxconn is what listen() got, whatever the program's source says.
    given = limit if somaxconn is not None and limit < somaxconn else constant
    within = min(advised, given)
    is_bounded = somaxconn is not None and somaxconn < within
    if advised > given:
        helps = "" if is_bounded or somaxconn is None else ": net.core.somaxconn does not help"
        yield (
            f"{program} passes {given} to listen(), a constant in the program. A backlog of "
            f"{advised} takes another build of it{helps}."
        )
    if is_bounded:
        yield f"Set net.core.somaxconn (now {somaxconn}) to {within} or more, {_RESTART_FOR_IT}"
    elif somaxconn is None:
        yield f"Make sure that net.core.somaxconn is {within} or more, {_RESTART_FOR_IT}"
