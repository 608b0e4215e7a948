//! Reading: nothing is believed that its checksum does not cover, and all of it is read before
//! anything is done with it.

use vm_memory::{Bytes, GuestAddress};

use super::format::{
    CRC_BYTES, Header, Kind, NoHeader, RECORD_HEADER_BYTES, RECORDS_START, Stage, VERSION,
    record_crc,
};
use super::write::CHUNK_BYTES;
use super::{RestoreError, Target};
use crate::machine::migratable::MachineState;
use crate::memory::GuestMemory;
use crate::migration::{Shape, wire};
use crate::state::{self, Decoder, StateError};

/// The header of a state of this domain that is whole; `None` when it was used up.
pub(super) fn open(target: &dyn Target, uid: &str) -> Result<Option<Header>, RestoreError> {
    if target.bytes() < RECORDS_START {
        return Err(RestoreError::Nothing);
    }
    let mut bytes = vec![0; RECORDS_START as usize];
    read_at(target, &mut bytes, 0)?;
    let header = Header::decode(&bytes).map_err(|error| match error {
        NoHeader::Magic => RestoreError::Nothing,
        NoHeader::Version(found) => RestoreError::Version { found, accepted: VERSION },
        NoHeader::Damaged(what) => RestoreError::Damaged(what),
    })?;
    if header.uid != uid {
        let (found, accepted) = (header.uid, uid.to_owned());
        return Err(RestoreError::Foreign { found, accepted });
    }
    match header.stage {
        Stage::Whole => Ok(Some(header)),
        Stage::UsedUp => Ok(None),
        Stage::Writing => Err(RestoreError::Unfinished),
    }
}

/// Reads everything: pages into `memory`, which is zero, and the state, which fits a machine of
/// this shape. When it fails the memory is of no use.
pub(super) fn read(
    target: &dyn Target,
    header: &Header,
    shape: &Shape,
    memory: &GuestMemory,
    may_go_on: &dyn Fn() -> Result<(), RestoreError>,
) -> Result<MachineState, RestoreError> {
    let end = RECORDS_START.checked_add(header.record_bytes);
    let Some(end) = end.filter(|end| *end <= target.bytes()) else {
        let (has, needs) = (target.bytes(), header.record_bytes);
        let what = format!("it has {needs} bytes behind its header, in a volume of {has}");
        return Err(RestoreError::Damaged(what));
    };
    let id = header.id;
    let buffer = Vec::with_capacity(CHUNK_BYTES);
    let mut reader =
        Reader { target, id, may_go_on, buffer, taken: 0, at: RECORDS_START, end, records: 0 };
    let mut payload = Vec::new();

    reader.expect(Kind::Shape, &mut payload)?;
    let mut fields = Decoder::new(&payload);
    let theirs = Shape::decode(&mut fields)?;
    fields.finish("shape")?;
    shape.accepts(&theirs).map_err(RestoreError::Mismatch)?;

    reader.expect(Kind::State, &mut payload)?;
    let state = state::decode(&payload)?;

    // Runs come in order, none twice.
    let (mut pages, mut next) = (0, 0);
    loop {
        match reader.next(&mut payload)? {
            Kind::Pages => pages += fill(memory, &payload, &mut next)?,
            Kind::End => break,
            kind => return Err(reader.damaged(&format!("is {kind:?} among pages"))),
        }
    }
    if !reader.is_at_end() || pages != header.pages {
        let wanted = header.pages;
        let what = format!("{pages} pages up to its end mark; accepted: {wanted}, and no more");
        return Err(RestoreError::Damaged(what));
    }
    Ok(state)
}

