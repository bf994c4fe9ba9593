//! Which pages user mode has in each address space.

use std::collections::HashSet;
use std::sync::Arc;

use harrier_engine::EngineError;
use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::user_mode::{UserAccess, UserCode, UserMemory, UserPage};

use super::Shared;
use super::code::{self, Forbidden, Match, Searches, Site};
use super::tables::{Full, Mapping, Tables};

const PAGE: u64 = PAGE_SIZE as u64;
/// End of the lower half of the address space.
const USER_END: u64 = 1 << 47;

/// The pages of one processor.
pub(super) struct Pages {
    shared: Arc<Shared>,
    pub(super) tables: Tables,
    searches: Searches,
    /// Pages, by space and address, whose end may begin a forbidden instruction: the next page was not there to tell.
    open_ended: HashSet<(u64, u64)>,
    /// Those whose next page is there by now.
    to_look_at: Vec<(u64, u64)>,
}

impl Pages {
    pub(super) fn new(shared: Arc<Shared>, index: u32, forbidden: Forbidden) -> Result<Pages, EngineError> {
        let tables = Tables::new(index)?;
        shared.slots().map(&shared.fd, tables.region(), false)?;
        Ok(Pages {
            shared,
            tables,
            searches: Searches::new(forbidden),
            open_ended: HashSet::new(),
            to_look_at: Vec::new(),
        })
    }

    /// Value of CR3 for a space.
    pub(super) fn root(&mut self, space: u64, memory: &mut dyn UserMemory) -> Result<u64, EngineError> {
        if let Ok(root) = self.tables.root(space) {
            return Ok(root);
        }
        self.empty(memory)?;
        self.tables.root(space).map_err(|Full| EngineError::State {
            field: "page tables",
            reason: "an empty region has no room for a root".to_owned(),
        })
    }

    /// Pages of a space that have to be forgotten, because more is known of the code at their end.
    pub(super) fn take_stale(&mut self, space: u64) -> Vec<u64> {
        let mut vas = Vec::new();
        self.to_look_at.retain(|&(of, va)| {
            if of == space {
                vas.push(va);
            }
            of != space
        });
        vas
    }

    /// Forgets all pages of a space.
    pub(super) fn forget_space(&mut self, space: u64) {
        self.tables.forget_space(space);
        self.open_ended.retain(|(of, _)| *of != space);
        self.to_look_at.retain(|(of, _)| *of != space);
    }

    /// Forgets all pages.
    pub(super) fn forget_spaces(&mut self) {
        self.tables.forget_spaces();
        self.open_ended.clear();
        self.to_look_at.clear();
    }

    /// Takes the tables away from KVM and gives them back empty.
    fn empty(&mut self, memory: &mut dyn UserMemory) -> Result<(), EngineError> {
        self.forget_spaces();
        memory.forgotten();
        let mut slots = self.shared.slots();
        slots.unmap(&self.shared.fd, self.tables.gpa())?;
        self.tables.reset();
        slots.map(&self.shared.fd, self.tables.region(), false)
    }

    /// Maps the page of a fault, and those around it that can be had for nothing. False: software's turn.
    pub(super) fn map(
        &mut self,
        space: u64,
        memory: &mut dyn UserMemory,
        va: u64,
        access: UserAccess,
    ) -> Result<bool, EngineError> {
        if va >= USER_END {
            return Ok(false);
        }
        // Twice at most: an empty region has room.
        for _ in 0..2 {
            match self.fill(space, memory, va, access) {
                Ok(done) => return Ok(done),
                Err(Full) => {
                    // Whoever translates remembers nothing of this page any longer, and so is asked again.
                    self.empty(memory)?;
                    self.root(space, memory)?;
                }
            }
        }
        Ok(false)
    }

    /// Maps the page of a fault and those around it, as far as there is room.
    fn fill(
        &mut self,
        space: u64,
        memory: &mut dyn UserMemory,
        va: u64,
        access: UserAccess,
    ) -> Result<bool, Full> {
        let Some(page) = memory.translate(va, access) else { return Ok(false) };
        if !self.put(space, memory, va, page, access == UserAccess::Fetch)? {
            return Ok(false);
        }
        for (near, page) in memory.nearby(va, access) {
            if near < USER_END && self.tables.mapping(space, near).is_none() {
                self.put(space, memory, near, page, false)?;
            }
        }
        Ok(true)
    }

    /// Maps a page; false if it shall be executed and cannot be.
    fn put(
        &mut self,
        space: u64,
        memory: &mut dyn UserMemory,
        va: u64,
        page: UserPage,
        fetch: bool,
    ) -> Result<bool, Full> {
        let va = va & !(PAGE - 1);
        let executable = match page.code {
            Some(code) => self.admit(space, memory, va, page.gpa, code)?,
            None => None,
        };
        if fetch && executable.is_none() {
            return Ok(false);
        }
        let to = Mapping {
            gpa: executable.unwrap_or(page.gpa),
            writable: page.writable && executable.is_none(),
            executable: executable.is_some(),
        };
        self.tables.map(space, va, to).map(|()| true)
    }

