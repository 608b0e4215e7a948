//! `drover-vmm`: the process of one domain.

use std::io::IsTerminal;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use drover_hv::config::DomainConfig;
use drover_hv::machine::exit::{ExitReason, ExitRecord};
use drover_hv::server::Server;
use drover_hv::vmm::{Options, Request, Vmm};
use drover_proto::vmm::v1::vmm_service_server::VmmServiceServer;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server as Transport;
use tracing_subscriber::EnvFilter;

/// Runs one domain on KVM and serves its API on a unix socket.
#[derive(Debug, Parser)]
#[command(name = "drover-vmm", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot the domain (or restore it, or wait for its migration to here) and run it until it ends.
    ///
    /// Exit status: 0 when the guest shut down, rebooted or was saved or the VMM was told to end, 1 when the
    /// guest crashed or the machine failed, 2 when the command line is wrong. The reason is in
    /// exit.json in the state directory.
    Run(RunArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The domain's configuration, JSON.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Serve drover.vmm.v1.VmmService here. The socket appears when the guest runs (or waits).
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Existing directory for exit.json and handover.json.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// Wait for a migration instead of booting.
    #[arg(long)]
    incoming: bool,
}

/// Open calls may end so long after the guest has.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    keep_heap_small();
    let filter = EnvFilter::try_from_env("DROVER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let Command::Run(args) = Cli::parse().command;
    let record = run(args);
    match record.reason {
        ExitReason::Shutdown | ExitReason::Reboot | ExitReason::Killed | ExitReason::Saved => {
            tracing::info!(reason = ?record.reason, detail = record.detail, "ended");
            ExitCode::SUCCESS
        }
        ExitReason::Crash | ExitReason::Error => {
            tracing::error!(reason = ?record.reason, detail = record.detail, "ended");
            ExitCode::FAILURE
        }
    }
}

/// Every thread that allocates would get an arena of its own, and what a large allocation left
/// would be kept: a VMM shall need next to nothing but its guest's memory.
fn keep_heap_small() {
    const ARENAS_MAX: libc::c_int = 1;
    const LARGE_BYTES: libc::c_int = 128 << 10;
    // SAFETY: mallopt is called before any other thread exists, with known parameters.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE_BYTES);
    }
}

fn run(args: RunArgs) -> ExitRecord {
    let config = match DomainConfig::load(&args.config) {
        Ok(config) => config,
        Err(error) => return refuse(&args.state_dir, error.to_string()),
    };
    let options = Options { config, state_dir: args.state_dir.clone(), incoming: args.incoming };
    let (vmm, ended) = match Vmm::start(options) {
        Ok(started) => started,
        Err(record) => return record,
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&args.state_dir, format!("the API's runtime: {error}")),
    };
    runtime.block_on(async {
        match bind(&args.socket) {
            Ok(listener) => {
                let record = serve(vmm, listener, ended).await;
                // The record says all; a socket nobody answers on would only puzzle.
                let _ = std::fs::remove_file(&args.socket);
                record
            }
            Err(error) => {
                let value = format!("socket: {}: {error}", args.socket.display());
                refuse(&args.state_dir, value)
            }
        }
    })
}

/// The machine never ran, or nobody could have spoken to it.
fn refuse(state_dir: &Path, detail: String) -> ExitRecord {
    let record = ExitRecord::new(ExitReason::Error, detail);
    if let Err(error) = record.write(state_dir) {
        tracing::error!(%error, state_dir = %state_dir.display(), "exit.json cannot be written");
    }
    record
}

/// Listens on the socket, which only its owner may use. One that an earlier process left is
/// replaced.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    // Under another name first, so that it appears with its permissions and ready.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Serves until the guest has ended and the open calls had time to say so.
async fn serve(
    vmm: Vmm,
    listener: UnixListener,
    mut ended: tokio::sync::oneshot::Receiver<ExitRecord>,
) -> ExitRecord {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let service = VmmServiceServer::new(Server::new(vmm.clone()));
    let server = Transport::builder().add_service(service).serve_with_incoming_shutdown(
        UnixListenerStream::new(listener),
        async {
            // Dropped or sent: stop.
            let _ = stopped.await;
        },
    );
    let mut server = tokio::spawn(server);
    let record = loop {
        tokio::select! {
            record = &mut ended => {
                break record.unwrap_or_else(|_| {
                    ExitRecord::new(ExitReason::Error, "the machine's thread has panicked")
                });
            }
            name = terminated() => {
                tracing::info!(signal = name, "told to end");
                if let Err(error) = vmm.ask(Request::Quit(format!("{name} received"))).await {
                    tracing::warn!(%error, "cannot end now");
                }
            }
            // The machine runs on without its API: there is nobody to decide otherwise.
            result = &mut server => tracing::error!(?result, "the API has ended"),
        }
    };
    drop(stop);
    // Whoever watches reads the last status; whoever does not read it is cut off.
    let _ = tokio::time::timeout(GOODBYE_TIMEOUT, server).await;
    record
}

/// Waits for a signal that says to end; answers its name.
async fn terminated() -> &'static str {
    let wait = |kind: SignalKind| async move {
        match signal(kind) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => "SIGTERM",
        () = wait(SignalKind::interrupt()) => "SIGINT",
    }
}
