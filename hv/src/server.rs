//! `drover.vmm.v1.VmmService` on the domain's unix socket.

use std::ops::RangeInclusive;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use drover_proto::v1::{ConsoleInput, ConsoleOutput};
use drover_proto::vmm::v1::vmm_service_server::VmmService;
use drover_proto::vmm::v1::{
    AttachDiskRequest, CancelMigrationRequest, DetachDiskRequest, GetStatusRequest,
    GrowDiskRequest, GrowDiskResponse, GuestAgentCallRequest, GuestAgentCallResponse, PauseRequest,
    PowerButtonRequest, PrepareIncomingRequest, PrepareIncomingResponse, QuitRequest, QuitResponse,
    ResetRequest, ResumeRequest, SaveRequest, SetDiskLimitsRequest, SetGenerationRequest,
    StartMigrationRequest, TakeOverRequest, VmmState, VmmStatus,
};
use futures::{Stream, StreamExt, stream};
use tokio::time::Instant;
use tonic::{Response, Status, Streaming};

use crate::config::FieldError;
use crate::guest_agent::{TIMEOUT_MAX, TIMEOUT_MIN};
use crate::vmm::{Reply, Request, Vmm, VmmError};

/// Shortest time between two statuses of which only counters differ.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// Console output goes out in pieces of at most this.
const CONSOLE_CHUNK_BYTES: usize = 16 << 10;
/// A console that speaks byte by byte is read after this, so that bytes gather.
const CONSOLE_INTERVAL: Duration = Duration::from_millis(10);
/// How long the guest's agent may take when the caller does not say.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a guest may take to let go of a disk when the caller does not say, and what it may say.
const DETACH_TIMEOUT: Duration = Duration::from_secs(30);
const DETACH_TIMEOUTS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);

/// The service.
#[derive(Debug, Clone)]
pub struct Server {
    vmm: Vmm,
}

impl Server {
    /// Serves this VMM.
    pub fn new(vmm: Vmm) -> Self {
        Self { vmm }
    }

    async fn ask(&self, request: Request) -> Result<Response<VmmStatus>, Status> {
        self.vmm.ask(request).await?;
        Ok(Response::new(self.vmm.shared().status()))
    }
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl VmmService for Server {
    async fn get_status(
        &self,
        _: tonic::Request<GetStatusRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        Ok(Response::new(self.vmm.shared().status()))
    }

    type WatchStatusStream = BoxStream<VmmStatus>;

    async fn watch_status(
        &self,
        _: tonic::Request<GetStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        Ok(Response::new(Box::pin(statuses(self.vmm.clone()))))
    }

    async fn save(
        &self,
        request: tonic::Request<SaveRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::Save(request.into_inner())).await
    }

