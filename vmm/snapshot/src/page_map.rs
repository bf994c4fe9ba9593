//! Where each page of guest memory is.

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// As the parent has it.
    Parent,
    /// All zeros; the file has a hole there.
    Zero,
    /// At its place in the file.
    Data,
}

const PAGES_PER_BYTE: u64 = 4;

/// Two bits a page, four pages a byte, lowest bits first: 0 parent, 1 zero, 2 data. 3 does not occur.
#[derive(Clone, PartialEq, Eq)]
pub struct PageMap {
    pages: u64,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for PageMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageMap").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl PageMap {
    /// `pages` pages of one kind.
    pub fn new(pages: u64, kind: PageKind) -> Self {
        let pattern = code(kind) * 0x55;
        let mut map = PageMap { pages, bytes: vec![pattern; Self::encoded_bytes(pages) as usize] };
        map.clear_padding();
        map
    }

    fn clear_padding(&mut self) {
        let used = self.pages % PAGES_PER_BYTE;
        if used != 0
            && let Some(last) = self.bytes.last_mut()
        {
            *last &= (1 << (2 * used)) - 1;
        }
    }

    /// Length of the form in the file.
    pub(crate) fn encoded_bytes(pages: u64) -> u64 {
        pages.div_ceil(PAGES_PER_BYTE)
    }

    /// The form in the file.
    pub(crate) fn encode(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads the form in the file; on bad codes, the byte's index.
    pub(crate) fn decode(pages: u64, bytes: &[u8]) -> Result<Self, u64> {
        if bytes.len() as u64 != Self::encoded_bytes(pages) {
            return Err(bytes.len() as u64);
        }
        if let Some(at) = bytes.iter().position(|byte| byte & (byte >> 1) & 0x55 != 0) {
            return Err(at as u64);
        }
        let map = PageMap { pages, bytes: bytes.to_vec() };
        let mut clean = map.clone();
        clean.clear_padding();
        if clean == map { Ok(map) } else { Err(bytes.len() as u64 - 1) }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Where `page` is; pages that do not exist are zero.
    pub fn get(&self, page: u64) -> PageKind {
        let shift = 2 * (page % PAGES_PER_BYTE);
        match self.bytes.get((page / PAGES_PER_BYTE) as usize).map(|byte| byte >> shift & 3) {
            Some(0) => PageKind::Parent,
            Some(2) => PageKind::Data,
            _ => PageKind::Zero,
        }
    }

    /// Says where `page` is.
    pub fn set(&mut self, page: u64, kind: PageKind) {
        if page < self.pages
            && let Some(byte) = self.bytes.get_mut((page / PAGES_PER_BYTE) as usize)
        {
            let shift = 2 * (page % PAGES_PER_BYTE);
            *byte = *byte & !(3 << shift) | code(kind) << shift;
        }
    }

    /// How many pages are of this kind.
    pub fn count(&self, kind: PageKind) -> u64 {
        self.runs().filter(|run| run.2 == kind).map(|run| run.1).sum()
    }

    /// Runs of pages of one kind: first page, count, kind.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, PageKind)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = at;
            let kind = (first < self.pages).then(|| self.get(first))?;
            let whole = code(kind) * 0x55;
            while at < self.pages {
                let aligned = at.is_multiple_of(PAGES_PER_BYTE) && at + PAGES_PER_BYTE <= self.pages;
                if aligned && self.bytes.get((at / PAGES_PER_BYTE) as usize) == Some(&whole) {
                    at += PAGES_PER_BYTE;
                } else if self.get(at) == kind {
                    at += 1;
                } else {
                    break;
                }
            }
            Some((first, at - first, kind))
        })
    }
}

fn code(kind: PageKind) -> u8 {
    match kind {
        PageKind::Parent => 0,
        PageKind::Zero => 1,
        PageKind::Data => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_every_page_once() {
        let mut map = PageMap::new(1003, PageKind::Parent);
        for page in (0..1003).filter(|page| page % 7 == 0 || (100..200).contains(page)) {
            map.set(page, if page % 2 == 0 { PageKind::Data } else { PageKind::Zero });
        }
        let mut at = 0;
        for (first, count, kind) in map.runs() {
            assert_eq!(first, at);
            assert!((first..first + count).all(|page| map.get(page) == kind));
            at += count;
        }
        assert_eq!(at, 1003);
        let sum: u64 =
            [PageKind::Parent, PageKind::Zero, PageKind::Data].map(|kind| map.count(kind)).iter().sum();
        assert_eq!(sum, 1003);
        assert_eq!(PageMap::decode(1003, map.encode()), Ok(map));
    }

    #[test]
    fn codes_that_do_not_occur_and_wrong_lengths_are_refused() {
        assert_eq!(PageMap::decode(5, &[0b10_01_00_10, 0b11]), Err(1));
        assert_eq!(PageMap::decode(5, &[0, 0b0100]), Err(1));
        assert!(PageMap::decode(5, &[0]).is_err());
        assert!(PageMap::decode(0, &[]).is_ok());
    }
}
