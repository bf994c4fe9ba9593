//! A vCPU that runs user code and nothing else.
//!
//! Whatever leads out of user mode ends at one of the stubs of [`super::tables`], whose HLT KVM hands to us. What
//! had happened is read from the stack, and the registers are those before the instruction: software executes it
//! again, and does what a processor does then. Page faults of pages that are merely not mapped yet are mapped.

use std::sync::Arc;
use std::time::Duration;

use harrier_engine::cpu_state::{Segment, msr};
use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::user_mode::{UserAccess, UserExit, UserMemory, UserProcessor, UserRegisters};
use harrier_engine::{EngineError, Kicker};
use kvm_bindings::{KVM_MAX_XCRS, Msrs, kvm_dtable, kvm_msr_entry, kvm_segment, kvm_sregs, kvm_xcrs};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::Shared;
use super::code::{self, Admission, Pages};
use super::tables::{self, Tables};
use crate::exit::{self, RunExit};
use crate::host::refused;
use crate::kick::{Alarm, Kick};
use crate::run_page::RunPage;
use crate::state::{Component, XsaveLayout, segment_to_kvm};

/// Vectors of INT1 and INT3.
const DEBUG: u64 = 1;
const BREAKPOINT: u64 = 3;
/// Where SYSCALL leads.
const SYSCALL: u64 = tables::STUBS + tables::SYSCALL_STUB * tables::STUB_BYTES;
/// Vector of page faults, and bits of their error code (Intel SDM volume 3, 4.7).
const PAGE_FAULT: u64 = 14;
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 4;
/// Vectors that push an error code.
const WITH_ERROR_CODE: [u64; 9] = [8, 10, 11, 12, 13, 14, 17, 21, 30];
/// Blocks of addresses around a fault whose pages are mapped along with it.
const DATA_AROUND: u64 = 128 * PAGE_SIZE as u64;
const CODE_AROUND: u64 = 16 * PAGE_SIZE as u64;
/// End of the lower half of the address space.
const USER_END: u64 = 1 << 47;
/// The same fault so often means that mapping does not help.
const PATIENCE: u32 = 3;

/// User mode of one vCPU on KVM.
pub(super) struct KvmUserProcessor {
    shared: Arc<Shared>,
    fd: VcpuFd,
    page: Arc<RunPage>,
    kick: Arc<Kick>,
    alarm: Alarm,
    tables: Tables,
    xsave: XsaveLayout,
    /// The area that KVM has.
    loaded_xsave: Vec<u8>,
    pages: Pages,
    /// The page that ended the last run: by now the guest's kernel may have provided it.
    missing: Option<(u64, UserAccess)>,
    /// Times in this run that a page changed between executable and writable.
    turned: u32,
}

/// Where the vCPU stands after KVM_RUN.
enum Stand {
    /// In user code, whose registers are in the shared page.
    User,
    /// At the stub of a vector or of SYSCALL.
    Stub(u64),
    /// Elsewhere.
    Lost,
}

/// What led out of user mode.
enum Event {
    None,
    PageFault { va: u64, access: UserAccess },
    Other,
}

fn access(error: u64) -> UserAccess {
    match error {
        error if error & FETCH != 0 => UserAccess::Fetch,
        error if error & WRITE != 0 => UserAccess::Write,
        _ => UserAccess::Read,
    }
}

/// SYSCALL has put RIP into RCX and the flags into R11, which it will do again.
fn undo_syscall(registers: &mut UserRegisters) {
    const LENGTH: u64 = 2;
    registers.rip = registers.gpr[1].wrapping_sub(LENGTH);
    registers.rflags = registers.gpr[11] | 2;
}

