//! Code pages that user mode may run on the processor: those without CPUID.
//!
//! CPUID of user mode does not leave the guest here and would show the host's processor instead of the model's: a
//! program would choose instructions that the software engine lacks, or whose registers the guest's kernel does not
//! save. So each page is searched for the two bytes of CPUID before it may be executed, and stays software's if it
//! has one. Bytes that only look like it, inside another instruction, are told apart by decoding towards them from
//! many places before: decoders fall into step with the code after a few instructions, wherever they begin. This is
//! no protection against a guest that wants to see the host's CPUID, and need not be one.
//!
//! A page is either executable or writable, so that what was searched stays as it was.

use std::collections::HashSet;

use harrier_engine::user_mode::{UserAccess, UserPage};
use iced_x86::{Decoder, DecoderOptions};

/// The bytes of CPUID.
const CPUID: [u8; 2] = [0x0f, 0xa2];
/// Decoding begins this far before the bytes, at every place of the range.
const BEGIN: std::ops::Range<usize> = 64..192;
/// Of so many decoders, one at most may meet the bytes as an instruction.
const SHARE: usize = 8;

/// Which pages user mode has, and how.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// By guest physical address, since a page may be mapped more than once.
    executable: HashSet<u64>,
    writable: HashSet<u64>,
}

/// How a page may be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// Like this.
    As(UserPage),
    /// Only after everything was forgotten: it is mapped in the way that excludes this one.
    AfterForgetting,
    /// Not at all: it holds CPUID.
    Never,
}

impl Pages {
    /// Forgets all pages.
    pub(super) fn forget(&mut self) {
        *self = Pages::default();
    }

    /// Decides how a page may be mapped. `content` reads it; `None` if it cannot be read.
    pub(super) fn admit(
        &mut self,
        page: UserPage,
        access: UserAccess,
        content: impl FnOnce() -> Option<Vec<u8>>,
    ) -> Admission {
        let fetch = access == UserAccess::Fetch;
        let writable = page.writable && !fetch && !self.executable.contains(&page.gpa);
        if access == UserAccess::Write && !writable || fetch && self.writable.contains(&page.gpa) {
            return Admission::AfterForgetting;
        }
        let mut executable = page.executable && !writable && !self.writable.contains(&page.gpa);
        if executable && !self.is_admitted(page.gpa, content) {
            if fetch {
                return Admission::Never;
            }
            executable = false;
        }
        if executable {
            self.executable.insert(page.gpa);
        }
        if writable {
            self.writable.insert(page.gpa);
        }
        Admission::As(UserPage { writable, executable, ..page })
    }

    fn is_admitted(&self, gpa: u64, content: impl FnOnce() -> Option<Vec<u8>>) -> bool {
        self.executable.contains(&gpa) || content().is_some_and(|bytes| !may_hold_cpuid(&bytes))
    }
}

/// Whether a page of code has CPUID in it, as far as one can see.
fn may_hold_cpuid(page: &[u8]) -> bool {
    // In two pages: who is to say what the next one will be. The first byte alone is far too common.
    let mut pairs = page.windows(2).enumerate().filter(|(_, pair)| *pair == CPUID);
    pairs.any(|(at, _)| is_met_as_instruction(page, at))
}

/// Whether decoders that begin before `at` fall into step so that an instruction begins there.
fn is_met_as_instruction(page: &[u8], at: usize) -> bool {
    let (mut met, mut all) = (0, 0);
    for distance in BEGIN {
        let Some(code) = at.checked_sub(distance).and_then(|begin| page.get(begin..)) else { break };
        all += 1;
        met += usize::from(begins_at(code, distance));
    }
    // Too near to the page's begin to tell.
    all < (BEGIN.end - BEGIN.start) / 4 || met * SHARE > all
}

/// Whether an instruction begins at `distance` when decoding begins at 0.
fn begins_at(code: &[u8], distance: usize) -> bool {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    while decoder.position() < distance {
        let before = decoder.position();
        if decoder.decode().is_invalid() && decoder.set_position(before + 1).is_err() {
            return false;
        }
    }
    decoder.position() == distance
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: UserPage = UserPage { gpa: 0x5000, writable: true, executable: true };
    const CODE: UserPage = UserPage { writable: false, ..BOTH };

    fn plain() -> Option<Vec<u8>> {
        Some(vec![0x90; 4096])
    }

    #[test]
    fn a_page_is_executable_or_writable_and_changes_only_by_forgetting() {
        let mut pages = Pages::default();
        assert_eq!(pages.admit(BOTH, UserAccess::Fetch, plain), Admission::As(CODE));
        assert_eq!(pages.admit(BOTH, UserAccess::Read, plain), Admission::As(CODE));
        assert_eq!(pages.admit(BOTH, UserAccess::Write, plain), Admission::AfterForgetting);
        pages.forget();
        let writable = UserPage { executable: false, ..BOTH };
        assert_eq!(pages.admit(BOTH, UserAccess::Write, plain), Admission::As(writable));
        assert_eq!(pages.admit(BOTH, UserAccess::Fetch, plain), Admission::AfterForgetting);
    }

    /// Instructions of several lengths, over and over: add rsp, 8; mov eax, 0; nop; lea rdx, [rip+0].
    fn code() -> Vec<u8> {
        let block =
            [0x48, 0x83, 0xc4, 0x08, 0xb8, 0, 0, 0, 0, 0x90, 0x48, 0x8d, 0x15, 0, 0, 0, 0, 0x55, 0x41, 0x57];
        block.repeat(4096 / block.len())
    }

    #[test]
    fn a_page_with_cpuid_is_never_executed_and_can_still_be_read() {
        let mut bytes = code();
        // In place of nop; lea's first byte, and then a nop again.
        bytes[2009..2012].copy_from_slice(&[0x0f, 0xa2, 0x90]);
        let mut pages = Pages::default();
        assert_eq!(pages.admit(CODE, UserAccess::Fetch, || Some(bytes.clone())), Admission::Never);
        let data = UserPage { executable: false, ..CODE };
        assert_eq!(pages.admit(CODE, UserAccess::Read, || Some(bytes)), Admission::As(data));
        assert_eq!(pages.admit(CODE, UserAccess::Fetch, || None), Admission::Never);
    }

    #[test]
    fn bytes_of_cpuid_inside_another_instruction_do_not_count() {
        let mut bytes = code();
        // The immediate of mov eax.
        bytes[2006..2008].copy_from_slice(&[0x0f, 0xa2]);
        let mut pages = Pages::default();
        assert_eq!(pages.admit(CODE, UserAccess::Fetch, || Some(bytes.clone())), Admission::As(CODE));
        // So near to the begin, nobody can tell.
        bytes[6..8].copy_from_slice(&[0x0f, 0xa2]);
        pages.forget();
        assert_eq!(pages.admit(CODE, UserAccess::Fetch, || Some(bytes)), Admission::Never);
    }
}
