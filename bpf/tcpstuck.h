/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The interface between the kernel side and the Python side. This header is compiled twice: by BCC
 * as part of the program text, and by a host compiler in the tests, which compare every offset with
 * tcpstuck_bpf/wire.py. The including file must define __u8 ... __u64 before.
 *
 * Times are CLOCK_MONOTONIC nanoseconds. Sequence numbers are in host order. Ports are in
 * network order and addresses as on the wire, because a key is only compared and printed.
 */
#ifndef TCPSTUCK_H
#define TCPSTUCK_H

/*
 * One handshake at one server. IPv4 addresses are stored IPv4-mapped (::ffff:a.b.c.d). No IPv6
 * packet may have such a source (6af1799aaf3f, "ipv6: drop incoming packets having a v4mapped
 * source address"), so the family needs no field of its own.
 */
struct handshake_key {
	__u8 client_address[16];
	__u8 server_address[16];
	__u16 client_port;
	__u16 server_port;
	__u32 netns; /* inode number, as in `ls -L /proc/PID/ns/net` */
};

/* How the handshake of an awaiting-ACK entry ended, if the entry is kept after that. */
enum handshake_ending {
	ENDING_NONE = 0,
	ENDING_COMPLETED = 1, /* cookie_vX_check made the child socket */
	ENDING_REJECTED = 2, /* cookie_vX_check returned an ACK to the listener: RST goes out */
	ENDING_RESET = 3, /* the client's address answered with an RST */
	ENDING_TAKEN_OVER = 4, /* a repeated SYN got into the SYN queue, no cookie was answered */
	ENDING_REPLACED = 5, /* the client uses its 4-tuple for a new handshake, without a cookie */
	ENDING_NO_LISTENER = 6, /* a segment found no socket: RST goes out */
};

/* Kernel counters (LINUX_MIB_*) that moved on this CPU while the kernel handled one segment. */
enum counter_moved {
	MOVED_SYNCOOKIES_RECV = 1 << 0,
	MOVED_SYNCOOKIES_FAILED = 1 << 1,
	MOVED_LISTEN_OVERFLOWS = 1 << 2,
	MOVED_LISTEN_DROPS = 1 << 3,
	MOVED_UNKNOWN = 1 << 7, /* the counters could not be read on this kernel */
};

/* The awaiting-ACK table's value: the facts of a handshake that still awaits an ACK. */
struct handshake {
	__u64 first_syn_ns; /* time of the first ACK if no SYN was seen */
	__u64 last_syn_ns;
	__u64 first_ack_dropped_ns; /* 0: no ACK was dropped */
	__u64 last_ack_dropped_ns;
	__u64 first_ack_filtered_ns; /* 0: no ACK was filtered */
	__u64 last_ack_filtered_ns;
	__u64 filter_place; /* kernel address of the last filtered ACK's drop site */
	__u64 drop_place; /* drop site of the last ACK that cookie_vX_check dropped; 0: not seen */
	__u64 ended_ns;
	__u32 client_isn;
	__u32 cookie_isn; /* ISN of the last SYN-ACK; the ACK for it acknowledges this + 1 */
	__u32 syn_count; /* SYNs with this ISN, answered or not; 0: an ACK made the entry */
	__u32 syns_dropped; /* those dropped by tcp_conn_request (full accept queue, ...) */
	__u32 acks_dropped; /* ACKs for which cookie_vX_check returned NULL */
	__u32 acks_filtered; /* ACKs dropped before cookie_vX_check */
	__u32 filter_reason; /* last filtered ACK's enum skb_drop_reason; 0: the kernel has none */
	__u32 drop_reason; /* the same for the last ACK that cookie_vX_check dropped */
	__u32 filter_stack; /* last filtered ACK's number + 1 in the table of stacks; 0: not seen */
	__u32 accept_queue; /* entries and limit at the last SYN */
	__u32 accept_queue_limit;
	__u32 syn_queue;
	__u32 bytes_missed; /* completing segment's sequence number - (ISN + 1); may be below 0 */
	__u16 mss; /* bytes, as encoded in the last cookie; 0: could not be read */
	__u8 ending;
	__u8 drop_counters; /* enum counter_moved, over all dropped ACKs */
	__u8 end_counters; /* enum counter_moved, at the segment that ended the handshake */
	__u8 told_kind; /* used by the programs only: kind of the last emitted event, 0: none */
	__u8 padding[2];
	__u32 told_at; /* used by the programs only: time of that event in units of 2^20 ns */
	__u32 filter_device; /* index of the device the last filtered ACK came by; 0: unknown */
	__u32 socket; /* inode of the socket that sent the last cookie (no SYN seen: that
		       * dropped the ACK) */
};

