//! One virtual machine of the software engine: what its vCPUs share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use harrier_engine::memory::WriteWatcher;
use harrier_engine::user_mode::UserMode;
use harrier_engine::{EngineError, GsiRoute, GuestRegion, Kicker, Msi, PageLog, Vcpu, Vm, VmConfig};
use vm_memory::{Address, GuestMemoryRegion, MmapRegion};

use crate::clock::Clock;
use crate::interrupt::{Destinations, InterruptMail};
use crate::mmu::PAGE;
use crate::mmu::map::{Mapped, MemoryMap, chunk_mask};
use crate::vcpu::SoftVcpu;

/// What other threads want from a vCPU; it looks at block boundaries.
#[derive(Default)]
pub(crate) struct Mail {
    /// Leave run.
    pub kicked: bool,
    /// Interrupts, NMI, INIT and start-up messages.
    pub interrupts: InterruptMail,
    /// Memory that held decoded code was written: page and chunks.
    pub written_code: HashMap<u64, u64>,
    /// Pages in which another vCPU decoded code for the first time.
    pub new_code: Vec<u64>,
    /// The memory map changed.
    pub new_map: bool,
    /// Forget which pages may be written without being logged.
    pub log_writes: bool,
    /// The vCPU waits for mail.
    waiting: bool,
}

/// Where a vCPU receives [`Mail`].
#[derive(Default)]
pub(crate) struct Mailbox {
    /// Something is in the box.
    flag: AtomicBool,
    mail: Mutex<Mail>,
    wake: Condvar,
    /// User code runs on the host's processor, out of sight of the flag.
    lent: AtomicBool,
    /// Ends that.
    borrower: OnceLock<Arc<dyn Kicker>>,
}

impl Mailbox {
    /// Puts something into the box and wakes the vCPU if it waits.
    pub(crate) fn post(&self, put: impl FnOnce(&mut Mail)) {
        let mut mail = self.lock();
        put(&mut mail);
        self.flag.store(true, Ordering::SeqCst);
        // Waking is a system call even when nobody waits.
        if mail.waiting {
            self.wake.notify_one();
        }
        drop(mail);
        if self.lent.load(Ordering::SeqCst)
            && let Some(borrower) = self.borrower.get()
        {
            borrower.kick();
        }
    }

