//! Puts a stock kernel into guest memory and says where it begins.
//!
//! A distribution's kernel is a bzImage: a real-mode stub, a decompressor, and in it the
//! compressed ELF `vmlinux`. We leave out the first two: [`image`] finds and decompresses the
//! payload as a stream, [`elf`] copies its segments from that stream straight to where they run,
//! and [`pvh`] writes the structures that the kernel's PVH entry expects in EBX. The guest starts
//! in 32-bit protected mode without paging and without a decompressor of its own.
//!
//! The kernel comes from files that an operator named, or from a disk of the domain
//! ([`crate::bootdisk`]), which is read anew each time. Each error names the field (`kernel`,
//! `initramfs` or `boot_disk`), the file, what is wrong, and what would be accepted. All sizes
//! are bounded.

mod elf;
mod image;
pub mod pvh;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::bootdisk::{self, Boot, BootDiskError, DiskFile, Limits};
use crate::config::{BootDiskConfig, DomainConfig, FieldError};
use crate::memory::{GuestMemory, LOW_RAM_END, PAGE_BYTES};

/// Largest kernel file, bytes; Debian's cloud kernels have 12 MiB.
pub const KERNEL_FILE_BYTES_MAX: u64 = 128 << 20;
/// Largest decompressed kernel, bytes; Debian's cloud kernels have 60 MiB.
pub const KERNEL_IMAGE_BYTES_MAX: u64 = 512 << 20;
/// Kernel segments lie at or above this guest-physical address; below are our structures.
pub(crate) const KERNEL_START_MIN: u64 = 1 << 20;

/// Largest initrd inside of a disk, bytes, and never more than the domain has memory: its bytes are
/// the VMM's own while they are read. Debian's have 10 to 60 MiB.
pub const DISK_INITRD_BYTES_MAX: u64 = 512 << 20;
/// Longest time to read kernel and initrd from a disk: shorter than a reset may take.
const DISK_TIMEOUT: Duration = Duration::from_secs(45);
/// Stack of the thread that does it.
const DISK_STACK_BYTES: usize = 1 << 20;

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
    let source = source(config)?;
    let (loaded, initramfs, command_line) = match source {
        Source::Files { kernel, initramfs } => {
            let loaded = load_kernel_file(memory, kernel)?;
            let initramfs =
                initramfs.map(|path| load_initramfs(memory, path, loaded.end)).transpose()?;
            (loaded, initramfs, config.command_line.clone())
        }
        Source::Disk(disk) => {
            let path = &disk.path;
            let boot = read_disk(disk, config)?;
            tracing::info!(disk = %path.display(), chosen = boot.description, "boots from disk");
            let wrong = |what: String| {
                let chosen = &boot.description;
                let value = format!("{}: its {what} ({chosen})", path.display());
                FieldError::new("boot_disk", value, KERNEL_ACCEPTED)
            };
            let wrong_kernel = |what: String| wrong(format!("kernel {what}"));
            let wrong_initrd = |what: String| wrong(format!("initrd {what}"));
            let loaded = load_kernel(memory, &boot.kernel, &wrong_kernel)?;
            let initramfs = boot.initrd.as_deref().filter(|bytes| !bytes.is_empty());
            let initramfs = initramfs.map(|bytes| {
                let length = bytes.len() as u64;
                let start = initramfs_start(memory, length, loaded.end).map_err(wrong_initrd)?;
                memory
                    .write_slice(bytes, start)
                    .map_err(|error| wrong_initrd(error.to_string()))?;
                Ok((start, length))
            });
            (loaded, initramfs.transpose()?, boot.command_line)
        }
    };
    let start_info = pvh::write(memory, &command_line, initramfs, rsdp)
        .map_err(|error| FieldError::new("memory_bytes", error, "room for the boot structures"))?;
    Ok(LoadedKernel { entry: loaded.entry, start_info })
}

/// Where the kernel comes from.
enum Source<'a> {
    Files { kernel: &'a Path, initramfs: Option<&'a Path> },
    Disk(&'a BootDiskConfig),
}

fn source(config: &DomainConfig) -> Result<Source<'_>, FieldError> {
    match (&config.kernel, &config.boot_disk) {
        (_, Some(disk)) => Ok(Source::Disk(disk)),
        (Some(kernel), None) => {
            Ok(Source::Files { kernel, initramfs: config.initramfs.as_deref() })
        }
        (None, None) => Err(FieldError::new("kernel", "", KERNEL_ACCEPTED)),
    }
}

