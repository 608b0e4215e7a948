//! Files and streams of a stated format become images. A format is never guessed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::Digest;

use super::qcow2::Qcow2;
use super::{ImageLimits, ImageWriter};
use crate::pool::{ImageInfo, Pool, SECTOR_BYTES, Sha256};
use crate::sparse::{PIECE_BYTES, next_data};
use crate::{PoolError, Result};

/// What the input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, one after the other.
    Raw,
    /// QEMU's, versions 2 and 3, without backing file, external data file or encryption.
    Qcow2,
}

impl FromStr for Format {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(PoolError::invalid("format", format!("{text:?}"), "raw or qcow2")),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Where the input comes from.
pub enum Source<'a> {
    /// A regular file.
    File(&'a Path),
    /// A stream of exactly this many bytes. Only for raw: qcow2 is read back and forth. A reader
    /// that may stall must have its own deadline, and end with an error.
    Stream {
        /// Where to read from.
        reader: &'a mut dyn Read,
        /// How much must come.
        bytes: u64,
    },
}

/// What to import.
#[derive(Debug, Clone, Copy)]
pub struct Import {
    /// The input's format.
    pub format: Format,
    /// The input's SHA-256, as its publisher gives it: of the file, not of the content.
    pub sha256: Option<Sha256>,
    /// How large the image may be.
    pub limits: ImageLimits,
}

/// What an import is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Computing the file's SHA-256.
    Verifying,
    /// Writing into the pool.
    Writing,
}

/// How far it is: `done` of `total` bytes of the file ([`Stage::Verifying`]) or of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// How much is done.
    pub done: u64,
    /// Of how much.
    pub total: u64,
}

/// Who watches an import, and may end it.
pub struct Watch<'a> {
    /// Called often, and from the importing thread: it should be quick.
    pub progress: &'a mut dyn FnMut(Progress),
    /// When set, the import ends with [`PoolError::Cancelled`].
    pub cancel: &'a AtomicBool,
}

impl Watch<'_> {
    fn at(&mut self, stage: Stage, done: u64, total: u64) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(PoolError::Cancelled);
        }
        (self.progress)(Progress { stage, done, total });
        Ok(())
    }
}

/// Imports an image. It is visible when everything has been read and verified, not before;
/// whatever fails leaves nothing. An image that the pool has already is answered.
///
/// # Errors
/// [`PoolError::Invalid`] with the field of the input, [`PoolError::Truncated`],
/// [`PoolError::Digest`], [`PoolError::NoRoom`], [`PoolError::Cancelled`], [`PoolError::Io`].
pub fn import(
    pool: &Arc<dyn Pool>,
    source: Source<'_>,
    import: &Import,
    watch: &mut Watch<'_>,
) -> Result<ImageInfo> {
    let (path, format) = match source {
        Source::Stream { reader, bytes } if import.format == Format::Raw => {
            return raw_stream(pool, reader, bytes, import, watch);
        }
        Source::Stream { .. } => {
            let value = format!("a stream of {}", import.format);
            return Err(PoolError::invalid("source", value, "a stream of raw, or a file"));
        }
        Source::File(path) => (path, import.format),
    };
    let (file, bytes) = open_file(path)?;
    if let Some(expected) = import.sha256 {
        verify_file(&file, path, bytes, expected, watch)?;
    }
    match format {
        Format::Raw => raw_file(pool, &file, path, bytes, import, watch),
        Format::Qcow2 => {
            let disk = Qcow2::open(&file, bytes)?;
            let mut writer = ImageWriter::new(pool, disk.bytes(), import.limits)?;
            let total = disk.bytes();
            disk.read_data(import.limits.data_bytes_max, |offset, content| {
                watch.at(Stage::Writing, offset, total)?;
                writer.write(offset, content)
            })?;
            watch.at(Stage::Writing, total, total)?;
            writer.finish(None)
        }
    }
}

