//! What KVM keeps for the VM as a whole: interrupt controllers, the timer, the clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::migratable::{MachineState, MigratableError, StateSection};
use super::vcpu_state::{read, write};
use crate::state::{self, kind};

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// A pause that looks longer than this is two nodes whose clocks differ: it is not added to the
/// guest's clock.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A guest that was saved stood still for hours or months, and finds its clock set on by that, as
/// after a suspend. What looks longer is a node whose clock was wrong.
const SAVED_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// A guest's clock, and when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clock {
    /// Nanoseconds that kvmclock shows.
    guest_ns: u64,
    /// The node's time when that was read, nanoseconds since 1970.
    node_ns: u64,
    /// A longer pause is none.
    pause_max: Duration,
}

impl Clock {
    fn read(vm: &VmFd) -> Result<Self, MigratableError> {
        let guest_ns = check("reading the clock", vm.get_clock())?.clock;
        Ok(Self { guest_ns, node_ns: node_ns(), pause_max: PAUSE_MAX })
    }

    /// It was read when the guest was saved.
    pub(super) fn after_saving(self) -> Self {
        Self { pause_max: SAVED_MAX, ..self }
    }

    /// Lets the guest's clock go on as if it had never stood still; never back.
    pub(super) fn set(self, vm: &VmFd) -> Result<(), MigratableError> {
        let clock = kvm_clock_data { clock: self.at(node_ns()), ..Default::default() };
        check("setting the clock", vm.set_clock(&clock))
    }

    /// What it shows at this time of the node.
    fn at(self, node_ns: u64) -> u64 {
        let passed = node_ns.saturating_sub(self.node_ns);
        let passed = if u128::from(passed) > self.pause_max.as_nanos() { 0 } else { passed };
        self.guest_ns.saturating_add(passed)
    }
}

fn node_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Saves the VM's own state. All vCPUs are parked.
pub(super) fn save(vm: &VmFd) -> Result<Vec<StateSection>, MigratableError> {
    let mut sections = Vec::new();
    for chip_id in IRQCHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        check("reading an interrupt controller", vm.get_irqchip(&mut chip))?;
        sections.push(state::section(kind::IRQCHIP, chip_id, 1, |out| write(out, &chip)));
    }
    let pit = check("reading the interval timer", vm.get_pit2())?;
    sections.push(state::section(kind::PIT, 0, 1, |out| write(out, &pit)));
    let clock = Clock::read(vm)?;
    sections.push(state::section(kind::CLOCK, 0, 1, |out| {
        out.u64(clock.guest_ns);
        out.u64(clock.node_ns);
    }));
    Ok(sections)
}

/// Restores the VM's own state, after the vCPUs' (the I/O APIC delivers to local APICs what it
/// has pending). The clock is to be set when the guest resumes.
pub(super) fn restore(vm: &VmFd, state: &MachineState) -> Result<Clock, MigratableError> {
    for chip_id in IRQCHIPS {
        let section = state::find(state, kind::IRQCHIP, chip_id).map_err(mismatch)?;
        let mut fields = state::fields(section, 1).map_err(mismatch)?;
        let chip: kvm_irqchip = read(&mut fields, "interrupt controller").map_err(mismatch)?;
        fields.finish("interrupt controller").map_err(mismatch)?;
        if chip.chip_id != chip_id {
            let reason = format!("interrupt controller {}; accepted: {chip_id}", chip.chip_id);
            return Err(MigratableError::Mismatch(reason));
        }
        check("setting an interrupt controller", vm.set_irqchip(&chip))?;
    }
    let section = state::find(state, kind::PIT, 0).map_err(mismatch)?;
    let mut fields = state::fields(section, 1).map_err(mismatch)?;
    let pit: kvm_pit_state2 = read(&mut fields, "interval timer").map_err(mismatch)?;
    fields.finish("interval timer").map_err(mismatch)?;
    check("setting the interval timer", vm.set_pit2(&pit))?;

    let section = state::find(state, kind::CLOCK, 0).map_err(mismatch)?;
    let mut fields = state::fields(section, 1).map_err(mismatch)?;
    let clock = Clock {
        guest_ns: fields.u64("clock").map_err(mismatch)?,
        node_ns: fields.u64("clock's time").map_err(mismatch)?,
        pause_max: PAUSE_MAX,
    };
    fields.finish("clock").map_err(mismatch)?;
    Ok(clock)
}

pub(super) fn mismatch(error: impl std::fmt::Display) -> MigratableError {
    MigratableError::Mismatch(error.to_string())
}

pub(super) fn step(step: &str, reason: impl std::fmt::Display) -> MigratableError {
    MigratableError::Step { step: step.to_owned(), reason: reason.to_string() }
}

fn check<T>(what: &str, result: Result<T, kvm_ioctls::Error>) -> Result<T, MigratableError> {
    result.map_err(|error| step(what, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pause is added, whatever the nodes' clocks say never taken away, and a difference that
    /// cannot be a pause is left out.
    #[test]
    fn the_clock_never_goes_back() {
        let pause_max = PAUSE_MAX;
        let clock = Clock { guest_ns: 1_000, node_ns: 50_000_000_000, pause_max };
        assert_eq!(clock.at(50_000_000_300), 1_300);
        assert_eq!(clock.at(49_000_000_000), 1_000);
        assert_eq!(clock.at(90_000_000_000), 1_000);
        let late = Clock { guest_ns: u64::MAX - 1, node_ns: 0, pause_max };
        assert_eq!(late.at(5), u64::MAX);
    }

    /// An hour on disk is an hour; a node that did not know the year is not believed.
    #[test]
    fn the_clock_of_a_saved_guest_is_set_on() {
        const HOUR_NS: u64 = 3_600_000_000_000;
        let clock = Clock { guest_ns: 7, node_ns: HOUR_NS, pause_max: PAUSE_MAX }.after_saving();
        assert_eq!(clock.at(2 * HOUR_NS), 7 + HOUR_NS);
        assert_eq!(clock.at(0), 7);
        assert_eq!(clock.at(56 * 8766 * HOUR_NS), 7);
    }
}
