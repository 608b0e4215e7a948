//! Writing: large, one behind the other, and the header last.

use vm_memory::{Bytes, GuestAddress};

use super::format::{
    CRC_BYTES, Header, Kind, RECORD_HEADER_BYTES, RECORDS_START, Stage, record_crc, record_header,
};
use super::{ROOM_BYTES, SaveError, Target};
use crate::memory::GuestMemory;
use crate::migration::pages::{self, Batches};
use crate::migration::{Shape, wire};
use crate::state::Encoder;

/// What is written at once; in the target at multiples of this.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// So much may wait in the host's cache: whoever writes notices then how fast the disk is, and the
/// end is no long wait.
const UNSYNCED_BYTES_MAX: u64 = 64 << 20;

/// Everything of a guest that stands still.
pub(super) struct Content<'a> {
    pub(super) shape: &'a Shape,
    pub(super) image: &'a [u8],
    pub(super) memory: &'a GuestMemory,
}

/// Makes durable that what lies there is not to be read, whatever it was.
pub(super) fn begin(target: &dyn Target, header: &Header) -> Result<(), SaveError> {
    assert_eq!(header.stage, Stage::Writing);
    put_header(target, header)
}

/// Writes all that is behind the header, durably. Answers the header that makes it whole.
pub(super) fn write(
    target: &dyn Target,
    header: &Header,
    content: &Content<'_>,
    may_go_on: &dyn Fn() -> Result<(), SaveError>,
) -> Result<Header, SaveError> {
    let mut writer = Writer {
        target,
        id: header.id,
        may_go_on,
        wanted: header.memory_bytes.saturating_add(ROOM_BYTES),
        buffer: Vec::with_capacity(CHUNK_BYTES),
        at: RECORDS_START,
        unsynced: 0,
        records: 0,
    };
    let mut shape = Encoder::new();
    content.shape.encode(&mut shape);
    writer.record(Kind::Shape, &shape.into_bytes())?;
    writer.record(Kind::State, content.image)?;
    let mut pages = 0;
    let present = pages::present(content.memory);
    for batch in Batches::new(content.memory, present.ranges(), true) {
        if batch.runs.is_empty() {
            continue;
        }
        let mut payload = wire::encode_runs(&batch.runs);
        payload.reserve_exact(batch.data_bytes);
        for run in &batch.runs {
            let start = payload.len();
            payload.resize(start + run.bytes() as usize, 0);
            let read = content.memory.read_slice(&mut payload[start..], GuestAddress(run.start));
            assert!(read.is_ok(), "a page outside of memory");
            pages += u64::from(run.pages);
        }
        writer.record(Kind::Pages, &payload)?;
    }
    writer.record(Kind::End, &[])?;
    writer.flush()?;
    let record_bytes = writer.at - RECORDS_START;
    sync(target)?;
    Ok(Header { stage: Stage::Whole, record_bytes, pages, ..header.clone() })
}

/// Makes it whole, durably. When that fails it is taken back.
pub(super) fn commit(target: &dyn Target, header: &Header) -> Result<(), SaveError> {
    assert_eq!(header.stage, Stage::Whole);
    let Err(error) = put_header(target, header) else { return Ok(()) };
    if let Err(again) = put_header(target, &Header { stage: Stage::Writing, ..header.clone() }) {
        tracing::error!(%again, "a saved state that is older than its guest may stay on disk");
    }
    Err(error)
}

/// A guest goes on from it, once.
pub(super) fn use_up(target: &dyn Target, header: &Header) -> std::io::Result<()> {
    let header = Header { stage: Stage::UsedUp, ..header.clone() };
    target.write_at(&header.encode(), 0)?;
    target.sync()
}

fn put_header(target: &dyn Target, header: &Header) -> Result<(), SaveError> {
    let failed = |source| SaveError::Write { step: "writing its header", source };
    if target.bytes() < RECORDS_START {
        return Err(too_small(target, header.memory_bytes.saturating_add(ROOM_BYTES)));
    }
    target.write_at(&header.encode(), 0).map_err(failed)?;
    sync(target)
}

fn sync(target: &dyn Target) -> Result<(), SaveError> {
    target.sync().map_err(|source| SaveError::Write { step: "making it durable", source })
}

fn too_small(target: &dyn Target, wanted: u64) -> SaveError {
    SaveError::TooSmall { bytes: target.bytes(), wanted }
}

struct Writer<'a> {
    target: &'a dyn Target,
    id: [u8; 16],
    may_go_on: &'a dyn Fn() -> Result<(), SaveError>,
    /// A target that would have been large enough.
    wanted: u64,
    /// What goes to `at` next.
    buffer: Vec<u8>,
    at: u64,
    unsynced: u64,
    records: u64,
}

impl Writer<'_> {
    fn record(&mut self, kind: Kind, payload: &[u8]) -> Result<(), SaveError> {
        assert!(payload.len() <= kind.length_max(), "a record that nobody would read");
        let header: [u8; RECORD_HEADER_BYTES] = record_header(kind, payload.len());
        let crc: [u8; CRC_BYTES] =
            record_crc(&self.id, self.records, &header, payload).to_le_bytes();
        self.records += 1;
        self.put(&header)?;
        self.put(payload)?;
        self.put(&crc)
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), SaveError> {
        while !bytes.is_empty() {
            let chunk = CHUNK_BYTES - self.at as usize % CHUNK_BYTES;
            let (now, rest) = bytes.split_at(bytes.len().min(chunk - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = rest;
            if self.buffer.len() == chunk {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SaveError> {
        (self.may_go_on)()?;
        let bytes = self.buffer.len() as u64;
        if self.target.bytes().saturating_sub(self.at) < bytes {
            return Err(too_small(self.target, self.wanted));
        }
        self.target
            .write_at(&self.buffer, self.at)
            .map_err(|source| SaveError::Write { step: "writing it", source })?;
        self.buffer.clear();
        self.at += bytes;
        self.unsynced += bytes;
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            sync(self.target)?;
            self.unsynced = 0;
        }
        Ok(())
    }
}
