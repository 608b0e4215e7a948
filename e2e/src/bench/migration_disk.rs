//! The second part of the migration benchmark: a guest with a local disk, which a process writes
//! to all the time, is moved to another process and another volume.
//!
//! Drover moves disk and memory as one migration; QEMU does it as virtualization managers have it
//! do ([`super::qemu`]). Each move goes to a blank thin volume that is made for it; that, and the
//! start of the new process, is before the clock starts for both. Measured are, the same way for
//! both: the time until the destination says that the guest runs; the bytes that went over the
//! loopback interface, which nothing else uses meanwhile; the longest silence between two replies
//! to pings, sent every 10 ms. The guest checks its own writes as it goes on, and in the end the
//! rest of the disk is read.

use serde_json::{Map, Value, json};

use super::drover::Drover;
use super::guest;
use super::migration::Mover;
use super::probe::Probe;
use super::qemu::Qemu;
use super::stage::{GUEST_DIRTY_MIB, GUEST_MEMORY_MIB, Guest, Stage, Who};
use super::stats::{Spread, heading, rounded, row};
use super::volume::{self, Volume};
use crate::{Error, Result};

const DISK_BYTES: u64 = 2 << 30;
/// What is on it before: a small system.
const FILLED_BYTES: u64 = 512 << 20;
/// What the process writes.
const WRITTEN_KIB_S: u32 = 2048;

/// What is said of each move, in this order.
const FIGURES: [&str; 4] = ["total (ms)", "sent (MiB)", "silence (ms)", "own pause (ms)"];
const KEYS: [&str; 4] = ["total", "bytes", "pause", "own_pause"];

/// The guest that is moved.
pub(super) fn guest(is_qemu_zero_blind: bool) -> Guest {
    let mut guest = Guest::small();
    guest.words += &format!(" drover.disk=/dev/vda drover.disk_kib={WRITTEN_KIB_S}");
    guest.volume = Some(name);
    guest.is_qemu_zero_blind = is_qemu_zero_blind;
    guest
}

fn name(who: Who, end: usize) -> String {
    format!("bench-{}{end}", who.name())
}

/// A guest and where its disk is.
struct Contestant<'a> {
    mover: Box<dyn Mover + 'a>,
    end: usize,
    // After the guest, which has it open.
    volume: Volume,
}

/// Measures and prints; what of it belongs into the last line.
pub(super) fn measure(stage: &Stage, runs: u32, warm_up: u32) -> Result<Map<String, Value>> {
    println!(
        "with a disk: {GUEST_MEMORY_MIB} MiB, {GUEST_DIRTY_MIB} MiB dirtied all the time; a thin \
         volume of {} MiB, {} MiB of it filled; {WRITTEN_KIB_S} KiB/s written and flushed; qemu: \
         blockdev-mirror over NBD{}, then migrate",
        DISK_BYTES >> 20,
        FILLED_BYTES >> 20,
        if stage.guest.is_qemu_zero_blind { "" } else { " (detect-zeroes=unmap)" },
    );
    let mut contestants = [boot(stage, Who::Drover)?, boot(stage, Who::Qemu)?];
    let mut pairs = Vec::new();
    for run in 1..=warm_up + runs {
        let counted = run > warm_up;
        let label = if counted { format!("{}", run - warm_up) } else { "warm-up".to_owned() };
        let mut pair = [[0.0; FIGURES.len()]; 2];
        for (contestant, figures) in contestants.iter_mut().zip(&mut pair) {
            *figures = one(stage, contestant, &label)?;
        }
        if counted {
            pairs.push(pair);
        }
    }
    for contestant in contestants {
        let Contestant { mover, volume, .. } = contestant;
        drop(mover);
        volume::check(&volume.path(), FILLED_BYTES)?;
    }
    Ok(summary(&pairs))
}

fn boot(stage: &Stage, who: Who) -> Result<Contestant<'_>> {
    let volume = Volume::make(&name(who, 0), DISK_BYTES)?;
    volume::fill(&volume.path(), FILLED_BYTES)?;
    let mut mover: Box<dyn Mover> = match who {
        Who::Drover => Box::new(Drover::boot(stage)?),
        Who::Qemu => Box::new(Qemu::boot(stage, false)?),
    };
    guest::wait_at_work(stage, who)?;
    mover.pause()?;
    Ok(Contestant { mover, end: 0, volume })
}

/// One move, between two looks at the guest.
fn one(
    stage: &Stage,
    contestant: &mut Contestant<'_>,
    label: &str,
) -> Result<[f64; FIGURES.len()]> {
    let Contestant { mover, end, volume } = contestant;
    let who = mover.who();
    let blank = Volume::make(&name(who, 1 - *end), DISK_BYTES)?;
    // What the other one has left behind.
    rustix::fs::sync();
    mover.resume()?;
    let before = guest::wait_at_work(stage, who)?;
    let probe = Probe::start(who.address());
    let sent = loopback_bytes()?;
    let moved = mover.migrate()?;
    let sent = loopback_bytes()? - sent;
    let after = guest::wait_at_work(stage, who)?;
    before.check_goes_on(&after)?;
    let silence_ms = probe.finish()?.as_secs_f64() * 1000.0;
    mover.pause()?;
    *end = 1 - *end;
    // The one that it left is removed.
    *volume = blank;
    let sent_mib = sent as f64 / f64::from(1 << 20);
    println!(
        "{label:>7} {:<7} total {:>8.1} ms  sent {sent_mib:>7.1} MiB  silence {silence_ms:>6.1} ms  \
         own pause {:>6.1} ms ({})",
        who.name(),
        moved.wall_ms,
        moved.pause_ms,
        moved.detail
    );
    Ok([moved.wall_ms, sent_mib, silence_ms, moved.pause_ms])
}

/// What has gone over the loopback interface.
fn loopback_bytes() -> Result<u64> {
    let path = "/sys/class/net/lo/statistics/tx_bytes";
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    text.trim().parse().map_err(|_| Error::other(format!("{path}: {text:?} is no number")))
}

fn summary(pairs: &[[[f64; FIGURES.len()]; 2]]) -> Map<String, Value> {
    let mut line = Map::new();
    println!("{}", heading());
    for (what, (label, key)) in FIGURES.into_iter().zip(KEYS).enumerate() {
        let of = |who: usize| Spread::of(pairs.iter().map(|pair| pair[who][what]));
        let ratio = Spread::of(pairs.iter().map(|pair| pair[0][what] / pair[1][what]));
        println!("{label}, with a disk");
        println!("{}", row("  drover", &of(0)));
        println!("{}", row("  qemu", &of(1)));
        println!("{}", row("  drover / qemu", &ratio));
        line.insert(format!("disk_{key}_ratio_p50"), rounded(ratio.p50).into());
        line.insert(format!("disk_{key}_ratio"), ratio.json());
        line.insert(format!("drover_disk_{key}_p50"), rounded(of(0).p50).into());
        line.insert(format!("qemu_disk_{key}_p50"), rounded(of(1).p50).into());
    }
    line.insert("disk_runs".to_owned(), json!(pairs.len()));
    line
}
