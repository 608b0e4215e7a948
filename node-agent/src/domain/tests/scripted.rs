//! A VMM without a machine: it speaks the API, keeps the files' promises, and its "guest" does
//! what the kernel command line says.

use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_hv::config::DomainConfig;
use drover_proto::agent::v1::{MigrationProgress, MigrationRole, ObservedMigration};
use drover_proto::v1::{ConsoleInput, ConsoleOutput};
use drover_proto::vmm::v1::vmm_service_server::{VmmService, VmmServiceServer};
use drover_proto::vmm::v1::*;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

/// The VMM's command line comes in this variable.
pub(super) const ENV: &str = "DROVER_TEST_SCRIPTED_VMM";

const FREEZE: &str = r#"{"execute":"guest-fsfreeze-freeze"}"#;
const THAW: &str = r#"{"execute":"guest-fsfreeze-thaw"}"#;

const NAME: &str = r#"{"execute":"guest-get-host-name"}"#;
const SYSTEM: &str = r#"{"execute":"guest-get-osinfo"}"#;
const INTERFACES: &str = r#"{"execute":"guest-network-get-interfaces"}"#;
const INTERFACES_SAID: &str = r#"[{"name":"eth0","hardware-address":"52:54:00:00:00:01",
    "statistics":{},"ip-addresses":[{"ip-address":"10.78.0.11","prefix":24,
    "ip-address-type":"ipv4"}]},{"name":"tun0"}]"#;
/// "secret" in base64.
const PASSWORD: &str = "c2VjcmV0";

/// Does nothing, unless it was started as a VMM.
#[test]
fn vmm() {
    let Ok(arguments) = std::env::var(ENV) else { return };
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let value = |flag| {
        let at = arguments.iter().position(|a| *a == flag).unwrap();
        PathBuf::from(arguments[at + 1])
    };
    let config = DomainConfig::load(&value("--config")).unwrap();
    let incoming = arguments.contains(&"--incoming");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(serve(config, value("--socket"), value("--state-dir"), incoming));
}

#[derive(Clone)]
struct Vmm {
    dir: PathBuf,
    /// What the guest does.
    how: String,
    status: watch::Sender<VmmStatus>,
    known_epoch: Arc<Mutex<u64>>,
}

fn end(dir: &Path, reason: &str, detail: &str) -> ! {
    let text = format!("{{\"reason\":\"{reason}\",\"detail\":\"{detail}\"}}");
    std::fs::write(dir.join("exit.json"), text).unwrap();
    exit(0)
}

async fn serve(config: DomainConfig, socket: PathBuf, dir: PathBuf, incoming: bool) {
    let state = if incoming { VmmState::Incoming } else { VmmState::Running };
    let disks = config.disks.iter().map(|disk| DiskStatus {
        serial: disk.serial.clone(),
        slot: disk.slot.map_or(0, u32::from),
        detaching: false,
    });
    let status = VmmStatus {
        domain_uid: config.uid.clone(),
        epoch: config.epoch,
        state: state.into(),
        pid: std::process::id(),
        disks: disks.collect(),
        ..VmmStatus::default()
    };
    let vmm = Vmm {
        dir: dir.clone(),
        how: config.command_line.clone(),
        status: watch::Sender::new(status),
        known_epoch: Arc::new(Mutex::new(config.epoch)),
    };
    if let Some(memory) = &config.restore {
        eprintln!("goes on from {}", memory.display());
    }
    match config.command_line.as_str() {
        "no-state" if config.restore.is_some() => {
            let memory = config.restore.unwrap();
            end(&dir, "error", &format!("restore: {}: is damaged", memory.display()))
        }
        "no-kernel" => end(&dir, "error", "boot.kernel: is no kernel"),
        "no-boot" => {
            let disk = config.boot_disk.unwrap().path;
            end(&dir, "error", &format!("boot_disk: {}: has no partitions", disk.display()))
        }
        "abort" => {
            eprintln!("last line of stderr");
            exit(3);
        }
        _ => {}
    }
    let listener = tokio::net::UnixListener::bind(socket).unwrap();
    let guest = vmm.clone();
    tokio::spawn(async move { guest.behave(&config.command_line).await });
    tonic::transport::Server::builder()
        .add_service(VmmServiceServer::new(vmm))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await
        .unwrap();
}

