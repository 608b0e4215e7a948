//! fio in the same guest on the same thin volume, under Drover and under QEMU in turn.
//!
//! Both guests are up all the time and have the volume as their disk; while one works the other
//! stands still. (fio writes to the bare disk, so they cannot harm each other.) A round takes
//! each kind of work once with each contestant, one right after the other, and who begins changes
//! from round to round. Before each the host writes out what is dirty.
//!
//! Drover's volumes go through the host's page cache, and so do QEMU's here (`cache=writeback`,
//! `aio=io_uring`); `--qemu-direct` takes `cache=none` instead. Reads find the volume in that
//! cache, so that what is measured is the way through the VMM and not the emulated disk under it;
//! `--cold` empties the cache before each work.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::drover::Drover;
use super::guest;
use super::migration::Mover;
use super::qemu::{self, Qemu};
use super::stage::{Guest, Stage, Who};
use super::stats::{self, Spread, heading, rounded};
use super::volume::{self, Volume};
use crate::client::{fetch_path, fetch_slow};
use crate::{Error, Result};

const VOLUME: &str = "bench-disk";
const VOLUME_BYTES: u64 = 1 << 30;
/// fio and its libraries lie in it as well.
const GUEST_MEMORY_MIB: u64 = 384;
const RUNTIME: &str = "2s";
const RAMP: &str = "500ms";
/// Many times what fio takes: a host with other work may stand still for a minute.
const FIO_PATIENCE: Duration = Duration::from_secs(180);

/// Of the program's options, those of this benchmark.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) is_cold: bool,
    pub(super) is_qemu_direct: bool,
    /// Names of the kinds of work that are wanted; none: all.
    pub(super) only: Vec<String>,
}

/// One kind of work.
#[derive(Debug, Clone, Copy)]
struct Work {
    name: &'static str,
    /// What fio is told besides what is the same for all.
    arguments: &'static [&'static str],
    figure: Figure,
}

/// What is read from fio's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    /// Requests a second of this side, `read` or `write`.
    Iops(&'static str),
    MibPerSecond(&'static str),
    /// The median fsync, µs.
    FsyncUs,
}

const WORKS: [Work; 7] = [
    Work {
        name: "rand_read_4k_qd1",
        arguments: &["--rw=randread", "--bs=4k", "--iodepth=1", "--ioengine=io_uring"],
        figure: Figure::Iops("read"),
    },
    Work {
        name: "rand_read_4k_qd32",
        arguments: &["--rw=randread", "--bs=4k", "--iodepth=32", "--ioengine=io_uring"],
        figure: Figure::Iops("read"),
    },
    Work {
        name: "rand_write_4k_qd1",
        arguments: &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--ioengine=io_uring"],
        figure: Figure::Iops("write"),
    },
    Work {
        name: "rand_write_4k_qd32",
        arguments: &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--ioengine=io_uring"],
        figure: Figure::Iops("write"),
    },
    Work {
        name: "seq_read_1m",
        arguments: &["--rw=read", "--bs=1M", "--iodepth=4", "--ioengine=io_uring"],
        figure: Figure::MibPerSecond("read"),
    },
    Work {
        name: "seq_write_1m",
        arguments: &["--rw=write", "--bs=1M", "--iodepth=4", "--ioengine=io_uring"],
        figure: Figure::MibPerSecond("write"),
    },
    Work {
        name: "fsync_latency",
        arguments: &["--rw=randwrite", "--bs=4k", "--fsync=1", "--ioengine=psync"],
        figure: Figure::FsyncUs,
    },
];

/// A kind of work, and what was measured: Drover's figure and QEMU's.
struct Row {
    work: Work,
    pairs: Vec<[f64; 2]>,
}

impl Row {
    /// Drover's figures, QEMU's, their ratios.
    fn spreads(&self) -> [Spread; 3] {
        let of = |who: usize| Spread::of(self.pairs.iter().map(|pair| pair[who]));
        let ratios = self.pairs.iter().map(|[drover, qemu]| self.work.ratio(*drover, *qemu));
        [of(0), of(1), Spread::of(ratios)]
    }
}

/// What `--only` takes.
pub(super) fn work_names() -> [&'static str; WORKS.len()] {
    WORKS.map(|work| work.name)
}

impl Work {
    /// Where the guest runs it.
    fn path(&self, seed: u32) -> String {
        let mut path = format!("/fio?--name={}&--randseed={seed}", self.name);
        let always = ["--filename=/dev/vda", "--direct=1", "--thread", "--norandommap"];
        let times = [format!("--runtime={RUNTIME}"), format!("--ramp_time={RAMP}")];
        let all = self.arguments.iter().copied().chain(always);
        for argument in all.chain(["--time_based", "--output-format=json"]) {
            path.push('&');
            path.push_str(argument);
        }
        times.iter().for_each(|time| path.extend(["&", time]));
        path
    }

    /// How many times as good the first figure is as the second.
    fn ratio(&self, drover: f64, qemu: f64) -> f64 {
        if self.figure == Figure::FsyncUs { qemu / drover } else { drover / qemu }
    }
}

impl Figure {
    fn unit(self) -> &'static str {
        match self {
            Self::Iops(_) => "iops",
            Self::MibPerSecond(_) => "mib_s",
            Self::FsyncUs => "us",
        }
    }

    /// From what fio said.
    fn read(self, text: &str) -> Result<f64> {
        let wrong = |what: &str| Error::other(format!("fio's answer: {what}: {text}"));
        // Warnings stand before it.
        let json = text.find('{').map_or("", |at| &text[at..]);
        let answer: Value = serde_json::from_str(json).map_err(|e| wrong(&e.to_string()))?;
        let job = &answer["jobs"][0];
        if job["error"] != 0 {
            return Err(wrong("an error"));
        }
        let figure = match self {
            Self::Iops(side) => &job[side]["iops"],
            Self::MibPerSecond(side) => &job[side]["bw_bytes"],
            Self::FsyncUs => &job["sync"]["lat_ns"]["percentile"]["50.000000"],
        };
        let figure = figure.as_f64().filter(|f| *f > 0.0).ok_or_else(|| wrong("no figure"))?;
        Ok(match self {
            Self::Iops(_) => figure,
            Self::MibPerSecond(_) => figure / f64::from(1 << 20),
            Self::FsyncUs => figure / 1000.0,
        })
    }
}

