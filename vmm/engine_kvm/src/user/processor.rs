//! A vCPU that runs user code and nothing else.
//!
//! Whatever leads out of user mode ends at one of the stubs of [`super::tables`], whose HLT KVM hands to us. What
//! had happened is read from the stack, and the registers are those before the instruction: software executes it
//! again, and does what a processor does then. [`super::pages`] maps pages that are merely not mapped yet.

use std::sync::Arc;
use std::time::Duration;

use harrier_engine::cpu_state::{Segment, msr};
use harrier_engine::user_mode::{UserAccess, UserExit, UserMemory, UserPage, UserProcessor, UserRegisters};
use harrier_engine::{EngineError, Kicker};
use kvm_bindings::{KVM_MAX_XCRS, Msrs, kvm_dtable, kvm_msr_entry, kvm_segment, kvm_sregs, kvm_xcrs};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::Shared;
use super::code::Forbidden;
use super::pages::Pages;
use super::tables;
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
/// RFLAGS.TF: a trap after each instruction.
const TRAP_FLAG: u64 = 1 << 8;
/// More pages of a space are not cleared one by one: the space is forgotten.
const MOST_CLEARED: usize = 48;
/// The same fault so often means that mapping does not help.
const PATIENCE: u32 = 3;

/// User mode of one vCPU on KVM.
pub(super) struct KvmUserProcessor {
    fd: VcpuFd,
    page: Arc<RunPage>,
    kick: Arc<Kick>,
    alarm: Alarm,
    /// Without user segments.
    supervisor: kvm_sregs,
    xsave: XsaveLayout,
    /// The area that KVM has.
    loaded_xsave: Vec<u8>,
    pages: Pages,
    /// The page that ended the last run, and its space: by now the guest's kernel may have provided it.
    missing: Option<(u64, u64, UserAccess)>,
    /// Entries cannot be cleared one by one on this KVM.
    clears_nothing: bool,
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
    PageFault {
        va: u64,
        access: UserAccess,
    },
    /// The trap after an instruction, which user mode has asked for.
    Stepped,
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
        components: Vec<Component>,
        forbidden: Forbidden,
    ) -> Result<KvmUserProcessor, EngineError> {
        let page = RunPage::map(&fd, shared.run_page_bytes)
            .map_err(|source| EngineError::Host { what: "map the shared page of a vCPU", source })?;
        let page = Arc::new(page);
        let mut pages = Pages::new(Arc::clone(&shared), index, forbidden)?;
        let xsave = XsaveLayout::new(&shared.fd, components);
        set_msrs(&fd)?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        const { assert!(KVM_MAX_XCRS > 0) };
        xcrs.xcrs[0].value = 7;
        let root = pages.root(0, &mut Nothing)?;
        let sregs = supervisor(&fd.get_sregs().map_err(refused("read control registers"))?, root);
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
            fd,
            page,
            kick,
            alarm,
            supervisor: sregs,
            xsave,
            loaded_xsave: Vec::new(),
            pages,
            missing: None,
            clears_nothing: false,
        })
    }

    /// Puts the registers where KVM takes them from.
    fn load(&mut self, root: u64, registers: &UserRegisters) {
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
        let word = |at: u64| self.pages.tables.stack_word(frame.wrapping_add(8 * at));
        // A fault pushes RF set; software sets it itself where it belongs.
        const RF: u64 = 1 << 16;
        registers.rip = word(0);
        registers.rflags = word(2) & !RF | 2;
        registers.gpr[4] = word(3);
        match vector {
            PAGE_FAULT => {
                let error = self.pages.tables.stack_word(regs.rsp);
                if registers.rip == SYSCALL && error & FETCH != 0 {
                    // The same KVM, when no signal came: it faults at the stub.
                    undo_syscall(registers);
                    return Event::Other;
                }
                Event::PageFault { va: self.fd.sync_regs().sregs.cr2, access: access(error) }
            }
            // INT1 and INT3 have one byte and report the next instruction, where the gate lets them pass; the same
            // KVM does not look at the gate.
            DEBUG if registers.rflags & TRAP_FLAG != 0 => Event::Stepped,
            DEBUG | BREAKPOINT => {
                registers.rip = registers.rip.wrapping_sub(1);
                Event::Other
            }
            _ => Event::Other,
        }
    }

    /// Lets the guest clear the listed entries of our tables, so that KVM drops what it made of them. False if it does not
    /// come to the end of that.
    fn clear_listed(&mut self, root: u64, count: u64) -> bool {
        let mut sregs = self.supervisor;
        sregs.cr3 = root;
        let segment = |selector, type_, l| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s: 1,
            l,
            db: 1 - l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(tables::CODE_SELECTOR, 0xb, 1);
        let data = segment(tables::CODE_SELECTOR + 8, 3, 0);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        let sync = self.fd.sync_regs_mut();
        sync.sregs = sregs;
        sync.regs = kvm_bindings::kvm_regs {
            rip: tables::CLEAR,
            rsi: tables::LIST,
            rcx: count,
            rsp: tables::STACK_TOP,
            rflags: 2,
            ..Default::default()
        };
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        // A kick that comes meanwhile is kept.
        let kicked = self.kick.take();
        let mut tries = 0;
        let ran = loop {
            match self.fd.run().map(drop) {
                Ok(()) => break true,
                Err(err) if matches!(err.errno(), libc::EINTR | libc::EAGAIN) && tries < 100 => tries += 1,
                Err(_) => break false,
            }
            self.page.set_immediate_exit(false);
        };
        if kicked || self.kick.is_kicked() {
            self.kick.kick();
        }
        let rip = self.fd.sync_regs().regs.rip;
        ran && exit::read(&self.page) == RunExit::Halted
            && (tables::CLEARED..=tables::CLEARED + 1).contains(&rip)
    }

    fn run_loop(
        &mut self,
        space: u64,
        registers: &mut UserRegisters,
        memory: &mut dyn UserMemory,
    ) -> UserExit {
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
            let (va, access) = match event {
                Event::PageFault { va, access } => (va, access),
                Event::Stepped => return UserExit::Stepped,
                Event::None | Event::Other => return UserExit::Software,
            };
            repeated = if last == (va, access) { repeated + 1 } else { 0 };
            last = (va, access);
            if repeated >= PATIENCE {
                return UserExit::Software;
            }
            match self.pages.map(space, memory, va, access) {
                Ok(true) => {
                    if let Err(err) = self.enter(space, registers, memory) {
                        return UserExit::Failed(err.to_string());
                    }
                }
                Ok(false) => {
                    self.missing = Some((space, va, access));
                    return UserExit::Software;
                }
                Err(err) => return UserExit::Failed(err.to_string()),
            }
        }
    }

    /// Makes everything ready for the next KVM_RUN.
    fn enter(
        &mut self,
        space: u64,
        registers: &UserRegisters,
        memory: &mut dyn UserMemory,
    ) -> Result<(), EngineError> {
        let root = self.pages.root(space, memory)?;
        self.load(root, registers);
        Ok(())
    }
}

