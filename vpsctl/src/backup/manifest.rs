//! What one backup holds: the disks of a domain at one moment, as digests of blocks.
//!
//! A manifest is read from a file that anybody may have changed: all that is computed with is
//! checked first.

use std::{
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{BLOCK_BYTES, Digest, failed};
use crate::error::Error;

/// Of the format. Another number is another format.
pub(super) const VERSION: u32 = 1;
/// A line of it is a block: more than 16 TiB of disks.
const FILE_BYTES_MAX: u64 = 2 << 30;
const DISKS_MAX: usize = 64;
const DISK_BYTES_MAX: u64 = 64 << 40;

/// One backup.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Manifest {
    pub(crate) version: u32,
    /// As the file is called.
    pub(crate) name: String,
    /// `domains/{id}` and its uid.
    pub(crate) domain: String,
    pub(crate) domain_uid: String,
    /// RFC 3339.
    pub(crate) snapshot_time: String,
    /// The guest's agent had frozen its filesystems.
    pub(crate) quiesced: bool,
    pub(crate) disks: Vec<ManifestDisk>,
}

/// One disk of it.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ManifestDisk {
    /// `volumes/{id}` that it was.
    pub(crate) volume: String,
    pub(crate) pool: String,
    pub(crate) size_bytes: u64,
    /// Ascending; what is in none of them is zeros.
    runs: Vec<Run>,
}

/// Blocks that follow one another.
#[derive(Debug, Deserialize, Serialize)]
struct Run {
    first_block: u64,
    digests: Vec<Digest>,
}

impl Manifest {
    /// Without disks yet.
    pub(crate) fn new(
        name: String,
        domain: &drover_proto::v1::Domain,
        taken: &prost_types::Timestamp,
        quiesced: bool,
    ) -> Self {
        Self {
            version: VERSION,
            name,
            domain: domain.name.clone(),
            domain_uid: domain.uid.clone(),
            snapshot_time: taken.to_string(),
            quiesced,
            disks: Vec::new(),
        }
    }

    /// Oldest first; a name tells those of one moment apart.
    pub(super) fn age_key(&self) -> (String, String) {
        (self.snapshot_time.clone(), self.name.clone())
    }

    pub(super) fn read(path: &Path, name: &str) -> Result<Self, Error> {
        let wrong = |why: String| Error::Local(format!("\"{}\": {why}", path.display()));
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::Missing(format!(
                "there is no backup {name}: \"{}\" does not exist",
                path.display()
            )),
            _ => failed(path, &e),
        })?;
        let manifest: Self = serde_json::from_reader(BufReader::new(file.take(FILE_BYTES_MAX)))
            .map_err(|e| wrong(format!("is no manifest of a backup: {e}")))?;
        manifest.checked(name).map_err(wrong)
    }

    fn checked(self, name: &str) -> Result<Self, String> {
        if self.version != VERSION {
            return Err(format!(
                "version: {} is not known: {VERSION} is, a newer vpsctl may read it",
                self.version
            ));
        }
        if self.name != name {
            return Err(format!("name: \"{}\" is not what the file is called", self.name));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(format!("disks: {} are too many: at most {DISKS_MAX}", self.disks.len()));
        }
        for (place, disk) in self.disks.iter().enumerate() {
            disk.check().map_err(|e| format!("disks[{place}].{e}"))?;
        }
        Ok(self)
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::Local(format!("the manifest of {}: {e}", self.name)))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Of all disks.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size_bytes).sum()
    }

    /// How many blocks it names, those of zeros left out.
    pub(crate) fn block_count(&self) -> u64 {
        self.disks.iter().map(|disk| disk.digests().count() as u64).sum()
    }

    /// What programs get of it: all but the digests.
    pub(crate) fn view(&self) -> serde_json::Value {
        let disks: Vec<_> = self
            .disks
            .iter()
            .map(|disk| {
                serde_json::json!({
                    "volume": disk.volume,
                    "pool": disk.pool,
                    "size_bytes": disk.size_bytes,
                    "block_count": disk.digests().count(),
                })
            })
            .collect();
        serde_json::json!({
            "name": self.name,
            "domain": self.domain,
            "domain_uid": self.domain_uid,
            "snapshot_time": self.snapshot_time,
            "quiesced": self.quiesced,
            "disks": disks,
        })
    }
}

