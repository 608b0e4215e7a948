//! An image's identity, computed while its content passes by.

use sha2::{Digest, Sha256};

use crate::pool::ImageId;
use crate::sparse::is_zero;

/// The unit of the digest. Part of the identity's definition: never to be changed.
pub const CHUNK_BYTES: u64 = 1 << 20;
const HEADER: &str = "drover-image-1";
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Computes an [`ImageId`] from an image's content, in order.
#[derive(Debug)]
pub struct Digester {
    bytes: u64,
    at: u64,
    list: Sha256,
    chunk: Sha256,
    chunk_filled: u64,
    zero_chunk: String,
}

impl Digester {
    /// For an image of this many bytes.
    pub fn new(bytes: u64) -> Self {
        let mut zero_chunk = Sha256::new();
        for _ in 0..CHUNK_BYTES / ZEROS.len() as u64 {
            zero_chunk.update(ZEROS);
        }
        Self {
            bytes,
            at: 0,
            list: Sha256::new_with_prefix(format!("{HEADER} {bytes}\n")),
            chunk: Sha256::new(),
            chunk_filled: 0,
            zero_chunk: line(&zero_chunk),
        }
    }

    /// The next bytes of the content.
    ///
    /// # Panics
    /// When there are more than the image has: the caller has checked that.
    pub fn data(&mut self, mut bytes: &[u8]) {
        self.advance(bytes.len() as u64);
        while !bytes.is_empty() {
            let here = (CHUNK_BYTES - self.chunk_filled).min(bytes.len() as u64);
            let (head, rest) = bytes.split_at(here as usize);
            if here == CHUNK_BYTES && is_zero(head) {
                self.list.update(&self.zero_chunk);
            } else {
                self.fill(head);
            }
            bytes = rest;
        }
    }

    /// The next bytes are this many zeros. Whole chunks of them cost next to nothing.
    ///
    /// # Panics
    /// As [`data`](Self::data).
    pub fn zeros(&mut self, bytes: u64) {
        self.advance(bytes);
        let mut left = bytes;
        while left > 0 {
            if self.chunk_filled == 0 && left >= CHUNK_BYTES {
                self.list.update(&self.zero_chunk);
                left -= CHUNK_BYTES;
                continue;
            }
            let here = (CHUNK_BYTES - self.chunk_filled).min(left).min(ZEROS.len() as u64);
            self.fill(&ZEROS[..here as usize]);
            left -= here;
        }
    }

    /// The identity; what has not been given is zeros.
    pub fn finish(mut self) -> ImageId {
        self.zeros(self.bytes - self.at);
        if self.chunk_filled > 0 {
            self.end_chunk();
        }
        ImageId(self.list.finalize().into())
    }

    fn advance(&mut self, bytes: u64) {
        self.at += bytes;
        assert!(self.at <= self.bytes, "more content than the image's {} bytes", self.bytes);
    }

    fn fill(&mut self, bytes: &[u8]) {
        self.chunk.update(bytes);
        self.chunk_filled += bytes.len() as u64;
        assert!(self.chunk_filled <= CHUNK_BYTES);
        if self.chunk_filled == CHUNK_BYTES {
            self.end_chunk();
        }
    }

    fn end_chunk(&mut self) {
        self.list.update(line(&self.chunk));
        self.chunk.reset();
        self.chunk_filled = 0;
    }
}

/// SHA-256 of a chunk; one that is shorter, at a disk's end, counts as filled up with zeros.
///
/// # Panics
/// When it is longer than [`CHUNK_BYTES`].
pub fn chunk_digest(bytes: &[u8]) -> [u8; 32] {
    let missing = CHUNK_BYTES.checked_sub(bytes.len() as u64);
    let mut missing = missing.expect("a chunk has at most 1 MiB") as usize;
    let mut hash = Sha256::new_with_prefix(bytes);
    while missing > 0 {
        let here = missing.min(ZEROS.len());
        hash.update(&ZEROS[..here]);
        missing -= here;
    }
    hash.finalize().into()
}

/// A digest as `sha256sum` prints it, on a line of its own.
fn line(hash: &Sha256) -> String {
    format!("{}\n", ImageId(hash.clone().finalize().into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn whole(content: &[u8]) -> ImageId {
        let mut digester = Digester::new(content.len() as u64);
        digester.data(content);
        digester.finish()
    }

    /// The definition in the module's documentation, carried out by other people's programs.
    #[test]
    fn coreutils_come_to_the_same_identity() {
        let mut content = vec![0_u8; (3 << 20) + 1536];
        content[5] = 1;
        content[(2 << 20) + 77] = 9;
        content[(3 << 20) + 1000] = 3;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&content).unwrap();
        let script = "{ echo \"drover-image-1 $(stat -c %s \"$1\")\"; \
                      split -b 1M --filter='sha256sum | cut -c1-64' \"$1\"; } | sha256sum";
        let output =
            Command::new("sh").args(["-c", script, "sh"]).arg(file.path()).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.split(' ').next().unwrap(), whole(&content).to_string());
    }

    #[test]
    fn size_and_place_matter() {
        let zeros = whole(&[0; 1024]);
        assert_ne!(zeros, whole(&[0; 1536]));
        assert_ne!(zeros, whole(&[&[0; 512][..], &[1; 512]].concat()));
    }

    /// 2 TiB of zeros, which by plain SHA-256 would take hours.
    #[test]
    fn terabytes_of_zeros_are_cheap() {
        let mut digester = Digester::new(2 << 40);
        digester.data(b"begin");
        digester.finish();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// However the content is cut, and whether zeros are told as data or as a hole.
        #[test]
        fn cuts_do_not_matter(
            sizes in prop::collection::vec((1_usize..1_200_000, any::<bool>(), any::<bool>()), 1..6),
        ) {
            let length = sizes.iter().map(|(size, ..)| size).sum::<usize>();
            let mut content = Vec::with_capacity(length);
            let mut digester = Digester::new(length as u64);
            for (size, is_data, told) in sizes {
                let start = content.len();
                content.resize(start + size, u8::from(is_data));
                if is_data || told {
                    digester.data(&content[start..]);
                } else {
                    digester.zeros(size as u64);
                }
            }
            prop_assert_eq!(digester.finish(), whole(&content));
        }
    }
}