/// Opens a regular file. Anything else is not even opened: a pipe would wait for its writer.
fn open_file(path: &Path) -> Result<(File, u64)> {
    let metadata = std::fs::metadata(path).map_err(PoolError::io("look at", path))?;
    if !metadata.is_file() {
        return Err(PoolError::invalid("file", path.display(), "a regular file"));
    }
    let file = File::open(path).map_err(PoolError::io("open", path))?;
    let bytes = file.metadata().map_err(PoolError::io("look at", path))?.len();
    Ok((file, bytes))
}

fn verify_file(
    file: &File,
    path: &Path,
    bytes: u64,
    expected: Sha256,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let mut hash = sha2::Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < bytes {
        watch.at(Stage::Verifying, at, bytes)?;
        let piece = &mut piece[..(bytes - at).min(PIECE_BYTES as u64) as usize];
        file.read_exact_at(piece, at).map_err(PoolError::io("read", path))?;
        hash.update(&*piece);
        at += piece.len() as u64;
    }
    check_sha256(expected, hash)
}

fn check_sha256(expected: Sha256, hash: sha2::Sha256) -> Result<()> {
    let found = Sha256(hash.finalize().into());
    if found == expected {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(PoolError::Digest { field: "sha256", expected, found })
}

/// An image for `bytes` of raw content.
fn raw_writer(pool: &Arc<dyn Pool>, bytes: u64, import: &Import) -> Result<ImageWriter> {
    let rounded = bytes.checked_next_multiple_of(SECTOR_BYTES).filter(|_| bytes > 0);
    let Some(rounded) = rounded else {
        let accepted = format!("1 to {} bytes of raw content", import.limits.bytes_max);
        return Err(PoolError::invalid("image size", bytes, accepted));
    };
    ImageWriter::new(pool, rounded, import.limits)
}

fn raw_file(
    pool: &Arc<dyn Pool>,
    file: &File,
    path: &Path,
    bytes: u64,
    import: &Import,
    watch: &mut Watch<'_>,
) -> Result<ImageInfo> {
    let mut writer = raw_writer(pool, bytes, import)?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(file, at, bytes).map_err(PoolError::io("read", path))? {
        at = data.start;
        while at < data.end {
            watch.at(Stage::Writing, at, bytes)?;
            let piece = &mut piece[..(data.end - at).min(PIECE_BYTES as u64) as usize];
            file.read_exact_at(piece, at).map_err(PoolError::io("read", path))?;
            writer.write(at, piece)?;
            at += piece.len() as u64;
        }
    }
    watch.at(Stage::Writing, bytes, bytes)?;
    writer.finish(None)
}

fn raw_stream(
    pool: &Arc<dyn Pool>,
    reader: &mut dyn Read,
    bytes: u64,
    import: &Import,
    watch: &mut Watch<'_>,
) -> Result<ImageInfo> {
    let mut writer = raw_writer(pool, bytes, import)?;
    let mut hash = sha2::Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < bytes {
        watch.at(Stage::Writing, at, bytes)?;
        let wanted = (bytes - at).min(PIECE_BYTES as u64) as usize;
        let got = fill(reader, &mut piece[..wanted])?;
        if import.sha256.is_some() {
            hash.update(&piece[..got]);
        }
        writer.write(at, &piece[..got])?;
        at += got as u64;
        if got < wanted {
            return Err(PoolError::Truncated { what: "raw image", have: at, want: bytes });
        }
    }
    if fill(reader, &mut piece[..1])? != 0 {
        let value = format!("more than {bytes} bytes");
        return Err(PoolError::invalid("stream", value, "exactly the announced length"));
    }
    watch.at(Stage::Writing, bytes, bytes)?;
    if let Some(expected) = import.sha256 {
        check_sha256(expected, hash)?;
    }
    writer.finish(None)
}

/// Reads until the piece is full or the stream ends.
fn fill(reader: &mut dyn Read, piece: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match reader.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(PoolError::io("read", Path::new("the stream"))(error)),
        }
    }
    Ok(filled)
}
