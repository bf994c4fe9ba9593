//! The table of calls.

use crate::block::Status;
use crate::layout::{Layout, layout};

/// A call of the ABI.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// What the guest puts into the block.
    pub number: u16,
    /// Its name.
    pub name: &'static str,
    /// What it does, in a sentence or more.
    pub doc: &'static str,
    /// Its arguments; none for a call without.
    pub args: Option<&'static Layout>,
    /// Its results; none for a call without.
    pub result: Option<&'static Layout>,
    /// What it answers beyond the errors that every call can have.
    pub errors: &'static [Status],
    /// The bit of the feature word that says that the host offers it; FEATURES itself has none.
    pub feature: u64,
    /// What it costs beyond the exit to the host.
    pub cost: &'static str,
    /// Minor version, of major version 1, that has it first.
    pub since_minor: u16,
    /// The number is taken, and the call is answered with [`Status::Unsupported`].
    pub reserved: bool,
}

impl Call {
    /// The exact `args_len` of a block for this call.
    pub const fn args_len(&self) -> usize {
        match self.args {
            Some(layout) => layout.size,
            None => 0,
        }
    }
}

/// The call with this number.
pub fn find(number: u16) -> Option<&'static Call> {
    CALLS.iter().find(|call| call.number == number)
}

/// Errors that every call can have: they are found before the call is looked at.
pub const COMMON_ERRORS: &[Status] = &[
    Status::UnknownCall,
    Status::BadVersion,
    Status::BadLength,
    Status::BadArgument,
    Status::Stale,
    Status::Unsupported,
];

/// Numbers of the calls.
pub mod number {
    /// See [`super::FeaturesResult`].
    pub const FEATURES: u16 = 1;
    /// See [`super::ConsoleArgs`].
    pub const CONSOLE: u16 = 2;
    /// See [`super::MarkArgs`].
    pub const MARK: u16 = 3;
    /// See [`super::ClockArgs`].
    pub const CLOCK: u16 = 4;
    /// See [`super::ParkArgs`].
    pub const PARK: u16 = 5;
    /// See [`super::MemReleaseArgs`].
    pub const MEM_RELEASE: u16 = 6;
    /// See [`super::ExitArgs`].
    pub const EXIT: u16 = 7;
    /// See [`super::CheckpointArgs`].
    pub const CHECKPOINT: u16 = 8;
    /// See [`super::QuiesceArgs`].
    pub const QUIESCE: u16 = 9;
    /// See [`super::IdentityResult`].
    pub const IDENTITY: u16 = 10;
    /// See [`super::DeviceArgs`].
    pub const DEVICE: u16 = 11;
}

/// Bits of the feature word.
pub mod features {
    /// CONSOLE.
    pub const CONSOLE: u64 = 1 << 0;
    /// MARK.
    pub const MARK: u64 = 1 << 1;
    /// CLOCK and the clock in the shared page.
    pub const CLOCK: u64 = 1 << 2;
    /// PARK.
    pub const PARK: u64 = 1 << 3;
    /// MEM_RELEASE.
    pub const MEM_RELEASE: u64 = 1 << 4;
    /// EXIT.
    pub const EXIT: u64 = 1 << 5;
    /// CHECKPOINT.
    pub const CHECKPOINT: u64 = 1 << 6;
    /// QUIESCE and the events QUIESCE and THAW, which are sent to guests that have set the bit themselves.
    pub const QUIESCE: u64 = 1 << 7;
    /// IDENTITY and the event GENERATION, which is sent to guests that have set the bit themselves.
    pub const IDENTITY: u64 = 1 << 8;
    /// DEVICE, and for a kernel an MP table with every interrupt that it names: the guest needs no ACPI.
    pub const DEVICE: u64 = 1 << 9;
}

