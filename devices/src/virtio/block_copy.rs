//! Copies of a disk as it is at one moment, made while the guest goes on writing.
//!
//! [`DiskCopies::begin`] fixes the moment and copies nothing. From then on a part of the disk is copied before the guest
//! changes it, and [`DiskCopy::finish`] copies what is left. Both happen under the copy's lock, part by part, so that a part
//! is copied once and as it was. A copy that fails costs the guest nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::disk::{BLOCK_BYTES, BlockMap, DiskFile};

/// Bytes of a part: what a write of the guest may have to wait for.
const PART: u64 = 256 << 10;

/// The copies of one disk that are being made, and which blocks the next difference has to have; clones share them.
#[derive(Debug, Clone)]
pub struct DiskCopies {
    file: DiskFile,
    under_way: Arc<Mutex<Vec<Weak<DiskCopy>>>>,
    /// Changed since the machine was made, or its last snapshot was taken.
    changed: Arc<BlockMap>,
}

/// A copy that is being made. Dropping it leaves it unfinished.
#[derive(Debug)]
pub struct DiskCopy {
    from: DiskFile,
    to: File,
    /// Of a difference, the blocks that it has.
    blocks: Option<BlockMap>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// One for each part: it is copied, or need not be.
    copied: Vec<bool>,
    buffer: Vec<u8>,
    failed: Option<io::Error>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskCopies {
    /// For a disk in this file.
    pub(super) fn new(file: DiskFile) -> Self {
        let changed = Arc::new(BlockMap::empty(file.len()));
        DiskCopies { file, under_way: Arc::default(), changed }
    }

    /// The disk's file.
    pub fn file(&self) -> &DiskFile {
        &self.file
    }

    /// Takes the blocks that have changed since this was last called: for a snapshot of the disk as it is now, which the next
    /// difference is one to.
    pub fn take_changed(&self) -> Vec<(u64, u64)> {
        self.changed.take()
    }

    /// There is no such snapshot after all.
    pub fn put_back_changed(&self, blocks: &[(u64, u64)]) {
        self.changed.add_words(blocks.iter().copied());
    }

    /// Begins a copy into the empty file `to`: of all of it, or only of such blocks. The disk stands still: the machine is
    /// paused.
    ///
    /// # Errors
    /// The host's.
    pub fn begin(&self, to: File, blocks: Option<&[(u64, u64)]>) -> io::Result<Arc<DiskCopy>> {
        let len = self.file.len();
        to.set_len(len)?;
        let mut copied = vec![blocks.is_some(); len.div_ceil(PART) as usize];
        for (index, _) in blocks.unwrap_or_default() {
            // The 64 blocks of a word are one part.
            if let Some(copied) = copied.get_mut((index * 64 * BLOCK_BYTES / PART) as usize) {
                *copied = false;
            }
        }
        let blocks = blocks.map(|blocks| BlockMap::from_words(len, blocks.iter().copied()));
        let state = State { copied, buffer: Vec::new(), failed: None };
        let copy = Arc::new(DiskCopy { from: self.file.clone(), to, blocks, state: Mutex::new(state) });
        lock(&self.under_way).push(Arc::downgrade(&copy));
        Ok(copy)
    }

    /// The guest is about to change these bytes.
    pub(super) fn before_change(&self, offset: u64, bytes: u64) {
        self.changed.add_bytes(offset, bytes);
        let mut under_way = lock(&self.under_way);
        if under_way.is_empty() || bytes == 0 {
            return;
        }
        under_way.retain(|copy| {
            copy.upgrade().is_some_and(|copy| {
                let (first, last) = (offset / PART, (offset + bytes - 1) / PART);
                (first..=last).all(|part| copy.part(part))
            })
        });
    }
}

impl DiskCopy {
    /// Copies what is left; of a disk that is mostly a hole that takes the time of what there is. May be called from any
    /// thread, while the guest runs.
    ///
    /// # Errors
    /// The host's, also for what was copied before.
    pub fn finish(&self) -> io::Result<()> {
        let parts = self.from.len().div_ceil(PART);
        let mut part = 0;
        while part < parts {
            part = self.pass_hole(part)?;
            if part < parts && !self.part(part) {
                break;
            }
            part += 1;
        }
        lock(&self.state).failed.take().map_or(Ok(()), Err)
    }

