/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The hypercalls of the Harrier monitor. Generated from the tables of the
 * crate harrier-hypercall-abi by `cargo run -p harrier-hypercall-abi -- header`;
 * do not edit. docs/hypercalls.md is the reference.
 */
#ifndef _HARRIER_HYPERCALL_H
#define _HARRIER_HYPERCALL_H

#include <linux/types.h>

/* Version */
#define HARRIER_VERSION_MAJOR 1
#define HARRIER_VERSION_MINOR 2

/* The doorbell: discovery and registers */
#define HARRIER_ACPI_ID "HARV0001"
#define HARRIER_PORT 0x5a0
#define HARRIER_PORT_LEN 32
#define HARRIER_SIGNATURE 0x56524148
#define HARRIER_REG_DOORBELL 0x0 /* write: makes the call whose argument block is at the value times 64 */
#define HARRIER_REG_SIGNATURE 0x0 /* read: the bytes HARV */
#define HARRIER_REG_VERSION 0x4 /* read: the ABI's version, major number in the upper half */
#define HARRIER_REG_FEATURES_LOW 0x8 /* read: lower half of the feature word */
#define HARRIER_REG_FEATURES_HIGH 0xc /* read: upper half of the feature word */
#define HARRIER_REG_EVENTS 0x10 /* read: pending events; write: clears the events whose bits are set */
#define HARRIER_REG_SHARED_PAGE 0x14 /* read: guest-physical address of the shared page, divided by 4096 */
#define HARRIER_REG_INTERRUPT 0x18 /* read: global system interrupt, level triggered, active high */
#define HARRIER_REG_REJECTED 0x1c /* read: doorbell writes whose value was the place of no block */

/* Events: bits of HARRIER_REG_EVENTS */
#define HARRIER_EVENT_CLOCK 0x1 /* the clock in the shared page has changed in a step */
#define HARRIER_EVENT_CONSOLE_ROOM 0x2 /* the console has room again after it took less than all */
#define HARRIER_EVENT_GENERATION 0x100 /* the machine was restored or forked: see IDENTITY, whose feature bit asks for it */
#define HARRIER_EVENT_QUIESCE 0x200 /* the host asks the guest to come to rest: see QUIESCE, whose feature bit asks for it */
#define HARRIER_EVENT_THAW 0x400 /* the guest need not be at rest any more */

/* Calls */
#define HARRIER_CALL_FEATURES 1
#define HARRIER_CALL_CONSOLE 2
#define HARRIER_CALL_MARK 3
#define HARRIER_CALL_CLOCK 4
#define HARRIER_CALL_PARK 5
#define HARRIER_CALL_MEM_RELEASE 6
#define HARRIER_CALL_EXIT 7
#define HARRIER_CALL_CHECKPOINT 8
#define HARRIER_CALL_QUIESCE 9
#define HARRIER_CALL_IDENTITY 10
#define HARRIER_CALL_DEVICE 11

/* Feature bits */
#define HARRIER_FEATURE_CONSOLE 0x1ULL
#define HARRIER_FEATURE_MARK 0x2ULL
#define HARRIER_FEATURE_CLOCK 0x4ULL
#define HARRIER_FEATURE_PARK 0x8ULL
#define HARRIER_FEATURE_MEM_RELEASE 0x10ULL
#define HARRIER_FEATURE_EXIT 0x20ULL
#define HARRIER_FEATURE_CHECKPOINT 0x40ULL
#define HARRIER_FEATURE_QUIESCE 0x80ULL
#define HARRIER_FEATURE_IDENTITY 0x100ULL
#define HARRIER_FEATURE_DEVICE 0x200ULL

