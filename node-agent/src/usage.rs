//! What the node has and what is used: /proc, and nothing else.
//!
//! Rates are measured between two samples at least [`INTERVAL_MIN`] apart, so that reports in
//! quick succession do not show noise.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use drover_proto::v1::{DomainUsage, NodeCapacity, NodeUsage};
use drover_proto::vmm::v1::VmmStatus;
use tokio::time::Instant;

/// Shortest time over which a rate is measured.
pub const INTERVAL_MIN: Duration = Duration::from_millis(500);
/// At least this is kept for the host itself when `--memory-reserved` is not given; otherwise
/// a tenth of its memory.
const MEMORY_RESERVED_MIN: u64 = 512 << 20;

/// What is promised to domains: cores times the overcommit, memory less what the host keeps.
pub fn capacity(vcpu_overcommit: u32, memory_reserved: Option<u64>) -> NodeCapacity {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let total = memory_total(&read("/proc/meminfo"));
    let reserved = memory_reserved.unwrap_or_else(|| MEMORY_RESERVED_MIN.max(total / 10));
    NodeCapacity {
        vcpus: u32::try_from(cores).unwrap_or(u32::MAX).saturating_mul(vcpu_overcommit),
        memory_bytes: total.saturating_sub(reserved),
    }
}

/// The part of a domain's usage that its VMM knows.
pub(crate) fn of_status(status: &VmmStatus) -> DomainUsage {
    let uptime = Duration::from_millis(status.uptime_ms);
    DomainUsage {
        net_rx_bytes: status.net_rx_bytes,
        net_tx_bytes: status.net_tx_bytes,
        uptime: prost_types::Duration::try_from(uptime).ok(),
        ..DomainUsage::default()
    }
}

/// Measures the node and its VMMs from sample to sample.
#[derive(Debug, Default)]
pub struct Sampler {
    node: Rate,
    processes: BTreeMap<u32, Rate>,
}

/// CPU time at the last sample, and the rate found then.
#[derive(Debug, Default, Clone, Copy)]
struct Rate {
    last: Option<(Instant, u64)>,
    millicores: u32,
}

impl Rate {
    fn sample(&mut self, now: Instant, ticks: u64, ticks_per_second: u64) -> u32 {
        let Some((then, before)) = self.last else {
            self.last = Some((now, ticks));
            return 0;
        };
        let elapsed = now.duration_since(then);
        if elapsed >= INTERVAL_MIN {
            let used = ticks.saturating_sub(before).saturating_mul(1_000_000);
            let span = ticks_per_second.max(1) * u64::try_from(elapsed.as_millis()).unwrap_or(1);
            self.millicores = u32::try_from(used / span.max(1)).unwrap_or(u32::MAX);
            self.last = Some((now, ticks));
        }
        self.millicores
    }
}

impl Sampler {
    /// The node's usage now.
    pub fn node(&mut self, now: Instant) -> NodeUsage {
        let meminfo = read("/proc/meminfo");
        let available = field(&meminfo, "MemAvailable:").unwrap_or(0);
        NodeUsage {
            cpu_millicores: self.node.sample(now, busy_ticks(&read("/proc/stat")), hertz()),
            memory_used_bytes: memory_total(&meminfo).saturating_sub(available),
        }
    }

    /// Adds what a VMM's process uses to what it says itself.
    pub fn process(&mut self, now: Instant, pid: u32, usage: &mut DomainUsage) {
        let stat = read(&format!("/proc/{pid}/stat"));
        let Some((ticks, resident_pages)) = parse_stat(&stat) else { return };
        let rate = self.processes.entry(pid).or_default();
        usage.cpu_millicores = rate.sample(now, ticks, hertz());
        usage.memory_resident_bytes = resident_pages * page_bytes();
    }

    /// Forgets the processes that are not among `pids`.
    pub fn keep_only(&mut self, pids: &[u32]) {
        self.processes.retain(|pid, _| pids.contains(pid));
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A field of /proc/meminfo, in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn memory_total(meminfo: &str) -> u64 {
    field(meminfo, "MemTotal:").unwrap_or(0)
}

/// User, nice, system, irq, softirq and steal of all CPUs. (Guests' time is in user already.)
fn busy_ticks(stat: &str) -> u64 {
    let Some(line) = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")) else {
        return 0;
    };
    let values: Vec<u64> = line.split_whitespace().filter_map(|v| v.parse().ok()).collect();
    [0, 1, 2, 5, 6, 7].iter().filter_map(|&index| values.get(index)).sum()
}

/// utime + stime in ticks, and resident pages, of /proc/PID/stat. The command in it may hold
/// anything, so fields are counted from the last ')'.
fn parse_stat(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Field 3 (state) is the first one here; utime is 14, stime 15, rss 24.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some((number(14)? + number(15)?, number(24)?))
}

fn hertz() -> u64 {
    // SAFETY: sysconf has no preconditions.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100)
}

fn page_bytes() -> u64 {
    // SAFETY: sysconf has no preconditions.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read_as_the_kernel_writes_them() {
        let meminfo = "MemTotal:       24576 kB\nMemFree:  1 kB\nMemAvailable:   8192 kB\n";
        assert_eq!(memory_total(meminfo), 24 << 20);
        assert_eq!(field(meminfo, "MemAvailable:"), Some(8 << 20));
        assert_eq!(busy_ticks("cpu  10 1 5 1000 7 2 3 4 9 0\ncpu0 1 1 1\n"), 25);
        let stat = "77 (a) b) R) S 1 77 77 0 -1 4194304 9 9 9 9 120 30 0 0 20 0 9 0 555 9999 321 1";
        assert_eq!(parse_stat(stat), Some((150, 321)));
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_rate_is_measured_over_an_interval() {
        let start = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.sample(start, 100, 100), 0);
        assert_eq!(rate.sample(start + Duration::from_secs(2), 300, 100), 1000);
        // Too soon: the last rate stands, and the interval goes on.
        assert_eq!(rate.sample(start + Duration::from_millis(2100), 400, 100), 1000);
        assert_eq!(rate.sample(start + Duration::from_secs(4), 350, 100), 250);
    }

    #[test]
    fn this_machine_has_something_and_uses_some_of_it() {
        let capacity = capacity(4, Some(0));
        assert!(capacity.vcpus >= 4 && capacity.memory_bytes > 64 << 20);
        let mut usage = DomainUsage::default();
        Sampler::default().process(Instant::now(), std::process::id(), &mut usage);
        assert!(usage.memory_resident_bytes > 1 << 20);
    }
}
