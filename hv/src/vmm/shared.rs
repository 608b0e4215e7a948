//! What everybody may know of a VMM: its status, its console, its counters.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use drover_proto::agent::v1::ObservedMigration;
use drover_proto::vmm::v1::{DiskStatus, VmmState, VmmStatus};
use tokio::sync::watch;

use crate::config::DomainConfig;
use crate::console::Console;
use crate::guest_agent::GuestAgent;
use crate::machine::{Devices, Machine};
use crate::virtio::net::NetCounters;

/// The public face of a VMM. Written by the supervisor and the migration's thread, read by the
/// API.
#[derive(Debug)]
pub struct Shared {
    /// The guest's console.
    pub console: Arc<Console>,
    status: watch::Sender<VmmStatus>,
    started: Instant,
    parts: Mutex<Parts>,
}

/// The parts of the present machine that are used while somebody else has the machine.
#[derive(Debug, Default)]
struct Parts {
    devices: Option<Arc<Devices>>,
    counters: Vec<Arc<NetCounters>>,
    guest_agent: Option<Arc<GuestAgent>>,
}

impl Shared {
    pub(super) fn new(config: &DomainConfig) -> Self {
        let status = VmmStatus {
            domain_uid: config.uid.clone(),
            epoch: config.epoch,
            pid: std::process::id(),
            vcpus: config.vcpus,
            memory_bytes: config.memory_bytes,
            ..Default::default()
        };
        Self {
            console: Arc::default(),
            status: watch::Sender::new(status),
            started: Instant::now(),
            parts: Mutex::default(),
        }
    }

    /// The status as it is now.
    pub fn status(&self) -> VmmStatus {
        self.fill(self.status.borrow().clone())
    }

    /// A receiver that changes when the status does; complete it with [`fill`](Self::fill).
    pub fn watch(&self) -> watch::Receiver<VmmStatus> {
        self.status.subscribe()
    }

    /// Adds what always changes: counters, and what the guest says of itself.
    pub fn fill(&self, mut status: VmmStatus) -> VmmStatus {
        status.uptime_ms = self.started.elapsed().as_millis() as u64;
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        for counters in &parts.counters {
            status.net_rx_bytes += counters.rx_bytes.load(Ordering::Relaxed);
            status.net_tx_bytes += counters.tx_bytes.load(Ordering::Relaxed);
        }
        if status.state == VmmState::Running as i32
            && let Some(panic) = self.console.panic()
        {
            status.state_reason = format!("the guest said: {panic}");
        }
        status
    }

    /// The devices of the present machine.
    pub fn devices(&self) -> Option<Arc<Devices>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).devices.clone()
    }

    /// The way to the guest's agent, if the domain has one and a machine.
    pub fn guest_agent(&self) -> Option<Arc<GuestAgent>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).guest_agent.clone()
    }

    pub(super) fn set_machine(&self, machine: &Machine) {
        *self.parts.lock().unwrap_or_else(PoisonError::into_inner) = Parts {
            devices: Some(Arc::clone(machine.devices())),
            counters: machine.net_counters().to_vec(),
            guest_agent: machine.guest_agent().cloned(),
        };
    }

    /// Must come before the machine is dropped: its devices end with the last who holds them.
    pub(super) fn forget_machine(&self) {
        *self.parts.lock().unwrap_or_else(PoisonError::into_inner) = Parts::default();
    }

    /// The only place where a status changes: of two, the one of the greater sequence is the later.
    fn change(&self, change: impl FnOnce(&mut VmmStatus)) {
        self.status.send_modify(|status| {
            change(status);
            status.sequence += 1;
        });
    }

    pub(super) fn set_state(&self, state: VmmState, reason: impl Into<String>) {
        let reason = reason.into();
        self.change(|status| {
            status.state = state as i32;
            status.state_reason = reason;
        });
    }

    pub(super) fn set_epoch(&self, epoch: u64) {
        self.change(|status| status.epoch = epoch);
    }

    pub(super) fn count_reboot(&self) {
        self.change(|status| status.reboot_count += 1);
    }

    pub(super) fn set_disks(&self, disks: Vec<DiskStatus>) {
        self.change(|status| status.disks = disks);
    }

    pub(super) fn set_migration(&self, migration: &ObservedMigration) {
        self.change(|status| status.migration = Some(migration.clone()));
    }

    pub(super) fn migration(&self) -> Option<ObservedMigration> {
        self.status.borrow().migration.clone()
    }

    /// Something that [`fill`](Self::fill) adds has changed.
    pub(super) fn touch(&self) {
        self.change(|_| {});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status that was made before another one is known to be older, whoever reads it first.
    #[test]
    fn each_change_has_a_greater_number() {
        let config = r#"{"uid":"u","name":"domains/a","epoch":1,"vcpus":1,
            "memory_bytes":134217728,"kernel":"/k"}"#;
        let shared = Shared::new(&serde_json::from_str(config).unwrap());
        let mut last = shared.status().sequence;
        let changes: [&dyn Fn(); 5] = [
            &|| shared.set_state(VmmState::Running, ""),
            &|| shared.set_epoch(2),
            &|| shared.count_reboot(),
            &|| shared.set_migration(&ObservedMigration::default()),
            &|| shared.touch(),
        ];
        for change in changes {
            change();
            let now = shared.status().sequence;
            assert!(now > last, "{now} after {last}");
            last = now;
        }
        assert_eq!(shared.status().sequence, last, "looking is no change");
    }
}
