//! Puts a stock kernel into guest memory and says where it begins.
//!
//! A distribution's kernel is a bzImage: a real-mode stub, a decompressor, and in it the
//! compressed ELF `vmlinux`. We leave out the first two: [`image`] finds and decompresses the
//! payload as a stream, [`elf`] copies its segments from that stream straight to where they run,
//! and [`pvh`] writes the structures that the kernel's PVH entry expects in EBX. The guest starts
//! in 32-bit protected mode without paging and without a decompressor of its own.
//!
//! Everything here reads files that an operator named: each error names the field (`kernel` or
//! `initramfs`), the file, what is wrong, and what would be accepted. All sizes are bounded.

mod elf;
mod image;
pub mod pvh;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::config::{DomainConfig, FieldError};
use crate::memory::{GuestMemory, LOW_RAM_END, PAGE_BYTES};

/// Largest kernel file, bytes; Debian's cloud kernels have 12 MiB.
pub const KERNEL_FILE_BYTES_MAX: u64 = 128 << 20;
/// Largest decompressed kernel, bytes; Debian's cloud kernels have 60 MiB.
pub const KERNEL_IMAGE_BYTES_MAX: u64 = 512 << 20;
/// Kernel segments lie at or above this guest-physical address; below are our structures.
pub(crate) const KERNEL_START_MIN: u64 = 1 << 20;

/// What a kernel may be, for messages.
const KERNEL_ACCEPTED: &str =
    "a Linux bzImage compressed with ZSTD or LZ4, or an ELF vmlinux, for x86-64 with a PVH entry";
const INITRAMFS_ACCEPTED: &str = "a readable file that fits into memory next to the kernel";

/// A kernel in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Where the first vCPU begins, guest-physical, in 32-bit protected mode.
    pub entry: GuestAddress,
    /// The `hvm_start_info` structure, whose address goes into EBX.
    pub start_info: GuestAddress,
}

/// Loads the domain's kernel and initramfs into zeroed memory, and the boot structures with
/// `rsdp` as the address of the ACPI tables.
///
/// # Errors
/// When a file is missing, unreadable, not what it should be, or does not fit into memory.
pub fn load(
    memory: &GuestMemory,
    config: &DomainConfig,
    rsdp: GuestAddress,
) -> Result<LoadedKernel, FieldError> {
    let loaded = load_kernel(memory, &config.kernel)?;
    let initramfs = match &config.initramfs {
        Some(path) => Some(load_initramfs(memory, path, loaded.end)?),
        None => None,
    };
    let start_info = pvh::write(memory, &config.command_line, initramfs, rsdp)
        .map_err(|error| FieldError::new("memory_bytes", error, "room for the boot structures"))?;
    Ok(LoadedKernel { entry: loaded.entry, start_info })
}

fn load_kernel(memory: &GuestMemory, path: &Path) -> Result<elf::LoadedElf, FieldError> {
    let wrong = |reason: String| {
        FieldError::new("kernel", format!("{}: {reason}", path.display()), KERNEL_ACCEPTED)
    };
    let (mut file, length) = open(path, KERNEL_FILE_BYTES_MAX).map_err(wrong)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 != length {
        return Err(wrong("changed while it was read".into()));
    }
    let mut vmlinux = image::vmlinux(&bytes).map_err(|error| wrong(error.to_string()))?;
    let loaded = elf::load(&mut vmlinux, memory).and_then(|loaded| {
        // What follows is not needed, but a checksum at its end covers all.
        std::io::copy(&mut vmlinux, &mut std::io::sink()).map_err(elf::ElfError::Read)?;
        Ok(loaded)
    });
    loaded.map_err(|error| match error {
        elf::ElfError::OutsideMemory { .. } => FieldError::new(
            "memory_bytes",
            format!("{}: {error}", path.display()),
            "enough memory for the kernel",
        ),
        other => wrong(vmlinux.explain(&other)),
    })
}

/// Loads the initramfs as high below 3 GiB as it goes. Answers where, and its length in bytes.
fn load_initramfs(
    memory: &GuestMemory,
    path: &Path,
    kernel_end: u64,
) -> Result<(GuestAddress, u64), FieldError> {
    let wrong = |reason: String| {
        FieldError::new("initramfs", format!("{}: {reason}", path.display()), INITRAMFS_ACCEPTED)
    };
    let (mut file, length) = open(path, LOW_RAM_END).map_err(wrong)?;
    let ram_end = memory.iter().map(vm_memory::GuestMemoryRegion::len).next().unwrap_or(0);
    let start = ram_end.checked_sub(length).map(|start| start & !(PAGE_BYTES - 1));
    let Some(start) = start.filter(|start| *start >= kernel_end) else {
        let room = ram_end.saturating_sub(kernel_end);
        return Err(wrong(format!("has {length} bytes, {room} are free above the kernel")));
    };
    let bytes = usize::try_from(length).map_err(|error| wrong(error.to_string()))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, bytes)
        .map_err(|error| wrong(format!("cannot be read: {error}")))?;
    Ok((GuestAddress(start), length))
}

/// Opens a regular, non-empty file of at most so many bytes.
fn open(path: &Path, bytes_max: u64) -> Result<(File, u64), String> {
    // Non-blocking: opening a FIFO must not wait for its writer.
    let file =
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|error| {
            match error.kind() {
                std::io::ErrorKind::NotFound => "does not exist".to_owned(),
                _ => format!("cannot be opened: {error}"),
            }
        })?;
    let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
    if !metadata.is_file() {
        return Err("is no regular file".into());
    }
    match metadata.len() {
        0 => Err("is empty".into()),
        length if length > bytes_max => Err(format!("has {length} bytes, more than {bytes_max}")),
        length => Ok((file, length)),
    }
}
