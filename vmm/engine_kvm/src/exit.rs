//! What KVM_RUN came back with, read from the shared page into plain values.
//!
//! kvm-ioctls' own decoding merges the size and count of port accesses and drops the data of internal errors.

use std::mem::offset_of;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_NMI, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS, KVM_EXIT_UNKNOWN, KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use vm_memory::ByteValued;

use crate::run_page::RunPage;

/// Where the union of exit data begins.
const DATA: usize = offset_of!(kvm_run, __bindgen_anon_1);
/// Offsets in the exit data of each kind, as include/uapi/linux/kvm.h of Linux lays them out.
mod at {
    pub(super) const IO_DIRECTION: usize = super::DATA;
    pub(super) const IO_SIZE: usize = super::DATA + 1;
    pub(super) const IO_PORT: usize = super::DATA + 2;
    pub(super) const IO_COUNT: usize = super::DATA + 4;
    pub(super) const IO_OFFSET: usize = super::DATA + 8;
    pub(super) const MMIO_GPA: usize = super::DATA;
    pub(super) const MMIO_BYTES: usize = super::DATA + 8;
    pub(super) const MMIO_LEN: usize = super::DATA + 16;
    pub(super) const MMIO_WRITE: usize = super::DATA + 20;
    pub(super) const INTERNAL_SUBERROR: usize = super::DATA;
    pub(super) const INTERNAL_COUNT: usize = super::DATA + 4;
    pub(super) const INTERNAL_DATA: usize = super::DATA + 8;
    pub(super) const INSTRUCTION_SIZE: usize = super::DATA + 16;
    pub(super) const INSTRUCTION: usize = super::DATA + 17;
    pub(super) const MSR_ERROR: usize = super::DATA;
    pub(super) const MSR_INDEX: usize = super::DATA + 12;
    pub(super) const HYPERCALL_RESULT: usize = super::DATA + 56;
}

/// A port access of `count` elements (more than one: a string instruction).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortAccess {
    pub(crate) write: bool,
    /// Bytes of one element: 1, 2 or 4.
    pub(crate) size: usize,
    pub(crate) port: u16,
    pub(crate) count: usize,
    /// Where the elements are in the shared page.
    pub(crate) offset: usize,
}

/// Why KVM_RUN returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RunExit {
    Port(PortAccess),
    Mmio {
        write: bool,
        gpa: u64,
        bytes: [u8; 8],
        len: usize,
    },
    Eoi(u8),
    /// An MSR that KVM leaves to user space.
    Msr {
        index: u32,
    },
    Hypercall,
    Debug,
    /// Nothing for us to do: run again.
    Again,
    /// HLT without an APIC in the kernel.
    Halted,
    Shutdown,
    /// The machine asked for an end by a paravirtual way.
    SystemEvent {
        kind: u32,
    },
    /// The emulator met an instruction that it does not know, or cannot execute here.
    EmulationFailure {
        bytes: Vec<u8>,
    },
    /// Anything else that the vCPU does not survive; the text says what.
    Broken(String),
}

fn value<T: ByteValued + Default>(page: &RunPage, offset: usize) -> T {
    page.read(offset).unwrap_or_default()
}