    /// Where the code of a page is to be executed: in the page itself or in a copy. `None`: nowhere.
    fn admit(
        &mut self,
        space: u64,
        memory: &mut dyn UserMemory,
        va: u64,
        gpa: u64,
        code: UserCode,
    ) -> Result<Option<u64>, Full> {
        let shared = &self.shared;
        let before = || {
            let page = va.checked_sub(PAGE).and_then(|va| memory.peek(va)).and_then(|gpa| shared.page(gpa));
            page.map_or(Vec::new(), |page| page.get(PAGE_SIZE - code::CONTEXT..).unwrap_or_default().to_vec())
        };
        let Some(found) = self.searches.search(gpa, code, before, || shared.page(gpa)) else {
            return Ok(None);
        };
        let mut sites = found.sites.clone();
        let tail = found.tail;
        self.open_ended.remove(&(space, va));
        if let Some(tail) = tail {
            match memory.peek(va.wrapping_add(PAGE)) {
                Some(next) if self.goes_on(gpa, &tail, next) => sites.push(tail),
                Some(_) => {}
                None => {
                    self.open_ended.insert((space, va));
                    sites.push(tail);
                }
            }
        }
        if let Some(before) = va.checked_sub(PAGE)
            && self.open_ended.remove(&(space, before))
        {
            self.to_look_at.push((space, before));
        }
        if sites.is_empty() {
            return Ok(Some(gpa));
        }
        if !sites.iter().all(|site| site.is_sure(code.trapped)) {
            return Ok(None);
        }
        let Some(content) = self.shared.page(gpa) else { return Ok(None) };
        let traps: Vec<usize> = sites.iter().map(|site| site.opcode).collect();
        self.tables.copy(gpa, code.version, &content, traps).map(Some)
    }

    /// Whether the tail of a page and the begin of the next one are a forbidden instruction.
    fn goes_on(&self, gpa: u64, tail: &Site, next: u64) -> bool {
        let (Some(page), Some(next)) = (self.shared.page(gpa), self.shared.page(next)) else { return true };
        let bytes = page.iter().skip(tail.opcode).chain(next.iter()).copied().take(3);
        self.searches.forbidden().matches(&bytes.collect::<Vec<u8>>()) == Match::Yes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;
    use crate::probe;
    use crate::slots::Slots;

    /// Memory in which every address leads somewhere, and which knows what it has translated and was not told to forget.
    #[derive(Default)]
    struct Remembering {
        translated: BTreeSet<u64>,
        emptied: u32,
    }

    impl UserMemory for Remembering {
        fn translate(&mut self, va: u64, _access: UserAccess) -> Option<UserPage> {
            self.translated.insert(va);
            Some(UserPage { gpa: va, writable: false, code: None })
        }
        fn nearby(&mut self, va: u64, access: UserAccess) -> Vec<(u64, UserPage)> {
            [va + PAGE, va + 2 * PAGE].map(|near| (near, self.translate(near, access).unwrap())).to_vec()
        }
        fn peek(&mut self, _va: u64) -> Option<u64> {
            None
        }
        fn forgotten(&mut self) {
            self.translated.clear();
            self.emptied += 1;
        }
    }

    #[test]
    fn whatever_is_mapped_is_known_to_whoever_translates_also_when_the_tables_were_full() {
        let host = match probe::open(&probe::default_path()) {
            Ok(host) => host,
            Err(missing) => return println!("skipped: pages: {missing}"),
        };
        let shared = Shared {
            fd: host.create_vm().unwrap(),
            slots: Mutex::new(Slots::new(32, true)),
            run_page_bytes: PAGE_SIZE,
        };
        let mut pages = Pages::new(Arc::new(shared), 0, Forbidden { xsave: false }).unwrap();
        let mut memory = Remembering::default();
        let mut last = 0;
        // Every address needs a table of its own; its neighbours are in another one at times.
        for number in 1..5000 {
            last = (number << 21) - PAGE;
            pages.root(1, &mut memory).unwrap();
            assert!(pages.map(1, &mut memory, last, UserAccess::Read).unwrap());
            for va in [last, last + PAGE, last + 2 * PAGE] {
                assert!(memory.translated.contains(&va), "{va:#x} is mapped and forgotten");
                assert!(pages.tables.mapping(1, va).is_some(), "{va:#x}");
            }
            assert!(!memory.translated.iter().any(|&va| pages.tables.mapping(1, va).is_none()));
        }
        assert!(memory.emptied >= 2, "{last:#x}");
    }
}
