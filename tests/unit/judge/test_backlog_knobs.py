"""What bounds the backlog of each server by name: the setting, or the constant in the program."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.judge.backlog_knobs import KNOBS, steps

INT_MAX = (1 << 31) - 1


def told(
    *owners: str, advised: int = 199, limit: int = 50, somaxconn: int | None = 4096
) -> tuple[str, ...]:
    names = [f"{owner} (pid {number})" for number, owner in enumerate(owners, 7)]
    return tuple(steps(names, advised, limit, somaxconn))


@pytest.mark.parametrize(
    ("owners", "knob"),
    [
        (("mysqld",), "back_log of MySQL"),
        (("mariadbd",), "back_log of MariaDB"),
        (("exim",), "smtp_connect_backlog of Exim"),
        (("exim4",), "smtp_connect_backlog of Exim"),
        (("sendmail",), "Listen= in Sendmail's DaemonPortOptions"),
        (("sendmail-mta",), "Listen= in Sendmail's DaemonPortOptions"),
        (("master",), "default_process_limit in Postfix's main.cf"),
        (("master", "smtpd"), "default_process_limit in Postfix's main.cf"),
        (("smtpd", "master"), "default_process_limit in Postfix's main.cf"),
        (("postscreen",), "default_process_limit in Postfix's main.cf"),
        (("dovecot",), "client_limit x process_limit"),
        (("imap-login",), "client_limit x process_limit"),
        (("submission-logi",), "client_limit x process_limit"),
        (("cyrmaster",), "-l of Cyrus's master"),
        (("master", "imapd"), "-l of Cyrus's master"),
        (("imapd", "master"), "-l of Cyrus's master"),
        (("proftpd",), "TCPBacklog of ProFTPD"),
        (("redis-server",), "tcp-backlog of Redis"),
        (("nginx",), "listen directive"),
        (("unheard-of",), "the backlog that the application passes to listen()"),
        ((), "the backlog that the application passes to listen()"),
    ],
)
def test_the_setting_of_a_server(owners: tuple[str, ...], knob: str) -> None:
    (step,) = told(*owners)
    assert knob in step
    assert "199 or more" in step
    assert "restart" in step


def test_master_alone_may_be_cyrus_as_well() -> None:
    (step,) = told("master")
    assert "Cyrus" in step


def test_the_smaller_of_two_numbers_of_postfix_is_not_what_counts() -> None:
    (step,) = told("master")
    assert "maxproc" in step
    assert "master.cf" in step


def test_pure_ftpd_takes_an_eighth_of_its_clients() -> None:
    (step,) = told("pure-ftpd")
    assert "MaxClientsNumber" in step
    assert "1568 or more" in step
    assert 3 + 1568 // 8 == 199


def test_a_backlog_that_pure_ftpd_reaches_with_any_number_of_clients() -> None:
    (step,) = told("pure-ftpd", advised=2, limit=1)
    assert "8 or more" in step


@pytest.mark.parametrize(
    ("owner", "program", "constant"),
    [
        ("smtpd", "OpenSMTPD", 5),
        ("vsftpd", "vsftpd", 32),
        ("sshd", "OpenSSH", 128),
    ],
)
def test_a_constant_in_the_program(owner: str, program: str, constant: int) -> None:
    (step,) = told(owner, limit=constant)
    assert program in step
    assert f"passes {constant} to listen()" in step
    assert "another build" in step
    assert "net.core.somaxconn does not help" in step
    assert "199 or more" not in step


def test_what_was_seen_goes_before_the_constant_of_its_source() -> None:
    (step,) = told("sshd", limit=64)
    assert "passes 64 to listen()" in step


def test_a_large_constant_leaves_somaxconn_as_the_knob() -> None:
    for owner in ("proxysql", "maxscale"):
        (step,) = told(owner, limit=128, somaxconn=128)
        assert step.startswith("Set net.core.somaxconn (now 128) to 199 or more")
        assert "restart" in step


def test_somaxconn_helps_as_far_as_the_constant_goes() -> None:
    constant, setting = told("proxysql", advised=2000, limit=128, somaxconn=128)
    assert "passes 1024 to listen()" in constant
    assert "does not help" not in constant
    assert setting.startswith("Set net.core.somaxconn (now 128) to 1024 or more")


def test_somaxconn_that_could_not_be_read() -> None:
    (step,) = told("maxscale", somaxconn=None)
    assert step.startswith("Make sure that net.core.somaxconn is 199 or more")
    (step,) = told("mysqld", somaxconn=None)
    assert "net.core.somaxconn" in step


def test_a_socket_that_systemd_made_has_systemds_backlog() -> None:
    """A service that gets its socket from systemd does not call listen() itself."""
    for owners in (("systemd", "sshd"), ("sshd", "systemd"), ("systemd", "dovecot")):
        (step,) = told(*owners)
        assert "Backlog= of its systemd socket unit" in step


def test_a_name_stands_for_one_server_only() -> None:
    """And is one that the kernel keeps whole: TASK_COMM_LEN is 16, with the NUL."""
    names = [name for knob in KNOBS for name in knob.names]
    assert len(names) == len(set(names))
    assert all(len(name) <= 15 for name in names)
