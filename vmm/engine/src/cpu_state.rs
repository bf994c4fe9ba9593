//! The state of one processor, in the terms of the architecture manuals and of no engine.
//!
//! There is one canonical form, so that two engines' states can be compared field by field:
//! - an unusable segment has its selector and its `unusable` flag, everything else zero (FS and GS keep their base);
//! - the XSAVE area is in the standard layout, components in their initial state have their `XSTATE_BV` bit
//!   clear and their bytes zero;
//! - the APIC id register of [`LapicState`] is in x2APIC form (the plain number);
//! - MSRs are sorted by index and only those of [`SAVED_MSRS`] appear.
//!
//! It is also the form in which a snapshot keeps a processor (docs/snapshot-format.md): a field that is added, renamed
//! or gone is a new version of that section.

mod saved;

use serde::{Deserialize, Serialize};

/// General registers in the encoding order of the manual, then RIP and RFLAGS.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneralRegisters {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Address of the next instruction (an offset in CS).
    pub rip: u64,
    /// Flags; bit 1 is always set.
    pub rflags: u64,
}

/// A segment register with its hidden part (Intel SDM volume 3, 3.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Descriptor type, bits 3:0 of the access byte (accessed bit included).
    pub kind: u8,
    /// True for code and data, false for system segments (the S bit).
    pub code_or_data: bool,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Present.
    pub present: bool,
    /// Available for software.
    pub avl: bool,
    /// 64-bit code.
    pub long: bool,
    /// Default operand size or big stack.
    pub db: bool,
    /// Granularity, as the descriptor had it.
    pub granularity: bool,
    /// The register was loaded with a null selector or is otherwise not to be used.
    pub unusable: bool,
}

impl Segment {
    /// Code or data over all addresses from 0 on, at the privilege level that its selector asks for: 64-bit code if `long`, else
    /// of 32 bits. `kind` is 3 for data that was written to, 0xb for code that may be read.
    pub fn flat(selector: u16, kind: u8, long: bool) -> Segment {
        Segment {
            selector,
            limit: u32::MAX,
            kind,
            code_or_data: true,
            dpl: (selector & 3) as u8,
            present: true,
            long,
            db: !long,
            granularity: true,
            ..Segment::default()
        }
    }
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Segment and descriptor-table registers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are the manual's registers")]
pub struct SegmentRegisters {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
}

/// Control registers and the extended ones beside them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are the manual's registers")]
pub struct ControlRegisters {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// Task priority, 0 to 15; mirrors bits 7:4 of the APIC's TPR.
    pub cr8: u64,
    pub efer: u64,
    pub xcr0: u64,
}

/// Whether a processor executes (Intel MultiProcessor Specification, appendix B.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Runnable,
    /// Executed HLT and waits for an interrupt.
    Halted,
    /// Application processor after RESET or INIT, waits for a start-up message.
    WaitForSipi,
}

/// An exception that was recognised and not yet delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PendingException {
    /// Vector 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
}

/// Events between instructions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// Exception to deliver before the next instruction.
    pub exception: Option<PendingException>,
    /// External interrupt that the APIC has acknowledged and that is not delivered yet.
    pub interrupt: Option<u8>,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// The last instruction was STI that set IF: no interrupt before the next one ends.
    pub sti_shadow: bool,
    /// The last instruction loaded SS: no interrupt and no debug trap before the next one ends.
    pub mov_ss_shadow: bool,
}

/// The local APIC (Intel SDM volume 3, chapter 12).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LapicState {
    /// The registers at offsets 0x000, 0x010, … 0x3f0; the id at index 2 in x2APIC form.
    #[serde(with = "saved::words")]
    pub registers: [u32; 64],
}

impl Default for LapicState {
    fn default() -> Self {
        LapicState { registers: [0; 64] }
    }
}

/// The time-stamp counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tsc {
    /// Value at the moment the state was taken.
    pub value: u64,
    /// Ticks per millisecond.
    pub frequency_khz: u32,
}

