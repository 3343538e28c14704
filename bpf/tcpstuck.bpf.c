// SPDX-License-Identifier: GPL-2.0-only
/*
 * The kernel side: the table of handshakes that still await an ACK, and events about them. It
 * records facts and judges nothing. The files are joined to one text in the order of PROGRAM_TEXTS
 * (kernel/compilation.py), because BCC translates map accesses only in its main text. This file has
 * the tables, and the scratch that keeps data from a function's entry to its return.
 *
 * There is one set of bodies, and two thin sets of entries at the end (TCPSTUCK_FENTRY or kprobes).
 * All probed functions run with bottom halves off, on one CPU from entry to return, and never
 * nested. So the entry program leaves its data in a per-CPU scratch for the return program, because
 * the function may free the packet (cookie_vX_check does from 6.9 on). A function that also runs in
 * process context must not be probed by kprobe: while its program runs, the kernel runs no other
 * program on that CPU (bpf_prog_active in trace_call_bpf), so packets of an interrupting softirq
 * would not be seen.
 *
 * On PREEMPT_RT only a lock in local_bh_disable() keeps packets of one CPU apart. If it is not
 * taken (SOFTIRQS_INTERLEAVE), a packet may come between another packet's entry and return. Then
 * each task has its own scratch. The rest is a declared gap (softirq_gaps in kernel/softirqs.py):
 * with fentry the kernel skips a program for a packet that preempts that program, and the kernel's
 * counters are per CPU.
 *
 * KERNEL_LAYOUT_H is generated from the kernel's BTF (kernel/layout.py): structs with only the
 * members used here, at their true offsets.
 */
#include <uapi/linux/ptrace.h>
#include KERNEL_LAYOUT_H
#include "tcpstuck.h"

#define ETH_P_IP_NETWORK_ORDER	 0x0008
#define ETH_P_IPV6_NETWORK_ORDER 0xdd86
#define IPPROTO_TCP		 6
#define TCP_STATE_SYN_RECV	 3
#define TCP_FLAG_SYN		 0x02
#define TCP_FLAG_RST		 0x04
#define TCP_FLAG_ACK		 0x10
/* Flag in skb_refdst: the reference to the route is not counted (include/linux/skbuff.h). */
#define SKB_DST_NOREF 1ULL
/* Largest distance from the ISN at which a segment counts as one of the handshake. */
#define NEAR_ISN (1 << 20)
/* Error of an insert into a full hash: -E2BIG (alloc_htab_elem). */
#define REFUSED_FULL -7
/* The highest index into msstab[] of net/ipv4/syncookies.c and net/ipv6/syncookies.c. */
#define HIGHEST_MSS_INDEX 3

/* fentry programs read their BTF-typed arguments by plain loads; kprobe programs cannot. */
#ifdef TCPSTUCK_FENTRY
#define READ(place) (place)
#else
#define READ(place)                                                       \
	({                                                                \
		__typeof__(place) value_ = 0;                             \
		bpf_probe_read_kernel(&value_, sizeof(value_), &(place)); \
		value_;                                                   \
	})
#endif

struct segment {
	struct handshake_key key;
	u64 netns_cookie; /* struct netns_key */
	u32 sequence;
	u32 acknowledgement;
	u32 accept_queue;
	u32 accept_queue_limit;
	u16 payload_length;
	u8 tcp_flags;
	u8 outside; /* excluded by the filters; PASSED_OVER: not even counted */
};

#define PASSED_OVER 2

/* Two of the kernel's counters that are neighbours in its array, for a single read. */
struct counter_pair {
	u64 first;
	u64 second;
};

/* Tables with a table-is-full flag. */
enum table {
	TABLE_AWAITING_ACK,
	TABLE_COUNTS,
	TABLE_LISTENERS,
	TABLE_CHOSEN,
	TABLES,
};

struct counters_before {
	u64 cpu_offset; /* offset of this CPU's per-CPU data, which never changes */
	u64 this_cpu; /* this CPU's struct linux_mib of the segment's namespace; 0: unknown */
	struct counter_pair cookies; /* SyncookiesRecv, SyncookiesFailed */
	struct counter_pair listen; /* ListenOverflows, ListenDrops */
};

/*
 * One per CPU. Probed functions never nest on a CPU, so they share the segment and the counters.
 * One per task on kernels where softirqs may preempt each other.
 */
