//! Reading an image, a volume or a snapshot: what another node gets of it.

use std::path::Path;

use super::{CHUNK_BYTES, Digester};
use crate::pool::{ImageId, Opened};
use crate::{PoolError, Result, sparse};

/// A piece of a disk that is not all zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Where it lies; a multiple of [`CHUNK_BYTES`].
    pub offset: u64,
    /// Its content: [`CHUNK_BYTES`], or what is left at the end.
    pub bytes: Vec<u8>,
}

/// What was found in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// This.
    Data(Chunk),
    /// Zeros up to here.
    Zeros(u64),
    /// Zeros to the end, or the end.
    End,
}

impl Opened {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its file or device node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its chunks from the first one that ends after `offset`, in order. The rest is zeros.
    pub fn chunks(&self, offset: u64) -> Chunks<'_> {
        Chunks { opened: self, next: offset - offset % CHUNK_BYTES }
    }

    /// Reads all of an image and says what it is: damage shows as another id.
    pub fn verify(&self) -> Result<ImageId> {
        let mut digester = Digester::new(self.bytes);
        let mut at = 0;
        for chunk in self.chunks(0) {
            let chunk = chunk?;
            digester.zeros(chunk.offset - at);
            digester.data(&chunk.bytes);
            at = chunk.offset + chunk.bytes.len() as u64;
        }
        Ok(digester.finish())
    }

    /// Skips the hole at `from`, a chunk's beginning, and reads one chunk: for who cannot wait
    /// until one that is not zeros is found.
    pub fn step(&self, from: u64) -> Result<Step> {
        let data = sparse::next_data(&self.file, from, self.bytes)
            .map_err(PoolError::io("look for data in", &self.path))?;
        let Some(data) = data else {
            return Ok(Step::End);
        };
        let offset = data.start - data.start % CHUNK_BYTES;
        let length = CHUNK_BYTES.min(self.bytes - offset) as usize;
        self.read(offset, length, |bytes| {
            if sparse::is_zero(bytes) {
                return Step::Zeros(offset + CHUNK_BYTES);
            }
            Step::Data(Chunk { offset, bytes: bytes.to_vec() })
        })
    }

    fn next_chunk(&self, from: u64) -> Result<Option<Chunk>> {
        let mut next = from;
        loop {
            match self.step(next)? {
                Step::Data(chunk) => return Ok(Some(chunk)),
                Step::Zeros(end) => next = end,
                Step::End => return Ok(None),
            }
        }
    }
}

/// The chunks of a disk. Ends after the first error.
#[derive(Debug)]
pub struct Chunks<'a> {
    opened: &'a Opened,
    next: u64,
}

impl Iterator for Chunks<'_> {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        let chunk = self.opened.next_chunk(self.next).transpose()?;
        self.next = match &chunk {
            Ok(chunk) => chunk.offset + CHUNK_BYTES,
            Err(_) => self.opened.bytes,
        };
        Some(chunk)
    }
}
