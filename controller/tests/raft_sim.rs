//! The Raft core under a simulator: one thread, one seed, no clock but the simulated one.
//!
//! A seed decides how long each message takes, which connections break and when, which
//! processes die (also in the middle of a write, losing what was not synced), which links are
//! cut, and what the clients do. The code under test is the one that runs. Checked all along:
//!
//! - one leader a term at most
//! - the same entry and the same state hash at an index, on every member, in every life
//! - the clients' histories are linearizable, key by key; what was acknowledged stays
//! - once the faults stop, the group works again and all members become equal
//!
//! `DROVER_SIM_SEEDS=1000` (or `1000..2000`) runs more seeds, `DROVER_SIM_SEED=17` replays one
//! and prints what happens.

#![allow(clippy::unwrap_used)]

mod sim;

use std::ops::Range;

use sim::Settings;
use sim::world::{self, World};

const SEEDS_DEFAULT: Range<u64> = 0..50;

/// The seed to replay.
fn seed_to_replay() -> Option<u64> {
    let value = std::env::var("DROVER_SIM_SEED").ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("DROVER_SIM_SEED={value}: not a number")))
}

/// The seeds to run: so many, or from one to (without) another.
fn seeds() -> Range<u64> {
    let Ok(value) = std::env::var("DROVER_SIM_SEEDS") else { return SEEDS_DEFAULT };
    let (from, to) = value.split_once("..").unwrap_or(("0", &value));
    let number = |text: &str| text.parse().ok();
    match (number(from), number(to)) {
        (Some(from), Some(to)) => from..to,
        _ => panic!("DROVER_SIM_SEEDS={value}: give 1000, or 1000..2000"),
    }
}

fn run(settings: Settings) -> Result<world::Summary, String> {
    World::new(settings).run()
}

#[test]
fn faults_lose_nothing_and_end() {
    if let Some(seed) = seed_to_replay() {
        let summary = run(Settings { trace: true, ..Settings::of(seed) });
        panic!("seed {seed} (a replay always ends here): {summary:#?}");
    }
    let mut sum = world::Summary::default();
    for seed in seeds() {
        match run(Settings::of(seed)) {
            Ok(summary) => sum += summary,
            Err(what) => panic!(
                "DROVER_SIM_SEED={seed} cargo test -p drover-controller --test raft_sim faults_lose\n{what}"
            ),
        }
    }
    println!("{sum:#?}");
    // A simulator in which nothing happens proves nothing.
    assert!(sum.acknowledged > 1000, "{sum:?}");
    assert!(sum.crashes > 100 && sum.crashes_in_writes > 10, "{sum:?}");
    assert!(sum.snapshots > 10 && sum.leaders > 100 && sum.reads > 1000, "{sum:?}");
}

#[test]
fn a_seed_decides_everything() {
    for seed in [3, 4] {
        let first = run(Settings::of(seed)).unwrap();
        let again = run(Settings::of(seed)).unwrap();
        assert_eq!(first.trace_hash, again.trace_hash, "seed {seed}");
        assert_ne!(first.trace_hash, 0);
    }
    let one = run(Settings::of(3)).unwrap();
    let other = run(Settings::of(4)).unwrap();
    assert_ne!(one.trace_hash, other.trace_hash);
}

/// The checks do see what they are for: a disk that says "synced" and is not loses
/// acknowledged writes, and some check must say so.
#[test]
fn a_disk_that_lies_is_found_out() {
    let found = (0..40)
        .filter(|seed| {
            let settings = Settings { disks_lie: true, ..Settings::of(*seed) };
            // The lie may also break Raft's own assertions.
            std::panic::catch_unwind(|| run(settings)).map_or(true, |result| result.is_err())
        })
        .count();
    assert!(found > 0, "40 runs on lying disks, and nobody noticed");
}

/// A single member, which commits without any message.
#[test]
fn one_member_alone() {
    for seed in 0..5 {
        let settings = Settings { members: 1, ..Settings::of(seed) };
        let summary = run(settings).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        assert!(summary.acknowledged > 20, "{summary:?}");
    }
}

/// Five members bear two failures.
#[test]
fn five_members() {
    for seed in 0..5 {
        let settings = Settings { members: 5, ..Settings::of(seed) };
        let summary = run(settings).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        assert!(summary.acknowledged > 10, "{summary:?}");
    }
}
