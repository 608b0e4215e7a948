//! Drover's side: `drover-vmm` processes, driven through their sockets as the agent does.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drover_proto::agent::v1::MigrationProgress;
use drover_proto::v1::{ConsoleInput, ConsoleOutput, MigrationLimits};
use drover_proto::vmm::v1::vmm_service_client::VmmServiceClient;
use drover_proto::vmm::v1::{
    GetStatusRequest, PauseRequest, PrepareIncomingRequest, QuitRequest, ResumeRequest,
    StartMigrationRequest, VmmState, VmmStatus,
};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::child::Owned;
use super::migration::{DOWNTIME, Moved, Mover};
use super::stage::{Stage, Who};
use crate::{Error, Result};

const WHO: Who = Who::Drover;
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
const CALL_PATIENCE: Duration = Duration::from_secs(60);
const MOVE_PATIENCE: Duration = Duration::from_secs(300);
const CONNECT_INTERVAL: Duration = Duration::from_millis(2);

/// One VMM process and its API.
pub(super) struct Vmm {
    pub(super) process: Owned,
    client: VmmServiceClient<Channel>,
}

impl Vmm {
    /// Starts one; it boots its guest, or waits for one to come.
    pub(super) async fn start(
        stage: &Stage,
        end: usize,
        epoch: u64,
        incoming: bool,
    ) -> Result<Self> {
        let path = |kind: &str| stage.path(&format!("drover{end}.{kind}"));
        let (config, socket, state_dir) = (path("json"), path("sock"), path("state"));
        write_config(stage, end, epoch, incoming, &config)?;
        // Of the process that was here before.
        let _ = std::fs::remove_dir_all(&state_dir);
        let _ = std::fs::remove_file(&socket);
        std::fs::create_dir_all(&state_dir).map_err(Error::io("cannot create", &state_dir))?;
        let mut command = Command::new(&stage.vmm);
        command.arg("run").arg("--config").arg(config);
        command.arg("--socket").arg(&socket).arg("--state-dir").arg(state_dir);
        if incoming {
            command.arg("--incoming");
        }
        command.stdout(Stdio::null());
        let mut process = Owned::start(command, &path("log"))?;
        let connecting = async {
            loop {
                process.still_runs()?;
                // Asked first: a try to connect costs far more.
                if socket.exists()
                    && let Ok(client) = connect(&socket).await
                {
                    return Ok::<_, Error>(client);
                }
                sleep(CONNECT_INTERVAL).await;
            }
        };
        let client = within("drover-vmm's socket", CONNECT_PATIENCE, connecting).await??;
        Ok(Self { process, client })
    }

    /// The console, from its beginning.
    pub(super) async fn console(&mut self) -> Result<Streaming<ConsoleOutput>> {
        // An input that never ends: the output ends with it.
        let input = futures::StreamExt::chain(
            futures::stream::iter([ConsoleInput::default()]),
            futures::stream::pending(),
        );
        let answer = within("AttachConsole", CALL_PATIENCE, self.client.attach_console(input));
        Ok(answer.await?.map_err(refused)?.into_inner())
    }

    /// Ends it.
    pub(super) async fn quit(&mut self) -> Result<()> {
        // Its answer may be lost with it.
        let _ = within("Quit", CALL_PATIENCE, self.client.quit(QuitRequest {})).await?;
        self.process.wait_end()
    }
}

async fn connect(socket: &std::path::Path) -> Result<VmmServiceClient<Channel>> {
    let uri = format!("unix://{}", socket.display());
    let endpoint = Endpoint::from_shared(uri).map_err(|e| Error::other(e.to_string()))?;
    let channel = endpoint.connect().await.map_err(|e| Error::other(e.to_string()))?;
    Ok(VmmServiceClient::new(channel))
}

fn write_config(
    stage: &Stage,
    end: usize,
    epoch: u64,
    incoming: bool,
    path: &PathBuf,
) -> Result<()> {
    let mut config = json!({
        "uid": "b0000000-0000-4000-8000-000000000001",
        "name": "domains/bench",
        "epoch": epoch,
        "vcpus": 1,
        "memory_bytes": stage.guest.memory_mib << 20,
        "kernel": stage.kernel,
        "initramfs": stage.initramfs,
        "command_line": stage.command_line(WHO),
        "interfaces": [{ "mac": WHO.mac(), "tap": WHO.tap(end), "addresses": [WHO.address()] }],
    });
    if let Some(disk) = stage.guest.disk(WHO, end) {
        // A destination's is a blank one, made for the move.
        config["disks"] = json!([{ "path": disk, "zeroed": incoming }]);
    }
    std::fs::write(path, config.to_string()).map_err(Error::io("cannot write", path))
}

async fn within<T>(what: &str, patience: Duration, work: impl Future<Output = T>) -> Result<T> {
    timeout(patience, work)
        .await
        .map_err(|_| Error::Timeout { what: what.to_owned(), seconds: patience.as_secs() })
}

fn refused(status: tonic::Status) -> Error {
    Error::other(format!("drover-vmm: {}: {}", status.code(), status.message()))
}

/// A runtime for one thread: the driver should cost little.
pub(super) fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::other(format!("cannot start a runtime: {e}")))
}

/// A guest under Drover that can be moved.
pub(super) struct Drover<'a> {
    stage: &'a Stage,
    runtime: Runtime,
    end: usize,
    epoch: u64,
    vmm: Vmm,
}

