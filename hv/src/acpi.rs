//! The ACPI tables: how a guest learns of CPUs, buses, its power button, and how to end itself.
//!
//! Built at once for a number of vCPUs and placed into the reserved area below 1 MiB. The
//! hardware they describe is the fixed-feature block of the [`power`](crate::machine::power)
//! device, the in-kernel interrupt controllers, one PCI bus, the serial port and pvpanic; where
//! the domain has a [`generation`](crate::machine::generation), its device and the event device
//! that tells of its changes (the fixed hardware has only buttons). What
//! PCs had and we have not is said not to be there (VGA, CMOS clock, 8042), so that no time goes
//! into probing.
//!
//! Field offsets are those of the ACPI specification 6.5: FADT 5.2.9, FACS 5.2.10, MADT 5.2.12.

use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Method,
    MethodCall, Mutex, Name, Notify, OpRegion, OpRegionSpace, Package, Path, Release,
    ResourceTemplate, Scope, Store,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::machine::ports;
use crate::memory::GuestMemory;
use crate::pci;

/// Where the RSDP lies; the other tables follow. The area is reserved in the memory map.
pub const RSDP_START: GuestAddress = GuestAddress(0xe_0000);
/// Where the domain's generation lies, 16 bytes: a page of its own in the reserved area.
pub const GENERATION_START: GuestAddress = GuestAddress(0xf_f000);
/// First address behind the area for tables.
const TABLES_END: u64 = GENERATION_START.0;
/// Guest-physical address of the in-kernel I/O APIC.
const IOAPIC_START: u32 = 0xfec0_0000;
/// Guest-physical address of every CPU's local APIC.
const LOCAL_APIC_START: u32 = 0xfee0_0000;

const OEM_ID: [u8; 6] = *b"DROVER";
const OEM_TABLE_ID: [u8; 8] = *b"DROVERVM";
const OEM_REVISION: u32 = 1;
/// The longest table that is written piecewise begins with this header, bytes.
const HEADER_BYTES: u32 = 36;

/// Builds the tables for so many vCPUs and writes them into memory. `generation`: there is one.
///
/// # Errors
/// When memory ends below 1 MiB.
pub fn write(
    memory: &GuestMemory,
    vcpus: u32,
    generation: bool,
) -> Result<GuestAddress, GuestMemoryError> {
    let mut next = RSDP_START.0 + Rsdp::len() as u64;
    let mut place = |table: &[u8]| -> Result<u64, GuestMemoryError> {
        // The FACS must be aligned to 64 bytes; it harms no other.
        let start = next.next_multiple_of(64);
        next = start + table.len() as u64;
        assert!(next <= TABLES_END, "the ACPI tables outgrew their area");
        memory.write_slice(table, GuestAddress(start))?;
        Ok(start)
    };
    let facs = place(&facs())?;
    let dsdt = place(dsdt(generation).as_slice())?;
    let fadt = place(fadt(facs, dsdt).as_slice())?;
    let madt = place(madt(vcpus).as_slice())?;
    let mut xsdt = sdt(*b"XSDT", 1);
    for table in [fadt, madt] {
        xsdt.append_slice(&table.to_le_bytes());
    }
    let xsdt = place(xsdt.as_slice())?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    memory.write_slice(&rsdp, RSDP_START)?;
    Ok(RSDP_START)
}