/* How a call ended */
#define HARRIER_STATUS_OK 0
#define HARRIER_STATUS_PENDING 1
#define HARRIER_STATUS_UNKNOWN_CALL (-1)
#define HARRIER_STATUS_BAD_VERSION (-2)
#define HARRIER_STATUS_BAD_LENGTH (-3)
#define HARRIER_STATUS_BAD_POINTER (-4)
#define HARRIER_STATUS_BAD_ARGUMENT (-5)
#define HARRIER_STATUS_STALE (-6)
#define HARRIER_STATUS_UNSUPPORTED (-7)
#define HARRIER_STATUS_FULL (-8)
#define HARRIER_STATUS_HOST_FAILED (-9)

/* Limits and special values */
#define HARRIER_BLOCK_ALIGN 64
#define HARRIER_CHANNELS 256
#define HARRIER_CONSOLE_MAX 65536 /* bytes */
#define HARRIER_MEM_RELEASE_MAX_RANGES 512
#define HARRIER_MEM_RELEASE_MAX_BYTES 268435456 /* in one call */
#define HARRIER_MARKS_MAX 256
#define HARRIER_PARK_NO_TIMEOUT 0xffffffffffffffffULL
#define HARRIER_EXIT_CODE_MAX 255

/* Phases of MARK */
#define HARRIER_PHASE_CUSTOM 0x0 /* a mark of the guest's own, with a name */
#define HARRIER_PHASE_KERNEL 0x1 /* the kernel has begun */
#define HARRIER_PHASE_MEMORY 0x2 /* the kernel has its memory */
#define HARRIER_PHASE_TIME 0x3 /* the kernel has its clocks and timers */
#define HARRIER_PHASE_PROCESSORS 0x4 /* all processors run */
#define HARRIER_PHASE_DRIVERS 0x5 /* drivers are ready */
#define HARRIER_PHASE_INIT 0x6 /* the first program begins */
#define HARRIER_PHASE_AGENT 0x7 /* the agent has begun */
#define HARRIER_PHASE_READY 0x8 /* the agent is ready for work */
#define HARRIER_PHASE_WORK_BEGIN 0x9 /* a piece of work begins */
#define HARRIER_PHASE_WORK_END 0xa /* a piece of work has ended */

/* Reasons of EXIT */
#define HARRIER_EXIT_DONE 0x0 /* the guest has done its work */
#define HARRIER_EXIT_FAILED 0x1 /* the guest cannot go on */
#define HARRIER_EXIT_PANIC 0x2 /* the guest's kernel has crashed */
#define HARRIER_EXIT_RESTART 0x3 /* the guest asks to be started again */

/* Operations of QUIESCE */
#define HARRIER_QUIESCE_ASK 0x0 /* what does the host want? */
#define HARRIER_QUIESCE_READY 0x1 /* the guest is at rest, until the event THAW */

/* Roles of CHECKPOINT and IDENTITY */
#define HARRIER_ROLE_ORIGINAL 0x0 /* the machine was booted, or is the one that made the call */
#define HARRIER_ROLE_RESTORED 0x1 /* it was made of a snapshot */
#define HARRIER_ROLE_CLONE 0x2 /* it was forked: others like it may run beside it */
#define HARRIER_ROLE_MIGRATED 0x3 /* it has moved here from another host */

/* Devices of DEVICE */
#define HARRIER_DEVICE_NONE 0x0 /* there is no device of this number and above */
#define HARRIER_DEVICE_VIRTIO_MMIO 0x1 /* a virtio device; registers in memory, the interrupt is a level */
#define HARRIER_DEVICE_SERIAL 0x2 /* a 16550A; registers are ports, the interrupt is an edge */
#define HARRIER_DEVICE_PVPANIC 0x3 /* QEMU's port for reports of a crash */
#define HARRIER_DEVICE_POWER 0x4 /* ports: 0x34 to the first switches the machine off, 1 to the third resets it */
#define HARRIER_DEVICE_DOORBELL 0x5 /* the ports of these calls; the interrupt of events is a level */
#define HARRIER_DEVICE_NO_INTERRUPT 0xffffffff

/* Flags of the clock page */
#define HARRIER_CLOCK_VALID 0x1
#define HARRIER_CLOCK_TSC_RELIABLE 0x2
#define HARRIER_CLOCK_OFFSET 0x0 /* of the clock in the shared page */

