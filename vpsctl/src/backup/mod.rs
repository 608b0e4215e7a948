//! A directory of backups, as `docs/backup-format.md` specifies it: blocks of disks by their
//! digests, and one manifest a backup. It knows nothing of the cluster.
//!
//! Nothing half written is ever taken for whole: every file comes under a temporary name, is
//! synced and renamed; a manifest comes when all its blocks are there. So what breaks off leaves
//! blocks that no manifest names, and nothing else. One process at a time writes, which a lock on
//! the directory's file `lock` sees to; it ends with the process.

mod blocks;
mod digest;
mod manifest;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

pub(crate) use self::{
    blocks::{BlockError, Blocks},
    digest::{BLOCK_BYTES, Digest, ImageDigester},
    manifest::{Manifest, ManifestDisk},
};
use crate::error::Error;

const BLOCKS: &str = "blocks";
const BACKUPS: &str = "backups";
const LOCK: &str = "lock";

/// An open directory of backups, locked while this lives.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    pub(crate) blocks: Blocks,
    /// Held for its lock alone; none where each file is read once.
    _lock: Option<File>,
}

impl Directory {
    /// For a new backup: makes what is missing. Nobody else uses it meanwhile.
    pub(crate) fn make(path: &Path) -> Result<Self, Error> {
        // What disks hold is nobody else's to read.
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(refused(path, &format!("cannot be made: {e}"))),
            Ok(()) => sync_folder(path.parent().filter(|p| !p.as_os_str().is_empty()))?,
        }
        let mut entries = fs::read_dir(path).map_err(|e| unusable(path, &e))?;
        if entries.next().is_some() && !is_one(path) && !path.join(LOCK).exists() {
            return Err(refused(path, "holds other things: a new or empty directory is expected"));
        }
        let lock = lock(path, FlockOperation::NonBlockingLockExclusive)?;
        for folder in [BLOCKS, BACKUPS] {
            match fs::create_dir(path.join(folder)) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(path, &e)),
                _ => {}
            }
        }
        sync_folder(Some(path))?;
        Ok(Self::opened(path, Some(lock)))
    }

    /// To see what there is, also while another backup is made: a manifest is whole or not there.
    pub(crate) fn look(path: &Path) -> Result<Self, Error> {
        known(path)?;
        Ok(Self::opened(path, None))
    }

    /// To take from: others may read it too.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        Self::open(path, FlockOperation::NonBlockingLockShared)
    }

    /// To take things out of it: nobody else uses it meanwhile.
    pub(crate) fn change(path: &Path) -> Result<Self, Error> {
        Self::open(path, FlockOperation::NonBlockingLockExclusive)
    }

    fn open(path: &Path, operation: FlockOperation) -> Result<Self, Error> {
        known(path)?;
        let lock = lock(path, operation)?;
        Ok(Self::opened(path, Some(lock)))
    }

    fn opened(path: &Path, lock: Option<File>) -> Self {
        Self { path: path.to_owned(), blocks: Blocks::new(path.join(BLOCKS)), _lock: lock }
    }

    /// The names of the backups, in the order of the alphabet.
    pub(crate) fn names(&self) -> Result<Vec<String>, Error> {
        let folder = self.path.join(BACKUPS);
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| failed(&folder, &e))? {
            let name = entry.map_err(|e| failed(&folder, &e))?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(".json"));
            // What begins with a dot was being written when its writer broke off.
            names.extend(name.filter(|name| !name.starts_with('.')).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// One backup.
    pub(crate) fn manifest(&self, name: &str) -> Result<Manifest, Error> {
        Manifest::read(&self.manifest_path(name), name)
    }

    /// All backups, oldest first, and what cannot be read.
    pub(crate) fn manifests(&self) -> Result<(Vec<Manifest>, Vec<Error>), Error> {
        let (mut manifests, mut broken) = (Vec::new(), Vec::new());
        for name in self.names()? {
            match self.manifest(&name) {
                Ok(manifest) => manifests.push(manifest),
                Err(error) => broken.push(error),
            }
        }
        manifests.sort_by_key(Manifest::age_key);
        Ok((manifests, broken))
    }

    /// Writes the manifest of a backup whose blocks are all there.
    pub(crate) fn add(&self, manifest: &Manifest) -> Result<(), Error> {
        let path = self.manifest_path(&manifest.name);
        if path.exists() {
            return Err(Error::Conflict(format!("backup {} exists already", manifest.name)));
        }
        self.blocks.sync()?;
        let temporary = self.path.join(BACKUPS).join(format!(".{}.tmp", manifest.name));
        write_synced(&temporary, &manifest.to_bytes()?)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|e| failed(&path, &e))?;
        sync_folder(Some(&self.path.join(BACKUPS)))
    }

    /// Deletes a backup, then the blocks that no other one names; how many bytes that gave back.
    /// Nothing is deleted when another backup cannot be read: its blocks would not be known.
    pub(crate) fn delete(&self, name: &str) -> Result<u64, Error> {
        let path = self.manifest_path(name);
        if !path.exists() {
            return Err(self.missing(name));
        }
        let mut named = std::collections::HashSet::new();
        for other in self.names()?.iter().filter(|other| *other != name) {
            let manifest = self.manifest(other)?;
            named.extend(manifest.disks.iter().flat_map(ManifestDisk::digests));
        }
        fs::remove_file(&path).map_err(|e| failed(&path, &e))?;
        sync_folder(Some(&self.path.join(BACKUPS)))?;
        self.blocks.keep_only(&named)
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.path.join(BACKUPS).join(format!("{name}.json"))
    }

    pub(crate) fn missing(&self, name: &str) -> Error {
        Error::Missing(format!("there is no backup {name} in \"{}\"", self.path.display()))
    }
}

