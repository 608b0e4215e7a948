//! Small records, replaced atomically and verified when read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// The longest payload, in bytes. A record is a page of facts, not a place for data.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

const MAGIC: &str = "drover-record";
/// The longest header line that can be right: magic, version, length and checksum.
const HEADER_BYTES_MAX: usize = 64;

/// A record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The payload's version, as its writer gave it.
    pub version: u32,
    /// The payload, at most [`RECORD_BYTES_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// Why a record could not be read or written. Each message names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// What was being done ("open", "write", …).
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file is there, but is not a whole record.
    #[error("{path}: the record is damaged: {detail}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The payload is longer than [`RECORD_BYTES_MAX`].
    #[error("{path}: a record of {bytes} bytes is too long; at most {RECORD_BYTES_MAX}")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The payload's length.
        bytes: usize,
    },
}

impl Error {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// Reads the record at `path`; `None` when there is none.
pub fn read(path: &Path) -> Result<Option<Record>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(Error::io("open", path)(err)),
    };
    // One byte more than a right record can have, so that a longer one is noticed.
    let limit = HEADER_BYTES_MAX + RECORD_BYTES_MAX + 1;
    let mut bytes = Vec::new();
    file.take(limit as u64).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    parse(&bytes).map(Some).map_err(|detail| Error::Corrupt { path: path.to_owned(), detail })
}

/// Replaces the record at `path`. When this returns, the new one survives a power cut; when it
/// fails, the old one is untouched. The directory must exist. Writers of one path must take
/// turns; readers need not.
pub fn write(path: &Path, version: u32, payload: &[u8]) -> Result<(), Error> {
    if payload.len() > RECORD_BYTES_MAX {
        return Err(Error::TooLong { path: path.to_owned(), bytes: payload.len() });
    }
    let temporary = temporary_path(path);
    let header = header(version, payload);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temporary)
        .map_err(Error::io("create", &temporary))?;
    file.write_all(header.as_bytes())
        .and_then(|()| file.write_all(payload))
        .and_then(|()| file.sync_all())
        .map_err(Error::io("write", &temporary))?;
    drop(file);
    fs::rename(&temporary, path).map_err(Error::io("rename to", path))?;
    sync_dir(parent(path))
}

/// Removes a record (or any file), durably. One that is not there is no error.
pub fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(err) => Err(Error::io("remove", path)(err)),
    }
}

/// Makes a directory and those above it, durably; mode 0700 for those that are new.
pub fn create_dir(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    create_dir(above)?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => sync_dir(above),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(err) => Err(Error::io("create directory", path)(err)),
    }
}

/// Makes the directory's entries durable.
pub fn sync_dir(path: &Path) -> Result<(), Error> {
    let dir = File::open(path).map_err(Error::io("open", path))?;
    rustix::fs::fsync(&dir).map_err(|err| Error::io("sync", path)(err.into()))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    }
}

/// In the same directory (rename must not cross filesystems) and hidden.
fn temporary_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

fn header(version: u32, payload: &[u8]) -> String {
    let crc = checksum(version, payload);
    format!("{MAGIC} {version} length={} crc32={crc:08x}\n", payload.len())
}