/// Reads what the last KVM_RUN left.
pub(crate) fn read(page: &RunPage) -> RunExit {
    let reason: u32 = value(page, offset_of!(kvm_run, exit_reason));
    match reason {
        KVM_EXIT_IO => RunExit::Port(PortAccess {
            write: u32::from(value::<u8>(page, at::IO_DIRECTION)) == KVM_EXIT_IO_OUT,
            size: value::<u8>(page, at::IO_SIZE).into(),
            port: value(page, at::IO_PORT),
            count: value::<u32>(page, at::IO_COUNT) as usize,
            offset: usize::try_from(value::<u64>(page, at::IO_OFFSET)).unwrap_or(usize::MAX),
        }),
        KVM_EXIT_MMIO => RunExit::Mmio {
            write: value::<u8>(page, at::MMIO_WRITE) != 0,
            gpa: value(page, at::MMIO_GPA),
            bytes: value::<u64>(page, at::MMIO_BYTES).to_le_bytes(),
            len: (value::<u32>(page, at::MMIO_LEN) as usize).min(8),
        },
        KVM_EXIT_IOAPIC_EOI => RunExit::Eoi(value(page, DATA)),
        KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => RunExit::Msr { index: value(page, at::MSR_INDEX) },
        KVM_EXIT_HYPERCALL => RunExit::Hypercall,
        KVM_EXIT_DEBUG => RunExit::Debug,
        KVM_EXIT_INTR
        | KVM_EXIT_IRQ_WINDOW_OPEN
        | KVM_EXIT_SET_TPR
        | KVM_EXIT_TPR_ACCESS
        | KVM_EXIT_NMI
        | KVM_EXIT_X86_BUS_LOCK => RunExit::Again,
        KVM_EXIT_HLT => RunExit::Halted,
        KVM_EXIT_SHUTDOWN => RunExit::Shutdown,
        KVM_EXIT_SYSTEM_EVENT => RunExit::SystemEvent { kind: value(page, DATA) },
        KVM_EXIT_INTERNAL_ERROR => internal_error(page),
        KVM_EXIT_FAIL_ENTRY => RunExit::Broken(format!(
            "the processor refused to enter the guest (reason {:#x} on cpu {}): the guest's state is invalid, or the \
             host's KVM has a fault",
            value::<u64>(page, DATA),
            value::<u32>(page, DATA + 8)
        )),
        KVM_EXIT_EXCEPTION => RunExit::Broken(format!(
            "exception {} with error code {:#x} came out of the guest",
            value::<u32>(page, DATA),
            value::<u32>(page, DATA + 4)
        )),
        KVM_EXIT_UNKNOWN => RunExit::Broken(format!(
            "KVM does not know the processor's exit reason {:#x}",
            value::<u64>(page, DATA)
        )),
        other => RunExit::Broken(format!("KVM left the guest for a reason unknown here ({other})")),
    }
}

fn internal_error(page: &RunPage) -> RunExit {
    let count = value::<u32>(page, at::INTERNAL_COUNT).min(16);
    let words = || -> Vec<String> {
        (0..count as usize).map(|i| format!("{:#x}", value::<u64>(page, at::INTERNAL_DATA + 8 * i))).collect()
    };
    match value::<u32>(page, at::INTERNAL_SUBERROR) {
        KVM_INTERNAL_ERROR_EMULATION => {
            let flags = if count >= 3 { value::<u64>(page, at::INTERNAL_DATA) } else { 0 };
            let mut bytes = Vec::new();
            if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0 {
                bytes = vec![0; value::<u8>(page, at::INSTRUCTION_SIZE).min(15).into()];
                page.read_bytes(at::INSTRUCTION, &mut bytes);
            }
            RunExit::EmulationFailure { bytes }
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => {
            RunExit::Broken(format!("KVM met two exceptions at once: {}", words().join(" ")))
        }
        KVM_INTERNAL_ERROR_DELIVERY_EV => {
            RunExit::Broken(format!("KVM could not deliver an event: {}", words().join(" ")))
        }
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            RunExit::Broken(format!("KVM met an unexpected exit of the processor: {}", words().join(" ")))
        }
        other => RunExit::Broken(format!("internal error {other} of KVM: {}", words().join(" "))),
    }
}

/// Answers an MSR access with #GP.
pub(crate) fn refuse_msr(page: &RunPage) {
    page.write(at::MSR_ERROR, 1u8);
}

/// Answers a hypercall with -ENOSYS, as KVM does for numbers that it does not know.
pub(crate) fn refuse_hypercall(page: &RunPage) {
    page.write(at::HYPERCALL_RESULT, (-1000i64) as u64);
}

/// Completes a load from a device.
pub(crate) fn answer_mmio(page: &RunPage, bytes: &[u8]) {
    page.write_bytes(at::MMIO_BYTES, bytes);
}

/// What a system event is, for people; true when the machine asked to end.
pub(crate) fn system_event(kind: u32) -> &'static str {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => "shutdown",
        KVM_SYSTEM_EVENT_RESET => "reset",
        KVM_SYSTEM_EVENT_CRASH => "crash",
        _ => "unknown event",
    }
}
