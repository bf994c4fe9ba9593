//! User mode on the host's processor, for an engine that runs everything else in software.
//!
//! There are hosts whose KVM runs only user mode on the processor and emulates kernel mode slowly. There the
//! software engine keeps the whole machine - kernel mode, APIC, timers, page walks - and lends 64-bit user code to
//! a [`UserProcessor`] for a while. The traits keep the two engines apart: one implements them, the other is
//! handed an implementation by whoever builds the machine.
//!
//! A [`UserProcessor`] is a second look-aside buffer, of several address spaces: it holds translations that [`UserMemory`]
//! gave it and forgets them when it is told to. Everything that user mode cannot do by itself (a fault, a system call,
//! an interrupt) ends [`UserProcessor::run`] *before* the instruction, which the caller then executes itself.

use std::sync::Arc;
use std::time::Duration;

use crate::cpu_state::Segment;
use crate::{EngineError, GuestRegion, Kicker};

/// The registers of user mode. Control registers are those of 64-bit mode with paging; privilege level is 3.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UserRegisters {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Next instruction.
    pub rip: u64,
    /// Flags; IF is set, TF is clear.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS; CS is a 64-bit code segment of privilege level 3.
    pub segments: [Segment; 6],
    /// XSAVE area in the form of [`crate::CpuState::xsave`].
    pub xsave: Vec<u8>,
    /// The components that it may hold.
    pub xcr0: u64,
}

/// Where a page of user space is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserPage {
    /// Guest physical address of the 4 KiB page.
    pub gpa: u64,
    /// Writes need not be seen by anybody: the page is in the page log already and holds no watched code.
    pub writable: bool,
    /// Instructions may be fetched. The caller has to notice writes to the page from then on.
    pub code: Option<UserCode>,
}

/// What is known of a page's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserCode {
    /// A page with the same address and the same version has the same content as before.
    pub version: u64,
    /// Software has executed one of the instructions of this page that user mode shall not execute, such as CPUID.
    pub trapped: bool,
}

/// What user mode wants to do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserAccess {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Fetch an instruction.
    Fetch,
}

/// The guest's page tables, as user mode sees them.
pub trait UserMemory {
    /// Translates and sets accessed and dirty bits. `None` where software has to execute the access: it faults,
    /// meets a device, is a write that somebody has to hear of, or makes code of what could be written until now.
    fn translate(&mut self, va: u64, access: UserAccess) -> Option<UserPage>;
    /// The pages near `va`, which was just translated, that can be had for nothing and were not given before, with their
    /// addresses.
    fn nearby(&mut self, va: u64, access: UserAccess) -> Vec<(u64, UserPage)>;
    /// Where the page of `va` is, if user mode may read it; nothing is given for that.
    fn peek(&mut self, va: u64) -> Option<u64>;
    /// Hears that the processor has forgotten every translation of every space, for want of room.
    fn forgotten(&mut self);
}

/// Why [`UserProcessor::run`] returned. The registers always stand at an instruction boundary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserExit {
    /// The next instruction is one that software has to execute.
    Software,
    /// An instruction was executed with RFLAGS.TF set: the trap after it is due.
    Stepped,
    /// Kicked, or the time is over.
    Interrupted,
    /// This processor cannot go on, now or ever; the registers are as they were.
    Failed(String),
}

/// User mode of one vCPU.
pub trait UserProcessor: Send {
    /// Runs user code of address space `space`, a number of the caller's, at most until `limit` is over.
    fn run(
        &mut self,
        space: u64,
        registers: &mut UserRegisters,
        memory: &mut dyn UserMemory,
        limit: Option<Duration>,
    ) -> UserExit;
    /// Forgets the translations of these addresses; true if it then has forgotten the whole space.
    fn forget_pages(&mut self, space: u64, vas: &[u64]) -> bool;
    /// Forgets every translation of an address space.
    fn forget_space(&mut self, space: u64);
    /// Forgets every translation.
    fn forget_translations(&mut self);
    /// Ends the current run, or the next one, soon.
    fn kicker(&self) -> Arc<dyn Kicker>;
}

/// User mode for the vCPUs of one machine.
pub trait UserMode: Send + Sync {
    /// Frequency of the TSC, which user mode reads unchanged from the host.
    fn tsc_khz(&self) -> u32;
    /// Makes `region` known; the pages of [`UserPage`] lie in such regions.
    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError>;
    /// Forgets the region that starts at `gpa`.
    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError>;
    /// Creates user mode for a vCPU.
    fn create_processor(&self, index: u32) -> Result<Box<dyn UserProcessor>, EngineError>;
}
