//! Instructions that user mode shall not execute on the processor, and how it is kept from them.
//!
//! CPUID of user mode does not leave the guest here and would show the host's processor instead of the model's: a
//! program would choose instructions that the software engine lacks. Where the processor saves more registers than the
//! model has, XSAVE and its kin would write past the end of what the program made room for, and XGETBV would say so. So
//! each page is searched for the bytes of these instructions before it may be executed. Bytes that only look like one,
//! inside another instruction, are told apart by decoding towards them from many places before: decoders fall into
//! step with the code after a few instructions, wherever they begin.
//!
//! A page with such instructions runs as a copy with a HLT in the place of each, where they are certain: software has
//! executed one of the page, or what follows looks like code, too, and not like data that lies among it. In doubt, software
//! keeps the page. (Breakpoints of the processor would say themselves whether an instruction begins at an address; the KVM
//! that emulates kernel mode takes them and does not stop.) This is no protection against a guest that wants to see the
//! host's CPUID, and need not be one.

use std::collections::HashMap;

use harrier_engine::user_mode::UserCode;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};

/// Decoding begins this far before the bytes, at every place of the range.
const BEGIN: std::ops::Range<usize> = 8..136;
/// Fewer decoders say nothing.
const FEWEST: usize = 32;
/// Of so many decoders, one at most may disagree.
const SHARE: usize = 8;
/// HLT, which user mode may not execute.
pub(super) const TRAP: u8 = 0xf4;
/// So many bytes before a page say what its first ones are.
pub(super) const CONTEXT: usize = 160;
/// Instructions behind one that must look like code, too.
const FOLLOWING: usize = 6;
/// Most pages whose searches are remembered; a large guest has that many pages of code.
const MOST_PAGES: usize = 1 << 16;

/// Which instructions are kept from the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Forbidden {
    /// XSAVE, XRSTOR and XGETBV too.
    pub(super) xsave: bool,
}

/// Whether bytes are those of a forbidden instruction, without its prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    No,
    Yes,
    /// If the right ones follow.
    Perhaps,
}

impl Forbidden {
    /// Looks at the first bytes; opcodes and operand bytes are those of the Intel SDM volume 2, A.3 and A.4.
    pub(super) fn matches(self, bytes: &[u8]) -> Match {
        let (first, second, third) = (bytes.first(), bytes.get(1), bytes.get(2));
        let Some(0x0f) = first else { return Match::No };
        let (registers, operations): (bool, &[u8]) = match second {
            None => return Match::Perhaps,
            Some(0xa2) => return Match::Yes,
            Some(_) if !self.xsave => return Match::No,
            // XGETBV
            Some(0x01) => (true, &[]),
            // XSAVE, XRSTOR, XSAVEOPT
            Some(0xae) => (false, &[4, 5, 6]),
            // XRSTORS, XSAVEC, XSAVES
            Some(0xc7) => (false, &[3, 4, 5]),
            Some(_) => return Match::No,
        };
        let Some(&operand) = third else { return Match::Perhaps };
        let is_memory = operand >> 6 != 3;
        let found =
            if registers { operand == 0xd0 } else { is_memory && operations.contains(&(operand >> 3 & 7)) };
        if found { Match::Yes } else { Match::No }
    }

    fn is(self, instruction: &Instruction) -> bool {
        use Mnemonic as M;
        let mnemonic = instruction.mnemonic();
        mnemonic == M::Cpuid
            || self.xsave
                && matches!(
                    mnemonic,
                    M::Xgetbv
                        | M::Xsave
                        | M::Xsave64
                        | M::Xsaveopt
                        | M::Xsaveopt64
                        | M::Xsavec
                        | M::Xsavec64
                        | M::Xsaves
                        | M::Xsaves64
                        | M::Xrstor
                        | M::Xrstor64
                        | M::Xrstors
                        | M::Xrstors64
                )
    }
}