/// Everything that software can see of one processor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// General registers.
    pub regs: GeneralRegisters,
    /// Segments and descriptor tables.
    pub segments: SegmentRegisters,
    /// Control registers.
    pub control: ControlRegisters,
    /// DR0 to DR3.
    pub debug_addresses: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XSAVE area in the standard layout, 576 bytes or more (Intel SDM volume 1, 13.4).
    #[serde(with = "saved::digits")]
    pub xsave: Vec<u8>,
    /// Model-specific registers by index, sorted.
    pub msrs: Vec<(u32, u64)>,
    /// Local APIC; `IA32_APIC_BASE` is among the MSRs.
    pub lapic: LapicState,
    /// Events between instructions.
    pub events: Events,
    /// Time-stamp counter.
    pub tsc: Tsc,
    /// Whether it executes.
    pub mp_state: MpState,
}

impl CpuState {
    /// The fields in which `other` differs, with both values: `regs.rip: 4096 or 8192`.
    pub fn differences(&self, other: &CpuState) -> Vec<String> {
        let mut found = Vec::new();
        match (serde_json::to_value(self), serde_json::to_value(other)) {
            (Ok(one), Ok(two)) => compare("", &one, &two, &mut found),
            // They are numbers and text; nothing of it cannot be written down.
            _ => found.push("the states cannot be compared".to_owned()),
        }
        found
    }
}

fn compare(path: &str, one: &serde_json::Value, two: &serde_json::Value, found: &mut Vec<String>) {
    use serde_json::Value::{Array, Object};
    let inner = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match (one, two) {
        (Object(ones), Object(twos)) if ones.len() == twos.len() => {
            for (name, one) in ones {
                compare(&inner(name), one, twos.get(name).unwrap_or(&serde_json::Value::Null), found);
            }
        }
        (Array(ones), Array(twos)) if ones.len() == twos.len() => {
            for (index, (one, two)) in ones.iter().zip(twos).enumerate() {
                compare(&inner(&index.to_string()), one, two, found);
            }
        }
        _ if one == two => {}
        _ => found.push(format!("{path}: {one} or {two}")),
    }
}

/// Model-specific registers, by the manual's names.
#[expect(missing_docs, reason = "the constants are the manual's registers")]
pub mod msr {
    pub const IA32_TSC: u32 = 0x10;
    pub const IA32_APIC_BASE: u32 = 0x1b;
    pub const IA32_TSC_ADJUST: u32 = 0x3b;
    pub const IA32_BIOS_SIGN_ID: u32 = 0x8b;
    pub const IA32_MTRRCAP: u32 = 0xfe;
    pub const IA32_SYSENTER_CS: u32 = 0x174;
    pub const IA32_SYSENTER_ESP: u32 = 0x175;
    pub const IA32_SYSENTER_EIP: u32 = 0x176;
    pub const IA32_MISC_ENABLE: u32 = 0x1a0;
    pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const IA32_PAT: u32 = 0x277;
    pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const KVM_WALL_CLOCK: u32 = 0x11;
    pub const KVM_SYSTEM_TIME: u32 = 0x12;
    pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
}

/// The MSRs that belong to [`CpuState::msrs`]. FS and GS base are in the segments, EFER among the control
/// registers, the TSC in [`Tsc`] and the x2APIC registers in [`LapicState`].
pub const SAVED_MSRS: &[u32] = &[
    msr::IA32_APIC_BASE,
    msr::IA32_TSC_ADJUST,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_MISC_ENABLE,
    msr::IA32_PAT,
    msr::IA32_MTRR_DEF_TYPE,
    msr::IA32_TSC_DEADLINE,
    msr::KVM_WALL_CLOCK_NEW,
    msr::KVM_SYSTEM_TIME_NEW,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written_and_differences_name_the_field() {
        let mut state = CpuState { xsave: vec![1; 600], msrs: vec![(0x10, u64::MAX)], ..Default::default() };
        state.lapic.registers[63] = u32::MAX;
        state.events.exception = Some(PendingException { vector: 14, error_code: Some(2) });
        let text = serde_json::to_string(&state).unwrap();
        let mut other: CpuState = serde_json::from_str(&text).unwrap();
        assert_eq!(state, other);
        assert!(state.differences(&other).is_empty());
        other.regs.gpr[3] = 7;
        other.events.exception = None;
        let mut found = state.differences(&other);
        found.sort();
        assert_eq!(
            found,
            ["events.exception: {\"error_code\":2,\"vector\":14} or null", "regs.gpr.3: 0 or 7"]
        );
        assert!(serde_json::from_str::<CpuState>(&text.replacen("\"cr8\"", "\"cr9\"", 1)).is_err());
    }
}
