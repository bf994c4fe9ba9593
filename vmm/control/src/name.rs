//! Names and ids of machines.

use std::fmt::{self, Display};
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// The longest name in bytes.
pub const NAME_MAX: usize = 64;
/// Digits of an id.
pub const ID_LEN: usize = 12;

/// A name that a machine may have: letters, digits, `_`, `.` and `-`, the first a letter or digit; at most
/// [`NAME_MAX`] bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineName(String);

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a name for a machine: use up to {NAME_MAX} letters, digits, '_', '.' and '-', and begin with a letter or digit"
)]
pub struct NameError(String);

impl MachineName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name that `taken` does not know, from the words below.
    pub(crate) fn generate(taken: impl Fn(&str) -> bool) -> Self {
        let mut suffix = String::new();
        loop {
            let random = random_u64();
            let word = |words: &[&'static str], shift: u32| -> &'static str {
                let index = usize::try_from(random >> shift & 0xffff).unwrap_or(0) % words.len().max(1);
                words.get(index).copied().unwrap_or_default()
            };
            let name = format!("{}-{}{suffix}", word(ADJECTIVES, 0), word(BIRDS, 16));
            if !taken(&name) {
                return Self(name);
            }
            suffix = format!("-{:04x}", random >> 32 & 0xffff);
        }
    }
}

impl FromStr for MachineName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let good = |(index, byte): (usize, u8)| {
            byte.is_ascii_alphanumeric() || (index > 0 && matches!(byte, b'_' | b'.' | b'-'))
        };
        if text.is_empty() || text.len() > NAME_MAX || !text.bytes().enumerate().all(good) {
            return Err(NameError(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for MachineName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<MachineName> for String {
    fn from(name: MachineName) -> String {
        name.0
    }
}

impl Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A machine's id: [`ID_LEN`] lower-case hexadecimal digits, never given twice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);

impl MachineId {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn generate() -> Self {
        Self(format!("{:012x}", random_u64() >> 16))
    }

    /// `text` as an id, if it is a whole one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        (text.len() == ID_LEN && is_id_prefix(text)).then(|| Self(text.to_owned()))
    }
}

impl TryFrom<String> for MachineId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("'{text}' is not an id of a machine"))
    }
}

impl From<MachineId> for String {
    fn from(id: MachineId) -> String {
        id.0
    }
}

impl Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `text` can begin an id.
pub(crate) fn is_id_prefix(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= ID_LEN
        && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(8) => u64::from_ne_bytes(bytes),
        // Only a kernel from before 2014 has no such call. Collisions are noticed by whoever creates a machine.
        _ => crate::time::unix_ns().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(std::process::id()),
    }
}

const ADJECTIVES: &[&str] = &[
    "able", "agile", "amber", "bold", "brave", "brisk", "calm", "clear", "clever", "crisp", "deft", "eager",
    "early", "fair", "fleet", "fond", "gentle", "glad", "golden", "grand", "hardy", "honest", "humble",
    "jolly", "keen", "kind", "level", "light", "lively", "loyal", "lucid", "merry", "mild", "neat", "nimble",
    "noble", "patient", "placid", "plucky", "polite", "proud", "quick", "quiet", "ready", "sharp", "silent",
    "silver", "sleek", "smart", "snug", "solid", "steady", "still", "sunny", "swift", "tidy", "trim",
    "vivid", "warm", "wise",
];

const BIRDS: &[&str] = &[
    "avocet",
    "bittern",
    "brambling",
    "bunting",
    "buzzard",
    "chiffchaff",
    "coot",
    "crane",
    "crossbill",
    "curlew",
    "dipper",
    "dotterel",
    "dunlin",
    "egret",
    "eider",
    "falcon",
    "fieldfare",
    "finch",
    "fulmar",
    "gannet",
    "godwit",
    "goshawk",
    "grebe",
    "heron",
    "hobby",
    "hoopoe",
    "jackdaw",
    "kestrel",
    "kite",
    "knot",
    "lapwing",
    "lark",
    "linnet",
    "martin",
    "merlin",
    "nightjar",
    "nuthatch",
    "oriole",
    "osprey",
    "ouzel",
    "petrel",
    "pintail",
    "pipit",
    "plover",
    "quail",
    "raven",
    "redstart",
    "robin",
    "ruff",
    "sanderling",
    "shrike",
    "siskin",
    "skua",
    "snipe",
    "sparrow",
    "starling",
    "stilt",
    "swallow",
    "swift",
    "teal",
    "tern",
    "thrush",
    "wagtail",
    "warbler",
    "waxwing",
    "whimbrel",
    "wigeon",
    "wren",
    "wryneck",
    "yaffle",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_file_systems_and_shells_bear() {
        for good in ["a", "web-1", "A.b_c", "0", &"x".repeat(NAME_MAX)] {
            assert_eq!(good.parse::<MachineName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "_a", "a b", "a/b", "ä", "a\n", "..", &"x".repeat(NAME_MAX + 1)] {
            assert!(bad.parse::<MachineName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn generated_names_are_names_and_avoid_taken_ones() {
        for _ in 0..200 {
            let name = MachineName::generate(|_| false);
            assert_eq!(name.as_str().parse(), Ok(name.clone()));
            assert_ne!(MachineName::generate(|taken| taken == name.as_str()), name);
        }
        let all: Vec<&&str> = ADJECTIVES.iter().chain(BIRDS).collect();
        assert!(all.iter().all(|word| !word.is_empty()));
    }

    #[test]
    fn ids_are_twelve_digits() {
        let id = MachineId::generate();
        assert_eq!(MachineId::parse(id.as_str()), Some(id.clone()));
        assert_ne!(MachineId::generate(), id);
        for bad in ["", "0123456789a", "0123456789abc", "0123456789aB", "0123456789a/"] {
            assert_eq!(MachineId::parse(bad), None, "{bad}");
        }
    }
}
