//! What a chain asks for: pure, and the only place that believes nothing of what a guest wrote.
//!
//! A chain is a header of 16 bytes and data to read, then data to write and one byte of status;
//! descriptors may cut these anywhere. A chain in which the status has no place breaks the rules.
//! Everything else that is wrong has an answer.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

use super::volume::SECTOR_BYTES;
use crate::memory::GuestMemory;
use crate::virtio::Segment;

/// Type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// One range of a discard: sector, sectors, flags.
const RANGE_BYTES: usize = 16;
/// Most data of one request. Stock drivers stay below 4 MiB; without a bound one request could
/// keep the disk busy for minutes, and a pause would wait for it.
pub(super) const REQUEST_BYTES_MAX: u64 = 64 << 20;
/// Ranges in one request to discard or to write zeros; the configuration says so.
pub(super) const RANGES_MAX: usize = 16;
/// Sectors in one range of a discard, 1 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Sectors in one range of zeros, 16 MiB: they may have to be written.
pub(super) const ZERO_SECTORS_MAX: u32 = 1 << 15;
/// The serial number's length.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The last byte of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        let value = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        value as u8
    }
}

/// What the device allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// The volume's length.
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// The driver took the feature.
    pub(super) discard: bool,
    /// The driver took the feature.
    pub(super) write_zeroes: bool,
}

/// Bytes of the volume; they lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// The room may be given back.
    pub(super) unmap: bool,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The volume's bytes from `offset` go into `data`.
    Read { offset: u64, data: Vec<Segment> },
    /// The other way.
    Write { offset: u64, data: Vec<Segment> },
    /// What was completed before is to be durable.
    Flush,
    /// What these hold does not matter any more.
    Discard(Vec<Span>),
    /// These are to be zero.
    WriteZeroes(Vec<Span>),
    /// The serial number goes into these.
    Id(Vec<Segment>),
}

/// A chain that can be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Where the status goes.
    pub(super) status: GuestAddress,
    /// Bytes that can be written before the status.
    pub(super) room_bytes: u64,
    /// What to do, or what to answer at once.
    pub(super) request: Result<Request, Status>,
}

/// Reads a chain, each byte of it once.
///
/// # Errors
/// When it has no place for an answer, or mixes what is to be read with what is to be written.
pub(super) fn parse(
    memory: &GuestMemory,
    segments: &[Segment],
    rules: &Rules,
) -> Result<Parsed, &'static str> {
    let first = segments.iter().position(|segment| segment.writable).unwrap_or(segments.len());
    let (readable, writable) = segments.split_at(first);
    if writable.iter().any(|segment| !segment.writable) {
        return Err("has a buffer to read behind one to write");
    }
    let (mut output, mut room) = (readable.to_vec(), writable.to_vec());
    let mut header = [0; HEADER_BYTES];
    if !take_front(memory, &mut output, &mut header) {
        return Err("is shorter than a request's header");
    }
    let Some(status) = take_last_byte(&mut room) else {
        return Err("has no byte for the status");
    };
    let room_bytes = length(&room);
    let request = understand(memory, &header, output, room, rules);
    Ok(Parsed { status, room_bytes, request })
}

fn understand(
    memory: &GuestMemory,
    header: &[u8; HEADER_BYTES],
    output: Vec<Segment>,
    room: Vec<Segment>,
    rules: &Rules,
) -> Result<Request, Status> {
    let [kind, _] = words(&header[..8]);
    let sector = long(&header[8..]);
    match kind {
        VIRTIO_BLK_T_IN if output.is_empty() => {
            let offset = transfer(sector, length(&room), rules)?;
            Ok(Request::Read { offset, data: room })
        }
        VIRTIO_BLK_T_OUT if room.is_empty() && !rules.read_only => {
            let offset = transfer(sector, length(&output), rules)?;
            Ok(Request::Write { offset, data: output })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_DISCARD if rules.discard => {
            Ok(Request::Discard(spans(memory, output, rules, DISCARD_SECTORS_MAX, 0)?))
        }
        VIRTIO_BLK_T_WRITE_ZEROES if rules.write_zeroes => {
            let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            Ok(Request::WriteZeroes(spans(memory, output, rules, ZERO_SECTORS_MAX, flags)?))
        }
        VIRTIO_BLK_T_GET_ID if !room.is_empty() => Ok(Request::Id(room)),
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

/// Where in the volume this many bytes from `sector` on lie.
fn transfer(sector: u64, bytes: u64, rules: &Rules) -> Result<u64, Status> {
    if bytes > REQUEST_BYTES_MAX || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoError);
    }
    within(sector, bytes / SECTOR_BYTES, rules)
}

/// The offset of `sector`, when it and those behind it lie in the volume.
fn within(sector: u64, sectors: u64, rules: &Rules) -> Result<u64, Status> {
    match sector.checked_add(sectors) {
        Some(end) if end <= rules.sectors => Ok(sector * SECTOR_BYTES),
        _ => Err(Status::IoError),
    }
}

/// The ranges of a request to discard or to write zeros.
fn spans(
    memory: &GuestMemory,
    mut output: Vec<Segment>,
    rules: &Rules,
    sectors_max: u32,
    flags_known: u32,
) -> Result<Vec<Span>, Status> {
    let bytes = length(&output);
    let most = (RANGES_MAX * RANGE_BYTES) as u64;
    if bytes == 0 || bytes > most || !bytes.is_multiple_of(RANGE_BYTES as u64) || rules.read_only {
        return Err(Status::IoError);
    }
    let mut spans = Vec::new();
    let mut range = [0; RANGE_BYTES];
    while take_front(memory, &mut output, &mut range) {
        let sector = long(&range[..8]);
        let [sectors, flags] = words(&range[8..]);
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        let offset = within(sector, sectors.into(), rules)?;
        if sectors > sectors_max {
            return Err(Status::IoError);
        }
        if sectors > 0 {
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            spans.push(Span { offset, bytes, unmap: flags != 0 });
        }
    }
    Ok(spans)
}

fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Reads the first bytes and takes them away; false when there are too few.
fn take_front(memory: &GuestMemory, segments: &mut Vec<Segment>, bytes: &mut [u8]) -> bool {
    let mut left = bytes;
    while !left.is_empty() {
        let Some(first) = segments.first_mut() else { return false };
        let here = left.len().min(first.len as usize);
        let (now, later) = left.split_at_mut(here);
        if memory.read_slice(now, first.addr).is_err() {
            return false;
        }
        first.addr.0 += here as u64;
        first.len -= here as u32;
        if first.len == 0 {
            segments.remove(0);
        }
        left = later;
    }
    true
}

/// Takes the last byte away; where it lies.
fn take_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = segments.last_mut()?;
    last.len -= 1;
    let address = GuestAddress(last.addr.0 + u64::from(last.len));
    if last.len == 0 {
        segments.pop();
    }
    Some(address)
}

/// Two little-endian words.
fn words(bytes: &[u8]) -> [u32; 2] {
    let both = long(bytes);
    [both as u32, (both >> 32) as u32]
}

fn long(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}
