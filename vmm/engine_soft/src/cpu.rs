//! One software processor: its registers and what handlers need to execute on it.

use std::sync::Arc;

use harrier_engine::cpu_state::{DescriptorTable, MpState, PendingException, Segment};

use crate::decode::op::{Op, REG_BLOCK, Step, Stop};
use crate::fault::{Fault, vector};
use crate::fpu::Fpu;
use crate::io_slot::IoSlot;
use crate::lapic::Lapic;
use crate::lend::LentPages;
use crate::mmu::Mmu;
use crate::native::alu::Flags;
use crate::native::mem::Word;
use crate::vm::Shared;
use harrier_engine::cpuid::Features;

pub(crate) const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
pub(crate) const RSP: usize = 4;
pub(crate) const RBP: usize = 5;
pub(crate) const RSI: usize = 6;
pub(crate) const RDI: usize = 7;
pub(crate) const R11: usize = 11;

/// Indices into [`Cpu::seg`], in the manual's encoding order.
pub(crate) const ES: usize = 0;
pub(crate) const CS: usize = 1;
pub(crate) const SS: usize = 2;
pub(crate) const DS: usize = 3;
pub(crate) const FS: usize = 4;
pub(crate) const GS: usize = 5;

/// Bits of RFLAGS that are not status flags.
pub(crate) mod rflags {
    pub(crate) const FIXED: u64 = 2;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const VIF: u64 = 1 << 19;
    pub(crate) const VIP: u64 = 1 << 20;
    pub(crate) const ID: u64 = 1 << 21;
}

/// Bits of CR0.
pub(crate) mod cr0 {
    pub(crate) const PE: u64 = 1;
    pub(crate) const MP: u64 = 1 << 1;
    pub(crate) const EM: u64 = 1 << 2;
    pub(crate) const TS: u64 = 1 << 3;
    pub(crate) const ET: u64 = 1 << 4;
    pub(crate) const NE: u64 = 1 << 5;
    pub(crate) const WP: u64 = 1 << 16;
    pub(crate) const AM: u64 = 1 << 18;
    pub(crate) const NW: u64 = 1 << 29;
    pub(crate) const CD: u64 = 1 << 30;
    pub(crate) const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub(crate) mod cr4 {
    pub(crate) const VME: u64 = 1;
    pub(crate) const PVI: u64 = 1 << 1;
    pub(crate) const TSD: u64 = 1 << 2;
    pub(crate) const DE: u64 = 1 << 3;
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const MCE: u64 = 1 << 6;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const PCE: u64 = 1 << 8;
    pub(crate) const OSFXSR: u64 = 1 << 9;
    pub(crate) const OSXMMEXCPT: u64 = 1 << 10;
    pub(crate) const UMIP: u64 = 1 << 11;
    pub(crate) const FSGSBASE: u64 = 1 << 16;
    pub(crate) const PCIDE: u64 = 1 << 17;
    pub(crate) const OSXSAVE: u64 = 1 << 18;
    pub(crate) const SMEP: u64 = 1 << 20;
    pub(crate) const SMAP: u64 = 1 << 21;
}

/// Bits of EFER.
pub(crate) mod efer {
    pub(crate) const SCE: u64 = 1;
    pub(crate) const LME: u64 = 1 << 8;
    pub(crate) const LMA: u64 = 1 << 10;
    pub(crate) const NXE: u64 = 1 << 11;
    pub(crate) const FFXSR: u64 = 1 << 14;
}

/// Model-specific registers that are only stored (the others live where they act).
#[derive(Clone, Debug, Default)]
pub(crate) struct Msrs {
    pub apic_base: u64,
    pub tsc_adjust: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub misc_enable: u64,
    pub pat: u64,
    pub mtrr_def_type: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub kvm_wall_clock: u64,
    pub kvm_system_time: u64,
}

/// The processor. Handlers get `&mut Cpu`; the code cache is kept outside it.
pub(crate) struct Cpu {
    /// General registers in slots 0 to 15; see [`crate::decode::op`] for the others.
    pub regs: [u64; 32],
    /// Status flags.
    pub flags: Flags,
    /// The other bits of RFLAGS (status bits zero here).
    pub rflags: u64,
    /// Next instruction; stale inside a block, where [`Cpu::op_rip`] and [`Cpu::next_rip`] tell.
    pub rip: u64,
    /// Linear base of the segment slots ES CS SS DS FS GS flat flat; what addresses add.
    pub seg_base: [u64; 8],
    /// Mask of RIP: 64, 32 or 16 bits by the code segment.
    pub rip_mask: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// The mode the decoder needs; see [`crate::decode::Mode`].
    pub mode: crate::decode::Mode,
    /// Address translation and guest memory.
    pub mmu: Mmu,
    /// The fault that [`Stop::Fault`] announces.
    pub fault: Fault,
    /// Something wants the dispatcher's slow path at the next block boundary: an interrupt may be deliverable,
    /// a device asked to leave, a shadow or trap is active.
    pub attention: bool,
    /// Only one instruction is being run (the block is cut after it).
    pub alone: bool,
    /// A device answered [`harrier_engine::Flow::Leave`].
    pub leave: bool,
    /// Instructions left before the dispatcher looks at the clock.
    pub budget: i64,

