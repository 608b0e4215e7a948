//! The session with the leading controller: dial, say who we are, then reports out and `Desired`
//! in, for as long as it lasts; and again. Nothing on the node waits for it (I4).
//!
//! Any controller may be dialled. One that does not lead answers UNAVAILABLE and names the leader
//! in `drover-leader`, which is dialled next. Between rounds without success there is a pause that
//! grows, with jitter, so that a thousand agents do not come back in the same instant.

use std::time::Duration;

use drover_proto::MESSAGE_BYTES_MAX;
use drover_proto::agent::v1::session_service_client::SessionServiceClient;
use drover_proto::agent::v1::{
    AgentMessage, ControllerMessage, Hello, Report, Welcome, agent_message, controller_message,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};

use crate::error::Error;
use crate::node::NodeHandle;

/// The metadata in which a controller names the leader.
pub const LEADER_METADATA: &str = "drover-leader";
/// So a controller says that the node is of another cluster (`ErrorInfo.reason`).
pub const WRONG_CLUSTER: &str = "CLUSTER_ID_MISMATCH";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// From the call to Welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// A leader that does not take a report for so long is not there.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Changes within this time go into one report.
const COALESCE: Duration = Duration::from_millis(20);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(6);
const REPORT_INTERVAL_DEFAULT: Duration = Duration::from_secs(1);
const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(100);
const REPORT_INTERVAL_MAX: Duration = Duration::from_secs(30);
/// So often a hint to the leader is followed before the list is gone through again.
const REDIRECTS_MAX: u32 = 3;
/// One that was shorter counts as none: a controller that drops us at once is no hot loop.
const SESSION_MIN: Duration = Duration::from_secs(1);
/// First and longest pause after a round without success.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Messages on their way to a stream.
const OUTBOX_MAX: usize = 4;

/// How one attempt ended.
#[derive(Debug)]
enum Ended {
    /// Not the leader; this one is.
    Redirect(String),
    /// It could not be begun, for this reason.
    NotBegun(String),
    /// It was a session, and is over.
    Lost(String),
    /// Never to be begun.
    Fatal(Error),
}

/// Holds sessions for ever; returns only when the cluster is the wrong one.
pub async fn run(controllers: Vec<String>, hello: Hello, node: NodeHandle) -> Error {
    let mut next = 0;
    let mut hint: Option<String> = None;
    let mut redirects = 0;
    let mut failures = 0_u32;
    let mut said = String::new();
    loop {
        let address = match hint.take() {
            Some(leader) => leader,
            None => {
                redirects = 0;
                let address = controllers[next % controllers.len()].clone();
                next += 1;
                address
            }
        };
        let begun = Instant::now();
        let reason = match hold(&address, &hello, &node).await {
            Ended::Fatal(error) => return error,
            Ended::Redirect(leader) if redirects < REDIRECTS_MAX => {
                tracing::debug!(controller = address, leader, "is sent to the leader");
                redirects += 1;
                hint = Some(leader);
                continue;
            }
            Ended::Redirect(leader) => format!("names {leader} as the leader, which is not"),
            Ended::Lost(reason) if begun.elapsed() >= SESSION_MIN => {
                tracing::warn!(controller = address, reason, "lost the session; the domains go on");
                failures = 0;
                said.clear();
                continue;
            }
            Ended::NotBegun(reason) | Ended::Lost(reason) => reason,
        };
        failures += 1;
        if said != reason {
            tracing::warn!(controller = address, reason, "no session");
            said = reason;
        }
        // The list is gone through without a pause first: the leader may be any of them.
        if (failures as usize).is_multiple_of(controllers.len()) {
            tokio::time::sleep(pause(failures / controllers.len() as u32)).await;
        }
    }
}

/// A growing pause, between half and all of its length.
fn pause(rounds: u32) -> Duration {
    let full = PAUSE_MIN.saturating_mul(1 << rounds.saturating_sub(1).min(16)).min(PAUSE_MAX);
    let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
    let share = (random >> 32) as u32;
    full / 2 + (full / 2).mul_f64(f64::from(share) / f64::from(u32::MAX))
}

async fn hold(address: &str, hello: &Hello, node: &NodeHandle) -> Ended {
    let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
    let (mut inbox, welcome) =
        match timeout(CONNECT_TIMEOUT + WELCOME_TIMEOUT, open(address, hello, &outbox, messages))
            .await
        {
            Ok(Ok(opened)) => opened,
            Ok(Err(ended)) => return ended,
            Err(_) => return Ended::NotBegun("no answer".into()),
        };
    tracing::info!(
        controller = address,
        leader = welcome.leader_id,
        term = welcome.term,
        "has a session"
    );
    match serve(node, &welcome, &outbox, &mut inbox).await {
        Ok(never) => match never {},
        Err(reason) => Ended::Lost(reason),
    }
}