fn known(path: &Path) -> Result<(), Error> {
    match is_one(path) {
        true => Ok(()),
        false if !path.exists() => Err(refused(path, "does not exist")),
        false => {
            let why = "holds no backups: one that 'vpsctl backup create' made is expected";
            Err(refused(path, why))
        }
    }
}

fn is_one(path: &Path) -> bool {
    path.join(BLOCKS).is_dir() && path.join(BACKUPS).is_dir()
}

fn lock(path: &Path, operation: FlockOperation) -> Result<File, Error> {
    let file = path.join(LOCK);
    // Who only reads may have no right to write here.
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&file);
    let lock = open.or_else(|_| File::open(&file)).map_err(|e| failed(&file, &e))?;
    match flock(&lock, operation) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Conflict(format!(
            "\"{}\" is in use by another vpsctl: try again when that has ended",
            path.display()
        ))),
        Err(e) => Err(failed(&file, &e.into())),
    }
}

fn refused(path: &Path, why: &str) -> Error {
    Error::Usage(format!("DIR: \"{}\" {why}", path.display()))
}

fn unusable(path: &Path, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotADirectory => refused(path, "is no directory"),
        _ => refused(path, &format!("cannot be read: {error}")),
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::Local(format!("\"{}\": {error}", path.display()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A name that was made, renamed or removed is durable once its folder is synced.
fn sync_folder(path: Option<&Path>) -> Result<(), Error> {
    let path = path.unwrap_or_else(|| Path::new("."));
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|e| failed(path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, digests: &[Digest]) -> Manifest {
        let blocks: Vec<_> = digests.iter().copied().map(Some).collect();
        Manifest {
            version: manifest::VERSION,
            name: name.to_owned(),
            domain: "domains/web1".to_owned(),
            domain_uid: "u".to_owned(),
            snapshot_time: "2026-11-23T01:16:00Z".to_owned(),
            quiesced: false,
            disks: vec![ManifestDisk::new(
                "volumes/web1-0",
                "ssd",
                4 * BLOCK_BYTES as u64,
                &blocks,
            )],
        }
    }

    fn block(value: u8) -> (Digest, Vec<u8>) {
        let data = vec![value; BLOCK_BYTES];
        (Digest::of(&data), data)
    }

    /// What no manifest names goes, with what was half written; the rest stays.
    #[test]
    fn delete_keeps_what_others_need() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web1");
        let directory = Directory::make(&path).unwrap();
        let ((a, data_a), (b, data_b), (c, data_c)) = (block(1), block(2), block(3));
        for (digest, data) in [(&a, data_a), (&b, data_b), (&c, data_c)] {
            assert!(directory.blocks.put(digest, &data).unwrap());
        }
        directory.add(&manifest("one", &[a, b])).unwrap();
        directory.add(&manifest("two", &[b])).unwrap();
        let half = directory.blocks.path(&a).with_file_name(".half.tmp");
        fs::write(&half, b"x").unwrap();
        assert!(matches!(directory.add(&manifest("two", &[])), Err(Error::Conflict(_))));
        assert_eq!(directory.names().unwrap(), ["one", "two"]);
        assert!(directory.delete("one").unwrap() > 0);
        let there = [&a, &b, &c].map(|digest| directory.blocks.has(digest));
        assert_eq!(there, [false, true, false]);
        assert!(!half.exists());
        assert!(matches!(directory.delete("one"), Err(Error::Missing(_))));
    }

    /// A manifest that cannot be read may need any block: none is deleted, nor the backup.
    #[test]
    fn delete_does_not_guess() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web1");
        let directory = Directory::make(&path).unwrap();
        let (a, data) = block(1);
        directory.blocks.put(&a, &data).unwrap();
        directory.add(&manifest("one", &[a])).unwrap();
        directory.add(&manifest("two", &[a])).unwrap();
        fs::write(path.join("backups/two.json"), b"{").unwrap();
        let error = directory.delete("one").unwrap_err().to_string();
        assert!(error.contains("two.json"), "{error}");
        assert!(directory.blocks.has(&a) && directory.manifest("one").is_ok());
    }

    /// One writer, or many readers; and never somebody else's directory.
    #[test]
    fn a_directory_is_locked_and_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web1");
        assert!(matches!(Directory::read(&path), Err(Error::Usage(_))));
        let writer = Directory::make(&path).unwrap();
        for other in [Directory::make(&path), Directory::read(&path), Directory::change(&path)] {
            let error = other.unwrap_err();
            assert!(matches!(error, Error::Conflict(_)), "{error}");
        }
        drop(writer);
        let (_one, _two) = (Directory::read(&path).unwrap(), Directory::read(&path).unwrap());
        assert!(matches!(Directory::change(&path), Err(Error::Conflict(_))));
        let foreign = tempfile::tempdir().unwrap();
        fs::write(foreign.path().join("letter"), b"x").unwrap();
        let error = Directory::make(foreign.path()).unwrap_err().to_string();
        assert!(error.contains("holds other things"), "{error}");
        let error = Directory::make(&foreign.path().join("letter")).unwrap_err().to_string();
        assert!(error.contains("is no directory"), "{error}");
    }
}
