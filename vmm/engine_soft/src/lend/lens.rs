//! The guest's page tables as the borrower of user code sees them.

use std::sync::Arc;

use harrier_engine::user_mode::{UserAccess, UserMemory, UserPage};

use super::spaces::{GROUP_SHIFT, Spaces};
use crate::cpu::Cpu;
use crate::decode::block::note_code;
use crate::mmu::{Intent, PAGE, Rights};

/// Pages around a fault that are lent along with it, in aligned blocks.
const DATA_AROUND: u64 = 64;
const CODE_AROUND: u64 = 16;

/// One address space.
pub(super) struct Lens<'a> {
    pub(super) cpu: &'a mut Cpu,
    pub(super) spaces: &'a mut Spaces,
    pub(super) root: u64,
    /// How often the borrower met a page that it had not been given.
    pub(super) faults: u32,
}

impl Lens<'_> {
    /// Translates, and notes what was given.
    fn give(&mut self, va: u64, access: UserAccess) -> Option<UserPage> {
        let cpu = &mut *self.cpu;
        if !cpu.canonical(va) {
            return None;
        }
        let intent = match access {
            UserAccess::Read => Intent::Read,
            UserAccess::Write => Intent::Write,
            UserAccess::Fetch => Intent::Fetch,
        };
        let translation = cpu.mmu.walk(va, Rights::User, intent).ok()?;
        let gpa = translation.gpa & !(PAGE - 1);
        // Another processor may be changing the tables: what is remembered is what was used.
        let path = cpu.mmu.path(va).filter(|path| path.leads_to(va) == gpa)?;
        if cpu.lapic.claims(gpa, cpu.msrs.apic_base) {
            return None;
        }
        let map = Arc::clone(&cpu.mmu.map);
        let page = map.page(gpa)?;
        let possible = translation.writable && path.is_writable() && !page.read_only() && page.code() == 0;
        let writable = match access {
            UserAccess::Write if !possible => return None,
            UserAccess::Write => {
                page.mark_dirty();
                true
            }
            // A page that is in the log already needs no fault to get there.
            UserAccess::Read => possible && page.is_dirty(),
            UserAccess::Fetch => false,
        };
        if writable {
            cpu.lent.lend_writable(gpa);
        }
        let mut code = None;
        if access == UserAccess::Fetch {
            // Whoever writes there has to say so.
            let age = cpu.lent.age();
            note_code(cpu, gpa, PAGE as usize);
            if cpu.lent.age() != age {
                // The borrower could write there until now.
                return None;
            }
            code = Some(cpu.lent.lend_code(gpa));
        }
        let page = UserPage { gpa, writable, code };
        self.spaces.note(self.root, va, path, &page);
        Some(page)
    }
}

impl UserMemory for Lens<'_> {
    fn translate(&mut self, va: u64, access: UserAccess) -> Option<UserPage> {
        self.faults = self.faults.saturating_add(1);
        self.give(va, access)
    }

    fn nearby(&mut self, va: u64, access: UserAccess) -> Vec<(u64, UserPage)> {
        // A neighbour may be read, or executed, but not marked as written.
        let (around, access) = match access {
            UserAccess::Fetch => (CODE_AROUND, UserAccess::Fetch),
            UserAccess::Read | UserAccess::Write => (DATA_AROUND, UserAccess::Read),
        };
        let Some(path) = self.cpu.mmu.path(va) else { return Vec::new() };
        let page = va & !(PAGE - 1);
        let first = va & !(around * PAGE - 1);
        debug_assert_eq!(first >> GROUP_SHIFT, va >> GROUP_SHIFT);
        let mut pages = Vec::new();
        for near in (first..first + around * PAGE).step_by(PAGE as usize) {
            let entry = self.cpu.mmu.entry(path.leaf_at((near / PAGE) as usize & 511));
            if near != page
                && path.allows_user(entry, access == UserAccess::Fetch)
                && !self.spaces.has(self.root, near)
                && let Some(found) = self.give(near, access)
            {
                pages.push((near, found));
            }
        }
        pages
    }

    fn peek(&mut self, va: u64) -> Option<u64> {
        let cpu = &mut *self.cpu;
        let translation =
            cpu.canonical(va).then(|| cpu.mmu.walk(va, Rights::User, Intent::Read).ok()).flatten()?;
        let gpa = translation.gpa & !(PAGE - 1);
        cpu.mmu.map.page(gpa).map(|_| gpa)
    }

    fn forgotten(&mut self) {
        let root = self.root;
        self.spaces.clear();
        self.spaces.make_room(root);
    }
}
