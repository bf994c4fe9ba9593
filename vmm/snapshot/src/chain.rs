//! A snapshot with all its parents: where each page really is.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::error::SnapshotError;
use crate::memory::MemoryImage;
use crate::{PAGE_BYTES, PageKind, Snapshot, store};

/// A chain is not longer than this.
const MAX_LENGTH: usize = 1024;

/// A snapshot and its parents, youngest first.
#[derive(Debug)]
pub struct Chain {
    links: Vec<(Snapshot, MemoryImage)>,
}

/// Where a run of pages is.
#[derive(Debug, Clone)]
pub enum Source {
    /// Nowhere: zeros.
    Zero,
    /// In this file, at `4096 * page`.
    File(Arc<File>),
}

/// Pages that follow each other and have one source.
#[derive(Debug, Clone)]
pub struct Run {
    /// First page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
    /// Where they are.
    pub source: Source,
}

impl Chain {
    /// Opens the snapshot in the folder `path` and all that it needs.
    ///
    /// # Errors
    /// One of them is missing or damaged, or they do not fit each other.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        Self::from_snapshot(Snapshot::open(path)?)
    }

    /// Opens all that `snapshot` needs.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn from_snapshot(snapshot: Snapshot) -> Result<Self, SnapshotError> {
        let mut links: Vec<(Snapshot, MemoryImage)> = Vec::new();
        let mut next = Some(snapshot);
        while let Some(snapshot) = next {
            let memory = snapshot.memory()?;
            let manifest = snapshot.manifest();
            if let Some((youngest, first)) = links.first()
                && first.map.pages() != memory.map.pages()
            {
                let pages = memory.map.pages();
                return Err(youngest.damaged("memory", 0, format!("its parent has {pages} pages")));
            }
            if manifest.parent.is_none() && memory.map.count(PageKind::Parent) != 0 {
                let reason = "pages are said to be the parent's, and there is none".to_owned();
                return Err(snapshot.damaged("memory", 0, reason));
            }
            if links.len() >= MAX_LENGTH || links.iter().any(|link| link.0.manifest().id == manifest.id) {
                return Err(snapshot.damaged("manifest.json", 0, "its parents form a ring".to_owned()));
            }
            next = match &manifest.parent {
                Some(parent) => Some(store::find_parent(&snapshot, parent)?),
                None => None,
            };
            links.push((snapshot, memory));
        }
        Ok(Chain { links })
    }

    /// The youngest: the snapshot that was asked for.
    pub fn snapshot(&self) -> &Snapshot {
        // There is always one.
        &self.links[0].0
    }

    /// All snapshots, youngest first.
    pub fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        self.links.iter().map(|link| &link.0)
    }

    /// Number of snapshots.
    pub fn depth(&self) -> usize {
        self.links.len()
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.links[0].1.map.pages()
    }

    /// The memory file of the oldest, which has no parent.
    pub fn base(&self) -> &MemoryImage {
        &self.links[self.links.len() - 1].1
    }

    /// Whether the youngest is the oldest too.
    pub fn is_full(&self) -> bool {
        self.links.len() == 1
    }

    /// Whether the memory of one of them is compressed: mapping it makes a copy.
    pub fn is_packed(&self) -> bool {
        self.links.iter().any(|(_, image)| image.is_packed())
    }

    /// Which link has `page`.
    fn owner(&self, page: u64) -> (usize, PageKind) {
        let oldest = self.links.len() - 1;
        let found = self.links.iter().map(|link| link.1.map.get(page)).enumerate();
        found.into_iter().find(|(_, kind)| *kind != PageKind::Parent).unwrap_or((oldest, PageKind::Zero))
    }

    /// Every page's source, in runs.
    ///
    /// # Errors
    /// Memory that is compressed cannot be unpacked.
    pub fn runs(&self) -> Result<Vec<Run>, SnapshotError> {
        let files = self.files()?;
        let source = |(link, kind): (usize, PageKind)| match (files.get(link), kind) {
            (Some(file), PageKind::Data) => Source::File(Arc::clone(file)),
            _ => Source::Zero,
        };
        let mut runs = Vec::new();
        let mut last: Option<(usize, PageKind)> = None;
        if self.is_full() {
            let image = self.base();
            return image
                .map
                .runs()
                .map(|(first, count, kind)| Ok(Run { first, count, source: source((0, kind)) }))
                .collect();
        }
        for page in 0..self.pages() {
            let (link, kind) = self.owner(page);
            let key = if kind == PageKind::Data { (link, kind) } else { (0, PageKind::Zero) };
            match runs.last_mut() {
                Some(Run { count, .. }) if last == Some(key) => *count += 1,
                _ => runs.push(Run { first: page, count: 1, source: source(key) }),
            }
            last = Some(key);
        }
        Ok(runs)
    }

    /// The file of each link, with every page at its place.
    fn files(&self) -> Result<Vec<Arc<File>>, SnapshotError> {
        self.links.iter().map(|(_, image)| image.file()).collect()
    }

    /// Reads whole pages.
    ///
    /// # Errors
    /// The host's, or memory that is compressed cannot be unpacked.
    pub fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        use std::os::unix::fs::FileExt as _;
        for (page, bytes) in (first..).zip(buffer.chunks_mut(PAGE_BYTES)) {
            match self.owner(page) {
                (link, PageKind::Data) => {
                    let (snapshot, image) = self.links.get(link).unwrap_or(&self.links[0]);
                    let read = crate::error::host("read the memory of", snapshot.path());
                    image.file()?.read_exact_at(bytes, page * PAGE_BYTES as u64).map_err(read)?;
                }
                _ => bytes.fill(0),
            }
        }
        Ok(())
    }
}
