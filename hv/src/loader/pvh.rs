//! What the kernel's PVH entry expects in memory, after Xen's public `arch-x86/hvm/start_info.h`.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// Where the GDT for the entry lies.
pub(crate) const GDT_START: GuestAddress = GuestAddress(0x500);
const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: GuestAddress = GuestAddress(0x6100);
const MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
const COMMAND_LINE: GuestAddress = GuestAddress(0x7000);
/// Below 640 KiB, where PCs have their extended BIOS data; from here to 1 MiB is reserved, and
/// holds the ACPI tables.
const LOW_RESERVED_START: u64 = 0x9_fc00;
const LOW_RESERVED_END: u64 = 0x10_0000;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The flat segments of the entry, as the GDT has them.
pub(crate) const GDT: [u64; 4] = [
    0,
    // 0x08: code, 32 bits, 0 to 4 GiB, execute and read.
    0x00cf_9b00_0000_ffff,
    // 0x10: data, 32 bits, 0 to 4 GiB, read and write.
    0x00cf_9300_0000_ffff,
    // 0x18: a busy 32-bit task state segment of 0x68 bytes at 0.
    0x0000_8b00_0000_0067,
];

/// Writes GDT, command line, memory map and start info; answers the latter's address.
pub(super) fn write(
    memory: &GuestMemory,
    command_line: &str,
    initramfs: Option<(GuestAddress, u64)>,
    rsdp: GuestAddress,
) -> Result<GuestAddress, GuestMemoryError> {
    let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&gdt, GDT_START)?;
    memory.write_slice(command_line.as_bytes(), COMMAND_LINE)?;
    memory.write_obj(0u8, GuestAddress(COMMAND_LINE.0 + command_line.len() as u64))?;

    let mut map = vec![
        (0, LOW_RESERVED_START, E820_RAM),
        (LOW_RESERVED_START, LOW_RESERVED_END - LOW_RESERVED_START, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(LOW_RESERVED_END);
        map.push((start, region.last_addr().0 + 1 - start, E820_RAM));
    }
    let mut bytes = Vec::new();
    for (start, length, kind) in &map {
        bytes.extend(start.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
    }
    memory.write_slice(&bytes, MEMORY_MAP)?;

    if let Some((start, length)) = initramfs {
        // Address, size, command line's address, reserved.
        let module = [start.0, length, 0, 0];
        let bytes: Vec<u8> = module.iter().flat_map(|field| field.to_le_bytes()).collect();
        memory.write_slice(&bytes, MODULES)?;
    }

    let mut info = Vec::new();
    info.extend(START_INFO_MAGIC.to_le_bytes());
    info.extend(START_INFO_VERSION.to_le_bytes());
    // Flags: not the initial domain.
    info.extend(0u32.to_le_bytes());
    info.extend(u32::from(initramfs.is_some()).to_le_bytes());
    let modules = if initramfs.is_some() { MODULES.0 } else { 0 };
    for address in [modules, COMMAND_LINE.0, rsdp.0, MEMORY_MAP.0] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    memory.write_slice(&info, START_INFO)?;
    Ok(START_INFO)
}
