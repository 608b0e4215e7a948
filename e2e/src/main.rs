//! `drover-lab`: the lab by hand. See the library's first page.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use clap::{Args, Parser, Subcommand, ValueEnum};
use drover_e2e::cluster::servers;
use drover_e2e::lab::{Lab, LabOptions};
use drover_e2e::switch::Segment;
use drover_e2e::vpsctl::Vpsctl;
use drover_e2e::{Error, Result};

#[derive(Parser)]
#[command(
    name = "drover-lab",
    about = "Real hosts in QEMU, a switch between them, and this machine as a client"
)]
struct Cli {
    /// Several labs live side by side under different names.
    #[arg(long, global = true, default_value = "lab", env = "DROVER_LAB")]
    name: String,
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Start a lab and wait until its hosts answer.
    Up(UpArgs),
    /// Take it down: hosts, switch, namespace, disks.
    Down,
    /// What runs.
    Status,
    /// A command, or a shell, on a host.
    Ssh {
        host: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy a file to a host (replaces what is there, running or not).
    Push { host: String, file: PathBuf, to: String },
    /// What a host said on its serial console.
    Console { host: String },
    /// Pull a host's power cable (SIGKILL to its QEMU).
    Kill { host: String },
    /// Start a killed host again, with the disk it had.
    Start { host: String },
    /// Pull a host's network cables.
    Cut {
        host: String,
        #[arg(default_value = "both")]
        cable: Cable,
    },
    /// Plug them in again.
    Join {
        host: String,
        #[arg(default_value = "both")]
        cable: Cable,
    },
    /// Make a host's cables slow or lossy (both ways; 0 0 makes them good again).
    Link {
        host: String,
        #[arg(long, default_value_t = 0)]
        delay_ms: u32,
        /// Probability of losing a frame, 0 to 1.
        #[arg(long, default_value_t = 0.0)]
        drop: f64,
        #[arg(long, default_value = "both")]
        cable: Cable,
    },
    /// Run a program in the client's network namespace.
    Exec {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run vpsctl against the lab's controllers.
    Ctl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Drain a node under load, kill the leader and an agent, and count what the clients saw.
    Demo {
        /// Leave it running.
        #[arg(long)]
        keep: bool,
    },
    /// Build the guests' Debian image, unless the cache has it, and say where it is.
    Image,
    /// Measure Drover and QEMU in turn, in one run; the last line is JSON.
    Bench(drover_e2e::bench::BenchArgs),
    /// The switch's own process.
    #[command(hide = true)]
    Switch,
}

#[derive(Args)]
struct UpArgs {
    #[arg(long, default_value_t = 3)]
    hosts: usize,
    /// Emulated cores of each host.
    #[arg(long, default_value_t = 1)]
    vcpus: usize,
    /// Memory of each host.
    #[arg(long, default_value_t = 3072)]
    memory_mib: usize,
    /// Boot them, also when the cache has them booted.
    #[arg(long)]
    boot: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cable {
    Mgmt,
    Guest,
    Both,
}

impl Cable {
    fn segments(self) -> &'static [Segment] {
        match self {
            Self::Mgmt => &[Segment::Mgmt],
            Self::Guest => &[Segment::Guest],
            Self::Both => &Segment::ALL,
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let open = || Lab::open(&cli.name);
    match &cli.command {
        Cmd::Up(args) => {
            let options = LabOptions {
                name: cli.name.clone(),
                hosts: args.hosts,
                vcpus: args.vcpus,
                memory_mib: args.memory_mib,
                boot: args.boot,
            };
            Lab::up(&options, |line| println!("{line}"))?;
        }
        Cmd::Down => Lab::down_by_name(&cli.name)?,
        Cmd::Status => status(&open()?)?,
        Cmd::Ssh { host, command } => return pass_through(open()?.ssh(host)?.command(command)?),
        Cmd::Push { host, file, to } => open()?.ssh(host)?.push(file, to)?,
        Cmd::Console { host } => print!("{}", open()?.console(host)?),
        Cmd::Kill { host } => open()?.kill(host)?,
        Cmd::Start { host } => open()?.start(host)?,
        Cmd::Cut { host, cable } => open()?.set_cut(host, cable.segments(), true)?,
        Cmd::Join { host, cable } => open()?.set_cut(host, cable.segments(), false)?,
        Cmd::Link { host, delay_ms, drop, cable } => {
            if !(0.0..=1.0).contains(drop) {
                return Err(Error::other(format!("--drop {drop}: 0 to 1 is accepted")));
            }
            open()?.set_link(host, cable.segments(), |link| {
                link.delay_ms = *delay_ms;
                link.drop = *drop;
            })?;
        }
        Cmd::Exec { command } => {
            let (program, arguments) =
                command.split_first().ok_or_else(|| Error::other("exec: a program is expected"))?;
            let mut command = open()?.netns().command(program)?;
            command.args(arguments);
            return pass_through(command);
        }
        Cmd::Ctl { arguments } => {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let vpsctl = Vpsctl::new(open()?.netns(), servers());
            return pass_through(vpsctl.command(&arguments)?);
        }
        Cmd::Demo { keep } => drover_e2e::demo::run(&cli.name, *keep)?,
        Cmd::Image => {
            let image = drover_e2e::image::GuestImage::ensure()?;
            println!("{}\n{}", image.raw().display(), image.qcow2().display());
        }
        Cmd::Bench(args) => return drover_e2e::bench::main(&cli.name, args),
        Cmd::Switch => drover_e2e::switch::serve(&cli.name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs it on this terminal; its exit code is ours.
fn pass_through(mut command: Command) -> Result<ExitCode> {
    let status = command
        .stdin(Stdio::inherit())
        .status()
        .map_err(|e| Error::other(format!("cannot run {:?}: {e}", command.get_program())))?;
    Ok(status.code().and_then(|c| u8::try_from(c).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn status(lab: &Lab) -> Result<()> {
    let word = |runs: bool| if runs { "runs" } else { "down" };
    println!("lab {}: namespace {}", lab.name(), lab.netns().name());
    println!("switch: {}", word(lab.switch_is_running()?));
    let links = lab.links().unwrap_or_default();
    for host in lab.hosts()? {
        println!("{host}: {}", word(lab.is_running(&host)?));
    }
    for report in links.iter().filter(|r| r.connected || r.link.cut) {
        let link = report.link;
        println!(
            "  {:<14} {}{}{}in {} frames, {} bytes; lost {}, overflowed {}",
            report.port.to_string(),
            if link.cut { "CUT " } else { "" },
            if link.delay_ms > 0 { format!("delay {} ms ", link.delay_ms) } else { String::new() },
            if link.drop > 0.0 { format!("drop {} ", link.drop) } else { String::new() },
            report.frames_in,
            report.bytes_in,
            report.frames_lost,
            report.frames_overflowed,
        );
    }
    Ok(())
}