enum event_kind {
	EVENT_SYN_REPEATED = 1,
	EVENT_SYN_DROPPED = 2,
	EVENT_ACK_DROPPED = 3,
	EVENT_ACK_REJECTED = 4,
	EVENT_RESET = 5,
	EVENT_COMPLETED = 6,
	EVENT_TAKEN_OVER = 7,
	EVENT_REPLACED = 8,
	EVENT_ACK_FILTERED = 9,
	EVENT_NO_LISTENER = 10,
};

/*
 * An event of a handshake in the table. It has the entry as it was right after the segment, so that
 * the order of events and table sweeps does not matter.
 */
struct event {
	struct handshake_key key;
	struct handshake handshake;
	__u64 time_ns;
	__u32 sequence;
	__u32 acknowledgement;
	__u32 accept_queue; /* entries and limit when the segment came or was refused */
	__u32 accept_queue_limit;
	__u16 payload_length; /* bytes */
	__u8 tcp_flags; /* the 14th byte of the TCP header */
	__u8 counters; /* enum counter_moved */
	__u8 kind;
	__u8 padding[3];
};

/*
 * With --rescue: the TCP segment (header and options) of the last SYN-ACK, as tcp_make_synack
 * returned it. The checksum is not computed yet. Bytes after the header's own length are garbage.
 */
struct synack {
	__u8 segment[60];
};

/* With --rescue: a client's address that has completed a handshake with a listener. */
struct known_client {
	__u8 client_address[16];
	__u8 server_address[16];
	__u32 netns;
	__u16 server_port;
	__u8 padding[2];
};

/*
 * A listening socket, identified by its inode number as in /proc/net/tcp. Several sockets may share
 * an address and port (SO_REUSEPORT), and a proxy's socket may get segments for any (TPROXY, BPF's
 * sk_lookup). So address and port are 0 here. If the inode number is unknown it is 0 instead, and
 * all sockets of one address and port are one listener.
 */
struct listener_key {
	__u8 server_address[16];
	__u32 netns;
	__u16 server_port;
	__u8 padding[2];
	__u32 socket;
};

/*
 * Figures of a listener's two queues. All CPUs share one entry, because `owed` and `turned_away`
 * must be single numbers, and an ACK may come to another CPU than its SYN. Peaks are raised without
 * a lock: if two CPUs raise a peak at the same instant, it may come out too low by one.
 */
struct listener_facts {
	__u64 syns;
	__u64 cookies_sent;
	__u64 syns_refused; /* SYNs dropped for a full accept queue */
	__u64 acks_refused; /* ACKs dropped for it, of cookies and of ordinary handshakes */
	__u64 syn_need_ns; /* time when the need of SYN queue was last raised */
	__u32 limit; /* sk_max_ack_backlog at the last segment */
	__u32 peak_accept_queue;
	__u32 peak_syn_queue;
	__u32 lowest_cookie_syn_queue; /* fewest entries when a cookie was sent; else undefined */
	__u32 owed; /* handshakes of the table still without an ACK */
	__u32 turned_away; /* clients with a dropped ACK since the accept queue was last empty */
	__u32 syn_need_syn_queue; /* both when their sum was highest */
	__u32 syn_need_owed;
	__u32 accept_need_accept_queue; /* all three when their sum was highest */
	__u32 accept_need_turned_away;
	__u32 accept_need_syn_queue; /* clients that have sent their ACK or will send it */
	__u8 server_address[16]; /* destination of the first segment */
	__u16 server_port; /* the socket's own port, if known; in network order */
	__u8 padding[2];
};

