//! Little-endian fields, written one after the other; reading checks every length.

use super::StateError;

/// Writes fields.
#[derive(Debug, Default, Clone)]
pub struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// An empty payload.
    pub fn new() -> Self {
        Self::default()
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// One byte, 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// Bytes whose number is known to the reader.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Four bytes of length, then the bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        // Longer ones make a section that `StateBuilder` refuses; the prefix cannot lie before that.
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.raw(bytes);
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// How many bytes were written.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Reads fields in the order in which they were written.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Reads from `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `length` bytes.
    pub fn raw(&mut self, field: &'static str, length: usize) -> Result<&'a [u8], StateError> {
        let Some((head, rest)) = self.rest.split_at_checked(length) else {
            return Err(StateError::Truncated { field, needed: length, left: self.rest.len() });
        };
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], StateError> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(field, N)?);
        Ok(array)
    }

    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, StateError> {
        Ok(self.array::<1>(field)?[0])
    }

    /// One byte that must be 0 or 1.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, StateError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(StateError::value(field, other, "0 or 1")),
        }
    }

    /// Two bytes.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, StateError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    /// Four bytes.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, StateError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// Eight bytes.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, StateError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// Four bytes of length, at most `limit`, then the bytes.
    pub fn bytes(&mut self, field: &'static str, limit: usize) -> Result<&'a [u8], StateError> {
        let length = self.u32(field)? as usize;
        if length > limit {
            return Err(StateError::TooLarge { field, value: length, limit });
        }
        self.raw(field, length)
    }

    /// How many bytes are left.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The last field has been read: nothing may follow.
    pub fn finish(self, field: &'static str) -> Result<(), StateError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(StateError::Trailing { field, left }),
        }
    }
}
