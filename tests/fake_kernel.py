"""A file that looks like a kernel to a reader: C with look-alike structs, compiled, and run.

What the compiler itself says of its structs (offsetof, sizeof, the bytes a bit-field changes) is
the oracle for what the readers find in BTF and DWARF.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf.kernel.layout import COOKIE_MEMBER, COUNTER_MEMBER, COUNTERS, REQUIRED_MEMBERS

RELEASE = "9.8.7-look-alike"
VERSION = "#1 SMP look-alike"
MEMBERS = [
    (member.kernel_struct, member.path)
    for member in (*REQUIRED_MEMBERS, COOKIE_MEMBER, COUNTER_MEMBER)
] + [("look_alike", path) for path in ("first", "deep", "deeper", "after", "table", "call", "last")]
BIT_FIELDS = ("one", "three", "seven")
PROTOTYPES = {
    "tcp_conn_request": (
        "int tcp_conn_request(struct request_sock_ops *rsk_ops, "
        "const struct tcp_request_sock_ops *af_ops, struct sock *sk, struct sk_buff *skb)"
    ),
    "cookie_v4_init_sequence": "u32 cookie_v4_init_sequence(const struct sk_buff *skb, u16 *mss)",
    "cookie_v4_check": "struct sock *cookie_v4_check(struct sock *sk, struct sk_buff *skb)",
    "cookie_v6_init_sequence": "u32 cookie_v6_init_sequence(const struct sk_buff *skb, u16 *mss)",
    "cookie_v6_check": "struct sock *cookie_v6_check(struct sock *sk, struct sk_buff *skb)",
    "tcp_check_req": (
        "struct sock *tcp_check_req(struct sock *sk, struct sk_buff *skb, "
        "void (*done)(struct sock *, int), bool *stolen)"
    ),
    "tcp_rcv_state_process": (
        "enum skb_drop_reason tcp_rcv_state_process(struct sock *sk, struct sk_buff *skb)"
    ),
    "tcp_child_process": (
        "enum skb_drop_reason tcp_child_process(struct sock *parent, struct sock *child, "
        "struct sk_buff *skb)"
    ),
}
ENUMERATORS = {f"LINUX_MIB_{name}": 2 + index for index, name in enumerate(COUNTERS)}
DROP_REASONS = {"SKB_DROP_REASON_NOT_SPECIFIED": 2, "SKB_DROP_REASON_NO_SOCKET": 3}

_SOURCE = f"""
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

const char banner[] = "Linux version {RELEASE} (look@alike) (cc) {VERSION}\\n";

enum {{ {", ".join(f"{name} = {value}" for name, value in ENUMERATORS.items())} }};
enum skb_drop_reason {{ SKB_NOT_DROPPED_YET, SKB_CONSUMED,
	{", ".join(f"{name} = {value}" for name, value in DROP_REASONS.items())} }};

struct net;
struct request_sock_ops;
struct tcp_request_sock_ops;
struct linux_mib;
typedef struct {{ struct net *net; }} possible_net_t;
typedef struct {{ int counter; }} atomic_t;
struct ns_common {{ void *stashed; u32 inum; }};
struct netns_mib {{ void *ip; struct linux_mib *net_statistics; }};
struct net {{
	long passive;
	struct ns_common ns;
	unsigned long long net_cookie;
	struct {{ char pad[3]; struct netns_mib mib; }};
}};
struct sock_common {{
	union {{ u32 pair; struct {{ u16 port, num; }}; }};
	volatile u8 skc_state;
	u8 skc_reuse : 4, skc_ipv6only : 1;
	possible_net_t skc_net;
}};
struct sock {{
	struct sock_common __sk_common;
	union {{ struct {{ int sk_backlog; u32 sk_ack_backlog; }}; long both; }};
	u32 sk_max_ack_backlog;
}};
struct request_sock_queue {{ u8 lock; atomic_t qlen; }};
struct inet_connection_sock {{ struct sock inet; struct request_sock_queue icsk_accept_queue; }};
struct sk_buff {{
	union {{ struct {{ struct sk_buff *next, *prev; }}; char node[24]; }};
	unsigned int len;
	u8 pkt_type : 3, ip_summed : 2;
	union {{
		struct {{ u16 protocol, transport_header, network_header; }};
		struct {{ u16 p[3]; }} headers;
	}};
	u8 *head;
}};
struct look_alike {{
	char first;
	union {{
		u16 word;
		struct {{ char gap; const union {{ long deep; struct {{ u8 low, deeper; }}; }}; }};
	}};
	u32 one : 1;
	u32 three : 3;
	u32 : 9;
	u32 seven : 7;
	u16 after;
	u16 table[3][5];
	int (*const call)(struct sock *, void (*)(int));
	u8 last;
}};

{{prototypes}}

struct keep {{
	struct net net;
	struct inet_connection_sock sock;
	struct sk_buff skb;
	struct look_alike look_alike;
}} keep;
enum skb_drop_reason kept = SKB_DROP_REASON_NO_SOCKET;
int counter = LINUX_MIB_{COUNTERS[0]};

static void bits(const char *name, struct look_alike *value)
{{
	const u8 *bytes = (const u8 *)value;
	int first = -1, count = 0;
	for (int n = 0; n < 8 * (int)sizeof(*value); n++)
		if (bytes[n / 8] >> n % 8 & 1) {{ count++; if (first < 0) first = n; }}
	printf("bits %s %d %d\\n", name, first, count);
}}

int main(void)
{{
	struct look_alike value;
{{prints}}
	return 0;
}}
"""


def _source() -> str:
    prints = [
        f'\tprintf("{struct} {path} %zu %zu\\n", offsetof(struct {struct}, {path}), '
        f"sizeof(((struct {struct} *)0)->{path}));"
        for struct, path in MEMBERS
    ]
    prints += [
        f'\tmemset(&value, 0, sizeof(value)); value.{name} = -1; bits("{name}", &value);'
        for name in BIT_FIELDS
    ]
    functions = [f"{prototype} {{ return 0; }}" for prototype in PROTOTYPES.values()]
    text = _SOURCE.replace("{prototypes}", "\n".join(functions))
    return text.replace("{prints}", "\n".join(prints))


def compiler() -> str:
    """The C compiler; skips where there is none."""
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler")
    return found


def build(directory: Path, *flags: str) -> Path:
    """Compile it; skips where the compiler does not know a flag."""
    source = directory / "net" / "ipv4" / "tcp_input.c"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(_source())
    target = directory / f"vmlinux{''.join(flags)}"
    ended = subprocess.run(
        [
            *(compiler(), "-std=gnu11", "-Wno-overflow", *flags),
            *("-o", str(target), "net/ipv4/tcp_input.c"),
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if ended.returncode and "unrecognized" in ended.stderr:
        pytest.skip(f"this compiler does not know {' '.join(flags)}")
    assert ended.returncode == 0, ended.stderr
    return target


def what_the_compiler_says(program: Path) -> Iterator[list[str]]:
    """Lines of words: struct, path, offset, size; or `bits`, name, first bit, width."""
    ended = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=True)
    for line in ended.stdout.splitlines():
        yield line.split()