fn sdt(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER_BYTES, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// Firmware's control structure; we never wake from sleep, so that it holds nothing.
fn facs() -> [u8; 64] {
    let mut table = [0; 64];
    table[..4].copy_from_slice(b"FACS");
    table[4] = 64;
    // Version.
    table[32] = 2;
    table
}

fn fadt(facs: u64, dsdt: u64) -> Sdt {
    const LENGTH: u32 = 276;
    /// No VGA to probe, no CMOS clock; the missing bit 1 says: no 8042.
    const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
    /// WBINVD works, C1 works on all CPUs, no sleep button, a reset register. The missing bit 4
    /// says that the power button is the fixed one.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 10;
    /// Longer than ACPI allows: C2 and C3 are not there.
    const NO_C_STATE: u16 = 0xfff;

    let mut table = Sdt::new(*b"FACP", LENGTH, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.write_u32(36, facs as u32);
    table.write_u32(40, dsdt as u32);
    // Preferred profile: enterprise server.
    table.write_u8(45, 4);
    table.write_u16(46, ports::SCI_LINE as u16);
    table.write_u32(56, ports::PM1_EVENT.into());
    table.write_u32(64, ports::PM1_CONTROL.into());
    table.write_u8(88, ports::PM1_EVENT_BYTES);
    table.write_u8(89, ports::PM1_CONTROL_BYTES);
    table.write_u16(96, NO_C_STATE);
    table.write_u16(98, NO_C_STATE + 1);
    table.write_u16(109, BOOT_ARCH);
    table.write_u32(112, FLAGS);
    table.write_bytes(116, &io_register(ports::RESET, 1));
    table.write_u8(128, ports::RESET_VALUE);
    // Minor version 5: ACPI 6.5.
    table.write_u8(131, 5);
    // The FACS has one address only (both set must be equal), the DSDT both.
    table.write_u64(140, dsdt);
    table.write_bytes(148, &io_register(ports::PM1_EVENT, ports::PM1_EVENT_BYTES));
    table.write_bytes(172, &io_register(ports::PM1_CONTROL, ports::PM1_CONTROL_BYTES));
    table
}

/// A generic address structure for so many bytes of ports.
fn io_register(port: u16, bytes: u8) -> [u8; 12] {
    let mut register = [0; 12];
    register[0] = 1;
    register[1] = bytes * 8;
    // Access size: bytes for one, words for more.
    register[3] = if bytes == 1 { 1 } else { 2 };
    register[4..6].copy_from_slice(&port.to_le_bytes());
    register
}

fn madt(vcpus: u32) -> Sdt {
    /// There are PICs as well.
    const PCAT_COMPATIBLE: u32 = 1;
    /// An override's flags: active high, level triggered.
    const HIGH_LEVEL: u16 = 0b1101;
    /// The local APIC's non-maskable line.
    const LINT1: u8 = 1;

    let mut table = sdt(*b"APIC", 5);
    table.append_slice(&LOCAL_APIC_START.to_le_bytes());
    table.append_slice(&PCAT_COMPATIBLE.to_le_bytes());
    for id in 0..vcpus as u8 {
        // Local APIC: processor's uid, APIC's id, enabled.
        table.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // The I/O APIC gets the first id behind the CPUs'; interrupts from 0.
    let mut ioapic = vec![1, 12, vcpus as u8, 0];
    ioapic.extend(IOAPIC_START.to_le_bytes());
    ioapic.extend(0u32.to_le_bytes());
    table.append_slice(&ioapic);
    // ISA's interrupt 9 is the SCI, and level triggered.
    let mut sci = vec![2, 10, 0, ports::SCI_LINE as u8];
    sci.extend(ports::SCI_LINE.to_le_bytes());
    sci.extend(HIGH_LEVEL.to_le_bytes());
    table.append_slice(&sci);
    // NMIs come in at LINT1 of every CPU.
    table.append_slice(&[4, 6, 0xff, 0, 0, LINT1]);
    table
}

fn dsdt(generation: bool) -> Sdt {
    let window_end = (pci::MMIO_END - 1) as u32;
    let pci = Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0u16),
                    &IO::new(
                        pci::CONFIG_PORT_START,
                        pci::CONFIG_PORT_START,
                        1,
                        (pci::CONFIG_PORT_END - pci::CONFIG_PORT_START) as u8,
                    ),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        pci::MMIO_START as u32,
                        window_end,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .bytes();
    let serial = Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, ports::SERIAL_LINE),
                    &IO::new(ports::SERIAL, ports::SERIAL, 1, ports::SERIAL_PORTS as u8),
                ]),
            ),
        ],
    )
    .bytes();
    // The id by which Linux' pvpanic-mmio driver finds it, given by QEMU.
    let panic = Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(ports::PANIC, ports::PANIC, 1, 1)]),
            ),
        ],
    )
    .bytes();
    let sleep_type = ports::SLEEP_TYPE_OFF as u8;
    let off = Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type, &sleep_type, &aml::ZERO, &aml::ZERO]),
    )
    .bytes();

    let mut table = sdt(*b"DSDT", 2);
    for part in [off, pci, serial, panic] {
        table.append_slice(&part);
    }
    for part in hot_plug() {
        table.append_slice(&part);
    }
    if generation {
        for part in generation_devices() {
            table.append_slice(&part);
        }
    }
    table
}