/// Over the version too: a changed header is noticed as well as a changed payload.
fn checksum(version: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&version.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn parse(bytes: &[u8]) -> Result<Record, String> {
    if bytes.is_empty() {
        return Err("it is empty".into());
    }
    let head = &bytes[..bytes.len().min(HEADER_BYTES_MAX)];
    let end = head.iter().position(|&b| b == b'\n').ok_or("its first line does not end")?;
    let payload = &bytes[end + 1..];
    let line = std::str::from_utf8(&bytes[..end]).map_err(|_| "its first line is not text")?;
    let fields: Vec<&str> = line.split(' ').collect();
    let &[MAGIC, version, length, crc] = fields.as_slice() else {
        return Err(format!("its first line is not `{MAGIC} VERSION length=… crc32=…`"));
    };
    let version: u32 = version.parse().map_err(|_| format!("version {version:?}"))?;
    let length: usize = length
        .strip_prefix("length=")
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| format!("{length:?} is no length"))?;
    let crc = crc
        .strip_prefix("crc32=")
        .and_then(|n| u32::from_str_radix(n, 16).ok())
        .ok_or_else(|| format!("{crc:?} is no checksum"))?;
    if length > RECORD_BYTES_MAX {
        return Err(format!("length {length} is more than {RECORD_BYTES_MAX}"));
    }
    if payload.len() != length {
        return Err(format!("{} bytes of payload where {length} were written", payload.len()));
    }
    if checksum(version, payload) != crc {
        return Err("its checksum does not match".into());
    }
    Ok(Record { version, payload: payload.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        (dir, path)
    }

    #[test]
    fn what_was_written_is_read_and_replaced_in_whole() {
        let (_dir, path) = place();
        assert_eq!(read(&path).unwrap(), None);
        write(&path, 1, b"one").unwrap();
        write(&path, 7, b"a longer\nsecond one").unwrap();
        let record = read(&path).unwrap().unwrap();
        assert_eq!(record, Record { version: 7, payload: b"a longer\nsecond one".to_vec() });
        write(&path, 7, b"").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().payload, b"");
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }

    /// A file torn at any byte, or with any bit flipped, is called damaged: it is never taken
    /// for a record, nor for "there is none".
    #[test]
    fn torn_or_flipped_records_are_damaged() {
        let (_dir, path) = place();
        write(&path, 3, b"{\"epoch\":12}").unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(read(&path), Err(Error::Corrupt { .. })), "cut at {cut}");
        }
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bytes).unwrap();
            match read(&path) {
                Err(Error::Corrupt { .. }) => {}
                // The only harmless flip is the case of a checksum's hex digit.
                Ok(Some(record)) => {
                    assert_eq!(record.payload, b"{\"epoch\":12}", "bit {bit}");
                    assert_eq!(record.version, 3, "bit {bit}");
                }
                other => panic!("bit {bit}: {other:?}"),
            }
        }
        let mut longer = whole;
        longer.push(b'x');
        fs::write(&path, &longer).unwrap();
        assert!(matches!(read(&path), Err(Error::Corrupt { .. })));
    }

    /// A crash between writing the temporary file and the rename leaves the old record.
    #[test]
    fn a_left_over_temporary_file_changes_nothing() {
        let (_dir, path) = place();
        write(&path, 1, b"old").unwrap();
        fs::write(temporary_path(&path), b"drover-rec").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().payload, b"old");
        write(&path, 1, b"new").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().payload, b"new");
        assert!(!temporary_path(&path).exists());
    }

    #[test]
    fn size_is_bounded_both_ways() {
        let (_dir, path) = place();
        write(&path, 1, b"small").unwrap();
        let long = vec![0_u8; RECORD_BYTES_MAX + 1];
        assert!(matches!(write(&path, 1, &long), Err(Error::TooLong { .. })));
        assert_eq!(read(&path).unwrap().unwrap().payload, b"small");
        write(&path, 1, &long[1..]).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().payload.len(), RECORD_BYTES_MAX);
        fs::write(&path, [header(1, &long).as_bytes(), &long].concat()).unwrap();
        assert!(matches!(read(&path), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn errors_name_the_file() {
        let (dir, _) = place();
        let err = write(&dir.path().join("no/such/dir"), 1, b"x").unwrap_err();
        assert!(err.to_string().contains("no/such/.dir.new: cannot create"), "{err}");
        let err = read(dir.path()).unwrap_err();
        assert!(matches!(err, Error::Io { action: "read", .. }), "{err}");
    }

    #[test]
    fn directories_are_made_all_the_way() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, _) = place();
        let deep = dir.path().join("a/b/c");
        create_dir(&deep).unwrap();
        create_dir(&deep).unwrap();
        assert_eq!(fs::metadata(&deep).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(create_dir(&dir.path().join("file/x")).is_err());
    }
}
