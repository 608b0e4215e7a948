//! The devices of a machine, by the ports and addresses at which the guest reaches them.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::exit::GuestExit;
use super::ports;
use super::power::{self, LevelLine, Power};
use super::vcpu::Bus;
use crate::pci::{HOT_PLUG_REGISTER_BYTES, PciBus};
use crate::serial::SerialPort;

/// What the guest reaches by ports and addresses.
#[derive(Debug)]
pub struct Devices {
    /// The serial port.
    pub serial: SerialPort,
    /// Power button, power off, reset, pvpanic.
    pub power: Power,
    /// Everything virtio.
    pub pci: PciBus,
}

impl Bus for Devices {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = serial_register(port) {
            self.serial.read(register, data);
        } else if power::owns(port, data.len()) {
            self.power.read(port, data);
        } else if let Some(offset) = hot_plug_register(port) {
            self.pci.hot_plug().read(offset, data);
        } else if !self.pci.read_port(port, data) {
            data.fill(0xff);
        }
    }

    fn write_port(&self, port: u16, data: &[u8]) -> Option<GuestExit> {
        if let Some(register) = serial_register(port) {
            self.serial.write(register, data);
        } else if power::owns(port, data.len()) {
            return self.power.write(port, data);
        } else if let Some(offset) = hot_plug_register(port) {
            self.pci.hot_plug().write(offset, data);
        } else {
            // To nobody, like on a PC.
            self.pci.write_port(port, data);
        }
        None
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) {
        if !self.pci.read_memory(address, data) {
            data.fill(0xff);
        }
    }

    fn write_memory(&self, address: u64, data: &[u8]) {
        self.pci.write_memory(address, data);
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(ports::SERIAL)?;
    (register < ports::SERIAL_PORTS).then_some(register as u8)
}

fn hot_plug_register(port: u16) -> Option<u16> {
    port.checked_sub(ports::HOT_PLUG).filter(|offset| *offset < HOT_PLUG_REGISTER_BYTES)
}

/// ACPI's interrupt line.
pub(super) struct SciLine(pub(super) Arc<VmFd>);

impl LevelLine for SciLine {
    fn set(&self, active: bool) {
        if let Err(error) = self.0.set_irq_line(ports::SCI_LINE, active) {
            tracing::error!(%error, "the power button's interrupt line cannot be set");
        }
    }
}
