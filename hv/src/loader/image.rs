//! The kernel file: a bzImage with its compressed payload, or a bare ELF.
//!
//! bzImage, after Linux' `Documentation/arch/x86/boot.rst`: at 0x1f1 the number of 512-byte
//! sectors of the real-mode stub behind the first, at 0x1f4 the length of what follows it, at
//! 0x202 "HdrS", and from version 2.08 on at 0x248 and 0x24c where the payload lies behind the
//! stub, and its length. The payload ends with
//! four bytes, the decompressed length, for compressors whose format does not carry it
//! (`size_append` in Linux' `scripts/Makefile.lib`).

use std::io::{self, Read};

use super::KERNEL_IMAGE_BYTES_MAX;
use super::elf::ElfError;

const ELF_MAGIC: &[u8] = b"\x7fELF";
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;
/// The first version of the boot protocol whose header tells where the payload is.
const BZIMAGE_VERSION_MIN: u16 = 0x0208;
const SECTOR_BYTES: usize = 512;
/// Bytes of the header that are read here; a shorter file is no bzImage.
const HEADER_BYTES: usize = 0x250;

const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// Linux compresses with `zstd -22 --ultra`, whose window is 128 MiB (2^27).
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const LZ4_LEGACY_MAGIC: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// A block of the legacy LZ4 format decompresses to at most this.
const LZ4_BLOCK_BYTES: usize = 8 << 20;
/// Formats that are recognised to be named.
const OTHER_MAGICS: &[(&[u8], &str)] = &[
    (&[0x1f, 0x8b], "gzip"),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], "XZ"),
    (b"BZh", "bzip2"),
    (&[0x5d, 0, 0], "LZMA"),
    (&[0x89, b'L', b'Z', b'O'], "LZO"),
];

/// Why no kernel was found in a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageError {
    #[error("is no kernel: neither a bzImage nor an ELF file")]
    NoKernel,
    #[error("is a bzImage of boot protocol {major}.{minor:02}, older than 2.08", major = .0 >> 8, minor = .0 & 0xff)]
    TooOld(u16),
    #[error("is truncated: it ends at byte {length} of {end}")]
    Truncated { end: usize, length: usize },
    #[error("is a bzImage compressed with {0}")]
    Compression(String),
    #[error("would decompress to {bytes} bytes, more than {KERNEL_IMAGE_BYTES_MAX}")]
    TooLarge { bytes: u64 },
    #[error("is damaged: {0}")]
    Damaged(String),
}

/// The ELF of a kernel, as a stream.
pub(super) struct Vmlinux<'a> {
    stream: Stream<'a>,
    /// What the stream may still yield, bytes.
    left: u64,
    compression: &'static str,
}

enum Stream<'a> {
    Plain(&'a [u8]),
    Zstd(zstd::stream::read::Decoder<'static, &'a [u8]>),
    Lz4(Lz4Legacy<'a>),
}

/// Finds the ELF in a kernel file.
pub(super) fn vmlinux(file: &[u8]) -> Result<Vmlinux<'_>, ImageError> {
    if file.starts_with(ELF_MAGIC) {
        let left = file.len() as u64;
        return Ok(Vmlinux { stream: Stream::Plain(file), left, compression: "nothing" });
    }
    let payload = bzimage_payload(file)?;
    if payload.starts_with(ELF_MAGIC) {
        let left = payload.len() as u64;
        return Ok(Vmlinux { stream: Stream::Plain(payload), left, compression: "nothing" });
    }
    let other = OTHER_MAGICS.iter().find(|(magic, _)| payload.starts_with(magic));
    if let Some((_, name)) = other {
        return Err(ImageError::Compression((*name).into()));
    }
    let (compressed, size) = payload
        .split_last_chunk::<4>()
        .ok_or_else(|| ImageError::Damaged("its payload is empty".into()))?;
    let left = u64::from(u32::from_le_bytes(*size));
    if compressed.starts_with(ZSTD_MAGIC) {
        check_size(left)?;
        let damaged = |error| ImageError::Damaged(format!("ZSTD: {error}"));
        let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed).map_err(damaged)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(damaged)?;
        Ok(Vmlinux { stream: Stream::Zstd(decoder), left, compression: "ZSTD" })
    } else if let Some(blocks) = compressed.strip_prefix(LZ4_LEGACY_MAGIC) {
        check_size(left)?;
        let stream = Lz4Legacy { blocks, block: Vec::new(), position: 0 };
        Ok(Vmlinux { stream: Stream::Lz4(stream), left, compression: "LZ4" })
    } else {
        let begin = &payload[..payload.len().min(4)];
        Err(ImageError::Compression(format!("something that begins with {begin:02x?}")))
    }
}