    /// The first part from this one on that is to be copied. What lies before is a hole, or was copied: nobody changes a
    /// part that is not, while the lock is held.
    fn pass_hole(&self, part: u64) -> io::Result<u64> {
        let mut state = lock(&self.state);
        let next = match state.copied.get(part as usize) {
            Some(false) => self.from.next_data(part * PART)? / PART,
            _ => return Ok(part),
        };
        let hole = state.copied.iter_mut().take(next as usize).skip(part as usize);
        hole.for_each(|copied| *copied = true);
        Ok(next.max(part))
    }

    /// Copies one part, if it is not copied. False if the copy has failed.
    fn part(&self, part: u64) -> bool {
        let mut state = lock(&self.state);
        let State { copied, buffer, failed } = &mut *state;
        if failed.is_some() {
            return false;
        }
        // What the guest writes behind the end as it was does not belong to the copy.
        let Some(copied) = copied.get_mut(part as usize).filter(|copied| !**copied) else { return true };
        match self.copy(part * PART, buffer) {
            Ok(()) => *copied = true,
            Err(error) => *failed = Some(error),
        }
        failed.is_none()
    }

    fn copy(&self, at: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.resize(PART.min(self.from.len() - at) as usize, 0);
        self.from.read_at(buffer, at)?;
        // Zeros are a hole.
        let is_hole = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        let Some(blocks) = &self.blocks else {
            return if is_hole(buffer) { Ok(()) } else { self.to.write_all_at(buffer, at) };
        };
        for (block, bytes) in (at / BLOCK_BYTES..).zip(buffer.chunks(BLOCK_BYTES as usize)) {
            if blocks.has(block) && !is_hole(bytes) {
                self.to.write_all_at(bytes, block * BLOCK_BYTES)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn file(len: u64) -> File {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn a_copy_is_the_disk_as_it_was_whatever_is_written_meanwhile() {
        const LEN: u64 = 3 * PART + 1000;
        let disk = file(LEN);
        disk.write_all_at(b"first", 0).unwrap();
        disk.write_all_at(b"last", LEN - 4).unwrap();
        let copies = DiskCopies::new(DiskFile::whole(disk.try_clone().unwrap()).unwrap());
        let to = file(0);
        let copy = copies.begin(to.try_clone().unwrap(), None).unwrap();
        let write = |text: &[u8], at: u64| {
            copies.before_change(at, text.len() as u64);
            disk.write_all_at(text, at).unwrap();
        };
        write(b"later", 2);
        write(b"over a border", PART - 3);
        write(b"grown", LEN + 10);
        copy.finish().unwrap();
        write(b"much later", 2 * PART);
        let mut bytes = vec![1; LEN as usize];
        to.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(to.metadata().unwrap().len(), LEN);
        assert_eq!((&bytes[..5], &bytes[LEN as usize - 4..]), (&b"first"[..], &b"last"[..]));
        assert!(bytes[5..LEN as usize - 4].iter().all(|byte| *byte == 0));
        // Two at a time have each their own moment.
        let (early, late) = (file(0), file(0));
        let first = copies.begin(early.try_clone().unwrap(), None).unwrap();
        write(b"BETWEEN", 100);
        let second = copies.begin(late.try_clone().unwrap(), None).unwrap();
        write(b"behind!", 100);
        second.finish().unwrap();
        first.finish().unwrap();
        let at = |file: &File| {
            let mut bytes = [0; 7];
            file.read_exact_at(&mut bytes, 100).unwrap();
            bytes
        };
        assert_eq!((at(&early), &at(&late), &at(&disk)), ([0; 7], b"BETWEEN", b"behind!"));
    }

    #[test]
    fn a_copy_that_fails_costs_the_guest_nothing() {
        let disk = file(4 * PART);
        disk.write_all_at(&[7; 100], PART).unwrap();
        let copies = DiskCopies::new(DiskFile::whole(disk.try_clone().unwrap()).unwrap());
        // One that cannot be written.
        let to = TempFile::new().unwrap();
        let begun = copies.begin(to.as_file().try_clone().unwrap(), None).unwrap();
        let copy = DiskCopy {
            from: begun.from.clone(),
            to: File::open(to.as_path()).unwrap(),
            blocks: None,
            state: Mutex::new(State { copied: vec![false; 4], buffer: Vec::new(), failed: None }),
        };
        drop(begun);
        let copy = Arc::new(copy);
        lock(&copies.under_way).push(Arc::downgrade(&copy));
        copies.before_change(PART + 5, 10);
        assert!(lock(&copies.under_way).is_empty(), "neither the dropped nor the failed one is kept");
        assert!(copy.finish().is_err());
    }
}
