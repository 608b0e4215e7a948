//! Process 1 of the lab's guests, in an initramfs with a stock kernel and a few of its modules.
//!
//! It loads `/modules/*`, takes its address from the kernel command line, answers HTTP with a
//! counter that lives in memory, keeps memory dirty on request, and obeys the power button, its
//! console and HTTP, so that a test can end the guest in each way that a guest can end.
//!
//! | parameter | meaning |
//! | --- | --- |
//! | `drover.ip=10.78.0.11/24` | address of eth0 |
//! | `drover.dirty_mib=2` | a process dirties so much memory, again and again, and checks what it wrote |
//! | `drover.dirty_interval_ms=20` | its rest between two passes (0: none) |
//! | `drover.disk=/dev/vda` | a process writes to this disk, on its last quarter, with flushes, and checks what it wrote |
//! | `drover.disk_kib=2048` | so much a second |
//! | `drover.disk_check=1` | it first says up to where an earlier boot's writes are all there |
//! | `drover.fill_mib=16` | memory filled once with noise, checked by `GET /check` |
//! | `drover.root=/dev/vda` | not a guest but a lab host: mount this as root, run its init |
//!
//! The same binary starts the lab's hosts ([`host`]), because there too a module has to be
//! loaded before the disk can be mounted, and nothing else.

mod control;
mod disk;
mod host;
mod http;
mod load;
mod sys;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::load::Shared;

fn main() {
    // Process 1 must not end: the kernel would panic, and the panic would hide the reason.
    if let Err(error) = run() {
        println!("drover-guest: {error}");
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn run() -> Result<(), String> {
    sys::mount_kernel_filesystems()?;
    sys::open_console()?;
    sys::load_modules("/modules");
    let options = Options::read()?;
    if let Some(device) = &options.root {
        return host::hand_over(device);
    }

    let shared = Arc::new(Shared::new()?);
    if let Some(address) = &options.address {
        sys::configure_network("eth0", address)?;
    }
    // Before the first thread: a child of a threaded process may not allocate.
    load::start_dirtying(&shared, options.dirty_mib, options.dirty_interval)?;
    if let Some(device) = &options.disk {
        disk::start_writing(&shared, device, options.disk_kib, options.disk_check)?;
    }
    let fill = Arc::new(load::Fill::new(options.fill_mib));
    control::watch_power_button();
    control::watch_console(Arc::clone(&shared));
    if options.address.is_some() {
        http::serve(&shared, &fill)?;
    }
    println!(
        "drover-guest: ready address={} uptime={} boot_id={}",
        options.address.as_deref().unwrap_or("none"),
        sys::uptime_seconds(),
        sys::boot_id()
    );

    let start = Instant::now();
    let mut ticks = 0;
    let mut clocks = load::Clocks::default();
    loop {
        // One thread wakes for all of this: each wake costs an emulated host a millisecond.
        std::thread::sleep(Duration::from_millis(200));
        clocks.look(&shared);
        sys::reap_children();
        let due = start.elapsed().as_secs();
        shared.count(due.saturating_sub(ticks));
        ticks = due;
    }
}

/// What the kernel command line asks for.
struct Options {
    address: Option<String>,
    root: Option<String>,
    dirty_mib: usize,
    dirty_interval: Duration,
    disk: Option<String>,
    disk_kib: usize,
    disk_check: bool,
    fill_mib: usize,
}

impl Options {
    fn read() -> Result<Self, String> {
        let line = std::fs::read_to_string("/proc/cmdline")
            .map_err(|e| format!("cannot read /proc/cmdline: {e}"))?;
        let value = |key: &str| {
            line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
        };
        let number = |key: &str, default: usize| match value(key) {
            None => Ok(default),
            Some(text) => {
                text.parse().map_err(|_| format!("{key}={text}: a whole number is expected"))
            }
        };
        Ok(Self {
            address: value("drover.ip").map(str::to_owned),
            root: value("drover.root").map(str::to_owned),
            dirty_mib: number("drover.dirty_mib", 0)?,
            dirty_interval: Duration::from_millis(number("drover.dirty_interval_ms", 20)? as u64),
            disk: value("drover.disk").map(str::to_owned),
            disk_kib: number("drover.disk_kib", 2048)?,
            disk_check: number("drover.disk_check", 0)? != 0,
            fill_mib: number("drover.fill_mib", 0)?,
        })
    }
}