/// A guest that does nothing until it is asked to run fio, which lies in this archive.
pub(super) fn guest(fio: &Path, options: &Options) -> Result<Guest> {
    if !fio.exists() {
        return Err(Error::other(format!("{}: not found, and needed", fio.display())));
    }
    Ok(Guest {
        memory_mib: GUEST_MEMORY_MIB,
        words: String::new(),
        more: Some(fio.to_owned()),
        volume: Some(|_, _| VOLUME.to_owned()),
        is_qemu_direct: options.is_qemu_direct,
        is_qemu_zero_blind: false,
    })
}

/// Measures and prints.
pub(super) fn measure(stage: &Stage, runs: u32, warm_up: u32, options: &Options) -> Result<()> {
    let cache = if options.is_qemu_direct { "none" } else { "writeback" };
    println!(
        "guest: {GUEST_MEMORY_MIB} MiB, 1 vCPU, a thin volume of {} MiB on virtio-blk; \
         fio with O_DIRECT for {RUNTIME} after {RAMP}",
        VOLUME_BYTES >> 20
    );
    println!("drover: io_uring, through the host's page cache");
    println!("qemu: {}, {}, io_uring, an iothread, cache={cache}", qemu::version()?, qemu::MACHINE);
    println!(
        "the host's page cache: {}",
        if options.is_cold { "emptied each time" } else { "warm" }
    );
    let volume = Volume::make(VOLUME, VOLUME_BYTES)?;
    volume::fill(&volume.path(), VOLUME_BYTES)?;
    let mut qemu = Qemu::boot(stage, false)?;
    guest::page(Who::Qemu.address())?;
    qemu.pause()?;
    let mut drover = Drover::boot(stage)?;
    guest::page(Who::Drover.address())?;
    drover.pause()?;
    if !options.is_cold {
        // The kernel forgot what was filled when nobody had the volume open. Otherwise whoever is
        // first in a row would read from the disk, and the other what the first has fetched.
        volume::check(&volume.path(), VOLUME_BYTES)?;
    }

    let is_wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|o| o == name);
    let mut rows: Vec<Row> = WORKS
        .into_iter()
        .filter(|work| is_wanted(work.name))
        .map(|work| Row { work, pairs: Vec::new() })
        .collect();
    let result = rounds(&mut drover, &mut qemu, &mut rows, [warm_up, runs], options);
    rows.retain(|row| !row.pairs.is_empty());
    summary(&rows);
    result?;
    println!("{}", line(&rows, options));
    Ok(())
}