async fn open(
    address: &str,
    hello: &Hello,
    outbox: &mpsc::Sender<AgentMessage>,
    messages: mpsc::Receiver<AgentMessage>,
) -> Result<(Streaming<ControllerMessage>, Welcome), Ended> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|err| Ended::NotBegun(format!("{address:?} is no address: {err}")))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect().await.map_err(|err| Ended::NotBegun(with_causes(&err)))?;
    let mut client =
        SessionServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    // The stream begins with Hello, before the answer is waited for.
    let first = AgentMessage { message: Some(agent_message::Message::Hello(hello.clone())) };
    let _ = outbox.try_send(first);
    let answer = client.open_session(ReceiverStream::new(messages)).await;
    let mut inbox = answer.map_err(|status| refused(address, hello, &status))?.into_inner();
    match inbox.message().await {
        Ok(Some(ControllerMessage { message: Some(controller_message::Message::Welcome(w)) })) => {
            Ok((inbox, w))
        }
        Ok(_) => Err(Ended::NotBegun("the first answer is no Welcome".into())),
        Err(status) => Err(refused(address, hello, &status)),
    }
}

fn refused(address: &str, hello: &Hello, status: &Status) -> Ended {
    let leader = status.metadata().get(LEADER_METADATA).and_then(|value| value.to_str().ok());
    if let (Code::Unavailable, Some(leader)) = (status.code(), leader)
        && !leader.is_empty()
    {
        return Ended::Redirect(leader.to_owned());
    }
    if is_wrong_cluster(status) {
        return Ended::Fatal(Error::WrongCluster {
            cluster: hello.cluster_id.clone(),
            address: address.to_owned(),
            reason: status.message().to_owned(),
        });
    }
    Ended::NotBegun(format!("{:?}: {}", status.code(), status.message()))
}

fn is_wrong_cluster(status: &Status) -> bool {
    use tonic_types::StatusExt;
    status.get_details_error_info().is_some_and(|info| info.reason == WRONG_CLUSTER)
}

/// The session itself; answers why it ended.
async fn serve(
    node: &NodeHandle,
    welcome: &Welcome,
    outbox: &mpsc::Sender<AgentMessage>,
    inbox: &mut Streaming<ControllerMessage>,
) -> Result<std::convert::Infallible, String> {
    let interval = welcome
        .report_interval
        .and_then(|interval| Duration::try_from(interval).ok())
        .unwrap_or(REPORT_INTERVAL_DEFAULT)
        .clamp(REPORT_INTERVAL_MIN, REPORT_INTERVAL_MAX);
    let mut changed = node.changed();
    changed.mark_unchanged();
    let mut sequence = 0;
    let mut desired_sequence = 0;
    let mut due = Instant::now();
    loop {
        tokio::select! {
            message = inbox.message() => {
                let message = message.map_err(|status| with_status(&status))?;
                let Some(message) = message else {
                    return Err("the controller ended it".into());
                };
                match message.message {
                    Some(controller_message::Message::Desired(desired)) => {
                        let taken = desired.sequence;
                        node.desire(desired).await.map_err(|stale| stale.to_string())?;
                        desired_sequence = taken;
                        due = due.min(Instant::now() + COALESCE);
                    }
                    Some(controller_message::Message::Welcome(_)) | None => {}
                }
            }
            news = changed.changed() => {
                news.map_err(|_| "the agent is ending")?;
                due = due.min(Instant::now() + COALESCE);
            }
            () = tokio::time::sleep_until(due) => {
                changed.mark_unchanged();
                let picture = node.picture().await.map_err(|err| err.to_string())?;
                sequence += 1;
                let report = Report {
                    sequence,
                    desired_sequence,
                    usage: Some(picture.usage),
                    domains: picture.domains,
                    pools: picture.storage.pools.clone(),
                    volumes: picture.storage.volumes.clone(),
                    images: picture.storage.images.clone(),
                    snapshots: picture.storage.snapshots.clone(),
                };
                let message =
                    AgentMessage { message: Some(agent_message::Message::Report(report)) };
                match timeout(SEND_TIMEOUT, outbox.send(message)).await {
                    Ok(Ok(())) => due = Instant::now() + interval,
                    Ok(Err(_)) => return Err("the stream is closed".into()),
                    Err(_) => return Err("the controller takes no reports".into()),
                }
            }
        }
    }
}

fn with_status(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// An error and what it comes from, on one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