/*
 * What the doorbell is told of: 128 bytes of guest memory, aligned to 64,
 * in one piece.
 *
 * The guest fills it, sets `status` to PENDING and writes the block's
 * address, divided by 64, to the doorbell. A status that is still PENDING
 * afterwards means that the address was not one of memory.
 */
struct harrier_block {
	/*
	 * Major version of the ABI that the caller was written for.
	 */
	__u16 version;
	/*
	 * Number of the call.
	 */
	__u16 number;
	/*
	 * Bytes of `args` that the call takes: exactly the size of its arguments.
	 */
	__u32 args_len;
	/*
	 * Zero, or a number that grows with each call on the channel. A call with
	 * the channel's last number again is answered from memory and not made
	 * twice; an older number is STALE.
	 */
	__u64 sequence;
	/*
	 * Whose sequence number it is, below 256: usually the processor's APIC id.
	 */
	__u32 channel;
	/*
	 * Written by the host: how the call ended.
	 */
	__s32 status;
	/*
	 * Written by the host: bytes of `result` that are valid.
	 */
	__u32 result_len;
	/*
	 * Zero.
	 */
	__u32 flags;
	/*
	 * The arguments.
	 */
	__u8 args[48];
	/*
	 * Written by the host: the results.
	 */
	__u8 result[48];
};
_Static_assert(sizeof(struct harrier_block) == 128, "layout of Block");

/*
 * Time and frequencies.
 *
 * A reader takes `sequence` (odd: try again), then the fields, then
 * `sequence` again (changed: try again). Guest time in nanoseconds is
 * `monotonic_base_ns + ((ticks * tsc_to_ns_multiplier) >> 32)` with `ticks
 * = tsc - tsc_base`, shifted left by `tsc_shift` first (right, if it is
 * negative). It stands still while the machine is paused and never goes
 * back. The wall clock is guest time plus `wall_offset_ns`.
 */
struct harrier_clock_page {
	/*
	 * Odd while the host writes.
	 */
	__u32 sequence;
	/*
	 * CLOCK_VALID, CLOCK_TSC_RELIABLE.
	 */
	__u32 flags;
	/*
	 * Frequency of the TSC in kHz.
	 */
	__u32 tsc_khz;
	/*
	 * Frequency of the local APIC timer before its divider, in kHz.
	 */
	__u32 lapic_timer_khz;
	/*
	 * TSC at which guest time was `monotonic_base_ns`.
	 */
	__u64 tsc_base;
	/*
	 * Guest time at `tsc_base`, in nanoseconds.
	 */
	__u64 monotonic_base_ns;
	/*
	 * Nanoseconds a shifted tick, as a fraction of 2^32.
	 */
	__u32 tsc_to_ns_multiplier;
	/*
	 * Left shift of the ticks before they are multiplied, -31 to 31.
	 */
	__s32 tsc_shift;
	/*
	 * Nanoseconds since 1970-01-01 UTC when guest time was zero.
	 */
	__s64 wall_offset_ns;
	/*
	 * Grows each time that the machine is restored or forked.
	 */
	__u64 generation;
};
_Static_assert(sizeof(struct harrier_clock_page) == 56, "layout of ClockPage");

/*
 * One range of a list.
 */
struct harrier_mem_range {
	/*
	 * Guest-physical address of the first page.
	 */
	__u64 gpa;
	/*
	 * Length in bytes, a multiple of 4096, not zero. The range does not leave
	 * its piece of memory.
	 */
	__u64 len;
};
_Static_assert(sizeof(struct harrier_mem_range) == 16, "layout of MemRange");

/*
 * What the guest tells about itself.
 */
struct harrier_features_args {
	/*
	 * The features that the guest will use, as far as they ask something of
	 * it. The host keeps the word for those that are requests to the guest
	 * (QUIESCE, IDENTITY) and ignores bits that it does not know.
	 */
	__u64 guest_features;
};
_Static_assert(sizeof(struct harrier_features_args) == 8, "layout of FeaturesArgs");

