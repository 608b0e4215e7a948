//! The simulator of `raft_sim.rs`: a disk, a network, clients, and what must hold.

pub mod disk;
pub mod linearizable;
pub mod network;
pub mod world;

/// What a run is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Decides everything that chance does.
    pub seed: u64,
    pub members: u64,
    /// Syncs are said to be done and are not.
    pub disks_lie: bool,
    /// Print what happens.
    pub trace: bool,
    /// Simulated time with faults, then without.
    pub faults_ms: u64,
    pub calm_ms: u64,
}

impl Settings {
    pub fn of(seed: u64) -> Self {
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
