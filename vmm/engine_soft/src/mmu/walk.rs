//! The page walk (Intel SDM volume 3, chapter 4).

use super::{Intent, Mmu, PAGE, PHYSICAL_BITS, Paging, Rights};
use crate::native::mem::Word;

pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(super) const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
pub(super) const NO_EXECUTE: u64 = 1 << 63;

/// Bits of a #PF error code.
pub(crate) mod error {
    pub(crate) const PRESENT: u32 = 1;
    pub(crate) const WRITE: u32 = 1 << 1;
    pub(crate) const USER: u32 = 1 << 2;
    pub(crate) const RESERVED: u32 = 1 << 3;
    pub(crate) const FETCH: u32 = 1 << 4;
}

/// Address bits of an 8-byte entry.
pub(super) const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !(PAGE - 1);
/// Bits 51 down to the physical width: must be zero.
const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);

/// Where a linear address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Translation {
    /// Guest physical address.
    pub gpa: u64,
    /// Writes are allowed and the dirty bit is set already: the look-aside buffer may let them through.
    pub writable: bool,
    /// Size of the page, 4 KiB and up.
    pub page_size: u64,
    /// The translation stays valid when CR3 changes.
    pub global: bool,
}

/// Error code of the page fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageFault(pub u32);

impl Mmu {
    /// Translates `va` and sets accessed and dirty bits. The address is canonical.
    pub(crate) fn walk(&self, va: u64, rights: Rights, intent: Intent) -> Result<Translation, PageFault> {
        match self.config.paging {
            Paging::Off => {
                Ok(Translation { gpa: va & 0xffff_ffff, writable: true, page_size: PAGE, global: false })
            }
            Paging::Legacy => self.walk_legacy(va & 0xffff_ffff, rights, intent),
            Paging::Pae => self.walk_pae(va & 0xffff_ffff, rights, intent),
            Paging::Long => {
                let root = self.config.cr3 & ADDRESS;
                self.walk_wide(va, root, 4, rights, intent)
            }
        }
    }

    fn fault<T>(&self, bits: u32, rights: Rights, intent: Intent) -> Result<T, PageFault> {
        let mut code = bits;
        if rights == Rights::User {
            code |= error::USER;
        }
        match intent {
            Intent::Write => code |= error::WRITE,
            // The I bit is only there when instruction fetches can fault by themselves (4.7).
            Intent::Fetch
                if self.config.smep || (self.config.no_execute && self.config.paging != Paging::Legacy) =>
            {
                code |= error::FETCH;
            }
            Intent::Fetch | Intent::Read => {}
        }
        Err(PageFault(code))
    }

    /// Entries of 4 bytes (4.3). Physical addresses of 4 MiB pages have up to 40 bits (PSE-36).
    fn walk_legacy(&self, va: u64, rights: Rights, intent: Intent) -> Result<Translation, PageFault> {
        let directory = self.config.cr3 & 0xffff_f000;
        let pde_at = directory + (va >> 22) * 4;
        let pde = u64::from(self.read_entry::<u32>(pde_at));
        if pde & PRESENT == 0 {
            return self.fault(0, rights, intent);
        }
        if pde & LARGE != 0 && self.config.page_size_extension {
            if pde & (1 << 21) != 0 {
                return self.fault(error::PRESENT | error::RESERVED, rights, intent);
            }
            let leaf = Leaf { entry: pde, at: pde_at, allowed: pde & (WRITABLE | USER), no_execute: false };
            let writable = self.finish::<u32>(leaf, rights, intent)?;
            let gpa = (pde & 0xffc0_0000) | ((pde >> 13) & 0xff) << 32 | (va & 0x3f_ffff);
            return Ok(Translation {
                gpa: gpa & ((1 << PHYSICAL_BITS) - 1),
                writable,
                page_size: 1 << 22,
                global: false,
            });
        }
        let pte_at = (pde & 0xffff_f000) + ((va >> 12) & 0x3ff) * 4;
        let pte = u64::from(self.read_entry::<u32>(pte_at));
        if pte & PRESENT == 0 {
            return self.fault(0, rights, intent);
        }
        let leaf = Leaf { entry: pte, at: pte_at, allowed: pde & pte & (WRITABLE | USER), no_execute: false };
        self.check(&leaf, rights, intent)?;
        self.set_bits::<u32>(pde_at, pde, ACCESSED);
        let writable = self.finish::<u32>(leaf, rights, intent)?;
        Ok(Translation {
            gpa: (pte & 0xffff_f000) | (va & (PAGE - 1)),
            writable,
            page_size: PAGE,
            global: false,
        })
    }

    /// Three levels; the first are the PDPTE registers (4.4).
    fn walk_pae(&self, va: u64, rights: Rights, intent: Intent) -> Result<Translation, PageFault> {
        let pdpte = self.pdpte[(va >> 30) as usize & 3];
        if pdpte & PRESENT == 0 {
            return self.fault(0, rights, intent);
        }
        self.walk_wide(va, pdpte & ADDRESS, 2, rights, intent)
    }