/// The slots whose functions come and go, with the methods that read and write the registers of
/// [`pci::HotPlug`], and the device of the event by which they are called.
fn hot_plug() -> [Vec<u8>; 2] {
    /// What is notified: look whether there is something, or let it go.
    const CHECK: u8 = 1;
    const EJECT: u8 = 3;
    const FOR_EVER: u16 = 0xffff;
    let name = |slot: u8| format!("S{slot:03}");
    let (lock, unlock) = (Acquire::new("PHLK".into(), FOR_EVER), Release::new("PHLK".into()));

    let slots: Vec<Vec<u8>> = pci::HOT_PLUG_SLOTS
        .map(|slot| {
            let (bit, path) = (1u32 << slot, Path::new("PEJT"));
            Device::new(
                name(slot).as_str().into(),
                vec![
                    &Name::new("_SUN".into(), &slot),
                    &Name::new("_ADR".into(), &(u32::from(slot) << 16)),
                    &Method::new(
                        "_EJ0".into(),
                        1,
                        true,
                        vec![&lock, &Store::new(&path, &bit), &unlock],
                    ),
                ],
            )
            .bytes()
        })
        .collect();
    // Notifies the slots whose bits are in the first argument of the second.
    let tell: Vec<Vec<u8>> = pci::HOT_PLUG_SLOTS
        .map(|slot| {
            let (bit, path) = (1u32 << slot, Path::new(&name(slot)));
            let is_set = And::new(&aml::ZERO, &Arg(0), &bit);
            If::new(&is_set, vec![&Notify::new(&path, &Arg(1))]).bytes()
        })
        .collect();
    let tell: Vec<Raw> = tell.into_iter().map(Raw).collect();
    let slots: Vec<Raw> = slots.into_iter().map(Raw).collect();

    let region = OpRegion::new(
        "PHPR".into(),
        OpRegionSpace::SystemIO,
        &ports::HOT_PLUG,
        &pci::HOT_PLUG_REGISTER_BYTES,
    );
    let registers = Field::new(
        "PHPR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"PCUP", 32),
            FieldEntry::Named(*b"PCDN", 32),
            FieldEntry::Named(*b"PEJT", 32),
        ],
    );
    let mutex = Mutex::new("PHLK".into(), 0);
    let tell = Method::new("PTEL".into(), 2, true, tell.iter().map(|part| part as _).collect());
    let (up, down) = (Path::new("PCUP"), Path::new("PCDN"));
    let tell_up = MethodCall::new("PTEL".into(), vec![&up, &CHECK]);
    let tell_down = MethodCall::new("PTEL".into(), vec![&down, &EJECT]);
    let look = Method::new("PLOK".into(), 0, true, vec![&lock, &tell_up, &tell_down, &unlock]);
    let mut parts: Vec<&dyn Aml> = vec![&region, &registers, &mutex];
    parts.extend(slots.iter().map(|part| part as &dyn Aml));
    parts.extend([&tell as &dyn Aml, &look]);
    let scope = Scope::new("_SB_.PCI0".into(), parts).bytes();

    let events = Device::new(
        "_SB_.GEDP".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    ports::HOT_PLUG_LINE,
                )]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&MethodCall::new("\\_SB_.PCI0.PLOK".into(), vec![])],
            ),
        ],
    )
    .bytes();
    [scope, events]
}

