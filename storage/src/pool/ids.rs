//! The names by which volumes, snapshots and images are known. The caller gives the first two;
//! an image's comes from its content (see [`crate::image`]).

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::PoolError;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = PoolError;

            /// One spelling only, so that a name that was read is the name that was written.
            fn from_str(text: &str) -> Result<Self, PoolError> {
                match Uuid::try_parse(text) {
                    Ok(uuid) if uuid.as_hyphenated().to_string() == text => Ok(Self(uuid)),
                    _ => Err(PoolError::invalid($field, text, "a UUID in lower case, hyphenated")),
                }
            }
        }
    };
}

uuid_id! {
    /// A volume.
    VolumeId, "volume"
}
uuid_id! {
    /// A snapshot of a volume; unique in its pool.
    SnapshotId, "snapshot"
}

/// An image, by the digest of its content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub [u8; 32]);

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl FromStr for ImageId {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        parse_hex(text).map(Self).ok_or_else(|| PoolError::invalid("image", text, HEX_ACCEPTED))
    }
}

/// A plain SHA-256, as `sha256sum` prints it: of a file as its publisher gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sha256(pub [u8; 32]);

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl FromStr for Sha256 {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let lower = text.to_ascii_lowercase();
        parse_hex(&lower).map(Self).ok_or_else(|| PoolError::invalid("sha256", text, HEX_ACCEPTED))
    }
}

const HEX_ACCEPTED: &str = "64 hexadecimal digits";

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_spelling() {
        let text = "0193f2a5-7e3c-7000-8000-0123456789ab";
        assert_eq!(text.parse::<VolumeId>().unwrap().to_string(), text);
        for bad in ["", "..", "0193F2A5-7e3c-7000-8000-0123456789ab", &text.replace('-', "")] {
            let error = bad.parse::<VolumeId>().unwrap_err().to_string();
            assert!(error.starts_with("volume: "), "{error}");
        }
        let hex = "ab".repeat(32);
        assert_eq!(hex.parse::<ImageId>().unwrap().to_string(), hex);
        assert!(hex.to_uppercase().parse::<ImageId>().is_err());
        assert!(hex.to_uppercase().parse::<Sha256>().is_ok());
        assert!(hex[1..].parse::<ImageId>().is_err());
        assert!(format!("+{}", &hex[1..]).parse::<ImageId>().is_err());
    }
}
