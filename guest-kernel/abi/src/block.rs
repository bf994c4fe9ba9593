//! The argument block of a call.

use crate::layout::layout;

/// Alignment of an argument block in guest-physical memory, in bytes.
pub const ALIGN: u64 = 64;
/// Space for a call's arguments, and as much for its results, in bytes.
pub const PAYLOAD: usize = 48;
/// Channels that a guest has: one for each processor that calls, so that their sequence numbers do not meet.
pub const CHANNELS: u32 = 256;

layout! {
    /// What the doorbell is told of: 128 bytes of guest memory, aligned to 64, in one piece.
    ///
    /// The guest fills it, sets `status` to PENDING and writes the block's address, divided by 64, to the doorbell.
    /// A status that is still PENDING afterwards means that the address was not one of memory.
    pub struct Block {
        /// Major version of the ABI that the caller was written for.
        pub version: u16,
        /// Number of the call.
        pub number: u16,
        /// Bytes of `args` that the call takes: exactly the size of its arguments.
        pub args_len: u32,
        /// Zero, or a number that grows with each call on the channel. A call with the channel's last number again
        /// is answered from memory and not made twice; an older number is STALE.
        pub sequence: u64,
        /// Whose sequence number it is, below 256: usually the processor's APIC id.
        pub channel: u32,
        /// Written by the host: how the call ended.
        pub status: i32,
        /// Written by the host: bytes of `result` that are valid.
        pub result_len: u32,
        /// Zero.
        pub flags: u32,
        /// The arguments.
        pub args: [u8; 48],
        /// Written by the host: the results.
        pub result: [u8; 48],
    }
}

/// Offset of the part of a block that the host writes for the status: `status` and `result_len`.
pub const STATUS_OFFSET: u64 = core::mem::offset_of!(Block, status) as u64;
/// Offset of the results.
pub const RESULT_OFFSET: u64 = core::mem::offset_of!(Block, result) as u64;

const _: () = assert!(Block::SIZE == 128 && STATUS_OFFSET == 20 && RESULT_OFFSET == 80);

macro_rules! statuses {
    ($($(#[doc = $doc:literal])+ $name:ident = $value:literal, $constant:literal;)+) => {
        /// How a call ended.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum Status {
            $($(#[doc = $doc])+ $name = $value,)+
        }

        impl Status {
            /// Every status.
            pub const ALL: &[Status] = &[$(Status::$name),+];

            /// Its name in C, without prefix.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Status::$name => $constant,)+
                }
            }

            /// What it says.
            pub const fn doc(self) -> &'static str {
                match self {
                    $(Status::$name => concat!($($doc, "\n"),+),)+
                }
            }

            /// The status with this value.
            pub const fn from_value(value: i32) -> Option<Status> {
                match value {
                    $($value => Some(Status::$name),)+
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// The call was made.
    Ok = 0, "OK";
    /// Set by the caller before it calls; the host never answers it.
    Pending = 1, "PENDING";
    /// There is no call of this number.
    UnknownCall = -1, "UNKNOWN_CALL";
    /// The block's version is not the host's major version.
    BadVersion = -2, "BAD_VERSION";
    /// `args_len` is not the size of the call's arguments, or a length in them is above its cap.
    BadLength = -3, "BAD_LENGTH";
    /// An address in the arguments is not one of memory, or not aligned.
    BadPointer = -4, "BAD_POINTER";
    /// Another argument is out of its range, or a reserved field is not zero.
    BadArgument = -5, "BAD_ARGUMENT";
    /// The sequence number is lower than the channel's last one, or was used for another call; or what the call
    /// answers is over.
    Stale = -6, "STALE";
    /// The call exists, but this host does not offer it.
    Unsupported = -7, "UNSUPPORTED";
    /// The host keeps no more of these, or not now.
    Full = -8, "FULL";
    /// The host's own system refused; trying again may help.
    HostFailed = -9, "HOST_FAILED";
}