struct scratch {
	struct segment segment;
	struct counters_before before;
	u64 syn; /* SYN in tcp_conn_request */
	u64 mss_place; /* kprobe only: where cookie_vX_init_sequence will write the MSS */
	u64 listening; /* listener in tcp_conn_request or tcp_check_req */
	u64 listener; /* listener in cookie_vX_check */
	u32 socket; /* inode number of the socket that the segment came to; 0: unknown */
	u16 own_port; /* port of that socket, in network order */
	u64 checked; /* packet of cookie_vX_check, while it may still be dropped for it */
	u32 refused; /* the packet is freed because an RST answers it */
	u64 drop_place; /* drop site within cookie_vX_check */
	u32 drop_reason;
	u64 child; /* made by cookie_vX_check, on its way to tcp_rcv_state_process */
	u64 child_entered; /* kprobe only */
	u32 syn_queue;
	u32 cookie_sent;
	u32 handshake_tracked; /* the SYN's cookie handshake has an entry */
	u32 request_checked; /* tcp_check_req is running */
	struct netns_counts none; /* zeros, for a namespace's new entry */
	struct listener_key listener_key;
	struct listener_facts first_facts; /* a new entry: zeros, except for address and port */
};

#define STACK_FRAMES 16

struct stack {
	u64 frames[STACK_FRAMES];
};

/* For each port, in network order, whether a cookie was sent from it. */
struct port_marks {
	u8 marks[65536];
};

enum loss {
	LOSS_NAMESPACES_UNCOUNTED, /* segments in namespaces without room in the counts */
	LOSS_COOKIES_UNMATCHED, /* a cookie was chosen outside tcp_conn_request */
	LOSS_LISTENERS_UNKNOWN, /* SYNs and ACKs of listeners without room in the table */
	LOSS_STACKS_UNKNOWN, /* dropped ACKs without a call stack (stack table full) */
	LOSS_TASKS_UNKNOWN, /* SYNs and ACKs in softirqs of tasks without room in the table */
	LOSS_MAX,
};

/* Placeholder; the loader sets the size of these tables (table_entries in open_source.py). */
#define SIZED_WHEN_LOADED 1

BPF_TABLE("hash", struct handshake_key, struct handshake, awaiting_ack, SIZED_WHEN_LOADED);
BPF_TABLE("percpu_hash", struct netns_key, struct netns_counts, counts, SIZED_WHEN_LOADED);
BPF_PERCPU_ARRAY(crowded_out, struct netns_counts, 1); /* namespaces without an entry in counts */
BPF_TABLE("hash", struct listener_key, struct listener_facts, listeners, SIZED_WHEN_LOADED);
BPF_RINGBUF_OUTPUT(events, SIZED_WHEN_LOADED);
#ifdef PROBE_tcp_make_synack
BPF_TABLE("hash", struct handshake_key, struct synack, synacks, SIZED_WHEN_LOADED);
BPF_TABLE("lru_hash", struct known_client, u64, known_clients, SIZED_WHEN_LOADED);
BPF_TABLE("hash", struct handshake_key, u8, chosen, SIZED_WHEN_LOADED);
#endif
#ifdef PROBE_kfree_skb
BPF_TABLE("stacktrace", u32, struct stack, stacks, SIZED_WHEN_LOADED);
BPF_ARRAY(cookie_ports, struct port_marks, 1);
#endif
BPF_ARRAY(config, struct trace_config, 1);
BPF_ARRAY(repeats, u32, REPEATS_MAX);
BPF_ARRAY(table_is_full, u32, TABLES);
BPF_ARRAY(wanted_ports, u64, 1024); /* one bit per port; BCC is slow with arrays in a value */
#ifdef SOFTIRQS_INTERLEAVE
BPF_TABLE("lru_hash", u64, struct scratch, scratches, SIZED_WHEN_LOADED);
BPF_ARRAY(no_scratch, struct scratch, 1); /* zeros for a new entry, too large for the stack */
#else
BPF_PERCPU_ARRAY(scratches, struct scratch, 1);
#endif
BPF_PERCPU_ARRAY(losses, u64, LOSS_MAX);

static __always_inline u16 swap16(u16 value)
{
	return __builtin_bswap16(value);
}

static __always_inline u32 swap32(u32 value)
{
	return __builtin_bswap32(value);
}

