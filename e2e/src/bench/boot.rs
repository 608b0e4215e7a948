//! From starting a VMM to the guest's init, and what memory the VMM needs for itself.
//!
//! Time: from just before the program is started until the first line of the guest's init is
//! read from its serial console. Kernel, initramfs and command line are the same for both.
//!
//! Memory: the sum of `Private_Dirty` over the mappings in `/proc/PID/smaps`, without the
//! guest's memory (the mapping that is exactly as large as it), once the guest serves HTTP. That
//! is anonymous memory and what was written of files' private copies; the program's text, which
//! the page cache holds and processes share, is not in it, and neither is the kernel's memory.

use std::io::Read as _;
use std::process::Stdio;
use std::time::Instant;

use serde_json::json;

use super::child::Owned;
use super::drover::{self, Vmm};
use super::guest;
use super::qemu;
use super::stage::{GUEST_MEMORY_MIB, Stage, Who};
use super::stats::{Spread, heading, rounded, row};
use crate::{Error, Result};

/// How the guest's init begins its lines.
const INIT_SAYS: &str = "drover-guest: ";
const CONSOLE_BYTES_MAX: usize = 1 << 20;
const BOOT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

/// One boot.
struct Booted {
    time_ms: f64,
    memory_kib: f64,
    /// The guest's own uptime when its init spoke: the rest is the VMM's.
    guest_uptime_ms: f64,
}

/// Measures and prints.
pub(super) fn measure(stage: &Stage, runs: u32, warm_up: u32) -> Result<()> {
    println!("guest: {GUEST_MEMORY_MIB} MiB, 1 vCPU, virtio-net and virtio-rng over PCI");
    println!("qemu: {}, -machine {}", qemu::version()?, qemu::MICROVM);
    let mut pairs = Vec::new();
    for run in 1..=warm_up + runs {
        let pair = [boot_drover(stage)?, boot_qemu(stage)?];
        let counted = run > warm_up;
        let label = if counted { format!("{}", run - warm_up) } else { "warm-up".to_owned() };
        for (who, booted) in [Who::Drover, Who::Qemu].into_iter().zip(&pair) {
            println!(
                "{label:>7} {:<7} init after {:>8.1} ms ({:.0} ms before the guest's clock began)  \
                 memory {:>8.0} KiB",
                who.name(),
                booted.time_ms,
                booted.time_ms - booted.guest_uptime_ms,
                booted.memory_kib
            );
        }
        if counted {
            pairs.push(pair);
        }
    }
    summary(&pairs);
    Ok(())
}

fn boot_drover(stage: &Stage) -> Result<Booted> {
    let runtime = drover::runtime()?;
    let start = Instant::now();
    let mut vmm = runtime.block_on(Vmm::start(stage, 0, 1, false))?;
    let mut said = Console::default();
    let reading = async {
        let mut console = vmm.console().await?;
        while !said.init_spoke() {
            let output = console
                .message()
                .await
                .map_err(|e| Error::other(format!("drover-vmm's console: {e}")))?
                .ok_or_else(|| Error::other(format!("the console ended: {said}")))?;
            said.hear(&output.data)?;
        }
        Ok(start.elapsed())
    };
    let time = runtime.block_on(async { tokio::time::timeout(BOOT_PATIENCE, reading).await });
    let time = time.map_err(|_| Error::other(format!("the guest does not boot: {said}")))??;
    guest::page(Who::Drover.address())?;
    let memory_kib = private_kib(vmm.process.pid())?;
    let guest_uptime_ms = said.uptime_ms();
    runtime.block_on(vmm.quit())?;
    Ok(Booted { time_ms: time.as_secs_f64() * 1000.0, memory_kib, guest_uptime_ms })
}

fn boot_qemu(stage: &Stage) -> Result<Booted> {
    let mut command = qemu::command(stage, qemu::MICROVM, 0, false, "stdio");
    command.stdout(Stdio::piped());
    let start = Instant::now();
    let mut process = Owned::start(command, &stage.path("microvm.log"))?;
    let mut output = process.stdout()?;
    let mut said = Console::default();
    let mut chunk = [0; 4096];
    while !said.init_spoke() {
        let read = output.read(&mut chunk).map_err(Error::io("cannot read", "QEMU's output"))?;
        if read == 0 {
            process.still_runs()?;
            return Err(Error::other(format!("QEMU's console ended: {said}")));
        }
        said.hear(&chunk[..read])?;
    }
    let time_ms = start.elapsed().as_secs_f64() * 1000.0;
    guest::page(Who::Qemu.address())?;
    let memory_kib = private_kib(process.pid())?;
    Ok(Booted { time_ms, memory_kib, guest_uptime_ms: said.uptime_ms() })
}

