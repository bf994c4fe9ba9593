//! The container of a snapshot, and nothing of what is inside: it knows neither machines nor devices nor engines.
//!
//! A snapshot is a folder. `manifest.json` names everything else ([`Manifest`]); `state` holds named, versioned,
//! checked sections ([`Section`]); `memory` is a sparse file whose pages can be mapped ([`MemoryImage`]), with a
//! trailer that says of each page where it is ([`PageMap`]); further files are layers of disks. A difference names
//! its parent, which stands beside it in the same folder, and a [`Chain`] resolves each page to the youngest
//! snapshot that has it. docs/snapshot-format.md describes all of it byte by byte.
//!
//! [`SnapshotWriter`] writes to a temporary name and renames: a snapshot is there completely or not at all.

mod chain;
mod compact;
mod error;
mod id;
mod layer;
mod manifest;
mod memory;
mod nameless;
mod packed;
mod page_map;
mod snapshot;
mod store;
mod verify;
mod writer;

pub use chain::{Chain, Run, Source};
pub use compact::{compact, unpack};
pub use error::SnapshotError;
pub use id::SnapshotId;
pub use layer::{Blocks, ChainDisk, DiskLayer, layer_name, seal_layer};
pub use manifest::{Compression, FileEntry, Manifest, MemoryEntry, ParentEntry, SectionEntry};
pub use memory::{CHUNK_PAGES, MemoryImage, MemoryWriter};
pub use nameless::nameless_beside;
pub use page_map::{PageKind, PageMap};
pub use snapshot::Snapshot;
pub use store::{Listed, list, remove, sweep, touched_file};
pub use verify::{Damage, verify};
pub use writer::{Section, SnapshotWriter, Step};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Newest version of the container that this crate writes and reads. It writes the oldest that has what the snapshot needs.
pub const FORMAT_VERSION: u32 = 2;
