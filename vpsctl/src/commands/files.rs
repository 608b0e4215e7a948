//! Files of this machine that become part of a request: SSH keys, user data, images.
//!
//! Each is looked at before anything is sent: what cannot be used is wrong usage, and nothing is
//! half done. What a file that was refused holds is never repeated: it may be a secret.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::error::Error;

/// A line of keys is a few hundred bytes; what is larger is no file of keys.
const KEYS_BYTES_MAX: u64 = 256 << 10;
/// As the API has it.
const KEYS_MAX: usize = 32;
const USER_DATA_BYTES_MAX: u64 = 64 << 10;
/// With the message around it well below the 1 MiB that the API allows.
pub(super) const CHUNK_BYTES: usize = 512 << 10;

/// An error that names the flag and the path.
fn refused(flag: &str, path: &Path, why: &str) -> Error {
    Error::Usage(format!("{flag}: \"{}\" {why}", path.display()))
}

fn unreadable(flag: &str, path: &Path, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => refused(flag, path, "does not exist"),
        _ => refused(flag, path, &format!("cannot be read: {error}")),
    }
}

/// The public keys of these files, each one line as in authorized_keys.
pub(super) fn public_keys(paths: &[PathBuf]) -> Result<Vec<String>, Error> {
    let mut keys = Vec::new();
    for path in paths {
        keys.extend(keys_of(path)?);
    }
    if keys.len() > KEYS_MAX {
        return Err(Error::Usage(format!(
            "--ssh-key: {} keys are too many: at most {KEYS_MAX} are accepted",
            keys.len()
        )));
    }
    Ok(keys)
}

fn keys_of(path: &Path) -> Result<Vec<String>, Error> {
    const FLAG: &str = "--ssh-key";
    let text = text(FLAG, path, KEYS_BYTES_MAX)?;
    if text.contains("PRIVATE KEY-----") || text.starts_with("PuTTY-User-Key-File") {
        let why = "holds a private key: its public part is expected, such as id_ed25519.pub";
        return Err(refused(FLAG, path, why));
    }
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if !is_public_key(line) {
            let why = format!(
                "holds no public key in line {}: lines as in authorized_keys are expected, such \
                 as ssh-ed25519 AAAA… name",
                index + 1
            );
            return Err(refused(FLAG, path, &why));
        }
        keys.push(line.to_owned());
    }
    if keys.is_empty() {
        return Err(refused(FLAG, path, "holds no public key: one a line is expected"));
    }
    Ok(keys)
}

/// A type and a blob stand side by side, behind options if there are any. Every blob begins with
/// the length of the type's name, whose first three bytes are zero.
fn is_public_key(line: &str) -> bool {
    const KINDS: [&str; 4] = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-sha2-"];
    let words: Vec<_> = line.split_whitespace().collect();
    let is_kind = |word: &str| KINDS.iter().any(|kind| word.starts_with(kind));
    !line.chars().any(char::is_control)
        && words.windows(2).any(|pair| is_kind(pair[0]) && pair[1].starts_with("AAAA"))
}

/// The text of `--user-data`.
pub(super) fn user_data(path: &Path) -> Result<String, Error> {
    text("--user-data", path, USER_DATA_BYTES_MAX)
}

/// A small text, from anything that can be read to its end (a pipe too).
fn text(flag: &str, path: &Path, bytes_max: u64) -> Result<String, Error> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(bytes_max + 1).read_to_end(&mut bytes))
        .map_err(|e| unreadable(flag, path, &e))?;
    if bytes.is_empty() {
        return Err(refused(flag, path, "is empty: a text is expected"));
    }
    if bytes.len() as u64 > bytes_max {
        let why = format!("is too large: at most {} KiB are accepted", bytes_max >> 10);
        return Err(refused(flag, path, &why));
    }
    String::from_utf8(bytes).map_err(|_| refused(flag, path, "is no text: UTF-8 is expected"))
}

/// An image's file, open and with a length that was not zero.
pub(super) struct ImageFile {
    file: File,
    path: PathBuf,
    /// What it had when it was opened; what is written behind that is not read.
    pub(super) bytes: u64,
}

