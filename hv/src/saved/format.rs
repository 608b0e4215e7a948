//! The file's parts as bytes: `docs/saved-state-format.md`.

use crate::memory::PAGE_BYTES;
use crate::migration::wire::{DATA_BYTES_MAX, RUN_BYTES, RUNS_MAX};
use crate::state::{Decoder, Encoder, STATE_BYTES_MAX, StateError};

const MAGIC: [u8; 8] = *b"DROVSAVE";
/// A reader refuses another one.
pub(super) const VERSION: u16 = 1;
/// The header lies in the first sector, which a disk writes as a whole or not at all.
const SECTOR_BYTES: usize = 512;
/// Where the header's checksum is.
const CRC_AT: usize = SECTOR_BYTES - 4;
/// The records begin here.
pub(super) const RECORDS_START: u64 = PAGE_BYTES;
const UID_BYTES_MAX: usize = 64;
/// kind, length.
pub(super) const RECORD_HEADER_BYTES: usize = 8;
pub(super) const CRC_BYTES: usize = 4;
const SHAPE_BYTES_MAX: usize = 8192;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Begun; not to be read.
    Writing = 1,
    /// All of it is there.
    Whole = 2,
    /// A guest has gone on from it.
    UsedUp = 3,
}

/// The first sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) stage: Stage,
    /// Of this saving alone: what an earlier one left in the same place is not taken for a part.
    pub(super) id: [u8; 16],
    /// The domain's.
    pub(super) uid: String,
    pub(super) memory_bytes: u64,
    /// Length of all records together.
    pub(super) record_bytes: u64,
    /// Pages of memory that are there; the others are zero.
    pub(super) pages: u64,
}

/// Why a first sector is no header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoHeader {
    /// It begins with something else.
    Magic,
    /// Another version's.
    Version(u16),
    /// It does not add up.
    Damaged(String),
}

impl Header {
    /// All up to the first record.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::new();
        out.raw(&MAGIC);
        out.u16(VERSION);
        out.u16(self.stage as u16);
        out.raw(&self.id);
        out.bytes(self.uid.as_bytes());
        out.u64(self.memory_bytes);
        out.u64(self.record_bytes);
        out.u64(self.pages);
        let mut sector = out.into_bytes();
        sector.resize(CRC_AT, 0);
        let crc = crc32fast::hash(&sector);
        sector.extend(crc.to_le_bytes());
        sector.resize(RECORDS_START as usize, 0);
        sector
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, NoHeader> {
        let damaged = |error: StateError| NoHeader::Damaged(error.to_string());
        let mut fields = Decoder::new(bytes);
        if fields.array("magic") != Ok(MAGIC) {
            return Err(NoHeader::Magic);
        }
        let version = fields.u16("version").map_err(damaged)?;
        if version != VERSION {
            return Err(NoHeader::Version(version));
        }
        let mut sector = Decoder::new(bytes);
        let covered = sector.raw("header", CRC_AT).map_err(damaged)?;
        if sector.u32("header crc").map_err(damaged)? != crc32fast::hash(covered) {
            return Err(NoHeader::Damaged("the checksum of its header is wrong".into()));
        }
        Self::fields(&mut fields).map_err(damaged)
    }

    fn fields(fields: &mut Decoder<'_>) -> Result<Self, StateError> {
        let stage = match fields.u16("stage")? {
            1 => Stage::Writing,
            2 => Stage::Whole,
            3 => Stage::UsedUp,
            other => return Err(StateError::value("stage", other, "1 to 3")),
        };
        let id = fields.array("id")?;
        let uid = String::from_utf8_lossy(fields.bytes("uid", UID_BYTES_MAX)?).into_owned();
        Ok(Self {
            stage,
            id,
            uid,
            memory_bytes: fields.u64("memory_bytes")?,
            record_bytes: fields.u64("record_bytes")?,
            pages: fields.u64("pages")?,
        })
    }
}

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// What the machine has to be like.
    Shape = 1,
    /// A state image.
    State = 2,
    /// As the message of a migration.
    Pages = 3,
    /// Nothing; nothing follows.
    End = 4,
}

impl Kind {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::Shape, Self::State, Self::Pages, Self::End]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }

    pub(super) fn length_max(self) -> usize {
        match self {
            Self::Shape => SHAPE_BYTES_MAX,
            Self::State => STATE_BYTES_MAX,
            Self::Pages => 4 + RUNS_MAX * RUN_BYTES + DATA_BYTES_MAX,
            Self::End => 0,
        }
    }
}

/// What stands in front of a record's payload.
pub(super) fn record_header(kind: Kind, length: usize) -> [u8; RECORD_HEADER_BYTES] {
    let mut header = [0; RECORD_HEADER_BYTES];
    header[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    header[4..].copy_from_slice(&(length as u32).to_le_bytes());
    header
}

/// The checksum of a record: also of which saving it is, and which of its records.
pub(super) fn record_crc(id: &[u8; 16], number: u64, header: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(id);
    crc.update(&number.to_le_bytes());
    crc.update(header);
    crc.update(payload);
    crc.finalize()
}