impl<'a> Drover<'a> {
    /// Boots it.
    pub(super) fn boot(stage: &'a Stage) -> Result<Self> {
        let runtime = runtime()?;
        let vmm = runtime.block_on(async {
            let mut vmm = Vmm::start(stage, 0, 1, false).await?;
            let watch = vmm.client.watch_status(GetStatusRequest {}).await.map_err(refused)?;
            // It may find something wrong, and end: better said now than as a silent guest.
            let running = wait_running(watch.into_inner());
            within("drover-vmm to say that it runs", CALL_PATIENCE, running).await??;
            Ok::<_, Error>(vmm)
        })?;
        Ok(Self { stage, runtime, end: 0, epoch: 1, vmm })
    }
}

impl Mover for Drover<'_> {
    fn who(&self) -> Who {
        WHO
    }

    fn migrate(&mut self) -> Result<Moved> {
        let (end, epoch) = (1 - self.end, self.epoch + 1);
        let (new, moved) = self.runtime.block_on(migrate(self.stage, &mut self.vmm, end, epoch))?;
        let mut old = std::mem::replace(&mut self.vmm, new);
        self.runtime.block_on(old.quit())?;
        (self.end, self.epoch) = (end, epoch);
        Ok(moved)
    }

    fn pause(&mut self) -> Result<()> {
        let call = self.vmm.client.pause(PauseRequest {});
        self.runtime.block_on(call).map(|_| ()).map_err(refused)
    }

    fn resume(&mut self) -> Result<()> {
        let call = self.vmm.client.resume(ResumeRequest {});
        self.runtime.block_on(call).map(|_| ()).map_err(refused)
    }
}

async fn migrate(stage: &Stage, from: &mut Vmm, end: usize, epoch: u64) -> Result<(Vmm, Moved)> {
    let migration_id = format!("b0000000-0000-4000-8000-{epoch:012x}");
    let token = format!("bench-{}-{epoch}", std::process::id());
    let mut to = Vmm::start(stage, end, epoch, true).await?;
    let begin = Instant::now();
    let prepare = PrepareIncomingRequest {
        migration_id: migration_id.clone(),
        token: token.clone(),
        listen_address: "127.0.0.1:0".to_owned(),
        epoch,
    };
    let answer = within("PrepareIncoming", CALL_PATIENCE, to.client.prepare_incoming(prepare));
    let address = answer.await?.map_err(refused)?.into_inner().listen_address;
    let start = StartMigrationRequest {
        migration_id: migration_id.clone(),
        address,
        token,
        to_epoch: epoch,
        limits: Some(MigrationLimits {
            downtime: Some(prost_types::Duration { seconds: 0, nanos: DOWNTIME.as_nanos() as i32 }),
            ..Default::default()
        }),
    };
    let watch = from.client.watch_status(GetStatusRequest {}).await.map_err(refused)?.into_inner();
    let answer = within("StartMigration", CALL_PATIENCE, from.client.start_migration(start));
    answer.await?.map_err(refused)?;
    let status = within("the migration", MOVE_PATIENCE, wait_moved(watch, &migration_id)).await??;
    let watch = to.client.watch_status(GetStatusRequest {}).await.map_err(refused)?.into_inner();
    within("the destination to say that it runs", CALL_PATIENCE, wait_running(watch)).await??;
    let wall_ms = begin.elapsed().as_secs_f64() * 1000.0;
    Ok((to, moved(&status, wall_ms)?))
}

/// Follows the source until it says how it ended.
async fn wait_moved(mut watch: Streaming<VmmStatus>, id: &str) -> Result<VmmStatus> {
    while let Some(status) = watch.message().await.map_err(refused)? {
        // It may have come here by a migration of its own.
        let Some(migration) = status.migration.as_ref().filter(|m| m.id == id) else { continue };
        match migration.progress() {
            MigrationProgress::Succeeded => return Ok(status),
            MigrationProgress::Failed => {
                return Err(Error::other(format!("drover-vmm's migration: {}", migration.error)));
            }
            _ => {}
        }
    }
    Err(Error::other("drover-vmm ended while its guest was moved"))
}

/// The source may know first: the destination has told it before its own API.
async fn wait_running(mut watch: Streaming<VmmStatus>) -> Result<()> {
    while let Some(status) = watch.message().await.map_err(refused)? {
        if status.state() == VmmState::Running {
            return Ok(());
        }
        if status.state() == VmmState::Exited {
            return Err(Error::other(format!("drover-vmm has ended: {}", status.state_reason)));
        }
    }
    Err(Error::other("drover-vmm ended before it said that it runs"))
}

fn moved(status: &VmmStatus, wall_ms: f64) -> Result<Moved> {
    let report = status
        .migration
        .as_ref()
        .and_then(|m| m.report.as_ref())
        .ok_or_else(|| Error::other("drover-vmm's status has no report"))?;
    let ms = |us: u64| us as f64 / 1000.0;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let disk = if report.disk_bytes_total == 0 {
        String::new()
    } else {
        format!("; disk {} passes, {:.1} MiB", report.disk_rounds, mib(report.disk_bytes_sent))
    };
    Ok(Moved {
        wall_ms,
        total_ms: ms(report.total_us),
        pause_ms: ms(report.pause_us),
        detail: format!(
            "{} passes, {:.1} MiB at {:.0} MB/s; stop {:.1} memory {:.1} state {:.1} commit {:.1} ms{disk}",
            report.rounds,
            mib(report.bytes_sent),
            report.rate_bytes_per_second as f64 / 1e6,
            ms(report.pause_stop_us),
            ms(report.pause_memory_us),
            ms(report.pause_state_us),
            ms(report.pause_commit_us),
        ),
    })
}