/*
 * A network namespace. A new namespace gets the lowest free inode number (ida_alloc in
 * ns_alloc_inum and its predecessors), often that of one just removed. A cookie is never used
 * again.
 */
struct netns_key {
	__u64 cookie; /* SO_NETNS_COOKIE; 0 if the kernel sets it only on request */
	__u32 netns; /* inode number */
	__u8 padding[4];
};

/*
 * Counts per network namespace. *_OUTSIDE counts segments that the filters (port, family, address)
 * exclude. Such segments are not traced, but the kernel's own counters include them, so the
 * comparison needs them. A segment outside that moves no counter makes no entry.
 */
enum netns_count {
	COUNT_COOKIES_SENT,
	COUNT_COOKIES_SENT_OUTSIDE,
	COUNT_COOKIES_RECEIVED, /* SyncookiesRecv moved */
	COUNT_COOKIES_RECEIVED_OUTSIDE,
	COUNT_COOKIES_FAILED, /* SyncookiesFailed moved */
	COUNT_COOKIES_FAILED_OUTSIDE,
	COUNT_LISTEN_OVERFLOWS, /* ListenOverflows moved */
	COUNT_LISTEN_OVERFLOWS_OUTSIDE,
	COUNT_COMPLETED,
	COUNT_COMPLETED_UNTRACKED, /* those without an entry in the table */
	COUNT_ESTABLISHED, /* cookie children that tcp_rcv_state_process left ESTABLISHED */
	COUNT_STILLBORN, /* cookie children that it refused: RST goes out */
	COUNT_ACKS_DROPPED,
	COUNT_ACKS_DROPPED_UNTRACKED,
	COUNT_ACKS_REJECTED,
	COUNT_ACKS_REJECTED_UNTRACKED,
	COUNT_RESETS,
	COUNT_RESETS_UNTRACKED,
	COUNT_SYNS_REPEATED,
	COUNT_SYNS_DROPPED, /* by tcp_conn_request, whether or not a cookie was sent before */
	COUNT_TAKEN_OVER,
	COUNT_REPLACED, /* entries whose client began a new handshake: same 4-tuple, another ISN */
	COUNT_TABLE_FULL, /* cookie handshakes not tracked because the table was full */
	COUNT_TABLE_BUSY, /* those not tracked because their bucket was being changed */
	COUNT_ACKS_FILTERED, /* ACKs of table entries, dropped before cookie_vX_check */
	COUNT_EVENTS_LOST, /* ring buffer full; the entry keeps the fact */
	COUNT_NO_LISTENER, /* entries ended by a segment that found no socket */
	NETNS_COUNT_MAX,
};

struct netns_counts {
	__u64 count[NETNS_COUNT_MAX];
};

/*
 * Address of both ends of the handshake with which a start tries its programs
 * (tcpstuck_bpf/kernel/trial.py), in network order: 127.83.89.78. Other instances ignore that
 * handshake. Meanwhile the starting instance filters for NOBODYS_NETNS, which no namespace has.
 */
#define TRIAL_ADDRESS 0x4e59537fU /* in memory, little-endian */
#define NOBODYS_NETNS 0xffffffffU

/*
 * Events for repeated SYNs: how many the programs have sent, and how many of them user space has
 * read. Both wrap.
 */
enum repeats {
	REPEATS_TOLD,
	REPEATS_READ,
	REPEATS_MAX,
};

/* The user's settings; one entry, read by every program. */
struct trace_config {
	__u64 tell_completed_after_ns; /* emit completions that took longer than this; 0: all */
	__u64 tell_syn_again_after_ns; /* emit a SYN of the last event's kind again after this */
	__u64 tell_ack_again_after_ns; /* the same for other segments */
	__u64 per_cpu_offset_table; /* kernel address of __per_cpu_offset; 0: unknown */
	__u32 netns; /* 0: every network namespace */
	__u32 most_repeats_unread; /* emit no event for a repeated SYN while so many are unread */
	__u8 match_ports; /* nonzero: only the server ports set in wanted_ports */
	__u8 match_listener; /* nonzero: only this server address */
	__u8 family; /* 0: both, else 4 or 6, by the packet */
	__u8 padding[5];
	__u8 listener_address[16]; /* IPv4-mapped for IPv4 */
};

#endif
