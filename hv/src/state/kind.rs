//! The registry of sections. A number is never used again for something else.

/// What a section holds. The numbers are part of the format; the names are those of
/// [`StateSection::kind`](crate::machine::migratable::StateSection::kind).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectionKind {
    /// On the wire.
    pub number: u16,
    /// In the program and in messages.
    pub name: &'static str,
}

const fn kind(number: u16, name: &'static str) -> SectionKind {
    SectionKind { number, name }
}

/// The machine as a whole: its shape and what belongs to no device.
pub const VM: SectionKind = kind(1, "vm");
/// One vCPU; the instance is its index.
pub const VCPU: SectionKind = kind(2, "vcpu");
/// An in-kernel interrupt controller.
pub const IRQCHIP: SectionKind = kind(3, "irqchip");
/// The in-kernel interval timer.
pub const PIT: SectionKind = kind(4, "pit");
/// kvmclock.
pub const CLOCK: SectionKind = kind(5, "clock");
/// The serial port.
pub const SERIAL: SectionKind = kind(6, "serial");
/// The ACPI power-management block.
pub const ACPI: SectionKind = kind(7, "acpi");
/// The real-time clock.
pub const RTC: SectionKind = kind(8, "rtc");
/// The PCI bus: the configuration address latch.
pub const PCI: SectionKind = kind(16, "pci");
/// One PCI function's configuration space and MSI-X table; the instance is its slot.
pub const PCI_FUNCTION: SectionKind = kind(17, "pci-function");
/// The virtio transport of a function; the instance is its slot.
pub const VIRTIO: SectionKind = kind(19, "virtio");
/// A virtio network device's own state; the instance is its slot.
pub const VIRTIO_NET: SectionKind = kind(20, "virtio-net");
/// A virtio entropy device's own state; the instance is its slot.
pub const VIRTIO_RNG: SectionKind = kind(21, "virtio-rng");
/// A virtio block device's own state; the instance is its slot.
pub const VIRTIO_BLK: SectionKind = kind(22, "virtio-blk");

/// A virtio console device's own state; the instance is its slot.
pub const VIRTIO_CONSOLE: SectionKind = kind(23, "virtio-console");

/// Every kind that this program knows.
pub const ALL: [SectionKind; 15] = [
    VM,
    VCPU,
    IRQCHIP,
    PIT,
    CLOCK,
    SERIAL,
    ACPI,
    RTC,
    PCI,
    PCI_FUNCTION,
    VIRTIO,
    VIRTIO_NET,
    VIRTIO_RNG,
    VIRTIO_BLK,
    VIRTIO_CONSOLE,
];

impl SectionKind {
    /// The kind with this number, if this program knows it.
    pub fn from_number(number: u16) -> Option<Self> {
        ALL.into_iter().find(|kind| kind.number == number)
    }

    /// The kind with this name, if this program knows it.
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.into_iter().find(|kind| kind.name == name)
    }
}
