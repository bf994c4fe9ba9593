//! What KVM_RUN came back with, read from the shared page into plain values.
//!
//! kvm-ioctls' own decoding merges the size and count of port accesses and drops the data of internal errors.

use std::mem::offset_of;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_NMI, KVM_EXIT_NOTIFY,
    KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_TPR_ACCESS, KVM_EXIT_UNKNOWN,
    KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
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
    pub(super) const MEMORY_FAULT_GPA: usize = super::DATA + 8;
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
        KVM_EXIT_MEMORY_FAULT => RunExit::Broken(format!(
            "the host could not give guest memory at {:#x} to KVM: free memory on the host",
            value::<u64>(page, at::MEMORY_FAULT_GPA)
        )),
        KVM_EXIT_NOTIFY => {
            RunExit::Broken("the guest kept the processor to itself longer than KVM lets it".to_owned())
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 0x1000;

    fn page(reason: u32) -> RunPage {
        let page = RunPage::without_kernel(PAGE);
        page.write(offset_of!(kvm_run, exit_reason), reason);
        page
    }

    fn broken(page: &RunPage) -> String {
        match read(page) {
            RunExit::Broken(text) => text,
            other => panic!("{other:?}"),
        }
    }

    fn internal(suberror: u32, words: &[u64]) -> RunPage {
        let page = page(KVM_EXIT_INTERNAL_ERROR);
        page.write(at::INTERNAL_SUBERROR, suberror);
        page.write(at::INTERNAL_COUNT, words.len() as u32);
        for (index, word) in words.iter().enumerate() {
            page.write(at::INTERNAL_DATA + 8 * index, *word);
        }
        page
    }

    #[test]
    fn the_layout_is_that_of_the_kernel() {
        use kvm_bindings::{
            kvm_run__bindgen_ty_1__bindgen_ty_4 as Io, kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio,
            kvm_run__bindgen_ty_1__bindgen_ty_8 as Hypercall,
            kvm_run__bindgen_ty_1__bindgen_ty_13 as Internal, kvm_run__bindgen_ty_1__bindgen_ty_23 as Msr,
            kvm_run__bindgen_ty_1__bindgen_ty_27 as MemoryFault,
        };
        for (ours, theirs) in [
            (at::IO_DIRECTION, offset_of!(Io, direction)),
            (at::IO_SIZE, offset_of!(Io, size)),
            (at::IO_PORT, offset_of!(Io, port)),
            (at::IO_COUNT, offset_of!(Io, count)),
            (at::IO_OFFSET, offset_of!(Io, data_offset)),
            (at::MMIO_GPA, offset_of!(Mmio, phys_addr)),
            (at::MMIO_BYTES, offset_of!(Mmio, data)),
            (at::MMIO_LEN, offset_of!(Mmio, len)),
            (at::MMIO_WRITE, offset_of!(Mmio, is_write)),
            (at::HYPERCALL_RESULT, offset_of!(Hypercall, ret)),
            (at::INTERNAL_SUBERROR, offset_of!(Internal, suberror)),
            (at::INTERNAL_COUNT, offset_of!(Internal, ndata)),
            (at::INTERNAL_DATA, offset_of!(Internal, data)),
            (at::MSR_ERROR, offset_of!(Msr, error)),
            (at::MSR_INDEX, offset_of!(Msr, index)),
            (at::MEMORY_FAULT_GPA, offset_of!(MemoryFault, gpa)),
        ] {
            assert_eq!(ours, DATA + theirs);
        }
    }

    #[test]
    fn every_reason_has_an_outcome() {
        let again = [
            KVM_EXIT_INTR,
            KVM_EXIT_IRQ_WINDOW_OPEN,
            KVM_EXIT_SET_TPR,
            KVM_EXIT_TPR_ACCESS,
            KVM_EXIT_NMI,
            KVM_EXIT_X86_BUS_LOCK,
        ];
        // Beyond the last that Linux has, too.
        for reason in (0..=100).chain([u32::MAX - 1, u32::MAX]) {
            let found = read(&page(reason));
            match reason {
                reason if again.contains(&reason) => assert_eq!(found, RunExit::Again, "{reason}"),
                KVM_EXIT_IO => assert!(matches!(found, RunExit::Port(_))),
                KVM_EXIT_MMIO => assert!(matches!(found, RunExit::Mmio { .. })),
                KVM_EXIT_IOAPIC_EOI => assert_eq!(found, RunExit::Eoi(0)),
                KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => assert_eq!(found, RunExit::Msr { index: 0 }),
                KVM_EXIT_HYPERCALL => assert_eq!(found, RunExit::Hypercall),
                KVM_EXIT_DEBUG => assert_eq!(found, RunExit::Debug),
                KVM_EXIT_HLT => assert_eq!(found, RunExit::Halted),
                KVM_EXIT_SHUTDOWN => assert_eq!(found, RunExit::Shutdown),
                KVM_EXIT_SYSTEM_EVENT => assert_eq!(found, RunExit::SystemEvent { kind: 0 }),
                // Reasons of other architectures, of what was never asked for, and those to come.
                _ => match found {
                    RunExit::Broken(text) => assert!(text.len() > 20 && !text.contains('\n'), "{text}"),
                    other => panic!("{reason}: {other:?}"),
                },
            }
        }
    }

    #[test]
    fn what_a_vcpu_does_not_survive_is_told_with_its_numbers() {
        let entry = page(KVM_EXIT_FAIL_ENTRY);
        entry.write(DATA, 0x8000_0021_u64);
        entry.write(DATA + 8, 3u32);
        assert!(
            broken(&entry)
                .starts_with("the processor refused to enter the guest (reason 0x80000021 on cpu 3)")
        );
        let unknown = page(KVM_EXIT_UNKNOWN);
        unknown.write(DATA, 0x4b_u64);
        assert_eq!(broken(&unknown), "KVM does not know the processor's exit reason 0x4b");
        let exception = page(KVM_EXIT_EXCEPTION);
        exception.write(DATA, 14u32);
        exception.write(DATA + 4, 2u32);
        assert_eq!(broken(&exception), "exception 14 with error code 0x2 came out of the guest");
        let fault = page(KVM_EXIT_MEMORY_FAULT);
        fault.write(DATA + 8, 0x1234_5000_u64);
        assert!(broken(&fault).contains("guest memory at 0x12345000"));
        assert_eq!(broken(&page(77)), "KVM left the guest for a reason unknown here (77)");
    }

    #[test]
    fn every_internal_error_has_an_outcome_whatever_its_data_says() {
        for suberror in (0..20).chain([u32::MAX]) {
            // Also more words than there is room for.
            for count in [0, 1, 3, 16, 17, u32::MAX] {
                let page = internal(suberror, &[1, 2, 3]);
                page.write(at::INTERNAL_COUNT, count);
                match read(&page) {
                    RunExit::EmulationFailure { bytes } => {
                        assert_eq!(suberror, KVM_INTERNAL_ERROR_EMULATION);
                        assert!(bytes.len() <= 15);
                    }
                    RunExit::Broken(text) => {
                        assert_ne!(suberror, KVM_INTERNAL_ERROR_EMULATION);
                        assert!(!text.contains('\n') && text.matches("0x").count() <= 16, "{text}");
                    }
                    other => panic!("{suberror}: {other:?}"),
                }
            }
        }
        let words = [0xaa, 0xbb];
        assert_eq!(
            broken(&internal(KVM_INTERNAL_ERROR_SIMUL_EX, &words)),
            "KVM met two exceptions at once: 0xaa 0xbb"
        );
        assert_eq!(
            broken(&internal(KVM_INTERNAL_ERROR_DELIVERY_EV, &words)),
            "KVM could not deliver an event: 0xaa 0xbb"
        );
        assert_eq!(
            broken(&internal(KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, &words)),
            "KVM met an unexpected exit of the processor: 0xaa 0xbb"
        );
        assert_eq!(broken(&internal(9, &words)), "internal error 9 of KVM: 0xaa 0xbb");
    }

    #[test]
    fn the_bytes_of_an_instruction_that_kvm_cannot_are_taken_if_it_gives_them() {
        let page = internal(KVM_INTERNAL_ERROR_EMULATION, &[1, 0, 0]);
        page.write(at::INSTRUCTION_SIZE, 3u8);
        page.write_bytes(at::INSTRUCTION, &[0x0f, 0x01, 0xca]);
        assert_eq!(read(&page), RunExit::EmulationFailure { bytes: vec![0x0f, 0x01, 0xca] });
        // More bytes than an instruction has.
        page.write(at::INSTRUCTION_SIZE, 255u8);
        assert!(matches!(read(&page), RunExit::EmulationFailure { bytes } if bytes.len() == 15));
        // Without the flag, or without enough words for it.
        page.write(at::INTERNAL_DATA, 0u64);
        assert_eq!(read(&page), RunExit::EmulationFailure { bytes: Vec::new() });
        page.write(at::INTERNAL_DATA, 1u64);
        page.write(at::INTERNAL_COUNT, 2u32);
        assert_eq!(read(&page), RunExit::EmulationFailure { bytes: Vec::new() });
    }

    #[test]
    fn a_device_access_of_an_impossible_length_does_not_leave_its_bytes() {
        let page = page(KVM_EXIT_MMIO);
        page.write(at::MMIO_LEN, u32::MAX);
        assert!(matches!(read(&page), RunExit::Mmio { len: 8, .. }));
    }
}
