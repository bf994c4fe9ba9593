//! General, segment and control registers.

use harrier_engine::cpu_state::{
    ControlRegisters, DescriptorTable, GeneralRegisters, Segment, SegmentRegisters,
};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

pub(crate) fn regs_from_kvm(regs: &kvm_regs) -> GeneralRegisters {
    GeneralRegisters {
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags | 2,
    }
}

pub(crate) fn regs_to_kvm(regs: &GeneralRegisters) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = regs.gpr;
    kvm_regs {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: regs.rip,
        rflags: regs.rflags | 2,
    }
}

/// `keep_base`: FS and GS keep their base when they are unusable.
fn segment_from_kvm(segment: &kvm_segment, keep_base: bool) -> Segment {
    // AMD's processors know no unusable bit: there a segment that is not present is unusable.
    if segment.unusable != 0 || segment.present == 0 {
        let base = if keep_base { segment.base } else { 0 };
        return Segment { selector: segment.selector, base, unusable: true, ..Segment::default() };
    }
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        kind: segment.type_,
        code_or_data: segment.s != 0,
        dpl: segment.dpl,
        present: true,
        avl: segment.avl != 0,
        long: segment.l != 0,
        db: segment.db != 0,
        granularity: segment.g != 0,
        unusable: false,
    }
}

pub(crate) fn segment_to_kvm(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.db.into(),
        s: segment.code_or_data.into(),
        l: segment.long.into(),
        g: segment.granularity.into(),
        avl: segment.avl.into(),
        unusable: segment.unusable.into(),
        padding: 0,
    }
}

fn table_from_kvm(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit }
}

fn table_to_kvm(table: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

pub(super) fn segments_from_kvm(sregs: &kvm_sregs) -> SegmentRegisters {
    SegmentRegisters {
        es: segment_from_kvm(&sregs.es, false),
        cs: segment_from_kvm(&sregs.cs, false),
        ss: segment_from_kvm(&sregs.ss, false),
        ds: segment_from_kvm(&sregs.ds, false),
        fs: segment_from_kvm(&sregs.fs, true),
        gs: segment_from_kvm(&sregs.gs, true),
        ldtr: segment_from_kvm(&sregs.ldt, false),
        tr: segment_from_kvm(&sregs.tr, false),
        gdtr: table_from_kvm(&sregs.gdt),
        idtr: table_from_kvm(&sregs.idt),
    }
}

pub(super) fn control_from_kvm(sregs: &kvm_sregs, xcr0: u64) -> ControlRegisters {
    ControlRegisters {
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        xcr0,
    }
}

/// Everything of `KVM_SET_SREGS`. The bitmap of pending interrupts stays empty: events say that.
pub(super) fn sregs_to_kvm(
    segments: &SegmentRegisters,
    control: &ControlRegisters,
    apic_base: u64,
) -> kvm_sregs {
    let mut ss = segment_to_kvm(&segments.ss);
    if segments.ss.unusable {
        // The processor keeps the current privilege level in SS, a null SS included.
        ss.dpl = segments.cs.dpl;
    }
    kvm_sregs {
        es: segment_to_kvm(&segments.es),
        cs: segment_to_kvm(&segments.cs),
        ss,
        ds: segment_to_kvm(&segments.ds),
        fs: segment_to_kvm(&segments.fs),
        gs: segment_to_kvm(&segments.gs),
        ldt: segment_to_kvm(&segments.ldtr),
        tr: segment_to_kvm(&segments.tr),
        gdt: table_to_kvm(segments.gdtr),
        idt: table_to_kvm(segments.idtr),
        cr0: control.cr0,
        cr2: control.cr2,
        cr3: control.cr3,
        cr4: control.cr4,
        cr8: control.cr8,
        efer: control.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> Segment {
        Segment {
            selector: 0x10,
            base: 0x1234_5000,
            limit: 0xffff_ffff,
            kind: 0xb,
            code_or_data: true,
            dpl: 3,
            present: true,
            avl: true,
            long: true,
            db: false,
            granularity: true,
            unusable: false,
        }
    }

    #[test]
    fn usable_segments_survive_the_way_to_kvm_and_back() {
        assert_eq!(segment_from_kvm(&segment_to_kvm(&usable()), false), usable());
    }

    #[test]
    fn of_an_unusable_segment_only_the_selector_and_the_base_of_fs_and_gs_are_left() {
        let kvm = kvm_segment { present: 0, unusable: 0, ..segment_to_kvm(&usable()) };
        let left = Segment { selector: 0x10, unusable: true, ..Segment::default() };
        assert_eq!(segment_from_kvm(&kvm, false), left);
        assert_eq!(segment_from_kvm(&kvm, true), Segment { base: 0x1234_5000, ..left });
    }

    #[test]
    fn a_null_stack_segment_keeps_the_privilege_level_of_the_code() {
        let null = Segment { unusable: true, ..Segment::default() };
        let segments = SegmentRegisters { cs: usable(), ss: null, ..SegmentRegisters::default() };
        assert_eq!(sregs_to_kvm(&segments, &ControlRegisters::default(), 0).ss.dpl, 3);
    }

    #[test]
    fn general_registers_survive_the_way_to_kvm_and_back() {
        let regs = GeneralRegisters { gpr: std::array::from_fn(|i| i as u64 + 1), rip: 0x100, rflags: 0x246 };
        assert_eq!(regs_from_kvm(&regs_to_kvm(&regs)), regs);
    }
}