/* Counts are per CPU, so plain additions are exact if no program preempts another one. */
#ifdef SOFTIRQS_INTERLEAVE
#define ADD(place, number) __sync_fetch_and_add(&(place), number)
#define TASKS_CHANGE_CPUS  true
#else
#define ADD(place, number) ((place) += (number))
#define TASKS_CHANGE_CPUS  false
#endif

static __always_inline void lose(u32 what)
{
	u64 *count = losses.lookup(&what);

	if (count)
		ADD(*count, 1);
}

/* The scratch keeps data from the program at a function's entry to the one at its return. */
#ifdef SOFTIRQS_INTERLEAVE
/* A task runs its softirqs one after the other, even if packets of other tasks preempt it. */
static __always_inline u64 this_task(void)
{
	u32 thread = bpf_get_current_pid_tgid();

	/* Every CPU's idle task has the thread ID 0. */
	return thread ? thread : 1ULL << 32 | bpf_get_smp_processor_id();
}

static __always_inline struct scratch *own_scratch(void)
{
	u64 task = this_task();

	return scratches.lookup(&task);
}

static __always_inline struct scratch *begin_scratch(void)
{
	struct scratch *found = own_scratch();
	u64 task = this_task();
	struct scratch *none;
	u32 zero = 0;

	if (found)
		return found;
	none = no_scratch.lookup(&zero);
	if (none)
		scratches.insert(&task, none);
	found = own_scratch();
	if (!found)
		lose(LOSS_TASKS_UNKNOWN);
	return found;
}
#else
static __always_inline struct scratch *own_scratch(void)
{
	u32 zero = 0;

	return scratches.lookup(&zero);
}

#define begin_scratch own_scratch
#endif

/*
 * Programs do not insert into a table that is known to be full. Before 54a9c3a42d92 ("bpf: Avoid
 * grabbing spin_locks of all cpus when no free elems") a failing insert takes the lock of every
 * CPU's free list, which in a flood would happen for each SYN. So the first failure sets a flag,
 * which stays set until an entry is deleted or user space has swept the tables.
 */
static __always_inline bool is_full(u32 table)
{
	u32 *full = table_is_full.lookup(&table);

	return full && *full;
}

static __always_inline long noted(u32 table, long refused)
{
	u32 *full = table_is_full.lookup(&table);

	if (full && refused == REFUSED_FULL)
		*full = 1;
	return refused;
}

/* A segment without room in the counts is still traced; its counts go to crowded_out. */
static __always_inline struct netns_counts *counts_of_others(void)
{
	u32 zero = 0;

	lose(LOSS_NAMESPACES_UNCOUNTED);
	return crowded_out.lookup(&zero);
}

static __always_inline struct netns_key netns_of(const struct segment *segment)
{
	struct netns_key key = {};

	key.cookie = segment->netns_cookie;
	key.netns = segment->key.netns;
	return key;
}

/* The counts of a namespace, looked up once per segment. */
static __always_inline struct netns_counts *counts_of(struct scratch *scratch)
{
	struct netns_key key = netns_of(&scratch->segment);
	struct netns_counts *found;

	if (scratch->segment.outside == PASSED_OVER)
		return 0;
	found = counts.lookup(&key);
	if (!found && !is_full(TABLE_COUNTS)) {
		noted(TABLE_COUNTS, counts.insert(&key, &scratch->none));
		found = counts.lookup(&key);
	}
	return found ? found : counts_of_others();
}

#ifdef PROBE_kfree_skb
/* Each port has a byte, not a bit, because two CPUs may mark two ports at once. */
static __always_inline u8 *port_mark(u16 port)
{
	u32 zero = 0;
	struct port_marks *found = cookie_ports.lookup(&zero);

	return found ? &found->marks[port] : 0;
}

/* Every entry's server port is marked; marks are never cleared. */
static __always_inline void mark_port(u16 port)
{
	u8 *mark = port_mark(port);

	if (mark && !*mark)
		*mark = 1;
}

static __always_inline bool port_marked(u16 port)
{
	u8 *mark = port_mark(port);

	return mark && *mark;
}
#else
#define mark_port(port)
#endif

static __always_inline long new_entry(struct handshake_key *key, struct handshake *fresh)
{
	if (is_full(TABLE_AWAITING_ACK))
		return REFUSED_FULL;
	return noted(TABLE_AWAITING_ACK, awaiting_ack.insert(key, fresh));
}

static __always_inline void note_room(void)
{
	u32 table = TABLE_AWAITING_ACK;
	u32 *full = table_is_full.lookup(&table);

	if (full && *full)
		*full = 0;
}
