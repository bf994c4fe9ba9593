//! How long fields are written down: bytes as hexadecimal digits, register arrays as lists.

/// Bytes as lower-case hexadecimal digits; zeros at the end are left out, and their number is kept.
pub(super) mod digits {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// An XSAVE area is never longer (Intel SDM volume 1, 13.5: the components that exist today), in bytes.
    const LONGEST: usize = 1 << 16;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let digits: String = bytes.iter().take(used).map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&format!("{}:{digits}", bytes.len()))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| D::Error::custom("bytes are written LENGTH:DIGITS"))
    }

    fn parse(text: &str) -> Option<Vec<u8>> {
        let (len, digits) = text.split_once(':')?;
        let len: usize = len.parse().ok().filter(|len| *len <= LONGEST)?;
        if !digits.is_ascii() || !digits.len().is_multiple_of(2) || digits.len() / 2 > len {
            return None;
        }
        let mut bytes = vec![0; len];
        for (index, byte) in bytes.iter_mut().take(digits.len() / 2).enumerate() {
            *byte = u8::from_str_radix(digits.get(2 * index..2 * index + 2)?, 16).ok()?;
        }
        Some(bytes)
    }

    #[cfg(test)]
    mod tests {
        use super::parse;

        #[test]
        fn only_the_written_form_is_read() {
            assert_eq!(parse("4:0a0b"), Some(vec![10, 11, 0, 0]));
            assert_eq!(parse("0:"), Some(vec![]));
            for bad in ["", "4", "1:0a0b", "4:0", "4:0x", "4:\u{e4}", "99999999999:", "-1:", "65537:"] {
                assert_eq!(parse(bad), None, "{bad}");
            }
        }
    }
}

/// 64 words as a list.
pub(super) mod words {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(words: &[u32; 64], serializer: S) -> Result<S::Ok, S::Error> {
        words.as_slice().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u32; 64], D::Error> {
        let words = Vec::<u32>::deserialize(deserializer)?;
        words.try_into().map_err(|words: Vec<u32>| D::Error::invalid_length(words.len(), &"64 registers"))
    }
}