fn check_size(bytes: u64) -> Result<(), ImageError> {
    if bytes > KERNEL_IMAGE_BYTES_MAX { Err(ImageError::TooLarge { bytes }) } else { Ok(()) }
}

fn bzimage_payload(file: &[u8]) -> Result<&[u8], ImageError> {
    if file.get(BZIMAGE_MAGIC_OFFSET..BZIMAGE_MAGIC_OFFSET + 4) != Some(BZIMAGE_MAGIC) {
        return Err(ImageError::NoKernel);
    }
    if file.len() < HEADER_BYTES {
        return Err(ImageError::Truncated { end: HEADER_BYTES, length: file.len() });
    }
    let word = |at: usize| u32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]);
    let version = word(0x206) as u16;
    if version < BZIMAGE_VERSION_MIN {
        return Err(ImageError::TooOld(version));
    }
    // Zero means four, for history's sake.
    let sectors = if file[0x1f1] == 0 { 4 } else { usize::from(file[0x1f1]) };
    let stub = (sectors + 1) * SECTOR_BYTES;
    let start = stub + word(0x248) as usize;
    let payload_end = start + word(0x24c) as usize;
    // Behind the payload comes the decompressor, up to the size given in 16-byte paragraphs.
    let end = payload_end.max(stub + word(0x1f4) as usize * 16);
    if end > file.len() {
        return Err(ImageError::Truncated { end, length: file.len() });
    }
    Ok(&file[start..payload_end])
}

impl Vmlinux<'_> {
    /// The error of a loader that read from this stream, as a text about the file.
    pub(super) fn explain(&self, error: &ElfError) -> String {
        match error {
            ElfError::Read(source) => {
                format!("is damaged: its {} payload: {source}", self.compression)
            }
            other => format!("is no kernel that can be booted: {other}"),
        }
    }
}

impl Read for Vmlinux<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        if target.is_empty() {
            return Ok(0);
        }
        let length = target.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if length == 0 {
            // The stream must end here, too; reading its end checks its checksum.
            return match self.stream.read(&mut [0])? {
                0 => Ok(0),
                _ => Err(io::Error::other("it yields more than the length that it gives")),
            };
        }
        let read = self.stream.read(&mut target[..length])?;
        self.left -= read as u64;
        Ok(read)
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(bytes) => bytes.read(target),
            Self::Zstd(decoder) => decoder.read(target),
            Self::Lz4(decoder) => decoder.read(target),
        }
    }
}

/// `lz4 -l`: after the magic, blocks, each with its compressed length in front.
struct Lz4Legacy<'a> {
    blocks: &'a [u8],
    /// The block that is being read, decompressed.
    block: Vec<u8>,
    position: usize,
}

impl Lz4Legacy<'_> {
    /// Decompresses the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let Some((length, rest)) = self.blocks.split_first_chunk::<4>() else {
            return Ok(false);
        };
        let length = u32::from_le_bytes(*length) as usize;
        let Some((compressed, rest)) = rest.split_at_checked(length) else {
            return Err(io::Error::other(format!(
                "a block of {length} bytes, {} are left",
                rest.len()
            )));
        };
        self.block.resize(LZ4_BLOCK_BYTES, 0);
        let length = lz4_flex::block::decompress_into(compressed, &mut self.block)
            .map_err(io::Error::other)?;
        self.block.truncate(length);
        self.position = 0;
        self.blocks = rest;
        Ok(true)
    }
}

impl Read for Lz4Legacy<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        while self.position == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let length = target.len().min(self.block.len() - self.position);
        target[..length].copy_from_slice(&self.block[self.position..self.position + length]);
        self.position += length;
        Ok(length)
    }
}