    /// Entries of 8 bytes, from `level` (4 = PML4) down (4.5).
    fn walk_wide(
        &self,
        va: u64,
        root: u64,
        level: u32,
        rights: Rights,
        intent: Intent,
    ) -> Result<Translation, PageFault> {
        let mut table = root;
        let mut allowed = WRITABLE | USER;
        let mut no_execute = false;
        // Accessed bits of the upper levels are set once the whole walk has succeeded.
        let mut upper = [(0u64, 0u64); 4];
        let mut level = level;
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = table + ((va >> shift) & 0x1ff) * 8;
            let entry = self.read_entry::<u64>(at);
            if entry & PRESENT == 0 {
                return self.fault(0, rights, intent);
            }
            let large = level > 1 && entry & LARGE != 0;
            let mut reserved = RESERVED_HIGH;
            if !self.config.no_execute {
                reserved |= NO_EXECUTE;
            }
            if self.config.paging == Paging::Pae {
                reserved |= 0x7ff << 52;
            }
            if large {
                // Bit 12 is PAT, the rest up to the page's size must be zero. PML4 entries have no size bit.
                let unknown = level == 4 || (level == 3 && !self.gigabyte_pages);
                reserved |= if unknown { LARGE } else { ((1 << shift) - 1) & !0x1fff };
            }
            if entry & reserved != 0 {
                return self.fault(error::PRESENT | error::RESERVED, rights, intent);
            }
            allowed &= entry;
            no_execute |= entry & NO_EXECUTE != 0;
            if level == 1 || large {
                let leaf = Leaf { entry, at, allowed, no_execute };
                self.check(&leaf, rights, intent)?;
                for &(at, entry) in upper.iter().filter(|(at, entry)| *at != 0 || *entry != 0) {
                    self.set_bits::<u64>(at, entry, ACCESSED);
                }
                let writable = self.finish::<u64>(leaf, rights, intent)?;
                let size = 1u64 << shift;
                let gpa = (entry & ADDRESS & !(size - 1)) | (va & (size - 1));
                let global = entry & GLOBAL != 0 && self.config.global_pages;
                return Ok(Translation { gpa, writable, page_size: size, global });
            }
            upper[level as usize - 1] = (at, entry);
            table = entry & ADDRESS;
            level -= 1;
        }
    }

    /// Access rights (4.6).
    fn check(&self, leaf: &Leaf, rights: Rights, intent: Intent) -> Result<(), PageFault> {
        let user_page = leaf.allowed & USER != 0;
        let writable = leaf.allowed & WRITABLE != 0;
        let denied = if rights == Rights::User {
            !user_page
                || (intent == Intent::Write && !writable)
                || (intent == Intent::Fetch && leaf.no_execute)
        } else {
            match intent {
                Intent::Fetch => leaf.no_execute || (user_page && self.config.smep),
                Intent::Write => {
                    (!writable && self.config.write_protect)
                        || (user_page && rights == Rights::SupervisorSmap)
                }
                Intent::Read => user_page && rights == Rights::SupervisorSmap,
            }
        };
        if denied { self.fault(error::PRESENT, rights, intent) } else { Ok(()) }
    }

    /// Checks rights once more for large legacy pages, sets accessed and dirty bits, and says whether writes
    /// may pass from now on.
    fn finish<W: Word>(&self, leaf: Leaf, rights: Rights, intent: Intent) -> Result<bool, PageFault> {
        self.check(&leaf, rights, intent)?;
        let wanted = if intent == Intent::Write { ACCESSED | DIRTY } else { ACCESSED };
        self.set_bits::<W>(leaf.at, leaf.entry, wanted);
        let dirty = intent == Intent::Write || leaf.entry & DIRTY != 0;
        Ok(dirty && self.check(&leaf, rights, Intent::Write).is_ok())
    }

    /// Reads a page-table entry; what is not memory reads as not present.
    pub(super) fn read_entry<W: Word>(&self, at: u64) -> W {
        self.map.page(at).map_or(W::default(), |page| W::load(page.ptr(at)))
    }

    /// Sets bits in a page-table entry atomically, as long as it is still the one that was read.
    fn set_bits<W: Word>(&self, at: u64, entry: u64, bits: u64) {
        if entry & bits == bits {
            return;
        }
        let Some(page) = self.map.page(at).filter(|page| !page.read_only()) else { return };
        page.mark_dirty();
        let mut old = entry;
        loop {
            let seen = W::compare_exchange(page.ptr(at), W::from_u64(old), W::from_u64(old | bits)).to_u64();
            if seen == old {
                return;
            }
            // Somebody else changed the entry: only its own bits may be added, and only if it is the same page.
            if (seen ^ entry) & !(ACCESSED | DIRTY) != 0 {
                return;
            }
            old = seen;
        }
    }

    /// Loads the PDPTE registers from memory (4.4.1); false when a reserved bit is set.
    pub(crate) fn load_pdptes(&mut self, cr3: u64) -> bool {
        let base = cr3 & 0xffff_ffe0;
        let mut loaded = [0; 4];
        for (index, place) in loaded.iter_mut().enumerate() {
            let entry = self.read_entry::<u64>(base + index as u64 * 8);
            if entry & PRESENT != 0 && entry & (RESERVED_HIGH | 0x1e6 | 0xfff << 52) != 0 {
                return false;
            }
            *place = entry;
        }
        self.pdpte = loaded;
        true
    }
}

struct Leaf {
    entry: u64,
    /// Guest physical address of the entry.
    at: u64,
    /// WRITABLE and USER as all levels allow them.
    allowed: u64,
    no_execute: bool,
}