/// Most bytes that a CONSOLE call takes.
pub const CONSOLE_MAX: u32 = 64 << 10;
/// Most ranges in the list of a MEM_RELEASE call.
pub const MEM_RELEASE_MAX_RANGES: u32 = 512;
/// Most bytes that a MEM_RELEASE call releases.
pub const MEM_RELEASE_MAX_BYTES: u64 = 256 << 20;
/// Most marks that the host keeps.
pub const MARKS_MAX: usize = 256;
/// [`ParkArgs::timeout_ns`]: nothing is to wake the processor but an interrupt.
pub const PARK_NO_TIMEOUT: u64 = u64::MAX;
/// Lowest [`ParkArgs::vector`] that is one: lower ones are the processor's exceptions.
pub const PARK_FIRST_VECTOR: u32 = 32;
/// Highest code of EXIT: it becomes the exit code of the host's program.
pub const EXIT_CODE_MAX: u32 = 255;

layout! {
    /// What the guest tells about itself.
    pub struct FeaturesArgs {
        /// The features that the guest will use, as far as they ask something of it. The host keeps the word for
        /// those that are requests to the guest (QUIESCE, IDENTITY) and ignores bits that it does not know.
        pub guest_features: u64,
    }
}

layout! {
    /// What the host offers.
    pub struct FeaturesResult {
        /// The feature word.
        pub features: u64,
        /// Guest-physical address of the shared page.
        pub shared_page: u64,
        /// The ABI's version, major number in the upper half.
        pub version: u32,
        /// Global system interrupt of the doorbell.
        pub interrupt: u32,
        /// Most bytes that a CONSOLE call takes.
        pub console_max: u32,
        /// Most ranges that a MEM_RELEASE call takes.
        pub mem_release_max_ranges: u32,
    }
}

