//! Address translation: paging, the translation look-aside buffers, and the way to guest memory.
//!
//! [`tlb`] is the fast path that every load and store takes, [`walk`] reads page tables, [`map`] knows where
//! guest memory lies on the host, and [`access`] puts them together as methods of [`crate::cpu::Cpu`].

pub(crate) mod access;
pub(crate) mod map;
pub(crate) mod path;
pub(crate) mod tlb;
pub(crate) mod walk;

use std::sync::Arc;

use crate::cpu::{cr0, cr4, efer, rflags};
use map::MemoryMap;
use tlb::{AddressFilter, Tlb};

/// Bits of a physical address that this processor has.
pub(crate) const PHYSICAL_BITS: u32 = 46;
/// Size of the smallest page in bytes.
pub(crate) const PAGE: u64 = 4096;

/// Whose rights an access has; the index of its translations in the look-aside buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Rights {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2, user pages allowed.
    Supervisor = 1,
    /// CPL 0 to 2 while SMAP keeps data accesses off user pages.
    SupervisorSmap = 2,
    /// One of the above, but every access takes the slow path, because alignment or data breakpoints have to
    /// be checked. Never in the look-aside buffers.
    Checked = 3,
}

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Intent {
    Read,
    Write,
    Fetch,
}

/// How page tables look, from CR0, CR4 and EFER (Intel SDM volume 3, 4.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Paging {
    #[default]
    Off,
    /// 32-bit, two levels of 4-byte entries.
    Legacy,
    /// PAE, three levels; the top one in the PDPTE registers.
    Pae,
    /// Four levels.
    Long,
}

/// Control bits that the walk depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct PagingConfig {
    pub paging: Paging,
    pub cr3: u64,
    pub write_protect: bool,
    pub no_execute: bool,
    pub page_size_extension: bool,
    pub global_pages: bool,
    pub smep: bool,
    pub smap: bool,
}

/// Flushes of translations, for whoever keeps translations elsewhere.
#[derive(Default)]
pub(crate) struct Flushes {
    /// How often everything was flushed.
    pub whole: u64,
    /// Addresses whose pages were, since that or since somebody took them away.
    pub pages: Vec<u64>,
}

impl Flushes {
    /// Longer lists are as good as everything.
    const MOST_PAGES: usize = 64;

    fn all(&mut self) {
        self.whole += 1;
        self.pages.clear();
    }

    fn page(&mut self, va: u64) {
        if self.pages.len() < Self::MOST_PAGES { self.pages.push(va) } else { self.all() }
    }
}

/// Translation state of one processor.
pub(crate) struct Mmu {
    pub config: PagingConfig,
    /// Rights of ordinary data accesses now.
    pub rights: Rights,
    /// What [`Rights::Checked`] stands for now.
    plain: Rights,
    /// Unaligned data accesses of CPL 3 fault (CR0.AM and RFLAGS.AC).
    pub check_alignment: bool,
    alignment_mask: bool,
    /// Data breakpoints are enabled.
    pub watching: bool,
    pub tlb: Tlb,
    pub map: Arc<MemoryMap>,
    /// PDPTE registers, loaded with CR3 in PAE paging.
    pub pdpte: [u64; 4],
    /// Grows whenever cached translations of code addresses may be stale.
    pub code_generation: u64,
    /// Pages of code that are kept under that generation.
    code_pages: AddressFilter,
    /// What was flushed since somebody looked.
    pub flushes: Flushes,
    /// Times that only the address space was switched: code in the upper half stays known then.
    space_switches: u64,
    /// Code in the upper half was fetched from a page that is not global.
    upper_half_is_local: bool,
    /// Physical pages of the block that is being executed.
    pub running: [u64; 2],
    /// The processor has pages of 1 GiB.
    pub gigabyte_pages: bool,
}

impl Mmu {
    pub(crate) fn new(map: Arc<MemoryMap>) -> Mmu {
        Mmu {
            config: PagingConfig::default(),
            rights: Rights::Supervisor,
            plain: Rights::Supervisor,
            check_alignment: false,
            alignment_mask: false,
            watching: false,
            tlb: Tlb::new(),
            map,
            pdpte: [0; 4],
            code_generation: 1,
            code_pages: AddressFilter::new(),
            flushes: Flushes::default(),
            space_switches: 0,
            upper_half_is_local: false,
            running: [u64::MAX; 2],
            gigabyte_pages: false,
        }
    }

