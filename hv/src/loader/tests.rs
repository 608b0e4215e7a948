//! Kernels are built here byte by byte; stock ones boot in the lab.

use std::path::PathBuf;

use tempfile::NamedTempFile;

use super::*;
use crate::config::{BootDiskConfig, OnReboot};
use crate::memory;

const LOAD_ADDRESS: u64 = 0x100_0000;
const ENTRY: u32 = 0x100_0040;
const SEGMENT_OFFSET: usize = 0x1000;

/// A vmlinux with one segment, in which the notes lie.
fn vmlinux() -> Vec<u8> {
    let mut segment = vec![0xabu8; 0x3000];
    let mut note = Vec::new();
    for (kind, name, description) in [
        (1u32, &b"GNU\0"[..], &[1u8, 2, 3, 4, 5][..]),
        (18, b"Xen\0", &u64::from(ENTRY).to_le_bytes()),
    ] {
        note.extend((name.len() as u32).to_le_bytes());
        note.extend((description.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        note.extend(name);
        note.extend(description);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    segment[0x100..0x100 + note.len()].copy_from_slice(&note);

    let mut elf = vec![0u8; SEGMENT_OFFSET];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = 2;
    let mut header = |at: usize, kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        elf[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, file), (40, memory)] {
            elf[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    let (offset, length) = (SEGMENT_OFFSET as u64, segment.len() as u64);
    header(64, 1, offset, LOAD_ADDRESS, length, length + 0x1000);
    header(64 + 56, 4, offset + 0x100, 0, note.len() as u64, note.len() as u64);
    elf.extend(segment);
    elf
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 2 * 512 + 0x30];
    file[0x1f1] = 1;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&0x30u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    file.resize(file.len().next_multiple_of(16) + 64, 0);
    let paragraphs = (file.len() as u32 - 1024) / 16;
    file[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    file
}

fn with_size(mut compressed: Vec<u8>, size: usize) -> Vec<u8> {
    compressed.extend((size as u32).to_le_bytes());
    compressed
}

fn zstd(elf: &[u8]) -> Vec<u8> {
    // With a checksum, as the program has it that kernels are built with.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut encoder, elf).unwrap();
    with_size(encoder.finish().unwrap(), elf.len())
}

fn lz4(elf: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x02, 0x21, 0x4c, 0x18];
    for chunk in elf.chunks(5000) {
        let block = lz4_flex::block::compress(chunk);
        stream.extend((block.len() as u32).to_le_bytes());
        stream.extend(block);
    }
    with_size(stream, elf.len())
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn config(kernel: PathBuf, initramfs: Option<PathBuf>) -> DomainConfig {
    DomainConfig {
        uid: "u".into(),
        name: "domains/a".into(),
        epoch: 1,
        vcpus: 1,
        memory_bytes: 64 << 20,
        kernel: Some(kernel),
        initramfs,
        boot_disk: None,
        command_line: "console=ttyS0".into(),
        interfaces: Vec::new(),
        disks: Vec::new(),
        guest_agent: false,
        generation_id: None,
        restore: None,
        on_reboot: OnReboot::Restart,
    }
}

fn try_load(bytes: &[u8]) -> Result<(GuestMemory, LoadedKernel), FieldError> {
    let memory = memory::create(64 << 20).unwrap();
    let file = file(bytes);
    let config = config(file.path().to_owned(), None);
    load(&memory, &config, GuestAddress(0xe0000)).map(|loaded| (memory, loaded))
}

/// However it is packed, the kernel arrives at its address and the PVH entry is found.
#[test]
fn every_packing_loads_the_same_kernel() {
    let elf = vmlinux();
    for bytes in [elf.clone(), bzimage(&elf), bzimage(&zstd(&elf)), bzimage(&lz4(&elf))] {
        let (memory, loaded) = try_load(&bytes).unwrap();
        assert_eq!(loaded.entry, GuestAddress(ENTRY.into()));
        let mut segment = vec![0; 0x3001];
        memory.read_slice(&mut segment, GuestAddress(LOAD_ADDRESS)).unwrap();
        assert_eq!(segment[..0x3000], elf[SEGMENT_OFFSET..]);
        assert_eq!(segment[0x3000], 0);
    }
}

/// Each file that is no kernel gets a message that names the field and what is wrong.
#[test]
fn bad_kernels_are_explained() {
    let elf = vmlinux();
    let packed = bzimage(&zstd(&elf));
    let mut damaged = packed.clone();
    damaged[1024 + 0x30 + 20..1024 + 0x30 + 40].fill(0xff);
    let mut huge = zstd(&elf);
    let size_at = huge.len() - 4;
    huge[size_at..].fill(0xff);
    let mut no_note = elf.clone();
    no_note[SEGMENT_OFFSET + 0x100..SEGMENT_OFFSET + 0x140].fill(0);
    let mut arm = elf.clone();
    arm[18] = 183;
    let mut low = elf.clone();
    low[64 + 24..64 + 32].copy_from_slice(&0x1000u64.to_le_bytes());
    let cases: &[(&[u8], &str, &str)] = &[
        (b"#!/bin/sh\n", "kernel", "is no kernel: neither"),
        (b"", "kernel", "is empty"),
        (&[0; 4096], "kernel", "is no kernel: neither"),
        (&packed[..packed.len() - 20], "kernel", "is truncated: it ends at byte"),
        (&packed[..0x210], "kernel", "is truncated"),
        (&bzimage(&[0x1f, 0x8b, 8, 0]), "kernel", "compressed with gzip"),
        (&bzimage(b"what is this"), "kernel", "begins with [77"),
        (&damaged, "kernel", "is damaged: its ZSTD payload"),
        (&bzimage(&huge), "kernel", "would decompress to 4294967295 bytes"),
        (&bzimage(&with_size(zstd(&elf), 100)), "kernel", "is damaged"),
        (&elf[..SEGMENT_OFFSET + 10], "kernel", "is damaged"),
        (&no_note, "kernel", "no PVH entry"),
        (&arm, "kernel", "no ELF file of 64 bits for x86-64"),
        (&low, "memory_bytes", "a segment of the kernel lies at 0x1000"),
    ];
    for (bytes, field, text) in cases {
        let error = try_load(bytes).map(|_| ()).expect_err(text);
        assert_eq!(error.field, *field, "{error}");
        assert!(error.to_string().contains(text), "{error}, expected {text}");
    }
}

#[test]
fn files_that_are_not_there() {
    let memory = memory::create(64 << 20).unwrap();
    let kernel = file(&vmlinux());
    let error =
        load(&memory, &config("/nonexistent/vmlinuz".into(), None), GuestAddress(0)).unwrap_err();
    assert!(error.to_string().starts_with("kernel: /nonexistent/vmlinuz: does not exist"));
    let error = load(&memory, &config("/".into(), None), GuestAddress(0)).unwrap_err();
    assert!(error.to_string().contains("no regular file"), "{error}");
    let large = tempfile::tempfile().unwrap();
    large.set_len(60 << 20).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&large));
    let both = config(kernel.path().to_owned(), Some(path.into()));
    let error = load(&memory, &both, GuestAddress(0)).unwrap_err();
    assert_eq!(error.field, "initramfs");
    assert!(error.to_string().contains("are free above the kernel"), "{error}");
}

/// A disk without partitions, with a kernel under the links that Debian keeps.
fn disk(kernel: &[u8], initrd: &[u8]) -> NamedTempFile {
    let mut image = std::io::Cursor::new(vec![0; 4 << 20]);
    fatfs::format_volume(&mut image, fatfs::FormatVolumeOptions::new()).unwrap();
    image.set_position(0);
    {
        let filesystem = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
        let entry = b"linux /k\ninitrd /i\noptions root=/dev/vda quiet\n";
        let directory = filesystem.root_dir().create_dir("loader").unwrap();
        let entries = directory.create_dir("entries").unwrap();
        for (mut file, bytes) in [
            (entries.create_file("a.conf").unwrap(), &entry[..]),
            (filesystem.root_dir().create_file("k").unwrap(), kernel),
            (filesystem.root_dir().create_file("i").unwrap(), initrd),
        ] {
            std::io::Write::write_all(&mut file, bytes).unwrap();
        }
    }
    file(&image.into_inner())
}

/// The domain's command line goes behind the entry's, and each start reads the disk anew: a kernel
/// that was upgraded in between is the one that starts.
#[test]
fn a_disk_boots_its_own_kernel_and_is_read_anew() {
    let disk_file = disk(&bzimage(&zstd(&vmlinux())), b"initrd of the disk");
    let mut config = config(PathBuf::new(), None);
    let path = disk_file.path().to_owned();
    (config.kernel, config.boot_disk) =
        (None, Some(BootDiskConfig { path: path.clone(), own_root: false }));
    let start = || {
        let memory = memory::create(64 << 20).unwrap();
        load(&memory, &config, GuestAddress(0xe0000)).map(|loaded| (memory, loaded))
    };
    let (memory, loaded) = start().unwrap();
    assert_eq!(loaded.entry, GuestAddress(ENTRY.into()));
    let long = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let module = long(loaded.start_info.0 + 16);
    let mut text = vec![0; long(module + 8) as usize];
    memory.read_slice(&mut text, GuestAddress(long(module))).unwrap();
    assert_eq!(text, b"initrd of the disk");
    let mut text = [0; 36];
    memory.read_slice(&mut text, GuestAddress(long(loaded.start_info.0 + 24))).unwrap();
    assert_eq!(&text, b"root=/dev/vda quiet console=ttyS0\0\0\0");

    let mut upgraded = vmlinux();
    upgraded[SEGMENT_OFFSET + 0x2000] = 0x77;
    std::fs::copy(disk(&upgraded, b"").path(), &path).unwrap();
    let (memory, _) = start().unwrap();
    let byte = memory.read_obj::<u8>(GuestAddress(LOAD_ADDRESS + 0x2000)).unwrap();
    assert_eq!(byte, 0x77, "the kernel that lies there now");

    std::fs::copy(disk(b"no kernel at all", b"").path(), &path).unwrap();
    let error = start().map(|_| ()).unwrap_err();
    assert_eq!(error.field, "boot_disk");
    assert!(error.value.contains("is no kernel: neither a bzImage"), "{error}");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let error = start().map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("neither a partition table nor a filesystem"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = start().map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("the disk cannot be read: No such file"), "{error}");
}

/// The start info points at everything, and the memory map leaves out what is not RAM.
#[test]
fn start_info_describes_memory() {
    let memory = memory::create(64 << 20).unwrap();
    let (kernel, initramfs) = (file(&vmlinux()), file(b"initramfs!"));
    let config = config(kernel.path().to_owned(), Some(initramfs.path().to_owned()));
    let loaded = load(&memory, &config, GuestAddress(0xe0000)).unwrap();
    let word = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
    let long = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let info = loaded.start_info.0;
    assert_eq!((word(info), word(info + 4), word(info + 12)), (0x336e_c578, 1, 1));
    assert_eq!(long(info + 32), 0xe0000);

    let module = long(info + 16);
    let (start, length) = (long(module), long(module + 8));
    assert_eq!((start, length), ((64 << 20) - 4096, 10));
    let mut text = [0; 10];
    memory.read_slice(&mut text, GuestAddress(start)).unwrap();
    assert_eq!(&text, b"initramfs!");

    let mut text = [0; 14];
    memory.read_slice(&mut text, GuestAddress(long(info + 24))).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");

    let map = long(info + 40);
    let entries: Vec<_> = (0..u64::from(word(info + 48)))
        .map(|i| (long(map + i * 24), long(map + i * 24 + 8), word(map + i * 24 + 16)))
        .collect();
    assert_eq!(entries, [(0, 0x9fc00, 1), (0x9fc00, 0x60400, 2), (0x100000, 63 << 20, 1)]);
}
