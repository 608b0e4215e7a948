//! From the peers: their streams and snapshots, into the node's inbox.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::raft::v1::raft_service_server::{RaftService, RaftServiceServer};
use drover_proto::raft::v1::{InstallSnapshotResponse, RaftFrame, Received, SnapshotChunk};
use futures::Stream;
use prost_raft::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::node::Inbound;
use super::peers::{Accepted, Peers};
use super::transport::FRAME_BYTES_MAX;
use crate::store::MemberId;

/// Of a snapshot's data.
const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
/// Between two chunks of a snapshot.
const CHUNK_TIME: Duration = Duration::from_secs(30);
/// For the node to take a snapshot in.
const INBOX_TIME: Duration = Duration::from_secs(30);

/// The service that the peers call.
pub type RaftServer = RaftServiceServer<Incoming>;

/// See [`RaftServer`].
pub struct Incoming {
    shared: Arc<Peers>,
    inbox: mpsc::Sender<Inbound>,
    /// Snapshots are large: one at a time.
    snapshots: Semaphore,
}

pub(crate) fn server(shared: Arc<Peers>, inbox: mpsc::Sender<Inbound>) -> RaftServer {
    let incoming = Incoming { shared, inbox, snapshots: Semaphore::new(1) };
    RaftServiceServer::new(incoming).max_decoding_message_size(FRAME_BYTES_MAX)
}

#[tonic::async_trait]
impl RaftService for Incoming {
    type OpenStreamStream = Pin<Box<dyn Stream<Item = Result<Received, Status>> + Send>>;

    async fn open_stream(
        &self,
        request: Request<Streaming<RaftFrame>>,
    ) -> Result<Response<Self::OpenStreamStream>, Status> {
        if self.inbox.is_closed() {
            return Err(stopping());
        }
        let accepted = self.shared.accept(request.metadata())?;
        tracing::info!(peer = accepted.from, "stream from peer is up");
        let (answers, received) = mpsc::channel(1);
        let (shared, inbox) = (self.shared.clone(), self.inbox.clone());
        let mut frames = request.into_inner();
        tokio::spawn(async move {
            let end = loop {
                let frame = match frames.message().await {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break Status::ok("the stream ended"),
                    Err(status) => break status,
                };
                if let Err(status) = take_in(&shared, &inbox, accepted, frame) {
                    // The peer may be gone; then there is nobody to tell.
                    let _ = answers.send(Err(status.clone())).await;
                    break status;
                }
                // It only shows that the stream lives: one under way is enough.
                let _ = answers.try_send(Ok(Received {}));
            };
            tracing::info!(peer = accepted.from, reason = end.message(), "stream from peer ended");
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<InstallSnapshotResponse>, Status> {
        let from = self.shared.check(request.metadata())?;
        let _one = self
            .snapshots
            .try_acquire()
            .map_err(|_| Status::resource_exhausted("another snapshot is coming in"))?;
        let message = assemble(request.into_inner()).await?;
        check_ends(&message, from, self.shared.identity.member)?;
        match timeout(INBOX_TIME, self.inbox.send(Inbound::Message(message))).await {
            Ok(Ok(())) => Ok(Response::new(InstallSnapshotResponse {})),
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Status::unavailable("this controller is overloaded")),
        }
    }
}

/// Hands a frame's messages to the node. When its inbox is full they are dropped: Raft sends
/// again.
fn take_in(
    shared: &Peers,
    inbox: &mpsc::Sender<Inbound>,
    accepted: Accepted,
    frame: RaftFrame,
) -> Result<(), Status> {
    let me = shared.identity.member;
    let mut messages = Vec::with_capacity(frame.messages.len());
    for bytes in frame.messages {
        let message = Message::decode(bytes)
            .map_err(|e| Status::invalid_argument(format!("no Raft message: {e}")))?;
        check_ends(&message, accepted.from, me)?;
        messages.push(message);
    }
    let deliver = || {
        for message in messages {
            match inbox.try_send(Inbound::Message(message)) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => break,
                Err(TrySendError::Closed(_)) => return Err(stopping()),
            }
        }
        Ok(())
    };
    let superseded = || Status::aborted("a newer stream took this one's place");
    shared.deliver(accepted, deliver).unwrap_or_else(|| Err(superseded()))
}

fn stopping() -> Status {
    Status::unavailable("this controller is stopping")
}

fn check_ends(message: &Message, from: MemberId, to: MemberId) -> Result<(), Status> {
    // A follower passes a leader's transfer and read questions on under the asker's name.
    let passed_on = matches!(
        message.msg_type(),
        MessageType::MsgTransferLeader | MessageType::MsgReadIndex | MessageType::MsgReadIndexResp
    );
    if message.to != to || (message.from != from && !passed_on) {
        return Err(Status::invalid_argument(format!(
            "a message from {} to {} on the stream from {from} to {to}",
            message.from, message.to
        )));
    }
    Ok(())
}

/// Puts a snapshot together.
async fn assemble(mut chunks: Streaming<SnapshotChunk>) -> Result<Message, Status> {
    let mut message = None;
    let mut total = 0;
    let mut data = Vec::new();
    loop {
        let next = timeout(CHUNK_TIME, chunks.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the snapshot stopped coming"))?;
        let Some(chunk) = next? else { break };
        if message.is_none() {
            let first = Message::decode(chunk.message.clone())
                .map_err(|e| Status::invalid_argument(format!("no Raft message: {e}")))?;
            message = Some(first);
            total = chunk.total_bytes;
            if total > SNAPSHOT_BYTES_MAX {
                return Err(Status::out_of_range(format!(
                    "the snapshot has {total} bytes, {SNAPSHOT_BYTES_MAX} are allowed"
                )));
            }
        }
        if crc32fast::hash(&chunk.data) != chunk.crc {
            return Err(Status::data_loss("a chunk of the snapshot is damaged"));
        }
        data.extend_from_slice(&chunk.data);
        if data.len() as u64 > total {
            return Err(Status::out_of_range("the snapshot is longer than it said"));
        }
    }
    let mut message = message.ok_or_else(|| Status::invalid_argument("the snapshot is empty"))?;
    if (data.len() as u64) < total {
        return Err(Status::data_loss("the snapshot ended early"));
    }
    match &mut message.snapshot {
        Some(snapshot) => snapshot.data = data,
        None => return Err(Status::invalid_argument("the message has no snapshot")),
    }
    Ok(message)
}
