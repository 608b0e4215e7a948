//! Loads an ELF kernel from a stream: each segment goes from the stream to its place in guest
//! memory, and nothing of the file is kept.

use std::io::{self, Read};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{KERNEL_IMAGE_BYTES_MAX, KERNEL_START_MIN};
use crate::memory::GuestMemory;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// A kernel has five or so.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// Program headers lie near the file's beginning.
const PROGRAM_HEADERS_OFFSET_MAX: u64 = 64 << 10;
/// Notes of a kernel have a few hundred bytes.
const NOTES_BYTES_MAX: u64 = 64 << 10;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY, from Xen's public `elfnote.h`: where PVH enters.
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";

#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    #[error("{0}")]
    Read(#[source] io::Error),
    #[error("it is no ELF file of 64 bits for x86-64")]
    NoElf,
    #[error("its ELF headers are damaged: {0}")]
    Header(&'static str),
    #[error(
        "a segment of the kernel lies at {start:#x} to {end:#x}, memory for it at \
         {KERNEL_START_MIN:#x} to {ram_end:#x}"
    )]
    OutsideMemory { start: u64, end: u64, ram_end: u64 },
    #[error("it has no PVH entry (CONFIG_PVH)")]
    NoPvhEntry,
}

#[derive(Debug)]
pub(super) struct LoadedElf {
    pub(super) entry: GuestAddress,
    /// First guest-physical address behind the kernel.
    pub(super) end: u64,
}

#[derive(Debug, Clone, Copy)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// Loads the kernel that `source` yields into zeroed memory.
pub(super) fn load(source: &mut impl Read, memory: &GuestMemory) -> Result<LoadedElf, ElfError> {
    let mut stream = Stream { source, position: 0 };
    let headers = read_headers(&mut stream)?;
    let ram_end = memory.iter().next().map_or(0, |low| low.len());

    let mut segments: Vec<_> = headers.iter().filter(|h| h.kind == PT_LOAD).copied().collect();
    segments.sort_by_key(|segment| segment.offset);
    let mut end = 0;
    for segment in &segments {
        if segment.file_bytes > segment.memory_bytes {
            return Err(ElfError::Header("a segment is larger in the file than in memory"));
        }
        let segment_end = segment.address.saturating_add(segment.memory_bytes);
        if segment.address < KERNEL_START_MIN || segment_end > ram_end {
            let start = segment.address;
            return Err(ElfError::OutsideMemory { start, end: segment_end, ram_end });
        }
        end = end.max(segment_end);
        if segment.file_bytes > 0 {
            stream.skip_to(segment.offset)?;
            stream.read_into(memory, segment.address, segment.file_bytes)?;
        }
    }
    let entry = headers
        .iter()
        .filter(|header| header.kind == PT_NOTE)
        .find_map(|notes| pvh_entry(memory, &segments, notes))
        .filter(|entry| (KERNEL_START_MIN..end).contains(entry))
        .ok_or(ElfError::NoPvhEntry)?;
    Ok(LoadedElf { entry: GuestAddress(entry), end })
}

fn read_headers(stream: &mut Stream<'_, impl Read>) -> Result<Vec<ProgramHeader>, ElfError> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    // Class 2: 64 bits; data 1: little endian.
    if header[..6] != *b"\x7fELF\x02\x01" || half(18) != MACHINE_X86_64 {
        return Err(ElfError::NoElf);
    }
    let offset = long(&header, 32);
    if usize::from(half(54)) != PROGRAM_HEADER_BYTES {
        return Err(ElfError::Header("the size of a program header"));
    }
    let count = half(56);
    if count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(ElfError::Header("the number of program headers"));
    }
    if !(HEADER_BYTES as u64..=PROGRAM_HEADERS_OFFSET_MAX).contains(&offset) {
        return Err(ElfError::Header("the place of the program headers"));
    }
    stream.skip_to(offset)?;
    let mut headers = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let mut bytes = [0; PROGRAM_HEADER_BYTES];
        stream.read_exact(&mut bytes)?;
        headers.push(ProgramHeader {
            kind: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            offset: long(&bytes, 8),
            address: long(&bytes, 24),
            file_bytes: long(&bytes, 32),
            memory_bytes: long(&bytes, 40),
        });
    }
    Ok(headers)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let mut long = [0; 8];
    long.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(long)
}