/// A part that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        self.0.iter().for_each(|byte| sink.byte(*byte));
    }
}

/// The generation's device, and the one that tells of its changes (ACPI 6.5, 5.6.9).
fn generation_devices() -> [Vec<u8>; 2] {
    /// What the driver is told: the generation has changed.
    const CHANGED: u8 = 0x80;
    // The second id is the specification's, by which guests find it; the first QEMU's.
    let counter = Device::new(
        "_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMUVGID"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new(
                "ADDR".into(),
                &Package::new(vec![&(GENERATION_START.0 as u32), &aml::ZERO]),
            ),
        ],
    )
    .bytes();
    let path: Path = "\\_SB_.VGEN".into();
    let events = Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    ports::GENERATION_LINE,
                )]),
            ),
            // Its one argument, which line it was, has only one value.
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&path, &CHANGED)]),
        ],
    )
    .bytes();
    [counter, events]
}

trait AmlBytes: Aml {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        bytes
    }
}
impl<T: Aml> AmlBytes for T {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn table(memory: &GuestMemory, start: u64) -> Vec<u8> {
        let length = memory.read_obj::<u32>(GuestAddress(start + 4)).unwrap();
        let mut table = vec![0; length as usize];
        memory.read_slice(&mut table, GuestAddress(start)).unwrap();
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// From the RSDP every table is reached, whole, and each vCPU is in the MADT.
    #[test]
    fn tables_are_linked_and_sum_up() {
        let memory = memory::create(32 << 20).unwrap();
        let rsdp = write(&memory, 8, true).unwrap();
        let mut root = [0; 36];
        memory.read_slice(&mut root, rsdp).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));

        let xsdt = table(&memory, long(&root, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 16));
        let fadt = table(&memory, long(&xsdt, 36));
        assert_eq!((&fadt[..4], sum(&fadt), fadt.len()), (&b"FACP"[..], 0, 276));
        let dsdt = table(&memory, long(&fadt, 140));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        let facs = u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()));
        assert_eq!((&table(&memory, facs)[..4], facs % 64), (&b"FACS"[..], 0));

        let madt = table(&memory, long(&xsdt, 44));
        assert_eq!((&madt[..4], sum(&madt)), (&b"APIC"[..], 0));
        let mut kinds = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, length, ..] = rest {
            kinds.push(*kind);
            rest = &rest[usize::from(*length)..];
        }
        assert_eq!(kinds, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4]);
    }

    /// The generation's device says where the number lies, and only a domain that has one shows
    /// it.
    #[test]
    fn the_generation_is_there_when_it_is_asked_for() {
        let with = dsdt(true);
        let has = |table: &Sdt, bytes: &[u8]| {
            table.as_slice().windows(bytes.len()).any(|window| window == bytes)
        };
        assert!(has(&with, b"QEMUVGID\0") && has(&with, b"VM_Gen_Counter\0"));
        // Name ADDR, a package of two: a double word, zero.
        assert!(has(&with, b"\x08ADDR\x12\x08\x02\x0c\x00\xf0\x0f\x00\x00"));
        // An interrupt, edge and active high, by the serial port's neighbour; then Notify.
        assert!(has(&with, &[0x89, 6, 0, 0b11, 1, 5, 0, 0, 0]));
        assert!(has(&with, b"\x86\x5c\x2e_SB_VGEN\x0a\x80"));
        assert!(!has(&dsdt(false), b"VM_Gen_Counter"));
        // The other event device is there always.
        assert!(has(&dsdt(false), b"\x5c\x2f\x03_SB_PCI0PLOK"));
        // It lies where the guest has no memory of its own.
        let memory = memory::create(32 << 20).unwrap();
        const { assert!(GENERATION_START.0 >= TABLES_END) };
        write(&memory, 8, true).unwrap();
        let mut page = [0xff; 4096];
        memory.read_slice(&mut page, GENERATION_START).unwrap();
        assert_eq!(page, [0; 4096]);
    }
}