impl ImageFile {
    /// Opens a regular file that is not empty.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        const FLAG: &str = "--file";
        // Before it is opened: opening a pipe would wait for its writer.
        let metadata = std::fs::metadata(path).map_err(|e| unreadable(FLAG, path, &e))?;
        if metadata.is_dir() {
            return Err(refused(FLAG, path, "is a directory: a file is expected"));
        }
        if !metadata.is_file() {
            let why = "is a device or a pipe: a file with a length is expected";
            return Err(refused(FLAG, path, why));
        }
        let open = || {
            let file = File::open(path)?;
            let bytes = file.metadata()?.len();
            Ok(Self { file, path: path.to_owned(), bytes })
        };
        let it: Self = open().map_err(|e| unreadable(FLAG, path, &e))?;
        if it.bytes == 0 {
            return Err(refused(FLAG, path, "is empty: an image is expected"));
        }
        Ok(it)
    }

    /// The bytes at an offset below the length: a chunk, less at the end.
    pub(super) fn chunk(&self, offset: u64) -> Result<Vec<u8>, Error> {
        let left = usize::try_from(self.bytes - offset).unwrap_or(CHUNK_BYTES);
        let mut data = vec![0; left.min(CHUNK_BYTES)];
        self.file.read_exact_at(&mut data, offset).map_err(|e| {
            let why = match e.kind() {
                io::ErrorKind::UnexpectedEof => "became shorter while it was read".to_owned(),
                _ => format!("cannot be read at byte {offset}: {e}"),
            };
            Error::Local(format!("--file: \"{}\" {why}", self.path.display()))
        })?;
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKZP user@host";

    fn written(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    #[test]
    fn keys_are_lines_as_in_authorized_keys() {
        let with_options = format!("command=\"ls -l\",no-pty {KEY}");
        let text = format!("# mine\n\n{KEY}\r\n{with_options}\necdsa-sha2-nistp256 AAAAE2Vj x\n");
        let (_folder, path) = written(text.as_bytes());
        let expected = [KEY, &with_options, "ecdsa-sha2-nistp256 AAAAE2Vj x"];
        assert_eq!(public_keys(std::slice::from_ref(&path)).unwrap(), expected);
        let error = public_keys(&vec![path; 11]).unwrap_err().to_string();
        assert_eq!(error, "--ssh-key: 33 keys are too many: at most 32 are accepted");
    }

    /// The one mistake that would tell a secret; the error must not repeat it either.
    #[test]
    fn a_private_key_is_refused_and_not_repeated() {
        let kinds = ["OPENSSH PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"];
        let armoured = kinds.map(|kind| format!("-----BEGIN {kind}-----\nc2VjcmV0\n"));
        let putty = "PuTTY-User-Key-File-3: ssh-ed25519\nc2VjcmV0\n".to_owned();
        let beside = format!("{KEY}\n{}", armoured[0]);
        for text in armoured.iter().chain([&putty, &beside]) {
            let (_folder, path) = written(text.as_bytes());
            let error = public_keys(&[path]).unwrap_err().to_string();
            assert!(error.contains("holds a private key: its public part"), "{error}");
            assert!(!error.contains("c2VjcmV0"), "{error}");
        }
    }

    #[test]
    fn texts_that_are_refused_say_why() {
        for (content, expected) in [
            (&b""[..], "is empty: a text is expected"),
            (b"\xff\xfe", "is no text: UTF-8"),
            (b"# none\n", "holds no public key: one a line"),
            (b"\nssh-ed25519\n", "holds no public key in line 2"),
            (b"hello AAAA\n", "holds no public key in line 1"),
            (&[b'#'; KEYS_BYTES_MAX as usize + 1], "is too large: at most 256 KiB"),
        ] {
            let (_folder, path) = written(content);
            let error = public_keys(&[path]).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let (folder, path) = written(&[b'a'; USER_DATA_BYTES_MAX as usize]);
        assert_eq!(user_data(&path).unwrap().len() as u64, USER_DATA_BYTES_MAX);
        let of_folder = user_data(folder.path()).unwrap_err().to_string();
        assert!(of_folder.contains("cannot be read: Is a directory"), "{of_folder}");
        let error = user_data(Path::new("/none/here")).unwrap_err().to_string();
        assert_eq!(error, "--user-data: \"/none/here\" does not exist");
    }

    /// Chunks join to the file as it was opened, whatever is added behind it.
    #[test]
    fn an_image_is_read_in_chunks() {
        let content: Vec<u8> = (0..CHUNK_BYTES as u32 * 2 + 7).map(|n| (n % 251) as u8).collect();
        let (_folder, path) = written(&content);
        let image = ImageFile::open(&path).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().set_len(1 << 22).unwrap();
        let mut read = Vec::new();
        while (read.len() as u64) < image.bytes {
            let chunk = image.chunk(read.len() as u64).unwrap();
            assert!((1..=CHUNK_BYTES).contains(&chunk.len()));
            read.extend(chunk);
        }
        assert!(read == content);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(10).unwrap();
        let error = image.chunk(0).unwrap_err().to_string();
        assert!(error.contains("became shorter while it was read"), "{error}");
    }
}