/// Memory of nobody.
struct Nothing;

impl UserMemory for Nothing {
    fn translate(&mut self, _va: u64, _access: UserAccess) -> Option<UserPage> {
        None
    }
    fn nearby(&mut self, _va: u64, _access: UserAccess) -> Vec<(u64, UserPage)> {
        Vec::new()
    }
    fn peek(&mut self, _va: u64) -> Option<u64> {
        None
    }
    fn forgotten(&mut self) {}
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
        space: u64,
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
        let stale = self.pages.take_stale(space);
        if !stale.is_empty() && self.forget_pages(space, &stale) {
            self.pages.forget_spaces();
            memory.forgotten();
        }
        if let Some((of, va, access)) = self.missing.take()
            && of == space
            && let Err(err) =
                self.pages.root(space, memory).and_then(|_| self.pages.map(space, memory, va, access))
        {
            return UserExit::Failed(err.to_string());
        }
        if let Err(err) = self.enter(space, registers, memory) {
            return UserExit::Failed(err.to_string());
        }
        let kick = Arc::clone(&self.kick);
        let running = kick.enter();
        if let Some(limit) = limit
            && let Err(err) = self.alarm.set(limit)
        {
            return UserExit::Failed(format!("no timer can be had from the host: {err}"));
        }
        let exit = self.run_loop(space, registers, memory);
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

    fn forget_pages(&mut self, space: u64, vas: &[u64]) -> bool {
        if vas.len() <= MOST_CLEARED && !self.clears_nothing {
            let count = self.pages.tables.list_entries(space, vas);
            if count == 0 {
                return false;
            }
            match self.pages.root(space, &mut Nothing) {
                Ok(root) if self.clear_listed(root, count) => return false,
                _ => {
                    log::debug!("kvm: entries of page tables are not cleared one by one on this host");
                    self.clears_nothing = true;
                }
            }
        }
        self.pages.forget_space(space);
        true
    }

    fn forget_space(&mut self, space: u64) {
        self.pages.forget_space(space);
    }

    fn forget_translations(&mut self) {
        self.pages.forget_spaces();
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kick) as Arc<dyn Kicker>
    }
}
