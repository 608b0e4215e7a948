//! The same guest is moved between two VMMs of one host, by Drover and by QEMU in turn.
//!
//! Each contestant boots its guest once and moves it to a new process again and again, so that
//! the guest also shows that it outlives that. While one is measured the other stands still. What
//! each says of itself is taken: QEMU's `total-time` and `downtime` of `query-migrate` (which end
//! when the source has sent everything), Drover's `total_us` and `pause_us` (which end when the
//! destination has said that the guest runs). `--probe` adds what a client sees.

use std::time::Duration;

use serde_json::{Map, Value};

use super::drover::Drover;
use super::guest;
use super::probe::Probe;
use super::qemu::{self, Qemu};
use super::stage::{GUEST_DIRTY_MIB, GUEST_MEMORY_MIB, Stage, Who};
use super::stats::{Spread, heading, rounded, row};
use crate::Result;

/// Longest pause that both aim at.
pub(super) const DOWNTIME: Duration = Duration::from_millis(100);

/// What a contestant says of one move.
pub(super) struct Moved {
    /// From the first command until the new process says that the guest runs.
    pub(super) wall_ms: f64,
    pub(super) total_ms: f64,
    pub(super) pause_ms: f64,
    /// More of it, for people.
    pub(super) detail: String,
}

/// A guest that can be moved.
pub(super) trait Mover {
    fn who(&self) -> Who;
    /// Moves it to a new process, which has taken the old one's place afterwards.
    fn migrate(&mut self) -> Result<Moved>;
    /// Stands still, so that the other is not disturbed.
    fn pause(&mut self) -> Result<()>;
    fn resume(&mut self) -> Result<()>;
}

/// Of the program's options, those of this benchmark.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub(super) vhost: bool,
    pub(super) probe: bool,
}

/// Measures and prints; what of it belongs into the last line.
pub(super) fn measure(
    stage: &Stage,
    runs: u32,
    warm_up: u32,
    options: Options,
) -> Result<Map<String, Value>> {
    println!(
        "guest: {GUEST_MEMORY_MIB} MiB, 1 vCPU, {GUEST_DIRTY_MIB} MiB dirtied all the time; \
         moved over TCP on loopback; both aim at a pause of at most {} ms, else with their defaults",
        DOWNTIME.as_millis()
    );
    println!(
        "qemu: {}, {}, vhost {}",
        qemu::version()?,
        qemu::MACHINE,
        if options.vhost { "on" } else { "off" }
    );
    let mut qemu = Qemu::boot(stage, options.vhost)?;
    guest::wait_at_work(stage, Who::Qemu)?;
    qemu.pause()?;
    let mut drover = Drover::boot(stage)?;
    guest::wait_at_work(stage, Who::Drover)?;
    drover.pause()?;

    let mut pairs = Vec::new();
    for run in 1..=warm_up + runs {
        let counted = run > warm_up;
        let label = if counted { format!("{}", run - warm_up) } else { "warm-up".to_owned() };
        let pair =
            [one(stage, &mut drover, &label, options)?, one(stage, &mut qemu, &label, options)?];
        if counted {
            pairs.push(pair);
        }
    }
    Ok(summary(&pairs, options))
}

/// One move, between two looks at the guest.
fn one(stage: &Stage, mover: &mut dyn Mover, label: &str, options: Options) -> Result<[f64; 3]> {
    let who = mover.who();
    mover.resume()?;
    let before = guest::wait_at_work(stage, who)?;
    let probe = options.probe.then(|| Probe::start(who.address()));
    let moved = mover.migrate()?;
    let after = guest::wait_at_work(stage, who)?;
    before.check_goes_on(&after)?;
    let silence = probe.map(Probe::finish).transpose()?;
    mover.pause()?;
    let silence_ms = silence.map_or(f64::NAN, |s| s.as_secs_f64() * 1000.0);
    println!(
        "{label:>7} {:<7} total {:>8.1} ms  pause {:>6.1} ms {} ({})",
        who.name(),
        moved.total_ms,
        moved.pause_ms,
        silence.map_or_else(String::new, |_| format!(" silence {silence_ms:>6.1} ms ")),
        moved.detail
    );
    Ok([moved.total_ms, moved.pause_ms, silence_ms])
}

fn summary(pairs: &[[[f64; 3]; 2]], options: Options) -> Map<String, Value> {
    let of = |who: usize, what: usize| Spread::of(pairs.iter().map(|pair| pair[who][what]));
    let ratio = |what: usize| Spread::of(pairs.iter().map(|p| p[0][what] / p[1][what]));
    println!("{}", heading());
    println!("{}", row("drover total (ms)", &of(0, 0)));
    println!("{}", row("qemu   total (ms)", &of(1, 0)));
    println!("{}", row("drover pause (ms)", &of(0, 1)));
    println!("{}", row("qemu   pause (ms)", &of(1, 1)));
    println!("{}", row("total, drover / qemu", &ratio(0)));
    println!("{}", row("pause, drover / qemu", &ratio(1)));
    let mut line = Map::new();
    let mut put = |key: &str, value: Value| drop(line.insert(key.to_owned(), value));
    put("runs", pairs.len().into());
    put("pause_ratio_p50", rounded(ratio(1).p50).into());
    put("total_ratio_p50", rounded(ratio(0).p50).into());
    put("pause_ratio", ratio(1).json());
    put("total_ratio", ratio(0).json());
    put("drover_pause_ms_p50", rounded(of(0, 1).p50).into());
    put("qemu_pause_ms_p50", rounded(of(1, 1).p50).into());
    put("drover_total_ms_p50", rounded(of(0, 0).p50).into());
    put("qemu_total_ms_p50", rounded(of(1, 0).p50).into());
    put("qemu_vhost", options.vhost.into());
    if options.probe {
        println!("{}", row("drover silence (ms)", &of(0, 2)));
        println!("{}", row("qemu   silence (ms)", &of(1, 2)));
        println!("{}", row("silence, drover / qemu", &ratio(2)));
        put("silence_ratio_p50", rounded(ratio(2).p50).into());
    }
    line
}
