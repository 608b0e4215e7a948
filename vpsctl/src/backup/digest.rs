//! What a block is called, and what an image made of blocks is called.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};

/// The unit of everything here. Part of the format, and of images' digests: never to be changed.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;

/// SHA-256 of a block.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Digest(pub(crate) [u8; 32]);

impl Digest {
    /// Of these bytes.
    pub(crate) fn of(data: &[u8]) -> Self {
        Self(Sha256::digest(data).into())
    }

    /// From 64 hexadecimal digits in lower case, as they are written.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let is_digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 64 || !text.bytes().all(is_digit) {
            return None;
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::custom(format!("\"{text}\" is no digest: 64 hexadecimal digits are expected"))
        })
    }
}

/// The digest by which the API names an image, from those of its blocks: SHA-256 over a header
/// with the length and a line for each block. In an image the last block has no zeros added.
pub(crate) struct ImageDigester {
    list: Sha256,
}

impl ImageDigester {
    /// For an image of so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        Self { list: Sha256::new_with_prefix(format!("drover-image-1 {bytes}\n")) }
    }

    /// The next block.
    pub(crate) fn block(&mut self, digest: &Digest) {
        self.list.update(format!("{digest}\n"));
    }

    /// In hexadecimal.
    pub(crate) fn finish(self) -> String {
        Digest(self.list.finalize().into()).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_written_as_sha256sum_does() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(Digest::parse(empty), Some(Digest::of(b"")));
        for bad in ["", &empty[1..], &empty.to_uppercase(), &empty.replace('e', "é")] {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }
}
