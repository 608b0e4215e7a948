//! The VMM's API on its socket. Every call has a deadline.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_proto::v1::DiskLimits;
use drover_proto::vmm::v1 as pb;
use drover_proto::vmm::v1::vmm_service_client::VmmServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::error::Error;
use crate::wanted::Disk;

/// How long a VMM may take to answer a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to write a guest's memory to a volume: 512 GiB at 150 MiB/s.
const SAVE_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long one call waits for a guest to let go of a disk; it is asked again later.
const DETACH_WAIT: Duration = Duration::from_secs(1);
/// How long connecting to its socket may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to one VMM.
#[derive(Debug, Clone)]
pub(crate) struct VmmClient {
    inner: VmmServiceClient<Channel>,
}

/// Connects to a VMM's socket.
pub(crate) async fn connect(socket: &Path) -> Result<VmmClient, Error> {
    Ok(VmmClient { inner: VmmServiceClient::new(channel(socket).await?) })
}

/// A channel to a VMM's socket.
pub(crate) async fn channel(socket: &Path) -> Result<Channel, Error> {
    let path: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The name is never resolved: the connector knows the way.
    Endpoint::from_static("http://vmm")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|err| Error::Process {
            action: "reach its socket",
            source: std::io::Error::other(err),
        })
}

impl VmmClient {
    pub(crate) async fn status(&mut self) -> Result<pb::VmmStatus, Error> {
        call("GetStatus", self.inner.get_status(pb::GetStatusRequest {})).await
    }

    /// The status at once, and after each change.
    pub(crate) async fn watch(&mut self) -> Result<tonic::Streaming<pb::VmmStatus>, Error> {
        call("WatchStatus", self.inner.watch_status(pb::GetStatusRequest {})).await
    }

    pub(crate) async fn pause(&mut self) -> Result<pb::VmmStatus, Error> {
        call("Pause", self.inner.pause(pb::PauseRequest {})).await
    }

    pub(crate) async fn resume(&mut self) -> Result<pb::VmmStatus, Error> {
        call("Resume", self.inner.resume(pb::ResumeRequest {})).await
    }

    pub(crate) async fn set_disk_limits(
        &mut self,
        serial: &str,
        limits: DiskLimits,
    ) -> Result<(), Error> {
        let limits = Some(disk_limits(limits));
        let request = pb::SetDiskLimitsRequest { disk: disk(serial), limits };
        call("SetDiskLimits", self.inner.set_disk_limits(request)).await.map(drop)
    }

    pub(crate) async fn grow_disk(&mut self, serial: &str) -> Result<(), Error> {
        let request = pb::GrowDiskRequest { disk: disk(serial) };
        call("GrowDisk", self.inner.grow_disk(request)).await.map(drop)
    }

    pub(crate) async fn attach_disk(
        &mut self,
        disk: &Disk,
        path: &Path,
        shared: bool,
    ) -> Result<pb::VmmStatus, Error> {
        let request = pb::AttachDiskRequest {
            path: path.display().to_string(),
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            slot: disk.slot.map_or(0, u32::from),
            shared,
            limits: Some(disk_limits(disk.limits)),
        };
        call("AttachDisk", self.inner.attach_disk(request)).await
    }

    /// Asks the guest, and answers soon, whether it has let go of it or not: the status says.
    pub(crate) async fn detach_disk(&mut self, serial: &str) -> Result<(), Error> {
        let timeout = prost_types::Duration::try_from(DETACH_WAIT).ok();
        let request = pb::DetachDiskRequest { serial: serial.to_owned(), timeout };
        match call("DetachDisk", self.inner.detach_disk(request)).await {
            Err(Error::Vmm { status, .. }) if status.code() == tonic::Code::DeadlineExceeded => {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// One command of the guest agent's protocol; answers its result, JSON. `timeout` is the
    /// guest's, and shorter than the VMM's own.
    pub(crate) async fn guest_agent_call(
        &mut self,
        command: String,
        timeout: Duration,
    ) -> Result<String, Error> {
        let timeout = prost_types::Duration::try_from(timeout).ok();
        let request = pb::GuestAgentCallRequest { command, timeout };
        let answer = call("GuestAgentCall", self.inner.guest_agent_call(request)).await?;
        Ok(answer.result)
    }

    /// Answers when the guest is saved, and its VMM ends. Asked again meanwhile, it is the same
    /// saving.
    pub(crate) async fn save(&mut self, path: &Path) -> Result<pb::VmmStatus, Error> {
        let request = pb::SaveRequest { path: path.display().to_string() };
        call_for(SAVE_TIMEOUT, "Save", self.inner.save(request)).await
    }

    pub(crate) async fn power_button(&mut self) -> Result<pb::VmmStatus, Error> {
        call("PowerButton", self.inner.power_button(pb::PowerButtonRequest {})).await
    }

    pub(crate) async fn quit(&mut self) -> Result<(), Error> {
        call("Quit", self.inner.quit(pb::QuitRequest {})).await.map(drop)
    }

    pub(crate) async fn prepare_incoming(
        &mut self,
        request: pb::PrepareIncomingRequest,
    ) -> Result<String, Error> {
        let response = call("PrepareIncoming", self.inner.prepare_incoming(request)).await?;
        Ok(response.listen_address)
    }

    pub(crate) async fn start_migration(
        &mut self,
        request: pb::StartMigrationRequest,
    ) -> Result<pb::VmmStatus, Error> {
        call("StartMigration", self.inner.start_migration(request)).await
    }

    pub(crate) async fn cancel_migration(
        &mut self,
        migration_id: String,
    ) -> Result<pb::VmmStatus, Error> {
        let request = pb::CancelMigrationRequest { migration_id };
        call("CancelMigration", self.inner.cancel_migration(request)).await
    }

    pub(crate) async fn take_over(&mut self, epoch: u64) -> Result<pb::VmmStatus, Error> {
        call("TakeOver", self.inner.take_over(pb::TakeOverRequest { epoch })).await
    }
}

fn disk_limits(limits: DiskLimits) -> pb::DiskLimits {
    pb::DiskLimits {
        iops: limits.requests_per_second,
        iops_burst: limits.requests_burst,
        bytes_per_second: limits.bytes_per_second,
        bytes_burst: limits.bytes_burst,
    }
}

fn disk(serial: &str) -> Option<pb::Disk> {
    Some(pb::Disk { which: Some(pb::disk::Which::Serial(serial.to_owned())) })
}

async fn call<T>(
    call: &'static str,
    future: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Error> {
    call_for(CALL_TIMEOUT, call, future).await
}

async fn call_for<T>(
    timeout: Duration,
    call: &'static str,
    future: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(timeout, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Error::Vmm { call, status: Box::new(status) }),
        Err(_) => Err(Error::VmmTimeout { call, seconds: timeout.as_secs() }),
    }
}

/// The VMM has answered, and the answer is no: asking again will not change it.
pub(crate) fn is_refusal(error: &Error) -> bool {
    use tonic::Code;
    match error {
        Error::Vmm { status, .. } => matches!(
            status.code(),
            Code::FailedPrecondition
                | Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::Unimplemented
                | Code::Internal
        ),
        _ => false,
    }
}