/// Rounds that are not counted, and those that are.
fn rounds(
    drover: &mut dyn Mover,
    qemu: &mut dyn Mover,
    rows: &mut [Row],
    [warm_up, runs]: [u32; 2],
    options: &Options,
) -> Result<()> {
    for run in 1..=warm_up + runs {
        let counted = run > warm_up;
        let label = if counted { format!("{}", run - warm_up) } else { "warm-up".to_owned() };
        for Row { work, pairs } in rows.iter_mut() {
            let pair = if run % 2 == 0 {
                let first = one(drover, work, run, options)?;
                [first, one(qemu, work, run, options)?]
            } else {
                let first = one(qemu, work, run, options)?;
                [one(drover, work, run, options)?, first]
            };
            let [drover, qemu] = pair;
            println!(
                "{label:>7} {:<20} drover {drover:>9.1}  qemu {qemu:>9.1} {:<5}  ratio {:>6.3}",
                work.name,
                work.figure.unit(),
                work.ratio(drover, qemu)
            );
            if counted {
                pairs.push(pair);
            }
        }
    }
    Ok(())
}

/// One kind of work in one guest.
fn one(mover: &mut dyn Mover, work: &Work, seed: u32, options: &Options) -> Result<f64> {
    rustix::fs::sync();
    if options.is_cold {
        let path = "/proc/sys/vm/drop_caches";
        std::fs::write(path, "1").map_err(Error::io("cannot write", path))?;
    }
    mover.resume()?;
    let address = mover.who().address();
    let text = fetch_slow(address, &work.path(seed), FIO_PATIENCE).map_err(|error| {
        // Other threads of the guest answer this: they tell a guest that hangs from its disk.
        let page = match fetch_path(address, "/") {
            Ok(_) => "answers".to_owned(),
            Err(error) => format!("does not: {error}"),
        };
        let who = mover.who().name();
        Error::other(format!("{who}, {}: {error}; the guest's page {page}", work.name))
    })?;
    mover.pause()?;
    work.figure.read(&text)
}

fn summary(rows: &[Row]) {
    println!("{}", heading());
    for row in rows {
        let [drover, qemu, ratio] = row.spreads();
        println!("{} ({})", row.work.name, row.work.figure.unit());
        println!("{}", stats::row("  drover", &drover));
        println!("{}", stats::row("  qemu", &qemu));
        println!("{}", stats::row("  ratio, above 1: better", &ratio));
    }
}

/// The last line.
fn line(rows: &[Row], options: &Options) -> Value {
    let mut line = json!({
        "bench": "disk",
        "runs": rows.first().map_or(0, |row| row.pairs.len()),
        "cold": options.is_cold,
        "qemu_cache": if options.is_qemu_direct { "none" } else { "writeback" },
    });
    for row in rows {
        let (name, unit) = (row.work.name, row.work.figure.unit());
        let [drover, qemu, ratio] = row.spreads();
        line[format!("{name}_ratio")] = rounded(ratio.p50).into();
        line[format!("{name}_ratio_spread")] = ratio.json();
        line[format!("drover_{name}_{unit}_p50")] = rounded(drover.p50).into();
        line[format!("qemu_{name}_{unit}_p50")] = rounded(qemu.p50).into();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"fio: a warning
        {"jobs":[{"error":0,"read":{"iops":1000.5,"bw_bytes":2097152},"write":{"iops":0.0},
        "sync":{"lat_ns":{"percentile":{"50.000000":1500}}}}]}"#;

    /// Figures are found where fio 3.39 puts them, and one that is not there is no zero.
    #[test]
    fn figures_are_read() {
        let read = |figure: Figure| figure.read(ANSWER).unwrap();
        assert_eq!(read(Figure::Iops("read")), 1000.5);
        assert_eq!(read(Figure::MibPerSecond("read")), 2.0);
        assert_eq!(read(Figure::FsyncUs), 1.5);
        Figure::Iops("write").read(ANSWER).unwrap_err();
        Figure::Iops("read").read("fio: cannot").unwrap_err();
        let failed = ANSWER.replace("\"error\":0", "\"error\":5");
        Figure::Iops("read").read(&failed).unwrap_err();
    }

    /// Above 1 is better than QEMU, also where less is better.
    #[test]
    fn above_one_is_better() {
        for work in &WORKS {
            let (good, bad) = if work.figure == Figure::FsyncUs { (1.0, 2.0) } else { (2.0, 1.0) };
            assert_eq!(work.ratio(good, bad), 2.0, "{}", work.name);
        }
    }
}