/// The PVH entry in these notes. They are part of a segment, which has been loaded.
fn pvh_entry(
    memory: &GuestMemory,
    segments: &[ProgramHeader],
    notes: &ProgramHeader,
) -> Option<u64> {
    let segment = segments.iter().find(|segment| {
        let offset = notes.offset.checked_sub(segment.offset);
        offset
            .and_then(|o| o.checked_add(notes.file_bytes))
            .is_some_and(|e| e <= segment.file_bytes)
    })?;
    if notes.file_bytes > NOTES_BYTES_MAX {
        return None;
    }
    let address = segment.address + (notes.offset - segment.offset);
    let mut bytes = vec![0; notes.file_bytes as usize];
    memory.read_slice(&mut bytes, GuestAddress(address)).ok()?;
    find_entry(&bytes)
}

/// Walks ELF notes: name length, description length, type, then both, each padded to 4 bytes.
fn find_entry(mut notes: &[u8]) -> Option<u64> {
    loop {
        let (header, rest) = notes.split_first_chunk::<12>()?;
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let name_bytes = word(0) as usize;
        let (name, rest) = rest.split_at_checked(name_bytes.next_multiple_of(4))?;
        let description_bytes = word(4) as usize;
        let (description, rest) =
            rest.split_at_checked(description_bytes.next_multiple_of(4).min(rest.len()))?;
        if word(8) == NOTE_PHYS32_ENTRY && name.get(..name_bytes) == Some(NOTE_NAME) {
            return match description.get(..description_bytes)? {
                &[a, b, c, d] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
                // Entered in 32-bit mode: what does not fit cannot be meant.
                bytes if bytes.len() == 8 => Some(long(bytes, 0)).filter(|e| *e <= u32::MAX.into()),
                _ => None,
            };
        }
        notes = rest;
    }
}

/// The source, and how far it was read.
struct Stream<'a, R> {
    source: &'a mut R,
    position: u64,
}

impl<R: Read> Stream<'_, R> {
    fn read_exact(&mut self, target: &mut [u8]) -> Result<(), ElfError> {
        self.source.read_exact(target).map_err(ElfError::Read)?;
        self.position += target.len() as u64;
        Ok(())
    }

    fn skip_to(&mut self, offset: u64) -> Result<(), ElfError> {
        let bytes = offset
            .checked_sub(self.position)
            .ok_or(ElfError::Header("segments overlap in the file"))?;
        if offset > KERNEL_IMAGE_BYTES_MAX {
            return Err(ElfError::Header("a segment lies too far back in the file"));
        }
        let skipped = io::copy(&mut self.source.by_ref().take(bytes), &mut io::sink())
            .map_err(ElfError::Read)?;
        if skipped < bytes {
            return Err(ElfError::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        self.position = offset;
        Ok(())
    }

    /// Reads straight into guest memory. The range was checked against RAM.
    fn read_into(&mut self, memory: &GuestMemory, to: u64, bytes: u64) -> Result<(), ElfError> {
        let bytes = usize::try_from(bytes).map_err(|_| ElfError::Header("a segment's size"))?;
        let slice = memory
            .get_slice(GuestAddress(to), bytes)
            .map_err(|error| ElfError::Read(io::Error::other(error)))?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: the slice is a live, bounds-checked part of the mapping, and nothing else
        // touches it: no vCPU exists before the kernel is loaded.
        let target = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), bytes) };
        self.read_exact(target)
    }
}