impl ManifestDisk {
    /// From the digests of all its blocks; none for zeros.
    pub(crate) fn new(
        volume: &str,
        pool: &str,
        size_bytes: u64,
        blocks: &[Option<Digest>],
    ) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        let mut follows = false;
        for (index, digest) in blocks.iter().enumerate() {
            match (digest, runs.last_mut().filter(|_| follows)) {
                (Some(digest), Some(run)) => run.digests.push(*digest),
                (Some(digest), None) => {
                    runs.push(Run { first_block: index as u64, digests: vec![*digest] });
                }
                (None, _) => {}
            }
            follows = digest.is_some();
        }
        Self { volume: volume.to_owned(), pool: pool.to_owned(), size_bytes, runs }
    }

    fn check(&self) -> Result<(), String> {
        if self.size_bytes == 0 || self.size_bytes > DISK_BYTES_MAX {
            return Err(format!("size_bytes: {} is not in 1 to {DISK_BYTES_MAX}", self.size_bytes));
        }
        let mut next = 0;
        for run in &self.runs {
            let end = run.first_block.checked_add(run.digests.len() as u64);
            match end.filter(|end| run.first_block >= next && *end <= self.block_total()) {
                Some(end) => next = end,
                None => {
                    return Err(format!(
                        "runs: {} blocks from {} are out of order or behind the disk's end",
                        run.digests.len(),
                        run.first_block
                    ));
                }
            }
        }
        Ok(())
    }

    /// How many blocks it has, those of zeros too.
    pub(crate) fn block_total(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES as u64)
    }

    /// In ascending order; the same one may come more than once.
    pub(crate) fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.runs.iter().flat_map(|run| run.digests.iter().copied())
    }

    /// One for each block; none for zeros.
    pub(crate) fn blocks(&self) -> Vec<Option<Digest>> {
        let mut blocks = vec![None; usize::try_from(self.block_total()).unwrap_or(0)];
        for run in &self.runs {
            let first = usize::try_from(run.first_block).unwrap_or(usize::MAX);
            for (block, digest) in blocks.iter_mut().skip(first).zip(&run.digests) {
                *block = Some(*digest);
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(value: u8) -> Digest {
        Digest([value; 32])
    }

    /// Runs leave zeros out and give every block back at its place.
    #[test]
    fn runs_are_the_blocks() {
        let blocks = [None, Some(digest(1)), Some(digest(2)), None, None, Some(digest(1)), None];
        let disk = ManifestDisk::new("volumes/a", "ssd", 7 << 20, &blocks);
        assert_eq!(disk.runs.len(), 2);
        assert_eq!(disk.blocks(), blocks);
        assert_eq!(disk.digests().collect::<Vec<_>>(), [digest(1), digest(2), digest(1)]);
        assert_eq!(ManifestDisk::new("volumes/a", "ssd", 1, &[None]).blocks(), [None]);
    }

    /// A manifest that was changed by hand or by a disk's fault names the field.
    #[test]
    fn what_is_no_manifest_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let manifest = Manifest {
            version: VERSION,
            name: "a".to_owned(),
            domain: "domains/web1".to_owned(),
            domain_uid: "u".to_owned(),
            snapshot_time: "2026-11-23T01:16:00Z".to_owned(),
            quiesced: true,
            disks: vec![ManifestDisk::new("volumes/a", "ssd", 2 << 20, &[Some(digest(1)), None])],
        };
        let good = String::from_utf8(manifest.to_bytes().unwrap()).unwrap();
        std::fs::write(&path, &good).unwrap();
        assert_eq!(Manifest::read(&path, "a").unwrap().view(), manifest.view());
        assert_eq!(manifest.view()["disks"][0]["block_count"], 1);
        let hex = digest(1).to_string();
        for (from, to, expected) in [
            ("{", "", "is no manifest of a backup"),
            ("\"version\": 1", "\"version\": 2", "version: 2 is not known: 1 is"),
            ("\"name\": \"a\"", "\"name\": \"b\"", "name: \"b\" is not what the file is called"),
            ("2097152", "0", "disks[0].size_bytes: 0 is not in 1 to"),
            ("2097152", "18446744073709551615", "disks[0].size_bytes: "),
            ("\"first_block\": 0", "\"first_block\": 2", "disks[0].runs: 1 blocks from 2"),
            ("\"first_block\": 0", "\"first_block\": 18446744073709551615", "disks[0].runs: "),
            (&hex, "01", "\"01\" is no digest"),
        ] {
            std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
            let error = Manifest::read(&path, "a").unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