/// What the bytes of a forbidden instruction are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// An instruction, and more of them follow.
    Certain,
    /// An instruction, or data that looks like one.
    Likely,
    /// Who knows.
    Doubtful,
}

/// A place that holds, or may hold, a forbidden instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Site {
    /// Offset of the opcode in the page.
    pub(super) opcode: usize,
    pub(super) meaning: Meaning,
}

impl Site {
    /// Whether it may be replaced: nothing reads or executes these bytes as anything else.
    pub(super) fn is_sure(&self, executed: bool) -> bool {
        match self.meaning {
            Meaning::Certain => true,
            Meaning::Likely => executed,
            Meaning::Doubtful => false,
        }
    }
}

/// What was found in a page.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Found {
    pub(super) sites: Vec<Site>,
    /// The page's last bytes may begin an instruction that is forbidden if the next page goes on in the right way.
    pub(super) tail: Option<Site>,
}

/// What was found so far.
#[derive(Debug)]
pub(super) struct Searches {
    forbidden: Forbidden,
    /// By guest physical address: version, whether the bytes before the page were known, and what was found.
    by_gpa: HashMap<u64, (u64, bool, Found)>,
}

impl Searches {
    pub(super) fn new(forbidden: Forbidden) -> Searches {
        Searches { forbidden, by_gpa: HashMap::new() }
    }

    pub(super) fn forbidden(&self) -> Forbidden {
        self.forbidden
    }

    /// Searches a page; `content` reads it. `before` are bytes that lie before it, [`CONTEXT`] of them or none. `None` if it
    /// cannot be read.
    pub(super) fn search(
        &mut self,
        gpa: u64,
        code: UserCode,
        before: impl FnOnce() -> Vec<u8>,
        content: impl FnOnce() -> Option<Vec<u8>>,
    ) -> Option<&Found> {
        if self.by_gpa.len() >= MOST_PAGES {
            self.by_gpa.clear();
        }
        let known = self.by_gpa.get(&gpa).is_some_and(|(version, complete, found)| {
            *version == code.version && (*complete || *found == Found::default())
        });
        if !known {
            let before = before();
            let found = find(&before, &content()?, self.forbidden);
            self.by_gpa.insert(gpa, (code.version, !before.is_empty(), found));
        }
        self.by_gpa.get(&gpa).map(|(_, _, found)| found)
    }
}

fn find(before: &[u8], page: &[u8], forbidden: Forbidden) -> Found {
    let mut found = Found::default();
    let mut bytes = Vec::new();
    let opcodes = page.iter().enumerate().filter(|(_, byte)| **byte == 0x0f).map(|(at, _)| at);
    for opcode in opcodes {
        let matched = forbidden.matches(page.get(opcode..).unwrap_or_default());
        if matched == Match::No {
            continue;
        }
        if bytes.is_empty() {
            bytes = [before, page].concat();
        }
        let at = before.len() + opcode;
        if matched == Match::Yes {
            let meaning = meaning(&bytes, at, |one| forbidden.is(one));
            found.sites.extend(meaning.map(|meaning| Site { opcode, meaning }));
        } else {
            // Cut off, no decoder knows it: it is enough that an instruction may begin there.
            let meaning = meaning(&bytes, at, Instruction::is_invalid);
            found.tail = meaning.map(|meaning| Site { opcode, meaning });
        }
    }
    found
}

/// What the opcode at this offset is; `None` if it is the inside of another instruction.
fn meaning(bytes: &[u8], opcode: usize, is_it: impl Fn(&Instruction) -> bool) -> Option<Meaning> {
    let (mut all, mut met) = (0, 0);
    for distance in BEGIN {
        let Some(code) = opcode.checked_sub(distance).and_then(|begin| bytes.get(begin..)) else { break };
        all += 1;
        met += usize::from(is_instruction(code, distance, &is_it));
    }
    if all < FEWEST {
        Some(Meaning::Doubtful)
    } else if met * SHARE <= all {
        None
    } else if (all - met) * SHARE > all {
        Some(Meaning::Doubtful)
    } else if looks_like_code(bytes.get(opcode..).unwrap_or_default()) {
        Some(Meaning::Certain)
    } else {
        Some(Meaning::Likely)
    }
}