/// What came from a serial console so far.
#[derive(Default)]
struct Console(Vec<u8>);

impl Console {
    fn hear(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        if self.0.len() > CONSOLE_BYTES_MAX {
            return Err(Error::other("the guest's console says too much"));
        }
        Ok(())
    }

    /// A whole line of init is there.
    fn init_spoke(&self) -> bool {
        let text = String::from_utf8_lossy(&self.0);
        text.find(INIT_SAYS).is_some_and(|at| text[at..].contains('\n'))
    }

    fn uptime_ms(&self) -> f64 {
        let text = String::from_utf8_lossy(&self.0);
        let word = text.split_whitespace().find_map(|w| w.strip_prefix("uptime="));
        word.and_then(|w| w.parse::<f64>().ok()).map_or(f64::NAN, |seconds| seconds * 1000.0)
    }
}

impl std::fmt::Display for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// A process's private memory without its guest's; see the page above.
fn private_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).map_err(Error::io("cannot read", &path))?;
    let (kib, guests) = private_dirty_kib(&text, GUEST_MEMORY_MIB * 1024);
    if guests == 0 {
        return Err(Error::other(format!("{path}: no mapping has the size of the guest's memory")));
    }
    Ok(kib as f64)
}

/// KiB of private dirty memory outside of mappings of the guest's size, and how many of these
/// there are.
fn private_dirty_kib(smaps: &str, guest_kib: u64) -> (u64, usize) {
    let (mut sum, mut guests, mut is_guest) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (words.next(), words.next().and_then(|v| v.parse::<u64>().ok()));
        match (key, value) {
            (Some("Size:"), Some(size)) => {
                is_guest = size == guest_kib;
                guests += usize::from(is_guest);
            }
            (Some("Private_Dirty:"), Some(dirty)) if !is_guest => sum += dirty,
            _ => {}
        }
    }
    (sum, guests)
}

fn summary(pairs: &[[Booted; 2]]) {
    let of = |who: usize, what: fn(&Booted) -> f64| Spread::of(pairs.iter().map(|p| what(&p[who])));
    let ratio =
        |what: fn(&Booted) -> f64| Spread::of(pairs.iter().map(|p| what(&p[0]) / what(&p[1])));
    let (time, memory) = (|b: &Booted| b.time_ms, |b: &Booted| b.memory_kib);
    println!("{}", heading());
    println!("{}", row("drover to init (ms)", &of(0, time)));
    println!("{}", row("qemu   to init (ms)", &of(1, time)));
    println!("{}", row("drover memory (KiB)", &of(0, memory)));
    println!("{}", row("qemu   memory (KiB)", &of(1, memory)));
    println!("{}", row("time, drover / qemu", &ratio(time)));
    println!("{}", row("memory, drover / qemu", &ratio(memory)));
    let line = json!({
        "bench": "boot",
        "runs": pairs.len(),
        "time_ratio_p50": rounded(ratio(time).p50),
        "memory_ratio": rounded(ratio(memory).p50),
        "time_ratio": ratio(time).json(),
        "memory_ratio_spread": ratio(memory).json(),
        "drover_ms_p50": rounded(of(0, time).p50),
        "qemu_ms_p50": rounded(of(1, time).p50),
        "drover_memory_kib_p50": rounded(of(0, memory).p50),
        "qemu_memory_kib_p50": rounded(of(1, memory).p50),
    });
    println!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest's memory is left out by its size, whoever maps it; everything else counts.
    #[test]
    fn the_guests_memory_is_left_out() {
        let smaps = "1-2 r--p 0 fe:00 6 /usr/bin/x\nSize: 12 kB\nPrivate_Dirty: 3 kB\n\
                     2-3 rw-s 0 00:01 9 /memfd:ram\nSize: 131072 kB\nPrivate_Dirty: 6144 kB\n\
                     3-4 rw-p 0 00:00 0 [heap]\nSize: 40 kB\nPrivate_Dirty: 40 kB\n";
        assert_eq!(private_dirty_kib(smaps, 131_072), (43, 1));
    }

    /// A line of init that came in two parts is one line.
    #[test]
    fn init_is_heard_when_its_line_is_whole() {
        let mut console = Console::default();
        console.hear(b"drover-guest: ready uptime=7.5").unwrap();
        assert!(!console.init_spoke());
        console.hear(b"0 boot_id=x\r\n").unwrap();
        assert!(console.init_spoke());
        assert_eq!(console.uptime_ms(), 7500.0);
    }
}