impl Vmm {
    /// The guest. It acts once the agent has seen it run.
    async fn behave(&self, how: &str) {
        while self.status.receiver_count() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let once = self.dir.join("crashed-once");
        match how {
            "crash" => end(&self.dir, "crash", "Kernel panic - not syncing"),
            "crash-once" if !once.exists() => {
                std::fs::write(once, "").unwrap();
                end(&self.dir, "crash", "Kernel panic - not syncing")
            }
            "poweroff" => end(&self.dir, "shutdown", ""),
            _ => {}
        }
    }

    fn change(&self, change: impl FnOnce(&mut VmmStatus)) -> Response<VmmStatus> {
        self.status.send_modify(|status| {
            change(status);
            status.sequence += 1;
        });
        Response::new(self.status.borrow().clone())
    }

    fn set_migration(
        &self,
        id: String,
        role: MigrationRole,
        progress: MigrationProgress,
    ) -> Response<VmmStatus> {
        self.change(|status| {
            status.migration = Some(ObservedMigration {
                id,
                role: role.into(),
                progress: progress.into(),
                ..ObservedMigration::default()
            });
        })
    }
}

fn serial(disk: Option<Disk>) -> String {
    match disk.unwrap().which.unwrap() {
        disk::Which::Serial(serial) => serial,
        disk::Which::Index(index) => panic!("index {index}"),
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl VmmService for Vmm {
    type WatchStatusStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<VmmStatus, Status>> + Send>>;
    type AttachConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<VmmStatus> {
        Ok(self.change(|_| {}))
    }

    async fn watch_status(&self, _: Request<GetStatusRequest>) -> Answer<Self::WatchStatusStream> {
        let stream = WatchStream::new(self.status.subscribe()).map(Ok);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn save(&self, request: Request<SaveRequest>) -> Answer<VmmStatus> {
        let path = request.into_inner().path;
        eprintln!("Save {path}");
        if self.how == "save-fails" {
            return Err(Status::resource_exhausted(format!("{path}: the state does not fit")));
        }
        self.change(|status| status.set_state(VmmState::Paused));
        if self.how == "save-slowly" {
            while !self.dir.join("saved").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        end(&self.dir, "saved", "the guest is saved: 9 bytes in /dev/vg/memory")
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Answer<VmmStatus> {
        eprintln!("Pause");
        Ok(self.change(|status| status.set_state(VmmState::Paused)))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Answer<VmmStatus> {
        eprintln!("Resume");
        Ok(self.change(|status| status.set_state(VmmState::Running)))
    }

    async fn power_button(&self, _: Request<PowerButtonRequest>) -> Answer<VmmStatus> {
        end(&self.dir, "shutdown", "")
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Answer<VmmStatus> {
        Err(Status::unimplemented(""))
    }

    async fn set_disk_limits(&self, request: Request<SetDiskLimitsRequest>) -> Answer<VmmStatus> {
        let SetDiskLimitsRequest { disk, limits } = request.into_inner();
        eprintln!("SetDiskLimits {} {}", serial(disk), limits.unwrap().iops);
        Ok(self.change(|_| {}))
    }

    async fn grow_disk(&self, request: Request<GrowDiskRequest>) -> Answer<GrowDiskResponse> {
        eprintln!("GrowDisk {}", serial(request.into_inner().disk));
        Ok(Response::new(GrowDiskResponse::default()))
    }

    async fn attach_disk(&self, request: Request<AttachDiskRequest>) -> Answer<VmmStatus> {
        let AttachDiskRequest { serial, slot, .. } = request.into_inner();
        eprintln!("AttachDisk {serial} {slot}");
        let disk = DiskStatus { serial, slot, detaching: false };
        Ok(self.change(|status| {
            status.disks.retain(|there| there.serial != disk.serial);
            status.disks.push(disk);
        }))
    }

    async fn detach_disk(&self, request: Request<DetachDiskRequest>) -> Answer<VmmStatus> {
        let serial = request.into_inner().serial;
        eprintln!("DetachDisk {serial}");
        if self.how == "keeps-disks" {
            self.change(|status| {
                let asked = |disk: &&mut DiskStatus| disk.serial == serial;
                status.disks.iter_mut().filter(asked).for_each(|disk| disk.detaching = true);
            });
            return Err(Status::deadline_exceeded("the guest has not let go of it"));
        }
        Ok(self.change(|status| status.disks.retain(|disk| disk.serial != serial)))
    }

    async fn set_generation(&self, _: Request<SetGenerationRequest>) -> Answer<VmmStatus> {
        Err(Status::unimplemented(""))
    }

    async fn guest_agent_call(
        &self,
        request: Request<GuestAgentCallRequest>,
    ) -> Answer<GuestAgentCallResponse> {
        let command = request.into_inner().command;
        eprintln!("guest's agent: {command}");
        if self.status.borrow().state() != VmmState::Running {
            return Err(Status::failed_precondition("the VMM does not run the guest"));
        }
        let result = match (self.how.as_str(), command.as_str()) {
            ("agent", FREEZE) => "2",
            ("agent" | "agent-slow", THAW) => "2",
            ("agent-slow", FREEZE) => {
                return Err(Status::deadline_exceeded("the guest's agent does not answer"));
            }
            // Frozen for good, until there is a file of that name.
            ("agent-stuck", FREEZE) => "1",
            ("agent", NAME) => r#"{"host-name":"web\u0007-1"}"#,
            ("agent", SYSTEM) => {
                return Err(Status::failed_precondition("the guest's agent refused: not found"));
            }
            ("agent", INTERFACES) => INTERFACES_SAID,
            ("agent-old", _) => {
                return Err(Status::failed_precondition("the guest's agent refused: not found"));
            }
            ("agent", set) if set.contains(PASSWORD) => "{}",
            ("agent-stuck", THAW) if self.dir.join("thaw").exists() => "1",
            _ => return Err(Status::unavailable("the guest's agent does not run")),
        };
        Ok(Response::new(GuestAgentCallResponse { result: result.into() }))
    }

    async fn quit(&self, _: Request<QuitRequest>) -> Answer<QuitResponse> {
        end(&self.dir, "killed", "told to quit")
    }

    async fn attach_console(
        &self,
        _: Request<Streaming<ConsoleInput>>,
    ) -> Answer<Self::AttachConsoleStream> {
        Err(Status::unimplemented(""))
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Answer<PrepareIncomingResponse> {
        let id = request.into_inner().migration_id;
        let listen_address = "127.0.0.1:4242".to_owned();
        self.set_migration(id.clone(), MigrationRole::Destination, MigrationProgress::Listening);
        self.change(|status| {
            status.migration.as_mut().unwrap().listen_address.clone_from(&listen_address);
        });
        let vmm = self.clone();
        tokio::spawn(async move {
            while !vmm.dir.join("ready").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            vmm.set_migration(id, MigrationRole::Destination, MigrationProgress::Ready);
        });
        Ok(Response::new(PrepareIncomingResponse { listen_address }))
    }

    async fn start_migration(&self, request: Request<StartMigrationRequest>) -> Answer<VmmStatus> {
        let request = request.into_inner();
        let id = request.migration_id;
        eprintln!("StartMigration {id}");
        match request.address.as_str() {
            "copy" => Ok(self.set_migration(id, MigrationRole::Source, MigrationProgress::Copying)),
            "hand-over" => {
                let text =
                    format!("{{\"migration_id\":\"{id}\",\"to_epoch\":{}}}", request.to_epoch);
                std::fs::write(self.dir.join("handover.json"), text).unwrap();
                *self.known_epoch.lock().unwrap() = request.to_epoch;
                self.set_migration(id, MigrationRole::Source, MigrationProgress::HandedOver);
                Ok(self.change(|status| status.set_state(VmmState::HandedOver)))
            }
            _ => Err(Status::invalid_argument("address: refused")),
        }
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Answer<VmmStatus> {
        let id = request.into_inner().migration_id;
        Ok(self.set_migration(id, MigrationRole::Source, MigrationProgress::Failed))
    }

    async fn take_over(&self, request: Request<TakeOverRequest>) -> Answer<VmmStatus> {
        let epoch = request.into_inner().epoch;
        if epoch <= *self.known_epoch.lock().unwrap() {
            return Err(Status::failed_precondition("epoch: is not greater"));
        }
        let _ = std::fs::remove_file(self.dir.join("handover.json"));
        Ok(self.change(|status| {
            status.epoch = epoch;
            status.set_state(VmmState::Running);
        }))
    }
}
