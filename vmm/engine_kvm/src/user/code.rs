//! Code pages that user mode may run on the processor, without their CPUID.
//!
//! CPUID of user mode does not leave the guest here and would show the host's processor instead of the model's: a
//! program would choose instructions that the software engine lacks, or whose registers the guest's kernel does not
//! save. So each page is searched for the two bytes of CPUID before it may be executed. Bytes that only look like it,
//! inside another instruction, are told apart by decoding towards them from many places before: decoders fall into
//! step with the code after a few instructions, wherever they begin. Where that leaves a doubt, software keeps the
//! page. Once software has executed a CPUID of a page, what looks like its others is believed too, and the page runs as
//! a copy that has undefined instructions in their places. This is no protection against a guest that wants to see
//! the host's CPUID, and need not be one.
//!
//! A page is either executable or writable, so that what was searched stays as it was.

use std::collections::HashSet;

use harrier_engine::user_mode::{UserAccess, UserPage};
use iced_x86::{Decoder, DecoderOptions};

/// The bytes of CPUID.
const CPUID: [u8; 2] = [0x0f, 0xa2];
/// Decoding begins this far before the bytes, at every place of the range.
const BEGIN: std::ops::Range<usize> = 8..136;
/// Fewer decoders say nothing.
const FEWEST: usize = 32;
/// Of so many decoders, one at most may disagree.
const SHARE: usize = 8;
/// UD2.
pub(super) const TRAP: [u8; 2] = [0x0f, 0x0b];

/// Which pages user mode has, and how.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// By guest physical address, since a page may be mapped more than once.
    executable: HashSet<u64>,
    writable: HashSet<u64>,
}

/// How a page may be mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Admission {
    /// Like this.
    As(UserPage),
    /// As a copy of the page, with [`TRAP`] at these offsets; executable and not writable.
    Copied(Vec<u8>, Vec<usize>),
    /// Only after everything was forgotten: it is mapped in the way that excludes this one.
    AfterForgetting,
    /// Not at all: it holds CPUID, or may.
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
        let mut copied = None;
        if executable {
            match content().map(|bytes| (find(&bytes, page.cpuid), bytes)) {
                Some((Some(found), bytes)) if !found.is_empty() => copied = Some((bytes, found)),
                Some((Some(_), _)) => {}
                _ if fetch => return Admission::Never,
                _ => executable = false,
            }
        }
        if executable {
            self.executable.insert(page.gpa);
        }
        if let Some((bytes, found)) = copied {
            return Admission::Copied(bytes, found);
        }
        if writable {
            self.writable.insert(page.gpa);
        }
        Admission::As(UserPage { writable, executable, ..page })
    }
}

/// What the bytes of CPUID are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// Part of another instruction.
    Inside,
    /// CPUID, by all that can be seen.
    Instruction,
    /// Who knows; data among the code, perhaps.
    Doubtful,
}

/// Offsets of the CPUIDs in a page; `None` if there are some that may be one or not. `believe`: one was executed.
fn find(page: &[u8], believe: bool) -> Option<Vec<usize>> {
    // A CPUID that crosses into the next page is missed: its first byte alone is far too common.
    let pairs = page.windows(2).enumerate().filter(|(_, pair)| *pair == CPUID).map(|(at, _)| at);
    let mut found = Vec::new();
    for at in pairs {
        match meaning(page, at) {
            Meaning::Inside => {}
            Meaning::Instruction if believe => found.push(at),
            Meaning::Instruction | Meaning::Doubtful => return None,
        }
    }
    Some(found)
}

fn meaning(page: &[u8], at: usize) -> Meaning {
    let (mut met, mut all) = (0, 0);
    for distance in BEGIN {
        let Some(code) = at.checked_sub(distance).and_then(|begin| page.get(begin..)) else { break };
        all += 1;
        met += usize::from(begins_at(code, distance));
    }
    if all < FEWEST {
        Meaning::Doubtful
    } else if met * SHARE <= all {
        Meaning::Inside
    } else if (all - met) * SHARE <= all {
        Meaning::Instruction
    } else {
        Meaning::Doubtful
    }
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

    const BOTH: UserPage = UserPage { gpa: 0x5000, writable: true, executable: true, cpuid: false };
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

    fn code_with_cpuid() -> Vec<u8> {
        let mut bytes = code();
        // After mov eax, 0, in place of nop; lea.
        bytes[2009..2012].copy_from_slice(&[0x0f, 0xa2, 0x90]);
        bytes
    }

    #[test]
    fn a_page_with_cpuid_is_not_executed_and_can_still_be_read() {
        let mut pages = Pages::default();
        assert_eq!(pages.admit(CODE, UserAccess::Fetch, || Some(code_with_cpuid())), Admission::Never);
        let data = UserPage { executable: false, ..CODE };
        assert_eq!(pages.admit(CODE, UserAccess::Read, || Some(code_with_cpuid())), Admission::As(data));
        assert_eq!(pages.admit(CODE, UserAccess::Fetch, || None), Admission::Never);
    }

    #[test]
    fn once_a_cpuid_was_executed_the_page_runs_as_a_copy_that_traps_at_each() {
        let mut pages = Pages::default();
        let proven = UserPage { cpuid: true, ..CODE };
        let admitted = pages.admit(proven, UserAccess::Fetch, || Some(code_with_cpuid()));
        assert_eq!(admitted, Admission::Copied(code_with_cpuid(), vec![2009]));
        assert_eq!(pages.admit(proven, UserAccess::Write, plain), Admission::AfterForgetting);
        // So near to the begin, nobody can tell.
        let mut bytes = vec![0x90; 4096];
        bytes[20..22].copy_from_slice(&CPUID);
        pages.forget();
        assert_eq!(pages.admit(proven, UserAccess::Fetch, || Some(bytes)), Admission::Never);
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
