//! A small reader of QEMU's qcow2, to read an image once, from its beginning to its end.
//!
//! Our own, and not the `imago` crate (0.2.6): that has no zstd, and is built to serve a guest
//! (asynchronous, caches, allocation, chains of backing files), of which an import needs
//! nothing. What an import does need is here in a page: everything that is not plainly
//! understood is refused by its field's name, and nothing in the file makes us read, inflate or
//! keep more than is bounded beforehand.
//!
//! The format: a header; a table (L1) of the offsets of tables (L2) of the offsets of clusters.
//! `docs/interop/qcow2.rst` in QEMU's tree specifies it.

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) use tests::sample;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use crate::pool::{SECTOR_BYTES, VOLUME_BYTES_MAX};
use crate::{PoolError, Result};

const MAGIC: u32 = 0x5146_49fb;
/// The whole header of version 3 that is read here.
const HEADER_BYTES: usize = 112;
const HEADER_V2_BYTES: u64 = 72;
/// QEMU's own bound on the L1 table.
const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
/// Bits 9 to 55 of an entry: an offset in the file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Set where a cluster is not shared with a snapshot; says nothing to a reader.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros, wherever it points (version 3).
const ZERO: u64 = 1;
/// How large a window a zstd frame may ask for, as a power of two: clusters have at most 2 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;

/// What the reader reads from; a file, or a test's bytes.
pub(super) trait Input {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Input for &File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(*self, buffer, offset)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Zlib,
    Zstd,
}

/// An opened file, its header checked.
#[derive(Debug)]
pub(super) struct Qcow2<I> {
    input: I,
    file_bytes: u64,
    version: u32,
    cluster_bits: u32,
    bytes: u64,
    compression: Compression,
    l1: Vec<u64>,
}

impl<I: Input> Qcow2<I> {
    /// Reads header and L1 table.
    pub(super) fn open(input: I, file_bytes: u64) -> Result<Self> {
        let header = Header::read(&input, file_bytes)?;
        header.check()?;
        let cluster_bits = header.cluster_bits;
        // What one L2 table maps: a cluster of 8-byte entries.
        let entries = header.size.div_ceil(1 << (2 * cluster_bits - 3));
        if entries > L1_ENTRIES_MAX {
            let accepted = format!(
                "at most {} with clusters of 2^{cluster_bits}",
                L1_ENTRIES_MAX << (2 * cluster_bits - 3)
            );
            return Err(refuse("header.size", header.size, accepted));
        }
        if u64::from(header.l1_size) < entries {
            return Err(refuse("header.l1_size", header.l1_size, format!("at least {entries}")));
        }
        let l1_offset = header.l1_table_offset;
        if !l1_offset.is_multiple_of(1 << cluster_bits) || l1_offset == 0 {
            let accepted = format!("a multiple of {}", 1_u64 << cluster_bits);
            return Err(refuse("header.l1_table_offset", l1_offset, accepted));
        }
        let mut disk = Self {
            input,
            file_bytes,
            version: header.version,
            cluster_bits,
            bytes: header.size,
            compression: header.compression,
            l1: Vec::new(),
        };
        let mut table = vec![0; (entries * 8) as usize];
        disk.read("L1 table", l1_offset, &mut table)?;
        disk.l1 = entries_of(&table);
        Ok(disk)
    }