/// Puts a record of pages where they belong; answers how many.
fn fill(memory: &GuestMemory, payload: &[u8], next: &mut u64) -> Result<u64, RestoreError> {
    let mut fields = Decoder::new(payload);
    let count = fields.u32("runs")? as usize;
    let table = fields.raw("runs", count.saturating_mul(wire::RUN_BYTES))?;
    let mut data = fields.raw("page data", fields.left())?;
    let mut pages = 0;
    for run in wire::decode_runs(table, count, data.len())? {
        if run.zero || run.start < *next {
            let what = StateError::value("run", format!("{run:?}"), "pages in order, not zero");
            return Err(what.into());
        }
        let (bytes, rest) = data.split_at(run.bytes() as usize);
        data = rest;
        let Ok(()) = memory.write_slice(bytes, GuestAddress(run.start)) else {
            return Err(RestoreError::Damaged(format!("{run:?} is outside of memory")));
        };
        *next = run.start + run.bytes();
        pages += u64::from(run.pages);
    }
    Ok(pages)
}

fn read_at(target: &dyn Target, buffer: &mut [u8], offset: u64) -> Result<(), RestoreError> {
    target.read_at(buffer, offset).map_err(RestoreError::Read)
}

struct Reader<'a> {
    target: &'a dyn Target,
    id: [u8; 16],
    may_go_on: &'a dyn Fn() -> Result<(), RestoreError>,
    buffer: Vec<u8>,
    /// Of the buffer.
    taken: usize,
    /// What is read next, and where the records end.
    at: u64,
    end: u64,
    records: u64,
}

impl Reader<'_> {
    fn is_at_end(&self) -> bool {
        self.taken == self.buffer.len() && self.at == self.end
    }

    fn damaged(&self, what: &str) -> RestoreError {
        RestoreError::Damaged(format!("record {} {what}", self.records))
    }

    fn expect(&mut self, wanted: Kind, payload: &mut Vec<u8>) -> Result<(), RestoreError> {
        match self.next(payload)? {
            kind if kind == wanted => Ok(()),
            kind => Err(self.damaged(&format!("is {kind:?}; accepted: {wanted:?}"))),
        }
    }

    fn next(&mut self, payload: &mut Vec<u8>) -> Result<Kind, RestoreError> {
        self.records += 1;
        self.take(RECORD_HEADER_BYTES, payload)?;
        let mut header = [0; RECORD_HEADER_BYTES];
        header.copy_from_slice(payload);
        let mut fields = Decoder::new(&header);
        let (number, length) = (fields.u32("record kind")?, fields.u32("record length")? as usize);
        let kind = Kind::from_number(number).filter(|kind| length <= kind.length_max());
        let kind = kind.ok_or_else(|| self.damaged(&format!("is {length} bytes of {number}")))?;
        self.take(length + CRC_BYTES, payload)?;
        let crc = payload.split_off(length);
        let expected = record_crc(&self.id, self.records - 1, &header, payload);
        if crc != expected.to_le_bytes() {
            return Err(self.damaged("has the wrong checksum"));
        }
        Ok(kind)
    }

    /// The next bytes in place of what `out` holds.
    fn take(&mut self, mut length: usize, out: &mut Vec<u8>) -> Result<(), RestoreError> {
        let ahead = (self.buffer.len() - self.taken) as u64 + (self.end - self.at);
        if (length as u64) > ahead {
            return Err(self.damaged("is cut short"));
        }
        out.clear();
        while length > 0 {
            if self.taken == self.buffer.len() {
                self.refill()?;
            }
            let now = length.min(self.buffer.len() - self.taken);
            out.extend_from_slice(&self.buffer[self.taken..self.taken + now]);
            self.taken += now;
            length -= now;
        }
        Ok(())
    }

    fn refill(&mut self) -> Result<(), RestoreError> {
        (self.may_go_on)()?;
        let chunk = (CHUNK_BYTES - self.at as usize % CHUNK_BYTES) as u64;
        self.buffer.resize(chunk.min(self.end - self.at) as usize, 0);
        read_at(self.target, &mut self.buffer, self.at)?;
        self.at += self.buffer.len() as u64;
        self.taken = 0;
        Ok(())
    }
}
