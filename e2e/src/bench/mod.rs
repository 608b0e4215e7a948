//! Benchmarks: Drover and a peer in turn, in one run, on one host.
//!
//! Times in an emulated host mean nothing by themselves; the ratio of two neighbours in the same
//! run does. So a run is a row of pairs, Drover's and QEMU's, and the result is how the pairs'
//! ratios spread ([`stats`]). The last line is one JSON object.
//!
//! ```text
//!   drover-lab bench migration            here: a lab host, programs pushed, output passed on
//!   └─ ssh ─ drover-lab bench --here …    there: the measurement itself
//!            ├─ drover-vmm   (gRPC on its socket)   [drover]
//!            └─ qemu-system  (QMP on its socket)    [qemu]
//! ```
//!
//! Start reading at [`migration`], [`migration_disk`], [`disk`] and [`boot`]. Every guest that is measured is asked over HTTP
//! whether it lives, is still the same and has lost nothing ([`guest`]).

mod boot;
mod child;
mod disk;
mod drover;
mod guest;
mod migration;
mod migration_disk;
mod probe;
mod qemu;
mod stage;
mod stats;
mod volume;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value};

use stage::{Guest, Stage};

use crate::image::ensure_fio;
use crate::lab::{Lab, LabOptions};
use crate::process::run;
use crate::{Error, Result, paths};

/// Where the programs are on a host.
const REMOTE_LAB: &str = "/usr/local/bin/drover-lab";
const REMOTE_VMM: &str = "/usr/local/bin/drover-vmm";
const REMOTE_FIO: &str = "/usr/local/share/drover-fio.cpio";
const HOST: &str = "host1";
const RUNS_MAX: u32 = 1000;

/// What `drover-lab bench` takes.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
    /// Pairs that are measured.
    #[arg(long, global = true, default_value_t = 10)]
    runs: u32,
    /// Pairs before them, which are not.
    #[arg(long, global = true, default_value_t = 1)]
    warm_up: u32,
    /// Use the lab of that name if it is up, and leave it up.
    #[arg(long, global = true)]
    keep: bool,
    /// Measure on this machine, which must have KVM, in place of a lab host.
    #[arg(long, global = true)]
    here: bool,
    /// With --here: the VMM.
    #[arg(long, global = true, default_value = REMOTE_VMM)]
    vmm: PathBuf,
    /// With --here: the folder of the guest's vmlinuz and initramfs.img.
    #[arg(long, global = true, default_value = "/var/lib/drover/boot")]
    boot_dir: PathBuf,
    /// With --here: the archive that puts fio into a guest's initramfs.
    #[arg(long, global = true, default_value = REMOTE_FIO)]
    fio: PathBuf,
}

#[derive(Debug, Clone, Subcommand)]
enum What {
    /// Move a busy guest between two VMMs of one host, without a disk and with one: total time,
    /// pause, bytes.
    Migration {
        /// QEMU's network device handled in the host's kernel (vhost).
        #[arg(long)]
        vhost: bool,
        /// Also ping the guest every 10 ms while it moves, and show the longest silence.
        #[arg(long)]
        probe: bool,
        /// Only one of the two guests.
        #[arg(long)]
        only: Option<Part>,
        /// QEMU's mirror sends a disk's zeros as bytes (no detect-zeroes).
        #[arg(long)]
        qemu_zeros: bool,
    },
    /// fio in a guest on a thin volume: requests a second, MiB a second, fsync.
    Disk {
        /// Empty the host's page cache before each measurement.
        #[arg(long)]
        cold: bool,
        /// QEMU goes past the host's page cache (cache=none).
        #[arg(long)]
        qemu_direct: bool,
        /// Only this kind of work; may be given several times.
        #[arg(long, value_name = "WORK", value_parser = disk::work_names())]
        only: Vec<String>,
    },
    /// From starting a VMM to the guest's init, and the VMM's own memory.
    Boot,
}

/// The guests of the migration benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The one without a disk.
    Memory,
    /// The one with a disk.
    Disk,
}