/// Whether instructions follow each other here as compilers and people write them.
fn looks_like_code(bytes: &[u8]) -> bool {
    let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
    (0..FOLLOWING).all(|_| {
        if !decoder.can_decode() {
            return true;
        }
        let (from, instruction) = (decoder.position(), decoder.decode());
        let cut_off = instruction.is_invalid() && bytes.len() - from < 15;
        // That would be an addition, which nobody writes.
        let zeros = bytes.get(from..from + 2) == Some(&[0, 0]);
        cut_off || !(instruction.is_invalid() || instruction.is_privileged() || zeros)
    })
}

/// Decodes from 0 to the instruction that holds the byte at `opcode`: whether it is the right one, and that byte its opcode.
fn is_instruction(code: &[u8], opcode: usize, is_it: impl Fn(&Instruction) -> bool) -> bool {
    let is_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    loop {
        let begin = decoder.position();
        let Some(prefixes) = code.get(begin..opcode) else { return false };
        let instruction = decoder.decode();
        let is_right = prefixes.iter().all(is_prefix) && is_it(&instruction);
        if instruction.is_invalid() {
            if is_right || decoder.set_position(begin + 1).is_err() {
                return is_right;
            }
        } else if decoder.position() > opcode {
            return is_right;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Forbidden = Forbidden { xsave: true };
    const CPUID: Forbidden = Forbidden { xsave: false };

    /// Instructions of several lengths, over and over: add rsp, 8; mov eax, 0; nop; lea rdx, [rip+0].
    fn code() -> Vec<u8> {
        let block =
            [0x48, 0x83, 0xc4, 0x08, 0xb8, 0, 0, 0, 0, 0x90, 0x48, 0x8d, 0x15, 0, 0, 0, 0, 0x55, 0x41, 0x57];
        let mut page = block.repeat(4096 / block.len());
        page.resize(4096, 0x90);
        page
    }

    fn code_with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut page = code();
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    /// After mov eax, 0, in place of nop; lea.
    const PLACE: usize = 2009;

    fn found(page: &[u8], forbidden: Forbidden) -> Found {
        find(&[], page, forbidden)
    }

    #[test]
    fn each_forbidden_instruction_is_found_behind_its_prefix() {
        let cases: [(&[u8], usize); 6] = [
            (&[0x0f, 0xa2, 0x90], 0),
            (&[0x0f, 0x01, 0xd0], 0),
            (&[0x0f, 0xae, 0x64, 0x24, 0x40], 0),       // xsave [rsp+0x40]
            (&[0x48, 0x0f, 0xae, 0x6c, 0x24, 0x40], 1), // xrstor64 [rsp+0x40]
            (&[0x48, 0x0f, 0xc7, 0x64, 0x24, 0x40], 1), // xsavec64 [rsp+0x40]
            (&[0x0f, 0xae, 0x30, 0x90], 0),             // xsaveopt [rax]
        ];
        for (bytes, prefixes) in cases {
            // After mov eax, 0, in place of nop; lea, and as much as brings the rest back into step.
            let mut page = code_with(PLACE, &[0x90; 11]);
            page[PLACE..PLACE + bytes.len()].copy_from_slice(bytes);
            for (at, byte) in (PLACE + bytes.len()..PLACE + 11).zip([0x53, 0x57, 0x56, 0x52].iter().cycle()) {
                page[at] = *byte;
            }
            let site = Site { opcode: PLACE + prefixes, meaning: Meaning::Certain };
            assert_eq!(found(&page, ALL), Found { sites: vec![site], tail: None }, "{bytes:02x?}");
        }
    }

    #[test]
    fn what_only_shares_the_opcode_is_no_forbidden_instruction() {
        let others: [&[u8]; 6] = [
            &[0x0f, 0xae, 0xf0],             // mfence
            &[0x0f, 0xae, 0xe8],             // lfence
            &[0x0f, 0xae, 0x5c, 0x24, 0x40], // stmxcsr
            &[0x0f, 0xae, 0x44, 0x24, 0x40], // fxsave
            &[0x0f, 0xc7, 0x0f],             // cmpxchg8b
            &[0x0f, 0x01, 0xf9],             // rdtscp
        ];
        for bytes in others {
            assert_eq!(found(&code_with(PLACE, bytes), ALL), Found::default(), "{bytes:02x?}");
        }
        let xgetbv = code_with(PLACE, &[0x0f, 0x01, 0xd0]);
        assert_eq!(found(&xgetbv, CPUID), Found::default());
    }

    #[test]
    fn bytes_inside_another_instruction_do_not_count() {
        // The immediate of mov eax.
        assert_eq!(found(&code_with(2006, &[0x0f, 0xa2]), ALL), Found::default());
        // So near to the begin only what lies before can tell.
        let page = code_with(6, &[0x0f, 0xa2]);
        assert_eq!(found(&page, ALL).sites, [Site { opcode: 6, meaning: Meaning::Doubtful }]);
        let before = code()[4080 - CONTEXT..4080].to_vec();
        assert_eq!(find(&before, &page, ALL), Found::default());
    }

    #[test]
    fn what_looks_like_cpuid_before_data_is_believed_only_once_one_was_executed() {
        let mut page = code_with(PLACE, &[0x0f, 0xa2]);
        page[PLACE + 2..PLACE + 200].fill(0);
        let sites = found(&page, ALL).sites;
        assert_eq!(sites, [Site { opcode: PLACE, meaning: Meaning::Likely }]);
        assert!(!sites[0].is_sure(false) && sites[0].is_sure(true));
    }

    #[test]
    fn an_instruction_that_may_go_on_in_the_next_page_is_remembered() {
        let mut page = code();
        page[4080..].fill(0x90);
        for tail in [&[0x0f][..], &[0x0f, 0xae], &[0x48, 0x0f, 0xc7]] {
            let at = 4096 - tail.len();
            page[at - 2..at].fill(0x90);
            page[at..].copy_from_slice(tail);
            let found = found(&page, ALL);
            let opcode = 4096 - tail.len() + usize::from(tail[0] == 0x48);
            assert_eq!(found.tail, Some(Site { opcode, meaning: Meaning::Certain }), "{tail:02x?}");
            assert!(found.sites.is_empty());
        }
        assert_eq!(ALL.matches(&[0x0f, 0xae, 0x20]), Match::Yes);
        assert_eq!(ALL.matches(&[0x0f, 0xae, 0xe8]), Match::No);
    }

    #[test]
    fn a_page_is_searched_once_for_each_version_and_again_when_more_is_known() {
        let mut searches = Searches::new(ALL);
        let code_of = |version| UserCode { version, trapped: false };
        let page = code_with(PLACE, &[0x0f, 0xa2, 0x90]);
        let before = || vec![0x90; CONTEXT];
        assert_eq!(
            searches.search(0x5000, code_of(1), Vec::new, || Some(page.clone())).unwrap().sites.len(),
            1
        );
        assert_eq!(searches.search(0x5000, code_of(1), before, || Some(page)).unwrap().sites.len(), 1);
        assert_eq!(searches.search(0x5000, code_of(1), before, || panic!("known")).unwrap().sites.len(), 1);
        assert_eq!(searches.search(0x5000, code_of(2), before, || Some(code())), Some(&Found::default()));
        assert_eq!(searches.search(0x6000, code_of(3), before, || None), None);
    }
}