    /// Segment registers with their hidden parts, in encoding order.
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub msrs: Msrs,
    /// x87, SSE and AVX registers.
    pub fpu: Fpu,
    pub lapic: Lapic,
    pub mp_state: MpState,
    /// No interrupt before the next instruction ends (STI, and with `mov_ss_shadow` no debug trap either).
    pub sti_shadow: bool,
    pub mov_ss_shadow: bool,
    pub nmi_pending: bool,
    /// A second one came before the first was delivered.
    pub nmi_second: bool,
    pub nmi_masked: bool,
    /// A debug trap (single step, breakpoint) is due after this instruction; bits for DR6.
    pub debug_trap: u64,
    /// TF was set when the instruction that runs alone began: a debug trap follows it.
    pub step_trap: bool,
    /// A repeated string instruction stands between two elements: what is delivered now pushes RF, and the instruction's
    /// breakpoint has had its turn (Intel SDM volume 3, 17.3.1.1).
    pub unfinished: bool,
    /// An exception, or an acknowledged external interrupt, that a restored state had not delivered yet.
    pub pending_exception: Option<PendingException>,
    pub pending_interrupt: Option<u8>,
    /// The processor stopped by a triple fault.
    pub triple_fault: bool,
    /// An instruction that this engine cannot execute stopped it; says what.
    pub unsupported: Option<String>,

    /// What the CPU model offers.
    pub features: Features,
    /// Added to the machine's TSC ticks (wrapping).
    pub tsc_offset: u64,
    /// Generation of the paravirtual clock that the clock page shows.
    pub clock_seen: u64,

    /// What user mode on the host's processor may do without us.
    pub lent: LentPages,
    /// Devices, while a run is under way.
    pub io: IoSlot,
    /// What all vCPUs of the machine share.
    pub shared: Arc<Shared>,
    /// APIC id and vCPU number.
    pub index: u32,
    /// Times that the guest said PAUSE.
    pub spins: u32,
    /// Device accesses so far.
    pub io_accesses: u64,
}

impl Cpu {
    /// RIP of the instruction that `op` came from.
    #[inline(always)]
    pub(crate) fn op_rip(&self, op: &Op) -> u64 {
        self.regs[REG_BLOCK as usize].wrapping_add(u64::from(op.pc)) & self.rip_mask
    }

    /// RIP of the instruction after it.
    #[inline(always)]
    pub(crate) fn next_rip(&self, op: &Op) -> u64 {
        self.regs[REG_BLOCK as usize].wrapping_add(u64::from(op.pc) + u64::from(op.len)) & self.rip_mask
    }

    /// Ends the block after `op`, without a branch. For instructions that change what the decoder or the
    /// dispatcher depends on.
    #[inline(always)]
    pub(crate) fn end_block(&mut self, op: &Op) -> Step {
        self.rip = self.next_rip(op);
        Err(Stop::Block)
    }