/*
 * What the host offers.
 */
struct harrier_features_result {
	/*
	 * The feature word.
	 */
	__u64 features;
	/*
	 * Guest-physical address of the shared page.
	 */
	__u64 shared_page;
	/*
	 * The ABI's version, major number in the upper half.
	 */
	__u32 version;
	/*
	 * Global system interrupt of the doorbell.
	 */
	__u32 interrupt;
	/*
	 * Most bytes that a CONSOLE call takes.
	 */
	__u32 console_max;
	/*
	 * Most ranges that a MEM_RELEASE call takes.
	 */
	__u32 mem_release_max_ranges;
};
_Static_assert(sizeof(struct harrier_features_result) == 32, "layout of FeaturesResult");

/*
 * Bytes for the console.
 */
struct harrier_console_args {
	/*
	 * Guest-physical address of the bytes; they lie in one piece.
	 */
	__u64 gpa;
	/*
	 * Number of bytes, at most 65536.
	 */
	__u32 len;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_console_args) == 16, "layout of ConsoleArgs");

/*
 * How much the console took.
 */
struct harrier_console_result {
	/*
	 * Bytes taken, from the first on. Fewer than all: there was no room, and
	 * the event CONSOLE_ROOM follows when there is.
	 */
	__u32 accepted;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_console_result) == 8, "layout of ConsoleResult");

/*
 * A moment in the guest's life.
 */
struct harrier_mark_args {
	/*
	 * The phase that begins: see the table of phases. 0 is a mark of the
	 * guest's own, with a name.
	 */
	__u32 phase;
	/*
	 * Zero.
	 */
	__u32 reserved;
	/*
	 * A number to keep with it; its meaning is the guest's.
	 */
	__u64 value;
	/*
	 * A name in printable ASCII, ended by a zero byte or the end. May be empty
	 * except for phase 0.
	 */
	__u8 name[32];
};
_Static_assert(sizeof(struct harrier_mark_args) == 48, "layout of MarkArgs");

/*
 * The caller's TSC, which ties the clock page to guest time.
 */
struct harrier_clock_args {
	/*
	 * The TSC as the caller has read it directly before the call.
	 */
	__u64 tsc;
};
_Static_assert(sizeof(struct harrier_clock_args) == 8, "layout of ClockArgs");

/*
 * The time of the call.
 */
struct harrier_clock_result {
	/*
	 * Guest-physical address of the clock page.
	 */
	__u64 clock_page;
	/*
	 * Guest time at the TSC that the caller gave, in nanoseconds.
	 */
	__u64 monotonic_ns;
	/*
	 * Nanoseconds since 1970-01-01 UTC.
	 */
	__s64 wall_ns;
};
_Static_assert(sizeof(struct harrier_clock_result) == 24, "layout of ClockResult");

/*
 * How long the caller has nothing to do.
 */
struct harrier_park_args {
	/*
	 * Nanoseconds after which the caller wants to be woken; all ones: only an
	 * interrupt is to wake it.
	 */
	__u64 timeout_ns;
	/*
	 * APIC id of the calling processor, where the waking interrupt goes.
	 */
	__u32 apic_id;
	/*
	 * Vector of the waking interrupt, 32 to 255; 0: the guest has set a timer
	 * of its own, and the time is only for the host to know.
	 */
	__u32 vector;
};
_Static_assert(sizeof(struct harrier_park_args) == 16, "layout of ParkArgs");

/*
 * Pages that the guest does not need, at most 256 MiB in a call.
 */
struct harrier_mem_release_args {
	/*
	 * Guest-physical address of the list, aligned to 8: `count` ranges in one
	 * piece.
	 */
	__u64 list_gpa;
	/*
	 * Number of ranges, at most 512.
	 */
	__u32 count;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_mem_release_args) == 16, "layout of MemReleaseArgs");