    /// Takes over the control registers; flushes what depends on what changed.
    pub(crate) fn set_paging(&mut self, cr0: u64, cr3: u64, cr4: u64, efer: u64) {
        self.alignment_mask = cr0 & cr0::AM != 0;
        let paging = if cr0 & cr0::PG == 0 {
            Paging::Off
        } else if efer & efer::LMA != 0 {
            Paging::Long
        } else if cr4 & cr4::PAE != 0 {
            Paging::Pae
        } else {
            Paging::Legacy
        };
        let config = PagingConfig {
            paging,
            cr3,
            write_protect: cr0 & cr0::WP != 0,
            no_execute: efer & efer::NXE != 0,
            page_size_extension: cr4 & cr4::PSE != 0,
            global_pages: cr4 & cr4::PGE != 0,
            smep: cr4 & cr4::SMEP != 0,
            smap: cr4 & cr4::SMAP != 0,
        };
        if config != self.config {
            self.config = config;
            self.flush();
        }
    }

    /// Takes over what decides the rights of data accesses.
    #[inline]
    pub(crate) fn set_access_mode(&mut self, cpl: u8, cr4: u64, rflags: u64) {
        self.plain = if cpl == 3 {
            Rights::User
        } else if cr4 & cr4::SMAP != 0 && rflags & rflags::AC == 0 {
            Rights::SupervisorSmap
        } else {
            Rights::Supervisor
        };
        self.check_alignment = cpl == 3 && self.alignment_mask && rflags & rflags::AC != 0;
        self.rights = if self.check_alignment || self.watching { Rights::Checked } else { self.plain };
    }

    /// Rights as the page walk and the look-aside buffers know them.
    #[inline(always)]
    pub(crate) fn plain_rights(&self, rights: Rights) -> Rights {
        if rights == Rights::Checked { self.plain } else { rights }
    }

    /// Forgets all translations.
    pub(crate) fn flush(&mut self) {
        self.flushes.all();
        self.tlb.flush();
        self.upper_half_is_local = false;
        self.forget_code();
    }

    /// Takes over another CR3 and forgets all translations that are not global.
    pub(crate) fn switch_space(&mut self, cr3: u64) {
        self.config.cr3 = cr3;
        self.flushes.all();
        if self.upper_half_is_local {
            self.flush();
        } else {
            self.tlb.flush();
            self.space_switches += 1;
        }
    }

    /// What knowledge about the code at a linear address depends on: it grows when that may be stale.
    #[inline(always)]
    pub(crate) fn code_generation_at(&self, rip: u64) -> u64 {
        // Kernels map their half with global pages, and those stay when the address space changes.
        if (rip as i64) < 0 { self.code_generation } else { self.code_generation + self.space_switches }
    }

    /// Notes how code at a linear address was translated.
    pub(crate) fn note_code_translation(&mut self, va: u64, global: bool) {
        self.upper_half_is_local |= (va as i64) < 0 && !global;
    }

    /// Forgets the translations of the page that holds `va`.
    pub(crate) fn flush_page(&mut self, va: u64) {
        self.flushes.page(va);
        // Most pages that are flushed never held code: the dispatcher keeps what it knows.
        if self.tlb.flush_page(va) || self.code_pages.may_contain(va / PAGE) {
            self.forget_code();
        }
    }

    fn forget_code(&mut self) {
        self.code_generation += 1;
        self.code_pages.clear();
    }

    /// Notes that a translation of a code address is kept under the present [`Mmu::code_generation`].
    pub(crate) fn note_code_address(&mut self, va: u64) {
        self.code_pages.add(va / PAGE);
    }

    /// Marks every page that could still be written without passing through the slow path as written, then
    /// makes the next write to each pass through it again.
    pub(crate) fn forget_writable(&mut self) {
        let map = Arc::clone(&self.map);
        self.tlb.forget_writable(|host_page| map.mark_dirty_host(host_page));
    }
}