layout! {
    /// Bytes for the console.
    pub struct ConsoleArgs {
        /// Guest-physical address of the bytes; they lie in one piece.
        pub gpa: u64,
        /// Number of bytes, at most 65536.
        pub len: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// How much the console took.
    pub struct ConsoleResult {
        /// Bytes taken, from the first on. Fewer than all: there was no room, and the event CONSOLE_ROOM follows
        /// when there is.
        pub accepted: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// A moment in the guest's life.
    pub struct MarkArgs {
        /// The phase that begins: see the table of phases. 0 is a mark of the guest's own, with a name.
        pub phase: u32,
        /// Zero.
        pub reserved: u32,
        /// A number to keep with it; its meaning is the guest's.
        pub value: u64,
        /// A name in printable ASCII, ended by a zero byte or the end. May be empty except for phase 0.
        pub name: [u8; 32],
    }
}

layout! {
    /// The caller's TSC, which ties the clock page to guest time.
    pub struct ClockArgs {
        /// The TSC as the caller has read it directly before the call.
        pub tsc: u64,
    }
}

layout! {
    /// The time of the call.
    pub struct ClockResult {
        /// Guest-physical address of the clock page.
        pub clock_page: u64,
        /// Guest time at the TSC that the caller gave, in nanoseconds.
        pub monotonic_ns: u64,
        /// Nanoseconds since 1970-01-01 UTC.
        pub wall_ns: i64,
    }
}

layout! {
    /// How long the caller has nothing to do.
    pub struct ParkArgs {
        /// Nanoseconds after which the caller wants to be woken; all ones: only an interrupt is to wake it.
        pub timeout_ns: u64,
        /// APIC id of the calling processor, where the waking interrupt goes.
        pub apic_id: u32,
        /// Vector of the waking interrupt, 32 to 255; 0: the guest has set a timer of its own, and the time is only
        /// for the host to know.
        pub vector: u32,
    }
}

layout! {
    /// Pages that the guest does not need, at most 256 MiB in a call.
    pub struct MemReleaseArgs {
        /// Guest-physical address of the list, aligned to 8: `count` ranges in one piece.
        pub list_gpa: u64,
        /// Number of ranges, at most 512.
        pub count: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// One range of a list.
    pub struct MemRange {
        /// Guest-physical address of the first page.
        pub gpa: u64,
        /// Length in bytes, a multiple of 4096, not zero. The range does not leave its piece of memory.
        pub len: u64,
    }
}

layout! {
    /// What was released.
    pub struct MemReleaseResult {
        /// Bytes that now read as zero.
        pub released_bytes: u64,
        /// Ranges done, from the first on. Fewer than all: the next one is the one that the status is about.
        pub done: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// How the guest ends.
    pub struct ExitArgs {
        /// Exit code for the host's program, 0 to 255.
        pub code: u32,
        /// Why: see the table of reasons.
        pub reason: u32,
        /// A word for people in printable ASCII, ended by a zero byte or the end. May be empty.
        pub message: [u8; 32],
    }
}

layout! {
    /// Which snapshot the guest wants.
    pub struct CheckpointArgs {
        /// Zero.
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// Who returns from the call.
    pub struct CheckpointResult {
        /// The restores that led to this machine; zero in one that was booted.
        pub generation: u64,
        /// Who this machine is: see the table of roles. ORIGINAL: the snapshot is there, and this machine goes on.
        pub role: u32,
        /// Tells the clones of one fork apart, from zero; zero in other machines.
        pub clone_index: u32,
    }
}

layout! {
    /// What the guest asks or says about coming to rest.
    pub struct QuiesceArgs {
        /// ASK or READY: see the table of operations.
        pub op: u32,
        /// Zero.
        pub reserved: u32,
        /// For READY the request that the guest has met, else zero.
        pub request: u64,
    }
}

layout! {
    /// What the host wants at this moment.
    pub struct QuiesceResult {
        /// The request's number; zero: the guest is not asked to come to rest, or need not be at rest any more.
        pub request: u64,
        /// How long the host still waits for READY, in milliseconds.
        pub remaining_ms: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// Who this machine is now.
    pub struct IdentityResult {
        /// The restores that led to this machine; zero in one that was booted.
        pub generation: u64,
        /// How this machine came to be: see the table of roles.
        pub role: u32,
        /// Tells the clones of one fork apart, from zero; zero in other machines.
        pub clone_index: u32,
        /// Random bytes that nobody else has, other ones in each call.
        pub entropy: [u8; 32],
    }
}

layout! {
    /// Which device is asked for.
    pub struct DeviceArgs {
        /// Devices are numbered from zero.
        pub index: u32,
        /// Zero.
        pub reserved: u32,
    }
}

layout! {
    /// Where a device is.
    pub struct DeviceResult {
        /// What it is: see the table of devices. NONE: there is no device of this number and above.
        pub kind: u32,
        /// Global system interrupt; all ones: it has none.
        pub interrupt: u32,
        /// First port, or guest-physical address, of its registers.
        pub base: u64,
        /// Length of its registers, in ports or bytes.
        pub len: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// [`DeviceResult::interrupt`]: the device has none.
pub const DEVICE_NO_INTERRUPT: u32 = u32::MAX;
/// [`DeviceResult::kind`]: no device.
pub const DEVICE_NONE: u32 = 0;
/// [`DeviceResult::kind`]: a virtio device behind memory-mapped registers.
pub const DEVICE_VIRTIO_MMIO: u32 = 1;
/// [`DeviceResult::kind`]: a serial port.
pub const DEVICE_SERIAL: u32 = 2;
/// [`DeviceResult::kind`]: pvpanic.
pub const DEVICE_PVPANIC: u32 = 3;
/// [`DeviceResult::kind`]: power registers.
pub const DEVICE_POWER: u32 = 4;
/// [`DeviceResult::kind`]: the doorbell.
pub const DEVICE_DOORBELL: u32 = 5;

/// Devices of [`DeviceResult::kind`]: number, name, meaning.
pub const DEVICES: &[(u32, &str, &str)] = &[
    (DEVICE_NONE, "NONE", "there is no device of this number and above"),
    (DEVICE_VIRTIO_MMIO, "VIRTIO_MMIO", "a virtio device; registers in memory, the interrupt is a level"),
    (DEVICE_SERIAL, "SERIAL", "a 16550A; registers are ports, the interrupt is an edge"),
    (DEVICE_PVPANIC, "PVPANIC", "QEMU's port for reports of a crash"),
    (DEVICE_POWER, "POWER", "ports: 0x34 to the first switches the machine off, 1 to the third resets it"),
    (DEVICE_DOORBELL, "DOORBELL", "the ports of these calls; the interrupt of events is a level"),
];

/// [`QuiesceArgs::op`]: what does the host want?
pub const QUIESCE_ASK: u32 = 0;
/// [`QuiesceArgs::op`]: the guest is at rest.
pub const QUIESCE_READY: u32 = 1;
/// Operations of [`QuiesceArgs::op`]: number, name, meaning.
pub const QUIESCE_OPS: &[(u32, &str, &str)] = &[
    (QUIESCE_ASK, "ASK", "what does the host want?"),
    (QUIESCE_READY, "READY", "the guest is at rest, until the event THAW"),
];

/// [`CheckpointResult::role`]: the machine was booted, or is the one that made the call.
pub const ROLE_ORIGINAL: u32 = 0;
/// [`CheckpointResult::role`]: it was made of a snapshot.
pub const ROLE_RESTORED: u32 = 1;
/// [`CheckpointResult::role`]: it was forked.
pub const ROLE_CLONE: u32 = 2;
/// [`CheckpointResult::role`]: it has moved here.
pub const ROLE_MIGRATED: u32 = 3;
/// Roles of [`CheckpointResult::role`] and [`IdentityResult::role`]: number, name, meaning.
pub const ROLES: &[(u32, &str, &str)] = &[
    (ROLE_ORIGINAL, "ORIGINAL", "the machine was booted, or is the one that made the call"),
    (ROLE_RESTORED, "RESTORED", "it was made of a snapshot"),
    (ROLE_CLONE, "CLONE", "it was forked: others like it may run beside it"),
    (ROLE_MIGRATED, "MIGRATED", "it has moved here from another host"),
];

/// Phases of [`MarkArgs::phase`]: number, name, meaning.
pub const PHASES: &[(u32, &str, &str)] = &[
    (0, "CUSTOM", "a mark of the guest's own, with a name"),
    (1, "KERNEL", "the kernel has begun"),
    (2, "MEMORY", "the kernel has its memory"),
    (3, "TIME", "the kernel has its clocks and timers"),
    (4, "PROCESSORS", "all processors run"),
    (5, "DRIVERS", "drivers are ready"),
    (6, "INIT", "the first program begins"),
    (7, "AGENT", "the agent has begun"),
    (8, "READY", "the agent is ready for work"),
    (9, "WORK_BEGIN", "a piece of work begins"),
    (10, "WORK_END", "a piece of work has ended"),
];

/// Reasons of [`ExitArgs::reason`]: number, name, meaning.
pub const EXIT_REASONS: &[(u32, &str, &str)] = &[
    (0, "DONE", "the guest has done its work"),
    (1, "FAILED", "the guest cannot go on"),
    (2, "PANIC", "the guest's kernel has crashed"),
    (3, "RESTART", "the guest asks to be started again"),
];

/// Every call, in the order of the numbers.
pub const CALLS: &[Call] = &[
    Call {
        number: number::FEATURES,
        name: "FEATURES",
        doc: "Answers what the host offers, and notes what the guest will use.",
        args: Some(&FeaturesArgs::LAYOUT),
        result: Some(&FeaturesResult::LAYOUT),
        errors: &[],
        feature: 0,
        cost: "nothing more",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::CONSOLE,
        name: "CONSOLE",
        doc: "Writes bytes to the console, behind what the serial port has written.",
        args: Some(&ConsoleArgs::LAYOUT),
        result: Some(&ConsoleResult::LAYOUT),
        errors: &[Status::BadLength, Status::BadPointer],
        feature: features::CONSOLE,
        cost: "a copy of the bytes",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::MARK,
        name: "MARK",
        doc: "Notes that a phase begins now. The host keeps the first 256 marks and shows their times.",
        args: Some(&MarkArgs::LAYOUT),
        result: None,
        errors: &[Status::BadArgument, Status::Full],
        feature: features::MARK,
        cost: "a reading of the host's clock",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::CLOCK,
        name: "CLOCK",
        doc: "Fills in the clock of the shared page, or, after the first time, corrects its wall clock.",
        args: Some(&ClockArgs::LAYOUT),
        result: Some(&ClockResult::LAYOUT),
        errors: &[],
        feature: features::CLOCK,
        cost: "two readings of the host's clocks; reading the page is no call",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::PARK,
        name: "PARK",
        doc: "Waits, as HLT does, until an interrupt is pending for the caller, and has one sent after a time. \
              Interrupts must be enabled, by an STI directly before the doorbell's OUT if none may be missed. The \
              status is written before the wait. The next PARK with a vector replaces the time of the last one.",
        args: Some(&ParkArgs::LAYOUT),
        result: None,
        errors: &[Status::BadArgument],
        feature: features::PARK,
        cost: "setting a timer of the host, if there is a vector",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::MEM_RELEASE,
        name: "MEM_RELEASE",
        doc: "Gives pages back to the host. They read as zero from then on, and may be used again at any time.",
        args: Some(&MemReleaseArgs::LAYOUT),
        result: Some(&MemReleaseResult::LAYOUT),
        errors: &[Status::BadLength, Status::BadPointer, Status::HostFailed],
        feature: features::MEM_RELEASE,
        cost: "a system call of the host for each range, and a page fault when a page is used again",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::EXIT,
        name: "EXIT",
        doc: "Ends the machine when everything that the console took is written. Does not return if it succeeds.",
        args: Some(&ExitArgs::LAYOUT),
        result: None,
        errors: &[Status::BadArgument],
        feature: features::EXIT,
        cost: "the machine",
        since_minor: 0,
        reserved: false,
    },
    Call {
        number: number::CHECKPOINT,
        name: "CHECKPOINT",
        doc: "Takes a snapshot and returns like fork: once here, when the snapshot is there, and once in each machine \
              that is made of it, with the role of who returns. The calling processor waits, the others run on. Where \
              the snapshot goes, and how many are kept, the host decides.",
        args: Some(&CheckpointArgs::LAYOUT),
        result: Some(&CheckpointResult::LAYOUT),
        errors: &[Status::BadArgument, Status::Full, Status::HostFailed],
        feature: features::CHECKPOINT,
        cost: "a copy of the memory that is in use",
        since_minor: 1,
        reserved: false,
    },
    Call {
        number: number::QUIESCE,
        name: "QUIESCE",
        doc: "Asks what the event QUIESCE is about, or says that the guest has come to rest: what it does not want to \
              find half done after a restore is done. The host takes its snapshot when every request is met or its \
              time is over, and signals THAW in the machine that goes on and in every one that is restored. READY \
              for a request that is over is STALE.",
        args: Some(&QuiesceArgs::LAYOUT),
        result: Some(&QuiesceResult::LAYOUT),
        errors: &[Status::BadArgument],
        feature: features::QUIESCE,
        cost: "nothing more",
        since_minor: 1,
        reserved: false,
    },
    Call {
        number: number::IDENTITY,
        name: "IDENTITY",
        doc: "Answers who this machine is, with randomness for it alone. After the event GENERATION all of it is new. \
              The answer is never from memory, whatever the sequence number.",
        args: None,
        result: Some(&IdentityResult::LAYOUT),
        errors: &[Status::HostFailed],
        feature: features::IDENTITY,
        cost: "the host's random numbers",
        since_minor: 1,
        reserved: false,
    },
    Call {
        number: number::DEVICE,
        name: "DEVICE",
        doc: "Answers where a device is and which interrupt it has, so that a guest finds its devices without ACPI. The \
              interrupts are those of the MP table.",
        args: Some(&DeviceArgs::LAYOUT),
        result: Some(&DeviceResult::LAYOUT),
        errors: &[],
        feature: features::DEVICE,
        cost: "nothing more",
        since_minor: 2,
        reserved: false,
    },
];

const _: () = {
    let mut at = 0;
    while at < CALLS.len() {
        assert!(CALLS[at].number as usize == at + 1, "the table is in order and has no gaps");
        assert!(CALLS[at].args_len() <= crate::block::PAYLOAD, "arguments fit the block");
        if let Some(result) = CALLS[at].result {
            assert!(result.size <= crate::block::PAYLOAD, "results fit the block");
        }
        at += 1;
    }
};
