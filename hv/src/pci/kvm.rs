//! [`Wiring`] by KVM, and the VM's one interrupt routing table.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{MsiMessage, Wiring};

/// Lines of the IOAPIC, which come first.
const IOAPIC_LINES: u32 = 24;
/// Lines of the two PICs.
const PIC_LINES: u32 = 16;
/// Most lines, so that the table has a bound (KVM's own is 4096).
const LINES_MAX: u32 = 1024;

/// Owns the routing table of one VM with an in-kernel irqchip. Lines 0 to 23 stay as KVM makes
/// them: the IOAPIC's pins, the first 16 also the PICs'.
#[derive(Debug)]
pub struct KvmWiring {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    next_line: u32,
    /// Lines that were given back.
    free: Vec<u32>,
    messages: BTreeMap<u32, MsiMessage>,
    changed: bool,
}

impl KvmWiring {
    /// For a VM that has its irqchip.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let (free, messages) = (Vec::new(), BTreeMap::new());
        let table = Table { next_line: IOAPIC_LINES, free, messages, changed: false };
        Self { vm, table: Mutex::new(table) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wiring for KvmWiring {
    fn add_irqfd(&self, fd: &EventFd) -> io::Result<u32> {
        let mut table = self.table();
        let line = table.free.last().copied().unwrap_or(table.next_line);
        if line >= LINES_MAX {
            return Err(io::Error::other(format!("all {LINES_MAX} interrupt lines are taken")));
        }
        self.vm.register_irqfd(fd, line)?;
        if table.free.pop().is_none() {
            table.next_line += 1;
        }
        Ok(line)
    }

    fn remove_irqfd(&self, fd: &EventFd, line: u32) -> io::Result<()> {
        let mut table = self.table();
        self.vm.unregister_irqfd(fd, line)?;
        table.changed |= table.messages.remove(&line).is_some();
        table.free.push(line);
        Ok(())
    }

    fn stage_msi(&self, line: u32, message: MsiMessage) {
        let mut table = self.table();
        table.changed |= table.messages.insert(line, message) != Some(message);
    }

    fn commit_msi(&self) -> io::Result<()> {
        let mut table = self.table();
        if !table.changed {
            return Ok(());
        }
        let mut entries = irqchip_entries();
        entries.extend(table.messages.iter().map(|(line, message)| msi_entry(*line, *message)));
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("interrupt routing table: {error:?}")))?;
        self.vm.set_gsi_routing(&routing)?;
        table.changed = false;
        Ok(())
    }

    fn add_ioeventfd(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        self.vm.register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)?;
        Ok(())
    }

    fn remove_ioeventfd(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        self.vm.unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)?;
        Ok(())
    }
}

fn irqchip_entries() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| {
        let mut entry =
            kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let pics = (0..PIC_LINES).map(|line| match line {
        0..8 => entry(line, KVM_IRQCHIP_PIC_MASTER, line),
        _ => entry(line, KVM_IRQCHIP_PIC_SLAVE, line - 8),
    });
    let ioapic = (0..IOAPIC_LINES).map(|line| entry(line, KVM_IRQCHIP_IOAPIC, line));
    pics.chain(ioapic).collect()
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