    async fn pause(&self, _: tonic::Request<PauseRequest>) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::Pause).await
    }

    async fn resume(
        &self,
        _: tonic::Request<ResumeRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::Resume).await
    }

    async fn power_button(
        &self,
        _: tonic::Request<PowerButtonRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::PowerButton).await
    }

    async fn reset(&self, _: tonic::Request<ResetRequest>) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::Reset).await
    }

    async fn quit(&self, _: tonic::Request<QuitRequest>) -> Result<Response<QuitResponse>, Status> {
        self.vmm.ask(Request::Quit("stopped by a call of Quit".into())).await?;
        Ok(Response::new(QuitResponse {}))
    }

    async fn set_disk_limits(
        &self,
        request: tonic::Request<SetDiskLimitsRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::SetDiskLimits(request.into_inner())).await
    }

    async fn grow_disk(
        &self,
        request: tonic::Request<GrowDiskRequest>,
    ) -> Result<Response<GrowDiskResponse>, Status> {
        match self.vmm.ask(Request::GrowDisk(request.into_inner())).await? {
            Reply::Grown { bytes_before, bytes } => {
                Ok(Response::new(GrowDiskResponse { bytes_before, bytes }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn attach_disk(
        &self,
        request: tonic::Request<AttachDiskRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::AttachDisk(request.into_inner())).await
    }

    async fn detach_disk(
        &self,
        request: tonic::Request<DetachDiskRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        let request = request.into_inner();
        let timeout = detach_timeout(request.timeout).map_err(VmmError::from)?;
        let serial = request.serial.clone();
        let mut status = self.vmm.shared().watch();
        self.vmm.ask(Request::DetachDisk(request)).await?;
        let gone = status.wait_for(|status| {
            status.state == VmmState::Exited as i32
                || status.disks.iter().all(|disk| disk.serial != serial)
        });
        match tokio::time::timeout(timeout, gone).await {
            Ok(_) => Ok(Response::new(self.vmm.shared().status())),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "the guest has not let go of the disk {serial} within {timeout:?}: it is still \
                 attached"
            ))),
        }
    }

    async fn set_generation(
        &self,
        request: tonic::Request<SetGenerationRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::SetGeneration(request.into_inner())).await
    }

    /// Not by way of the supervisor, which has more to do than to wait for a guest.
    async fn guest_agent_call(
        &self,
        request: tonic::Request<GuestAgentCallRequest>,
    ) -> Result<Response<GuestAgentCallResponse>, Status> {
        let GuestAgentCallRequest { command, timeout } = request.into_inner();
        let timeout = agent_timeout(timeout).map_err(VmmError::from)?;
        let refuse = |state: &str| VmmError::State {
            asked: "call the guest's agent",
            state: state.to_owned(),
        };
        let shared = self.vmm.shared();
        let state = shared.status().state();
        if state != VmmState::Running {
            return Err(refuse(state.as_str_name()).into());
        }
        let agent = shared.guest_agent().ok_or_else(|| {
            refuse("the domain has no port for one (guest_agent in its configuration)")
        })?;
        let result = agent.call(&command, timeout).await.map_err(VmmError::from)?;
        Ok(Response::new(GuestAgentCallResponse { result }))
    }

    type AttachConsoleStream = BoxStream<ConsoleOutput>;

    async fn attach_console(
        &self,
        request: tonic::Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        let output = console(self.vmm.clone());
        let input = typed(self.vmm.clone(), request.into_inner());
        // Both ends in one stream: when the caller goes, both are dropped.
        let both = stream::select(output.map(Some), input.map(|error| error.map(Err)));
        Ok(Response::new(Box::pin(both.filter_map(std::future::ready))))
    }

    async fn prepare_incoming(
        &self,
        request: tonic::Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingResponse>, Status> {
        match self.vmm.ask(Request::PrepareIncoming(request.into_inner())).await? {
            Reply::Listening(listen_address) => {
                Ok(Response::new(PrepareIncomingResponse { listen_address }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn start_migration(
        &self,
        request: tonic::Request<StartMigrationRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::StartMigration(request.into_inner())).await
    }

    async fn cancel_migration(
        &self,
        request: tonic::Request<CancelMigrationRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::CancelMigration(request.into_inner())).await
    }

    async fn take_over(
        &self,
        request: tonic::Request<TakeOverRequest>,
    ) -> Result<Response<VmmStatus>, Status> {
        self.ask(Request::TakeOver(request.into_inner())).await
    }
}

fn agent_timeout(asked: Option<prost_types::Duration>) -> Result<Duration, FieldError> {
    let Some(asked) = asked else { return Ok(AGENT_TIMEOUT) };
    let accepted = || format!("{TIMEOUT_MIN:?} to {TIMEOUT_MAX:?}");
    match Duration::try_from(asked) {
        Ok(timeout) if (TIMEOUT_MIN..=TIMEOUT_MAX).contains(&timeout) => Ok(timeout),
        _ => Err(FieldError::new("timeout", asked, accepted())),
    }
}

fn detach_timeout(asked: Option<prost_types::Duration>) -> Result<Duration, FieldError> {
    let Some(asked) = asked else { return Ok(DETACH_TIMEOUT) };
    match Duration::try_from(asked) {
        Ok(timeout) if DETACH_TIMEOUTS.contains(&timeout) => Ok(timeout),
        _ => {
            let (least, most) = (DETACH_TIMEOUTS.start(), DETACH_TIMEOUTS.end());
            Err(FieldError::new("timeout", asked, format!("{least:?} to {most:?}")))
        }
    }
}

fn unexpected(reply: &Reply) -> Status {
    Status::internal(format!("the supervisor answered something else: {reply:?}"))
}

/// The status now and after each change; changes of counters alone at most 5 times a second.
/// Ends when the guest has.
fn statuses(vmm: Vmm) -> impl Stream<Item = Result<VmmStatus, Status>> + Send {
    struct Watcher {
        vmm: Vmm,
        receiver: tokio::sync::watch::Receiver<VmmStatus>,
        last: Option<(VmmStatus, Instant)>,
    }
    let receiver = vmm.shared().watch();
    stream::unfold(Watcher { vmm, receiver, last: None }, |mut watcher| async move {
        if let Some((last, sent)) = &watcher.last {
            if last.state == VmmState::Exited as i32 {
                return None;
            }
            watcher.receiver.changed().await.ok()?;
            if same_but_counters(&watcher.receiver.borrow(), last) {
                // Only counters: what more changes meanwhile goes along.
                tokio::select! {
                    () = tokio::time::sleep_until(*sent + STATUS_INTERVAL) => {}
                    other = watcher.receiver.wait_for(|now| !same_but_counters(now, last)) => {
                        other.ok()?;
                    }
                }
            }
        }
        let now = watcher.receiver.borrow_and_update().clone();
        watcher.last = Some((now.clone(), Instant::now()));
        let status = watcher.vmm.shared().fill(now);
        Some((Ok(status), watcher))
    })
}

/// Whether two statuses differ in a migration's figures at most.
fn same_but_counters(one: &VmmStatus, other: &VmmStatus) -> bool {
    let progress = |status: &VmmStatus| {
        status.migration.as_ref().map(|m| (m.id.clone(), m.progress, m.error.clone()))
    };
    (one.state, &one.state_reason, one.epoch, one.reboot_count, &one.disks)
        == (other.state, &other.state_reason, other.epoch, other.reboot_count, &other.disks)
        && progress(one) == progress(other)
}

/// The history, then what comes. Ends when the guest has and all is said.
fn console(vmm: Vmm) -> impl Stream<Item = Result<ConsoleOutput, Status>> + Send {
    struct Reader {
        vmm: Vmm,
        end: tokio::sync::watch::Receiver<u64>,
        status: tokio::sync::watch::Receiver<VmmStatus>,
        position: u64,
        /// Up to here it was said before the attach.
        history: u64,
    }
    let shared = vmm.shared();
    let (end, status) = (shared.console.watch(), shared.watch());
    let history = *end.borrow();
    let reader = Reader { vmm, end, status, position: 0, history };
    stream::unfold(reader, |mut reader| async move {
        loop {
            let exited = reader.status.borrow().state == VmmState::Exited as i32;
            reader.end.mark_unchanged();
            let is_history = reader.position < reader.history;
            let left = (reader.history.saturating_sub(reader.position)) as usize;
            let bytes_max =
                if is_history { left.min(CONSOLE_CHUNK_BYTES) } else { CONSOLE_CHUNK_BYTES };
            let said = reader.vmm.shared().console.read(reader.position, bytes_max);
            if !said.bytes.is_empty() {
                // The history may have scrolled on since: then what was read is newer.
                let history = said.next <= reader.history;
                reader.position = said.next;
                let output = ConsoleOutput { data: Bytes::from(said.bytes), history };
                return Some((Ok(output), reader));
            }
            if exited {
                return None;
            }
            tokio::select! {
                changed = reader.end.changed() => changed.ok()?,
                exited = reader.status.wait_for(|s| s.state == VmmState::Exited as i32) => {
                    exited.ok()?;
                    continue;
                }
            }
            tokio::time::sleep(CONSOLE_INTERVAL).await;
        }
    })
}

/// Types in what comes; yields nothing but the error that ends the attachment.
fn typed(vmm: Vmm, input: Streaming<ConsoleInput>) -> impl Stream<Item = Option<Status>> + Send {
    input.map(move |message| match message {
        Ok(message) => {
            if message.data.is_empty() {
                return None;
            }
            match vmm.shared().devices() {
                Some(devices) => {
                    let taken = devices.serial.type_in(&message.data);
                    if taken < message.data.len() {
                        tracing::debug!(taken, "the guest does not read its console");
                    }
                    None
                }
                None => Some(
                    VmmError::State { asked: "type", state: "there is no machine".into() }.into(),
                ),
            }
        }
        Err(error) => Some(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_time_has_bounds() {
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        assert_eq!(agent_timeout(None), Ok(AGENT_TIMEOUT));
        assert_eq!(agent_timeout(seconds(300)), Ok(TIMEOUT_MAX));
        for (refused, shown) in
            [(0, "0s"), (301, "301s"), (-1, "-1s"), (i64::MAX, "9223372036854775807s")]
        {
            let error = agent_timeout(seconds(refused)).unwrap_err().to_string();
            assert_eq!(error, format!("timeout: {shown}; accepted: 1ms to 300s"));
        }
    }

    /// Each way in which an agent gives no result is told apart by its code.
    #[test]
    fn an_agents_errors_have_codes() {
        use crate::guest_agent::AgentError;
        use tonic::Code;
        let waited = AGENT_TIMEOUT;
        let refused = AgentError::Refused { class: "A".into(), description: "b".into() };
        for (error, code) in [
            (AgentError::NoAnswer { waited }, Code::DeadlineExceeded),
            (AgentError::Busy { waited }, Code::Unavailable),
            (AgentError::Closed, Code::Unavailable),
            (AgentError::TooLarge { limit: 1 }, Code::ResourceExhausted),
            (AgentError::Malformed { reason: "x".into() }, Code::DataLoss),
            (refused, Code::FailedPrecondition),
        ] {
            assert_eq!(Status::from(VmmError::from(error)).code(), code);
        }
    }
}