    #[inline(always)]
    pub(crate) fn has_mail(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Says who has to be told of mail while user code is lent.
    pub(crate) fn set_borrower(&self, borrower: Arc<dyn Kicker>) {
        let _ = self.borrower.set(borrower);
    }

    /// Runs `lend` unless there is mail; mail that comes meanwhile ends it.
    pub(crate) fn while_lent(&self, lend: impl FnOnce()) {
        self.lent.store(true, Ordering::SeqCst);
        if !self.flag.load(Ordering::SeqCst) {
            lend();
        }
        self.lent.store(false, Ordering::SeqCst);
    }

    /// Empties the box.
    pub(crate) fn take(&self) -> Mail {
        let mut mail = self.lock();
        self.flag.store(false, Ordering::SeqCst);
        std::mem::take(&mut mail)
    }

    /// Waits for mail, at most so long; `None` waits without end.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let mut mail = self.lock();
        mail.waiting = true;
        let empty = |_: &mut Mail| !self.flag.load(Ordering::SeqCst);
        match timeout {
            Some(timeout) => {
                drop(self.wake.wait_timeout_while(mail, timeout, empty).map(|(mail, _)| mail));
            }
            None => drop(self.wake.wait_while(mail, empty)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that the vCPUs of a machine have in common.
pub(crate) struct Shared {
    pub config: VmConfig,
    pub clock: Clock,
    pub mailboxes: Vec<Arc<Mailbox>>,
    /// Which vCPU answers to which interrupt destination.
    pub destinations: Destinations,
    /// Held by a LOCK instruction whose operand crosses a page, against the other ones.
    pub split_lock: Mutex<()>,
    /// Where user code can be lent.
    pub user_mode: Option<Arc<dyn UserMode>>,
    /// Called by a vCPU that sleeps.
    pub on_idle: OnceLock<Box<dyn Fn() + Send + Sync>>,
    map: RwLock<Arc<MemoryMap>>,
}

impl Shared {
    /// The memory map as it is now.
    pub(crate) fn map(&self) -> Arc<MemoryMap> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells every vCPU that memory with decoded code was written.
    pub(crate) fn code_written(&self, page: u64, chunks: u64) {
        for mailbox in &self.mailboxes {
            mailbox.post(|mail| *mail.written_code.entry(page).or_default() |= chunks);
        }
    }

    /// Tells the other vCPUs that this page holds decoded code from now on.
    pub(crate) fn new_code_page(&self, from: u32, page: u64) {
        for (index, mailbox) in self.mailboxes.iter().enumerate() {
            if index as u32 != from {
                mailbox.post(|mail| mail.new_code.push(page));
            }
        }
    }
}

/// Hears of devices' writes to pages with decoded code.
struct CodeWatcher {
    shared: std::sync::Weak<Shared>,
    start: u64,
}

impl WriteWatcher for CodeWatcher {
    fn written(&self, offset: usize, len: usize) {
        let Some(shared) = self.shared.upgrade() else { return };
        let map = shared.map();
        let first = self.start + offset as u64;
        let end = first.saturating_add(len as u64);
        let mut at = first;
        while at < end {
            let page_gpa = at & !(PAGE - 1);
            let part = (page_gpa + PAGE).min(end) - at;
            if let Some(page) = map.page(at) {
                let chunks = chunk_mask(at & (PAGE - 1), part) & page.code();
                if chunks != 0 {
                    page.remove_code(chunks);
                    shared.code_written(page_gpa, chunks);
                }
            }
            at += part;
        }
    }
}

/// A machine of the software engine.
pub(crate) struct SoftVm {
    shared: Arc<Shared>,
}

impl SoftVm {
    pub(crate) fn new(config: &VmConfig, user_mode: Option<Arc<dyn UserMode>>) -> SoftVm {
        let count = config.vcpu_count as usize;
        let clock = match &user_mode {
            Some(user_mode) => Clock::native(user_mode.tsc_khz()),
            None => Clock::new(config.tsc_khz),
        };
        SoftVm {
            shared: Arc::new(Shared {
                config: config.clone(),
                clock,
                mailboxes: (0..count).map(|_| Arc::new(Mailbox::default())).collect(),
                destinations: Destinations::new(count),
                split_lock: Mutex::default(),
                user_mode,
                on_idle: OnceLock::new(),
                map: RwLock::default(),
            }),
        }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Creates the vCPU with this number.
    pub(crate) fn vcpu(&self, index: u32) -> Result<SoftVcpu, EngineError> {
        if index as usize >= self.shared.mailboxes.len() {
            return Err(EngineError::State {
                field: "vcpu index",
                reason: format!("{index} is not below the machine's {} vCPUs", self.shared.mailboxes.len()),
            });
        }
        let mut vcpu = SoftVcpu::new(Arc::clone(&self.shared), index);
        if let Some(user_mode) = &self.shared.user_mode {
            vcpu.lend_to(user_mode.create_processor(index)?);
        }
        Ok(vcpu)
    }

    fn replace_map(&self, map: MemoryMap) {
        *self.shared.map.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
        for mailbox in &self.shared.mailboxes {
            mailbox.post(|mail| mail.new_map = true);
        }
    }
}

impl Vm for SoftVm {
    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError> {
        let gpa = region.start_addr().raw_value();
        let size_bytes = region.len();
        let refuse = |reason: &str| EngineError::Memory { gpa, size_bytes, reason: reason.to_owned() };
        let end = gpa.checked_add(size_bytes).ok_or_else(|| refuse("its end is beyond 64 bits"))?;
        if size_bytes == 0 || !gpa.is_multiple_of(PAGE) || !size_bytes.is_multiple_of(PAGE) {
            return Err(refuse("start and size must be multiples of 4096 and not zero"));
        }
        if end > 1 << crate::mmu::PHYSICAL_BITS {
            return Err(refuse("it does not fit into 46 bits of physical address"));
        }
        let map = self.shared.map();
        if map.regions().iter().any(|r| r.start < end && gpa < r.end) {
            return Err(refuse("it overlaps a region that is mapped already"));
        }
        if let Some(user_mode) = &self.shared.user_mode {
            user_mode.map_memory(Arc::clone(&region), read_only)?;
        }
        let mapping: &MmapRegion<PageLog> = &region;
        mapping
            .bitmap()
            .set_watcher(Arc::new(CodeWatcher { shared: Arc::downgrade(&self.shared), start: gpa }));
        self.replace_map(map.with(Mapped::new(region, read_only)));
        Ok(())
    }

    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError> {
        let map = self.shared.map().without(gpa).ok_or_else(|| EngineError::Memory {
            gpa,
            size_bytes: 0,
            reason: "no region starts there".to_owned(),
        })?;
        self.replace_map(map);
        match &self.shared.user_mode {
            Some(user_mode) => user_mode.unmap_memory(gpa),
            None => Ok(()),
        }
    }

    fn sync_dirty_pages(&self) -> Result<(), EngineError> {
        for mailbox in &self.shared.mailboxes {
            mailbox.post(|mail| mail.log_writes = true);
        }
        Ok(())
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.vcpu(index)?))
    }

    fn send_msi(&self, msi: Msi) -> Result<(), EngineError> {
        crate::interrupt::deliver_msi(&self.shared, msi);
        Ok(())
    }

    fn set_gsi_routes(&self, _routes: &[GsiRoute]) -> Result<(), EngineError> {
        // The local APIC itself reports the end of level interrupts.
        Ok(())
    }

    fn clock_ns(&self) -> Result<u64, EngineError> {
        Ok(self.shared.clock.guest_ns())
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), EngineError> {
        self.shared.clock.set_guest_ns(clock_ns);
        Ok(())
    }

    fn stop_time(&self) -> Result<(), EngineError> {
        self.shared.clock.stop();
        Ok(())
    }

    fn start_time(&self) -> Result<(), EngineError> {
        self.shared.clock.start();
        Ok(())
    }

    fn on_idle(&self, idle: Box<dyn Fn() + Send + Sync>) {
        // Only the first one counts.
        let _ = self.shared.on_idle.set(idle);
    }

    fn tsc_khz(&self) -> u32 {
        self.shared.clock.tsc_khz()
    }
}