/*
 * What was released.
 */
struct harrier_mem_release_result {
	/*
	 * Bytes that now read as zero.
	 */
	__u64 released_bytes;
	/*
	 * Ranges done, from the first on. Fewer than all: the next one is the one
	 * that the status is about.
	 */
	__u32 done;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_mem_release_result) == 16, "layout of MemReleaseResult");

/*
 * How the guest ends.
 */
struct harrier_exit_args {
	/*
	 * Exit code for the host's program, 0 to 255.
	 */
	__u32 code;
	/*
	 * Why: see the table of reasons.
	 */
	__u32 reason;
	/*
	 * A word for people in printable ASCII, ended by a zero byte or the end.
	 * May be empty.
	 */
	__u8 message[32];
};
_Static_assert(sizeof(struct harrier_exit_args) == 40, "layout of ExitArgs");

/*
 * Which snapshot the guest wants.
 */
struct harrier_checkpoint_args {
	/*
	 * Zero.
	 */
	__u32 flags;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_checkpoint_args) == 8, "layout of CheckpointArgs");

/*
 * Who returns from the call.
 */
struct harrier_checkpoint_result {
	/*
	 * The restores that led to this machine; zero in one that was booted.
	 */
	__u64 generation;
	/*
	 * Who this machine is: see the table of roles. ORIGINAL: the snapshot is
	 * there, and this machine goes on.
	 */
	__u32 role;
	/*
	 * Tells the clones of one fork apart, from zero; zero in other machines.
	 */
	__u32 clone_index;
};
_Static_assert(sizeof(struct harrier_checkpoint_result) == 16, "layout of CheckpointResult");

/*
 * What the guest asks or says about coming to rest.
 */
struct harrier_quiesce_args {
	/*
	 * ASK or READY: see the table of operations.
	 */
	__u32 op;
	/*
	 * Zero.
	 */
	__u32 reserved;
	/*
	 * For READY the request that the guest has met, else zero.
	 */
	__u64 request;
};
_Static_assert(sizeof(struct harrier_quiesce_args) == 16, "layout of QuiesceArgs");

/*
 * What the host wants at this moment.
 */
struct harrier_quiesce_result {
	/*
	 * The request's number; zero: the guest is not asked to come to rest, or
	 * need not be at rest any more.
	 */
	__u64 request;
	/*
	 * How long the host still waits for READY, in milliseconds.
	 */
	__u32 remaining_ms;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_quiesce_result) == 16, "layout of QuiesceResult");

/*
 * Who this machine is now.
 */
struct harrier_identity_result {
	/*
	 * The restores that led to this machine; zero in one that was booted.
	 */
	__u64 generation;
	/*
	 * How this machine came to be: see the table of roles.
	 */
	__u32 role;
	/*
	 * Tells the clones of one fork apart, from zero; zero in other machines.
	 */
	__u32 clone_index;
	/*
	 * Random bytes that nobody else has, other ones in each call.
	 */
	__u8 entropy[32];
};
_Static_assert(sizeof(struct harrier_identity_result) == 48, "layout of IdentityResult");

/*
 * Which device is asked for.
 */
struct harrier_device_args {
	/*
	 * Devices are numbered from zero.
	 */
	__u32 index;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_device_args) == 8, "layout of DeviceArgs");

/*
 * Where a device is.
 */
struct harrier_device_result {
	/*
	 * What it is: see the table of devices. NONE: there is no device of this
	 * number and above.
	 */
	__u32 kind;
	/*
	 * Global system interrupt; all ones: it has none.
	 */
	__u32 interrupt;
	/*
	 * First port, or guest-physical address, of its registers.
	 */
	__u64 base;
	/*
	 * Length of its registers, in ports or bytes.
	 */
	__u32 len;
	/*
	 * Zero.
	 */
	__u32 reserved;
};
_Static_assert(sizeof(struct harrier_device_result) == 24, "layout of DeviceResult");

#endif /* _HARRIER_HYPERCALL_H */