    /// The disk's size, rounded up to whole sectors.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.next_multiple_of(SECTOR_BYTES)
    }

    /// Hands out all data in order; the rest of the disk is zeros.
    ///
    /// # Errors
    /// The visitor's, or what is wrong with the file, or more than `data_bytes_max` of data.
    pub(super) fn read_data(
        &self,
        data_bytes_max: u64,
        mut visit: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let cluster_bytes = 1_u64 << self.cluster_bits;
        let table_bytes = cluster_bytes / 8 * cluster_bytes;
        let mut table = vec![0; cluster_bytes as usize];
        let mut unpacker = Unpacker::new(self.compression, cluster_bytes)?;
        let mut budget = Budget { plain: self.file_bytes, all: data_bytes_max, data_bytes_max };
        for (index, entry) in self.l1.iter().enumerate() {
            let offset = self.table_offset("L1 entry", *entry)?;
            if offset == 0 {
                continue;
            }
            self.read("L2 table", offset, &mut table)?;
            let start = index as u64 * table_bytes;
            for (index, entry) in entries_of(&table).into_iter().enumerate() {
                let guest = start + index as u64 * cluster_bytes;
                if guest >= self.bytes {
                    break;
                }
                let length = cluster_bytes.min(self.bytes - guest) as usize;
                if let Some(data) = self.cluster(entry, length, &mut unpacker, &mut budget)? {
                    visit(guest, data)?;
                }
            }
        }
        Ok(())
    }

    /// The content of one cluster; `None` for zeros.
    fn cluster<'a>(
        &self,
        entry: u64,
        length: usize,
        unpacker: &'a mut Unpacker,
        budget: &mut Budget,
    ) -> Result<Option<&'a [u8]>> {
        if entry & COMPRESSED != 0 {
            budget.take(length as u64, false)?;
            self.read_compressed(entry, unpacker)?;
            return Ok(Some(&unpacker.cluster[..length]));
        }
        if self.version >= 3 && entry & ZERO != 0 {
            return Ok(None);
        }
        let offset = self.table_offset("L2 entry", entry)?;
        if offset == 0 {
            return Ok(None);
        }
        budget.take(length as u64, true)?;
        let cluster = &mut unpacker.cluster[..length];
        self.read("cluster", offset, cluster)?;
        Ok(Some(cluster))
    }

    fn read_compressed(&self, entry: u64, unpacker: &mut Unpacker) -> Result<()> {
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & !(COMPRESSED | COPIED)) >> offset_bits;
        // The count is of further sectors; the last one may end behind the file's end.
        let end = (offset - offset % SECTOR_BYTES) + (sectors + 1) * SECTOR_BYTES;
        let end = end.min(self.file_bytes);
        if offset >= end {
            return Err(self.truncated("compressed cluster", offset + 1));
        }
        // At most twice a cluster, by the width of the field.
        let mut packed = std::mem::take(&mut unpacker.packed);
        packed.resize((end - offset) as usize, 0);
        self.read("compressed cluster", offset, &mut packed)?;
        let unpacked = unpacker.unpack(&packed);
        unpacker.packed = packed;
        unpacked.map_err(|reason| {
            refuse("compressed cluster", format!("at {offset}: {reason}"), "a whole cluster")
        })
    }

    /// The offset in an entry that points to a table or a cluster.
    fn table_offset(&self, field: &'static str, entry: u64) -> Result<u64> {
        let offset = entry & OFFSET_MASK;
        let rest = entry & !(OFFSET_MASK | COPIED);
        if rest != 0 || !offset.is_multiple_of(1 << self.cluster_bits) {
            let accepted = format!("a multiple of {}, no other bits", 1_u64 << self.cluster_bits);
            return Err(refuse(field, format!("{entry:#x}"), accepted));
        }
        Ok(offset)
    }

    fn read(&self, what: &'static str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.file_bytes {
            return Err(self.truncated(what, end));
        }
        read_at(&self.input, offset, buffer)
    }

    fn truncated(&self, what: &'static str, want: u64) -> PoolError {
        PoolError::Truncated { what, have: self.file_bytes, want }
    }
}

/// How much data may still come.
struct Budget {
    /// Plain clusters: no two guest clusters share one, so there is no more of them than file.
    plain: u64,
    all: u64,
    data_bytes_max: u64,
}

impl Budget {
    fn take(&mut self, bytes: u64, is_plain: bool) -> Result<()> {
        if is_plain {
            self.plain = self.plain.checked_sub(bytes).ok_or_else(|| {
                refuse("L2 tables", "more clusters than the file has", "each cluster used once")
            })?;
        }
        self.all = self.all.checked_sub(bytes).ok_or_else(|| {
            let max = self.data_bytes_max;
            refuse("image data", format!("more than {max} bytes"), "less data than that")
        })?;
        Ok(())
    }
}

/// Room for one cluster, and the decoders.
struct Unpacker {
    cluster: Vec<u8>,
    packed: Vec<u8>,
    decoder: Unpack,
}

enum Unpack {
    Zlib(Box<DecompressorOxide>),
    Zstd(Box<Decoder<'static>>),
}

impl Unpacker {
    fn new(compression: Compression, cluster_bytes: u64) -> Result<Self> {
        let decoder = match compression {
            Compression::Zlib => Unpack::Zlib(Box::default()),
            Compression::Zstd => {
                let made = Decoder::new().and_then(|mut decoder| {
                    decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
                    Ok(decoder)
                });
                let refused = |error: io::Error| refuse("zstd", error, "a decoder");
                Unpack::Zstd(Box::new(made.map_err(refused)?))
            }
        };
        Ok(Self { cluster: vec![0; cluster_bytes as usize], packed: Vec::new(), decoder })
    }

    /// Fills `cluster` from the packed bytes, behind which may lie some that are not ours.
    fn unpack(&mut self, packed: &[u8]) -> std::result::Result<(), String> {
        let filled = match &mut self.decoder {
            Unpack::Zlib(inflate) => {
                inflate.init();
                // Raw deflate: no zlib header, whatever the format's documents call it.
                let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
                let (status, _, filled) = decompress(inflate, packed, &mut self.cluster, 0, flags);
                if !matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput) {
                    return Err(format!("deflate: {status:?}"));
                }
                filled
            }
            Unpack::Zstd(decoder) => unpack_zstd(decoder, packed, &mut self.cluster)
                .map_err(|error| format!("zstd: {error}"))?,
        };
        match filled == self.cluster.len() {
            true => Ok(()),
            false => Err(format!("it holds {filled} bytes of {}", self.cluster.len())),
        }
    }
}