    /// Register slot as a word of any width but high bytes.
    #[inline(always)]
    pub(crate) fn reg<W: Word>(&self, slot: u8) -> W {
        let value = self.regs[(slot & 31) as usize];
        if W::SIZE == 1 { W::from_u64(value >> ((slot >> 4) & 8)) } else { W::from_u64(value) }
    }

    /// Writes a register: 32 bits clear the upper half, 8 and 16 bits leave the rest.
    #[inline(always)]
    pub(crate) fn set_reg<W: Word>(&mut self, slot: u8, value: W) {
        let place = &mut self.regs[(slot & 31) as usize];
        match W::SIZE {
            1 => {
                let shift = (slot >> 4) & 8;
                *place = (*place & !(0xff << shift)) | value.to_u64() << shift;
            }
            2 => *place = (*place & !0xffff) | value.to_u64(),
            _ => *place = value.to_u64(),
        }
    }

    /// RFLAGS as software sees it.
    pub(crate) fn rflags(&self) -> u64 {
        self.rflags | self.flags.to_rflags() | rflags::FIXED
    }

    /// Replaces all of RFLAGS.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        let keep = rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::RF
            | rflags::VM
            | rflags::AC
            | rflags::VIF
            | rflags::VIP
            | rflags::ID;
        self.flags = Flags::from_rflags(value);
        self.rflags = value & keep;
        self.attention = true;
        self.mmu.set_access_mode(self.cpl, self.cr4, self.rflags);
    }

    /// Records a fault without error code.
    #[cold]
    pub(crate) fn raise<T>(&mut self, vector: u8) -> Result<T, Stop> {
        self.fault = Fault { vector, ..Fault::default() };
        Err(Stop::Fault)
    }

    /// Records a fault with an error code.
    #[cold]
    pub(crate) fn raise_with<T>(&mut self, vector: u8, error: u32) -> Result<T, Stop> {
        self.fault = Fault { vector, error, ..Fault::default() };
        Err(Stop::Fault)
    }

    /// #GP(0).
    #[cold]
    pub(crate) fn raise_gp<T>(&mut self) -> Result<T, Stop> {
        self.raise_with(vector::GP, 0)
    }

    /// #UD.
    #[cold]
    pub(crate) fn raise_ud<T>(&mut self) -> Result<T, Stop> {
        self.raise(vector::UD)
    }

    /// True in long mode (64-bit or compatibility).
    #[inline(always)]
    pub(crate) fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// True when CS is a 64-bit code segment in long mode.
    #[inline(always)]
    pub(crate) fn code64(&self) -> bool {
        self.long_mode() && self.seg[CS].long
    }

    /// True in real-address mode.
    #[inline(always)]
    pub(crate) fn real_mode(&self) -> bool {
        self.cr0 & cr0::PE == 0
    }

    /// True in virtual-8086 mode.
    #[inline(always)]
    pub(crate) fn v86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    /// I/O privilege level.
    #[inline(always)]
    pub(crate) fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> 12) as u8
    }

    /// Recomputes everything that is derived from CS, SS, CR0, CR4, EFER and RFLAGS. To be called after any of
    /// them changed; the block must end as well.
    pub(crate) fn mode_changed(&mut self) {
        let code64 = self.code64();
        for (index, seg) in self.seg.iter().enumerate() {
            self.seg_base[index] = if code64 && index < FS { 0 } else { seg.base };
        }
        self.rip_mask = if code64 {
            u64::MAX
        } else if self.seg[CS].db {
            0xffff_ffff
        } else {
            0xffff
        };
        // In real mode and virtual-8086 mode the code size follows the hidden D bit, so big real mode works.
        self.mode = crate::decode::Mode::of(self);
        self.mmu.set_paging(self.cr0, self.cr3, self.cr4, self.efer);
        self.mmu.set_access_mode(self.cpl, self.cr4, self.rflags);
        self.fpu_mode_changed();
        self.attention = true;
    }
}
