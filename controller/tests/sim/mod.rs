//! The simulator of `raft_sim.rs`: a disk, a network, clients, and what must hold.

pub(crate) mod disk;
pub(crate) mod engines;
pub(crate) mod linearizable;
pub(crate) mod network;
pub(crate) mod world;

/// What a run is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Decides everything that chance does.
    pub(crate) seed: u64,
    pub(crate) members: u64,
    /// Syncs are said to be done and are not.
    pub(crate) disks_lie: bool,
    /// Print what happens.
    pub(crate) trace: bool,
    /// Simulated time with faults, then without.
    pub(crate) faults_ms: u64,
    pub(crate) calm_ms: u64,
}

impl Settings {
    pub(crate) fn of(seed: u64) -> Self {
        Self {
            seed,
            members: 3,
            disks_lie: false,
            trace: false,
            faults_ms: 40_000,
            calm_ms: 30_000,
        }
    }
}