fn unpack_zstd(decoder: &mut Decoder<'_>, packed: &[u8], target: &mut [u8]) -> io::Result<usize> {
    decoder.reinit()?;
    let capacity = target.len();
    let mut input = InBuffer::around(packed);
    let mut output = OutBuffer::around(target);
    loop {
        let before = (input.pos(), output.pos());
        decoder.run(&mut input, &mut output)?;
        // The cluster is full, or nothing more comes; there may be several frames.
        if output.pos() == capacity || (input.pos(), output.pos()) == before {
            return Ok(output.pos());
        }
    }
}

/// What the header says.
struct Header {
    version: u32,
    backing_file_offset: u64,
    cluster_bits: u32,
    size: u64,
    crypt_method: u32,
    l1_size: u32,
    l1_table_offset: u64,
    incompatible_features: u64,
    compression_type: u8,
    compression: Compression,
}

impl Header {
    fn read(input: &impl Input, file_bytes: u64) -> Result<Self> {
        if file_bytes < HEADER_V2_BYTES {
            let (have, want) = (file_bytes, HEADER_V2_BYTES);
            return Err(PoolError::Truncated { what: "qcow2 header", have, want });
        }
        // What the file does not have reads as zeros: the defaults of the newer fields.
        let mut bytes = [0; HEADER_BYTES];
        let there = file_bytes.min(HEADER_BYTES as u64) as usize;
        read_at(input, 0, &mut bytes[..there])?;
        let magic = u32_at(&bytes, 0);
        if magic != MAGIC {
            return Err(refuse("header.magic", format!("{magic:#010x}"), "0x514649fb (a qcow2)"));
        }
        let version = u32_at(&bytes, 4);
        let header_length = if version == 3 { u32_at(&bytes, 100) } else { 0 };
        let compression_type = if header_length > 104 { bytes[104] } else { 0 };
        let is_zstd = compression_type == 1;
        Ok(Self {
            version,
            backing_file_offset: u64_at(&bytes, 8),
            cluster_bits: u32_at(&bytes, 20),
            size: u64_at(&bytes, 24),
            crypt_method: u32_at(&bytes, 32),
            l1_size: u32_at(&bytes, 36),
            l1_table_offset: u64_at(&bytes, 40),
            incompatible_features: if version == 3 { u64_at(&bytes, 72) } else { 0 },
            compression_type,
            compression: if is_zstd { Compression::Zstd } else { Compression::Zlib },
        })
    }

    fn check(&self) -> Result<()> {
        if !(2..=3).contains(&self.version) {
            return Err(refuse("header.version", self.version, "2 or 3"));
        }
        if self.backing_file_offset != 0 {
            let value = self.backing_file_offset;
            return Err(refuse("header.backing_file_offset", value, "0: no backing file"));
        }
        if self.crypt_method != 0 {
            return Err(refuse("header.crypt_method", self.crypt_method, "0: no encryption"));
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(refuse("header.cluster_bits", self.cluster_bits, "9 to 21"));
        }
        if self.size == 0 || self.size > VOLUME_BYTES_MAX {
            return Err(refuse("header.size", self.size, format!("1 to {VOLUME_BYTES_MAX}")));
        }
        self.check_features()?;
        if self.compression_type > 1 {
            let value = self.compression_type;
            return Err(refuse("header.compression_type", value, "0 (zlib) or 1 (zstd)"));
        }
        let said = self.incompatible_features & (1 << 3) != 0;
        if said != (self.compression_type != 0) {
            let value = format!("{:#x}", self.incompatible_features);
            let accepted = "bit 3 set exactly when header.compression_type is not 0";
            return Err(refuse("header.incompatible_features", value, accepted));
        }
        Ok(())
    }

    fn check_features(&self) -> Result<()> {
        let accepted = match self.incompatible_features & !(1 << 3) {
            0 => return Ok(()),
            bits if bits & 1 != 0 => "bit 0 clear: not closed properly, see qemu-img check -r",
            bits if bits & 2 != 0 => "bit 1 clear: it is marked as corrupt",
            bits if bits & 4 != 0 => "bit 2 clear: no external data file",
            bits if bits & 16 != 0 => "bit 4 clear: no extended L2 entries",
            _ => "no bit but 3: unknown features",
        };
        let value = format!("{:#x}", self.incompatible_features);
        Err(refuse("header.incompatible_features", value, accepted))
    }
}

fn refuse(field: &'static str, value: impl ToString, accepted: impl Into<String>) -> PoolError {
    PoolError::Invalid {
        field,
        value: value.to_string(),
        accepted: format!("{} (qcow2)", accepted.into()),
    }
}

fn read_at(input: &impl Input, offset: u64, buffer: &mut [u8]) -> Result<()> {
    let failed = PoolError::io("read", std::path::Path::new("the qcow2 file"));
    input.read_exact_at(buffer, offset).map_err(failed)
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    (u64::from(u32_at(bytes, at)) << 32) | u64::from(u32_at(bytes, at + 4))
}

/// A table's big-endian entries.
fn entries_of(table: &[u8]) -> Vec<u64> {
    let entry = |bytes: &[u8]| bytes.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte));
    table.chunks_exact(8).map(entry).collect()
}