/// Reads what a disk boots, as it is now: a kernel that was upgraded inside of the guest is the
/// one that the next boot finds.
///
/// It is done by a thread of its own, so that a disk that is damaged on purpose can at most end
/// this start of this domain, by an error.
fn read_disk(disk: &BootDiskConfig, config: &DomainConfig) -> Result<Boot, FieldError> {
    let path = &disk.path;
    let wrong = |what: String| {
        let value = format!("{}: {what}", path.display());
        FieldError::new("boot_disk", value, "a disk with a Linux system that boots")
    };
    let limits = Limits {
        kernel_bytes_max: KERNEL_FILE_BYTES_MAX.min(config.memory_bytes),
        initrd_bytes_max: DISK_INITRD_BYTES_MAX.min(config.memory_bytes),
    };
    let (send, receive) = sync_channel(1);
    let (disk, command_line): (PathBuf, _) = (path.clone(), config.command_line.clone());
    let own_root = config.own_root();
    let thread = std::thread::Builder::new().name("boot-disk".into()).stack_size(DISK_STACK_BYTES);
    thread
        .spawn(move || {
            let boot = DiskFile::open(&disk)
                .map_err(|error| BootDiskError::Read(error.to_string()))
                .and_then(|disk| {
                    bootdisk::find(Box::new(disk), limits, &command_line, own_root.as_deref())
                });
            // Whoever asked may have given up.
            let _ = send.send(boot);
        })
        .map_err(|error| wrong(format!("no thread to read it: {error}")))?;
    match receive.recv_timeout(DISK_TIMEOUT) {
        Ok(boot) => boot.map_err(|error| wrong(error.to_string())),
        Err(RecvTimeoutError::Timeout) => Err(wrong("reading it takes too long".into())),
        Err(RecvTimeoutError::Disconnected) => {
            Err(wrong("it is damaged in a way that cannot be read".into()))
        }
    }
}

fn load_kernel_file(memory: &GuestMemory, path: &Path) -> Result<elf::LoadedElf, FieldError> {
    let wrong = |reason: String| {
        FieldError::new("kernel", format!("{}: {reason}", path.display()), KERNEL_ACCEPTED)
    };
    let (mut file, length) = open(path, KERNEL_FILE_BYTES_MAX).map_err(wrong)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 != length {
        return Err(wrong("changed while it was read".into()));
    }
    load_kernel(memory, &bytes, &wrong)
}

/// Unpacks a kernel into memory; `wrong` makes the error of a reason.
fn load_kernel(
    memory: &GuestMemory,
    bytes: &[u8],
    wrong: &dyn Fn(String) -> FieldError,
) -> Result<elf::LoadedElf, FieldError> {
    let mut vmlinux = image::vmlinux(bytes).map_err(|error| wrong(error.to_string()))?;
    let loaded = elf::load(&mut vmlinux, memory).and_then(|loaded| {
        // What follows is not needed, but a checksum at its end covers all.
        std::io::copy(&mut vmlinux, &mut std::io::sink()).map_err(elf::ElfError::Read)?;
        Ok(loaded)
    });
    loaded.map_err(|error| match error {
        elf::ElfError::OutsideMemory { .. } => FieldError {
            field: "memory_bytes".into(),
            accepted: "enough memory for the kernel".into(),
            ..wrong(error.to_string())
        },
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
    let start = initramfs_start(memory, length, kernel_end).map_err(wrong)?;
    let bytes = usize::try_from(length).map_err(|error| wrong(error.to_string()))?;
    memory
        .read_exact_volatile_from(start, &mut file, bytes)
        .map_err(|error| wrong(format!("cannot be read: {error}")))?;
    Ok((start, length))
}

/// Where an initramfs of so many bytes goes; else the reason why it does not fit.
fn initramfs_start(
    memory: &GuestMemory,
    length: u64,
    kernel_end: u64,
) -> Result<GuestAddress, String> {
    let ram_end = memory.iter().map(vm_memory::GuestMemoryRegion::len).next().unwrap_or(0);
    let start = ram_end.checked_sub(length).map(|start| start & !(PAGE_BYTES - 1));
    start.filter(|start| *start >= kernel_end).map(GuestAddress).ok_or_else(|| {
        let room = ram_end.saturating_sub(kernel_end);
        format!("has {length} bytes, {room} are free above the kernel")
    })
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