/// Runs a benchmark in the lab of that name, or on this machine.
///
/// # Errors
/// When a guest dies or comes to harm, or anything does not start or answer in time.
pub fn main(lab: &str, args: &BenchArgs) -> Result<ExitCode> {
    if !(1..=RUNS_MAX).contains(&args.runs) {
        return Err(Error::other(format!("--runs {}: 1 to {RUNS_MAX} are accepted", args.runs)));
    }
    if args.here { measure(args).map(|()| ExitCode::SUCCESS) } else { in_lab(lab, args) }
}

fn measure(args: &BenchArgs) -> Result<()> {
    let stage = |guest| Stage::build(&args.vmm, &args.boot_dir, guest);
    let (runs, warm_up) = (args.runs, args.warm_up);
    match &args.what {
        &What::Migration { vhost, probe, only, qemu_zeros } => {
            let mut line = Map::from_iter([("bench".to_owned(), "migration".into())]);
            if only != Some(Part::Disk) {
                let options = migration::Options { vhost, probe };
                let stage = stage(Guest::small())?;
                line.append(&mut migration::measure(&stage, runs, warm_up, options)?);
            }
            if only != Some(Part::Memory) {
                let stage = stage(migration_disk::guest(qemu_zeros))?;
                line.append(&mut migration_disk::measure(&stage, runs, warm_up)?);
            }
            println!("{}", Value::from(line));
            Ok(())
        }
        What::Disk { cold, qemu_direct, only } => {
            let options =
                disk::Options { is_cold: *cold, is_qemu_direct: *qemu_direct, only: only.clone() };
            disk::measure(&stage(disk::guest(&args.fio, &options)?)?, runs, warm_up, &options)
        }
        What::Boot => boot::measure(&stage(Guest::small())?, runs, warm_up),
    }
}

fn in_lab(name: &str, args: &BenchArgs) -> Result<ExitCode> {
    let vmm = paths::program("drover-vmm");
    if !vmm.exists() {
        return Err(Error::other(format!("{} is not built", vmm.display())));
    }
    let (lab, mine) = match Lab::open(name) {
        Ok(lab) if args.keep => (lab, false),
        _ => {
            // One core for the guest, one for who moves it.
            let options =
                LabOptions { name: name.to_owned(), hosts: 1, vcpus: 2, ..Default::default() };
            (Lab::up(&options, |line| println!("{line}"))?, !args.keep)
        }
    };
    let result = on_host(&lab, args);
    if mine {
        lab.down()?;
    }
    result
}

fn on_host(lab: &Lab, args: &BenchArgs) -> Result<ExitCode> {
    let ssh = lab.ssh(HOST)?;
    for (name, to) in [("drover-lab", REMOTE_LAB), ("drover-vmm", REMOTE_VMM)] {
        let stripped = paths::run_dir(lab.name()).join(name);
        run(Command::new("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(&stripped)
            .arg(paths::program(name)))?;
        ssh.push(&stripped, to)?;
    }
    if matches!(args.what, What::Disk { .. }) {
        ssh.push(&ensure_fio()?, REMOTE_FIO)?;
    }
    let mut words = vec![REMOTE_LAB.to_owned(), "bench".to_owned()];
    words.extend(args.words());
    words.push("--here".to_owned());
    let status = ssh
        .command(&words)?
        .stdin(Stdio::null())
        .status()
        .map_err(|e| Error::other(format!("cannot run ssh: {e}")))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl BenchArgs {
    /// As they are typed.
    fn words(&self) -> Vec<String> {
        let mut flags = Vec::new();
        let mut flag = |name: &str, is_set: bool| flags.extend(is_set.then(|| name.to_owned()));
        let mut words = Vec::new();
        match &self.what {
            &What::Migration { vhost, probe, only, qemu_zeros } => {
                words.push("migration".to_owned());
                flag("--vhost", vhost);
                flag("--probe", probe);
                flag("--only=memory", only == Some(Part::Memory));
                flag("--only=disk", only == Some(Part::Disk));
                flag("--qemu-zeros", qemu_zeros);
            }
            What::Disk { cold, qemu_direct, only } => {
                words.push("disk".to_owned());
                flag("--cold", *cold);
                flag("--qemu-direct", *qemu_direct);
                only.iter().for_each(|work| flag(&format!("--only={work}"), true));
            }
            What::Boot => words.push("boot".to_owned()),
        }
        words.append(&mut flags);
        words.push(format!("--runs={}", self.runs));
        words.push(format!("--warm-up={}", self.warm_up));
        words
    }
}
