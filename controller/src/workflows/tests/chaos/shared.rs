//! Hosts that share a pool: what is on its disks is so for both, at once.

use super::Chaos;

impl Chaos {
    /// What the other host has done to the disks that this one shares.
    pub(super) fn see(&mut self, host: usize) {
        if let [a, b, _] = self.hosts.as_mut_slice()
            && a.is_shared
        {
            match host {
                0 => a.see_disks_of(b),
                1 => b.see_disks_of(a),
                _ => {}
            }
        }
    }

    /// And the other one sees what this one has done.
    pub(super) fn seen(&mut self, host: usize) {
        match host {
            0 => self.see(1),
            1 => self.see(0),
            _ => {}
        }
    }
}
