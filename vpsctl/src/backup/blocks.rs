//! The blocks of a directory: a file each, compressed, called after the SHA-256 of what it holds.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{BLOCK_BYTES, Digest, failed, sync_folder, write_synced};
use crate::error::Error;

/// zstd's own default: fast, and most of the gain.
const LEVEL: i32 = 3;
/// A block that does not compress grows a little; what is larger is no block.
const FILE_BYTES_MAX: u64 = 2 * BLOCK_BYTES as u64;

/// The folder `blocks`. Clones are the same folder.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    root: PathBuf,
    /// Two threads may write the same block at once.
    temporaries: Arc<AtomicU64>,
}

/// What is wrong with a block's file.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum BlockError {
    /// There is none.
    #[error("is missing")]
    Missing,
    /// It holds something else than its name says.
    #[error("is damaged: {0}")]
    Damaged(String),
    /// It may be there, or not.
    #[error("cannot be read: {0}")]
    Unreadable(String),
}

impl Blocks {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, temporaries: Arc::default() }
    }

    /// Where a block's file is.
    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join(&name[..2]).join(name)
    }

    /// Whether there is a file of that name.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Writes a whole block of that digest durably, unless it is there; whether it was written.
    pub(crate) fn put(&self, digest: &Digest, data: &[u8]) -> Result<bool, Error> {
        assert_eq!(data.len(), BLOCK_BYTES, "a block is whole");
        let path = self.path(digest);
        if path.is_file() {
            return Ok(false);
        }
        let folder = self.root.join(&digest.to_string()[..2]);
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = folder.join(format!(".{digest}.{number}.tmp"));
        let write = || {
            match fs::create_dir(&folder) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            write_synced(&temporary, &zstd::bulk::compress(data, LEVEL)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| {
            // What is left of it is in nobody's way, but takes room.
            let _ = fs::remove_file(&temporary);
            failed(&path, &e)
        })?;
        Ok(true)
    }

    /// Makes the names of all blocks durable.
    pub(super) fn sync(&self) -> Result<(), Error> {
        for folder in self.folders()? {
            sync_folder(Some(&folder))?;
        }
        sync_folder(Some(&self.root))
    }

    /// A block, compared with its digest.
    pub(crate) fn get(&self, digest: &Digest) -> Result<Vec<u8>, BlockError> {
        let unreadable = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => BlockError::Missing,
            _ => BlockError::Unreadable(e.to_string()),
        };
        let mut bytes = Vec::new();
        File::open(self.path(digest))
            .and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes))
            .map_err(unreadable)?;
        let data = zstd::bulk::decompress(&bytes, BLOCK_BYTES)
            .map_err(|e| BlockError::Damaged(format!("it does not unpack to 1 MiB ({e})")))?;
        if data.len() != BLOCK_BYTES || Digest::of(&data) != *digest {
            return Err(BlockError::Damaged("it does not hold what its name says".to_owned()));
        }
        Ok(data)
    }

    /// Deletes a damaged block.
    pub(crate) fn remove(&self, digest: &Digest) -> Result<(), Error> {
        let path = self.path(digest);
        fs::remove_file(&path).map_err(|e| failed(&path, &e))
    }

    /// Deletes all blocks but these, and what was half written; how many bytes that gave back.
    /// Files that are none of ours stay.
    pub(super) fn keep_only(&self, named: &HashSet<Digest>) -> Result<u64, Error> {
        let mut freed = 0;
        for folder in self.folders()? {
            for entry in fs::read_dir(&folder).map_err(|e| failed(&folder, &e))? {
                let entry = entry.map_err(|e| failed(&folder, &e))?;
                let (name, path) = (entry.file_name(), entry.path());
                let name = name.to_string_lossy();
                let half = name.starts_with('.') && name.ends_with(".tmp");
                let unnamed = Digest::parse(&name).is_some_and(|digest| !named.contains(&digest));
                if half || unnamed {
                    freed += entry.metadata().map_or(0, |metadata| metadata.len());
                    fs::remove_file(&path).map_err(|e| failed(&path, &e))?;
                }
            }
        }
        Ok(freed)
    }

    /// `00` to `ff`, those that are there.
    fn folders(&self) -> Result<Vec<PathBuf>, Error> {
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(|e| failed(&self.root, &e))? {
            let entry = entry.map_err(|e| failed(&self.root, &e))?;
            if entry.file_name().len() == 2 && entry.path().is_dir() {
                folders.push(entry.path());
            }
        }
        Ok(folders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> (tempfile::TempDir, Blocks) {
        let folder = tempfile::tempdir().unwrap();
        let blocks = Blocks::new(folder.path().to_owned());
        (folder, blocks)
    }

    /// A block is kept once, and what comes back is what went in, noise too.
    #[test]
    fn a_block_comes_back() {
        let (_folder, blocks) = blocks();
        let mut state = 1_u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
        for data in [vec![7; BLOCK_BYTES], noise.take(BLOCK_BYTES).collect()] {
            let digest = Digest::of(&data);
            assert_eq!(blocks.get(&digest), Err(BlockError::Missing));
            assert!(blocks.put(&digest, &data).unwrap());
            assert!(!blocks.put(&digest, &data).unwrap());
            assert!(blocks.get(&digest).unwrap() == data);
        }
    }

    /// Whatever has become of a file, it is never taken for the block.
    #[test]
    fn a_damaged_block_is_not_taken() {
        let (_folder, blocks) = blocks();
        let data: Vec<u8> = (0..BLOCK_BYTES).map(|n| (n % 251) as u8).collect();
        let digest = Digest::of(&data);
        blocks.put(&digest, &data).unwrap();
        let path = blocks.path(&digest);
        let packed = fs::read(&path).unwrap();
        let other = zstd::bulk::compress(&vec![1; BLOCK_BYTES], LEVEL).unwrap();
        let short = zstd::bulk::compress(&data[..100], LEVEL).unwrap();
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], LEVEL).unwrap();
        let cut = packed[..packed.len() - 1].to_vec();
        let mut flipped = packed;
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        for bad in [vec![], cut, flipped, other, short, bomb] {
            fs::write(&path, bad).unwrap();
            let error = blocks.get(&digest).unwrap_err();
            assert!(matches!(error, BlockError::Damaged(_)), "{error}");
        }
    }
}