impl KvmUserProcessor {
    pub(super) fn new(
        shared: Arc<Shared>,
        mut fd: VcpuFd,
        index: u32,
        run_page_bytes: usize,
        components: Vec<Component>,
    ) -> Result<KvmUserProcessor, EngineError> {
        let page = RunPage::map(&fd, run_page_bytes)
            .map_err(|source| EngineError::Host { what: "map the shared page of a vCPU", source })?;
        let page = Arc::new(page);
        let tables = Tables::new(index)?;
        shared.slots().map(&shared.fd, tables.region(), false)?;
        let xsave = XsaveLayout::new(&shared.fd, components);
        set_msrs(&fd)?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        const { assert!(KVM_MAX_XCRS > 0) };
        xcrs.xcrs[0].value = 7;
        let sregs = supervisor(&fd.get_sregs().map_err(refused("read control registers"))?, tables.root());
        fd.set_sregs(&sregs).map_err(refused("enter 64-bit mode"))?;
        // A host without AVX has no such XCR0.
        if fd.set_xcrs(&xcrs).is_err() {
            xcrs.xcrs[0].value = 3;
            fd.set_xcrs(&xcrs).map_err(refused("set XCR0"))?;
        }
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::SystemRegister);
        *fd.sync_regs_mut() = kvm_bindings::kvm_sync_regs { sregs, ..Default::default() };
        let kick = Arc::new(Kick::new(Arc::clone(&page)));
        let alarm = Alarm::default();
        Ok(KvmUserProcessor {
            shared,
            fd,
            page,
            kick,
            alarm,
            tables,
            xsave,
            loaded_xsave: Vec::new(),
            pages: Pages::default(),
            missing: None,
            turned: 0,
        })
    }

    /// Puts the registers where KVM takes them from.
    fn load(&mut self, registers: &UserRegisters) {
        let root = self.tables.root();
        let sync = self.fd.sync_regs_mut();
        sync.regs = crate::state::regs_to_kvm(&harrier_engine::cpu_state::GeneralRegisters {
            gpr: registers.gpr,
            rip: registers.rip,
            rflags: registers.rflags,
        });
        let [es, cs, ss, ds, fs, gs] = &registers.segments;
        let sregs = &mut sync.sregs;
        sregs.es = user_segment(es);
        sregs.cs = user_segment(cs);
        sregs.ss = user_segment(ss);
        sregs.ds = user_segment(ds);
        sregs.fs = user_segment(fs);
        sregs.gs = user_segment(gs);
        sregs.cr3 = root;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
    }

    /// Where KVM_RUN left the vCPU.
    fn stand(&self) -> Stand {
        let sync = self.fd.sync_regs();
        if sync.sregs.cs.selector & 3 == 3 {
            return Stand::User;
        }
        let offset = sync.regs.rip.wrapping_sub(tables::STUBS);
        let (stub, inside) = (offset / tables::STUB_BYTES, offset % tables::STUB_BYTES);
        if stub <= tables::SYSCALL_STUB && inside <= 1 { Stand::Stub(stub) } else { Stand::Lost }
    }

    /// Takes the registers of user mode back, as they were before the instruction that led out of it.
    fn store(&self, registers: &mut UserRegisters, stub: Option<u64>) -> Event {
        let regs = self.fd.sync_regs().regs;
        let now = crate::state::regs_from_kvm(&regs);
        let sregs = &self.fd.sync_regs().sregs;
        // Where the host lets user mode write them.
        (registers.segments[4].base, registers.segments[5].base) = (sregs.fs.base, sregs.gs.base);
        (registers.gpr, registers.rip, registers.rflags) = (now.gpr, now.rip, now.rflags);
        let Some(vector) = stub else {
            // There is a KVM that stays in user mode after SYSCALL, where a signal may find it.
            if registers.rip == SYSCALL {
                undo_syscall(registers);
            }
            return Event::None;
        };
        if vector == tables::SYSCALL_STUB {
            undo_syscall(registers);
            return Event::Other;
        }
        let has_error = WITH_ERROR_CODE.contains(&vector);
        let frame = if has_error { regs.rsp.wrapping_add(8) } else { regs.rsp };
        let word = |at: u64| self.tables.stack_word(frame.wrapping_add(8 * at));
        // A fault pushes RF set; software sets it itself where it belongs.
        const RF: u64 = 1 << 16;
        registers.rip = word(0);
        registers.rflags = word(2) & !RF | 2;
        registers.gpr[4] = word(3);
        match vector {
            PAGE_FAULT => {
                let error = self.tables.stack_word(regs.rsp);
                if registers.rip == SYSCALL && error & FETCH != 0 {
                    // The same KVM, when no signal came: it faults at the stub.
                    undo_syscall(registers);
                    return Event::Other;
                }
                Event::PageFault { va: self.fd.sync_regs().sregs.cr2, access: access(error) }
            }
            // INT1 and INT3 have one byte and report the next instruction, where the gate lets them pass; the same
            // KVM does not look at the gate.
            DEBUG | BREAKPOINT => {
                registers.rip = registers.rip.wrapping_sub(1);
                Event::Other
            }
            _ => Event::Other,
        }
    }

    /// Maps the page of a fault, and those around it that can be had for nothing. False: software's turn.
    fn map(&mut self, memory: &mut dyn UserMemory, va: u64, access: UserAccess) -> Result<bool, EngineError> {
        const PAGE: u64 = PAGE_SIZE as u64;
        if va >= USER_END {
            return Ok(false);
        }
        if !self.map_one(memory, va, access, false)? {
            return Ok(false);
        }
        // A neighbour may be read, or executed, but not marked as written.
        let (around, quietly) = match access {
            UserAccess::Fetch => (CODE_AROUND, UserAccess::Fetch),
            UserAccess::Read | UserAccess::Write => (DATA_AROUND, UserAccess::Read),
        };
        let first = va & !(around - 1);
        for near in (first..first + around).step_by(PAGE_SIZE) {
            if near != va & !(PAGE - 1) && !self.tables.is_mapped(near) {
                self.map_one(memory, near, quietly, true)?;
            }
        }
        Ok(true)
    }

    fn map_one(
        &mut self,
        memory: &mut dyn UserMemory,
        va: u64,
        access: UserAccess,
        quiet: bool,
    ) -> Result<bool, EngineError> {
        let Some(to) = memory.translate(va, access) else { return Ok(false) };
        // Twice at most: after forgetting, nothing excludes anything.
        for _ in 0..2 {
            let shared = &self.shared;
            match self.pages.admit(to, access, || shared.page(to.gpa)) {
                Admission::Never => return Ok(false),
                Admission::AfterForgetting if quiet => return Ok(false),
                Admission::AfterForgetting => {
                    self.turned += 1;
                    self.forget()?;
                }
                admission => {
                    let mapped = match admission {
                        Admission::Copied(mut bytes, cpuids) => {
                            for at in cpuids {
                                if let Some(place) = bytes.get_mut(at..at + code::TRAP.len()) {
                                    place.copy_from_slice(&code::TRAP);
                                }
                            }
                            self.tables.map_copy(va, &bytes)
                        }
                        Admission::As(to) => self.tables.map(va, to),
                        Admission::Never | Admission::AfterForgetting => return Ok(false),
                    };
                    if mapped.is_err() {
                        self.empty_tables()?;
                        continue;
                    }
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn forget(&mut self) -> Result<(), EngineError> {
        self.pages.forget();
        if self.tables.begin().is_err() { self.empty_tables() } else { Ok(()) }
    }

    /// Takes the tables away from KVM and gives them back empty.
    fn empty_tables(&mut self) -> Result<(), EngineError> {
        self.pages.forget();
        let mut slots = self.shared.slots();
        slots.unmap(&self.shared.fd, self.tables.gpa())?;
        self.tables.reset();
        slots.map(&self.shared.fd, self.tables.region(), false)
    }

    fn run_loop(&mut self, registers: &mut UserRegisters, memory: &mut dyn UserMemory) -> UserExit {
        let mut last = (0, UserAccess::Read);
        let mut repeated = 0;
        loop {
            let interrupted = match self.fd.run().map(drop) {
                Ok(()) => false,
                Err(err) if matches!(err.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.kick.take();
                    true
                }
                Err(err) => return UserExit::Failed(format!("KVM_RUN failed: {err}")),
            };
            let stub = match self.stand() {
                Stand::User => {
                    self.store(registers, None);
                    if interrupted {
                        return UserExit::Interrupted;
                    }
                    // KVM could not go on here: software can.
                    return match exit::read(&self.page) {
                        RunExit::Shutdown => UserExit::Failed("user mode ended by a triple fault".to_owned()),
                        _ => UserExit::Software,
                    };
                }
                Stand::Stub(stub) => stub,
                Stand::Lost => {
                    return UserExit::Failed(format!(
                        "user mode left for {:#x}: {:x?}",
                        self.fd.sync_regs().regs.rip,
                        exit::read(&self.page)
                    ));
                }
            };
            let event = self.store(registers, Some(stub));
            if interrupted {
                return UserExit::Interrupted;
            }
            let Event::PageFault { va, access } = event else { return UserExit::Software };
            repeated = if last == (va, access) { repeated + 1 } else { 0 };
            last = (va, access);
            if repeated >= PATIENCE || self.turned >= PATIENCE {
                return UserExit::Software;
            }
            match self.map(memory, va, access) {
                Ok(true) => self.load(registers),
                Ok(false) => {
                    self.missing = Some((va, access));
                    return UserExit::Software;
                }
                Err(err) => return UserExit::Failed(err.to_string()),
            }
        }
    }
}

/// SYSCALL leads to its stub.
fn set_msrs(fd: &VcpuFd) -> Result<(), EngineError> {
    let values = [
        (msr::STAR, u64::from(tables::CODE_SELECTOR) << 32),
        (msr::LSTAR, SYSCALL),
        (msr::CSTAR, SYSCALL),
        (msr::SFMASK, 0x4_7700),
    ];
    let entries = values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let list = Msrs::from_entries(&entries)
        .map_err(|err| EngineError::State { field: "msrs", reason: format!("{err:?}") })?;
    match fd.set_msrs(&list).map_err(refused("write model-specific registers"))? {
        done if done == entries.len() => Ok(()),
        done => Err(EngineError::State { field: "msrs", reason: format!("KVM refused number {done}") }),
    }
}

/// 64-bit mode with our own tables.
fn supervisor(now: &kvm_sregs, root: u64) -> kvm_sregs {
    let table = |base, limit| kvm_dtable { base, limit, padding: [0; 3] };
    kvm_sregs {
        // PG, WP, NE, ET, MP, PE.
        cr0: 0x8001_0033,
        cr3: root,
        // OSXSAVE, OSXMMEXCPT, OSFXSR, PGE off, PAE.
        cr4: 0x4_0620,
        // NXE, LMA, LME, SCE.
        efer: 0xd01,
        gdt: table(tables::GDT, tables::GDT_LIMIT),
        idt: table(tables::IDT, 0xfff),
        tr: kvm_segment {
            base: tables::TASK,
            limit: tables::TASK_LIMIT,
            selector: tables::TASK_SELECTOR,
            type_: 0xb,
            present: 1,
            ..Default::default()
        },
        ldt: kvm_segment { unusable: 1, ..Default::default() },
        interrupt_bitmap: [0; 4],
        ..*now
    }
}

fn user_segment(segment: &Segment) -> kvm_segment {
    let mut kvm = segment_to_kvm(segment);
    if segment.unusable {
        kvm.present = 0;
        kvm.dpl = 3;
    }
    kvm
}

impl UserProcessor for KvmUserProcessor {
    fn run(
        &mut self,
        registers: &mut UserRegisters,
        memory: &mut dyn UserMemory,
        limit: Option<Duration>,
    ) -> UserExit {
        if self.kick.take() {
            return UserExit::Interrupted;
        }
        if self.loaded_xsave != registers.xsave
            && let Err(err) = self.xsave.set(&self.fd, &registers.xsave)
        {
            return UserExit::Failed(err.to_string());
        }
        self.turned = 0;
        if let Some((va, access)) = self.missing.take()
            && let Err(err) = self.map(memory, va, access)
        {
            return UserExit::Failed(err.to_string());
        }
        self.load(registers);
        let kick = Arc::clone(&self.kick);
        let running = kick.enter();
        if let Some(limit) = limit
            && let Err(err) = self.alarm.set(limit)
        {
            return UserExit::Failed(format!("no timer can be had from the host: {err}"));
        }
        let exit = self.run_loop(registers, memory);
        if limit.is_some() {
            self.alarm.clear();
        }
        drop(running);
        match self.xsave.get(&self.fd, registers.xcr0) {
            Ok(area) => {
                registers.xsave.clone_from(&area);
                self.loaded_xsave = area;
            }
            Err(err) => return UserExit::Failed(err.to_string()),
        }
        exit
    }

    fn forget_translations(&mut self) {
        if let Err(err) = self.forget() {
            log::warn!("kvm: user mode's page tables: {err}");
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kick) as Arc<dyn Kicker>
    }
}
