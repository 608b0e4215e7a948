//! To the peers: one task, one bounded queue and one ordered stream each.
//!
//! Raft bears the loss of messages, not their reordering. So a message is sent on the one
//! stream to its peer or not at all: while the stream is down, or its queue is full, it is
//! dropped and Raft is told that the peer is unreachable. A stream that breaks takes what was
//! queued with it; the next one begins empty.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use drover_proto::raft::v1::raft_service_client::RaftServiceClient;
use drover_proto::raft::v1::{RaftFrame, Received, SnapshotChunk};
use prost_raft::Message as _;
use raft::eraftpb::Message;
use rand::RngExt as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use super::node::Inbound;
use super::peers::Peers;
use crate::store::MemberId;

/// Messages that wait for a peer's stream.
const QUEUE_MESSAGES_MAX: usize = 1024;
/// Messages put into one frame.
const FRAME_MESSAGES_MAX: usize = 64;
/// A frame is closed when it is larger; one message is at most about 2 MiB.
const FRAME_BYTES: usize = 1 << 20;
/// Frames on their way into the connection.
const FRAMES_MAX: usize = 4;
/// The largest frame that a receiver takes.
pub(crate) const FRAME_BYTES_MAX: usize = 16 << 20;
/// Of a snapshot's data in one message.
const CHUNK_BYTES: usize = 256 << 10;

const CONNECT_TIME: Duration = Duration::from_secs(2);
const OPEN_TIME: Duration = Duration::from_secs(3);
const FRAME_TIME: Duration = Duration::from_secs(5);
const SNAPSHOT_TIME: Duration = Duration::from_secs(300);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIME: Duration = Duration::from_secs(2);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// The streams to all peers.
pub(crate) struct Transport {
    peers: BTreeMap<MemberId, Peer>,
}

struct Peer {
    queue: mpsc::Sender<Message>,
    link: Arc<Link>,
}

/// What is known of the way to one peer.
struct Link {
    id: MemberId,
    address: String,
    shared: Arc<Peers>,
    inbox: mpsc::Sender<Inbound>,
    connected: AtomicBool,
    sending_snapshot: AtomicBool,
}

impl Transport {
    /// Starts a task for each peer, on the current runtime.
    pub(crate) fn start(shared: &Arc<Peers>, inbox: &mpsc::Sender<Inbound>) -> Self {
        let me = shared.identity.member;
        let others = shared.members.iter().filter(|(id, _)| **id != me);
        let peers = others.map(|(id, address)| {
            let link = Arc::new(Link {
                id: *id,
                address: address.clone(),
                shared: shared.clone(),
                inbox: inbox.clone(),
                connected: AtomicBool::new(false),
                sending_snapshot: AtomicBool::new(false),
            });
            let (queue, messages) = mpsc::channel(QUEUE_MESSAGES_MAX);
            tokio::spawn(link.clone().run(messages));
            (*id, Peer { queue, link })
        });
        Self { peers: peers.collect() }
    }

    /// The peer's stream is up.
    pub(crate) fn connected(&self, id: MemberId) -> bool {
        self.peers.get(&id).is_some_and(|peer| peer.link.connected.load(Ordering::Relaxed))
    }

    /// Queues a message; false when it is dropped.
    pub(crate) fn send(&self, message: Message) -> bool {
        let Some(peer) = self.peers.get(&message.to) else { return false };
        peer.link.connected.load(Ordering::Relaxed) && peer.queue.try_send(message).is_ok()
    }

    /// Starts sending a snapshot; its end is reported to the inbox. False when it is dropped.
    pub(crate) fn send_snapshot(&self, message: Message, runtime: &tokio::runtime::Handle) -> bool {
        let Some(peer) = self.peers.get(&message.to) else { return false };
        let link = peer.link.clone();
        if link.sending_snapshot.swap(true, Ordering::Relaxed) {
            return false;
        }
        runtime.spawn(async move {
            let sent = timeout(SNAPSHOT_TIME, link.send_snapshot(message)).await;
            let result = sent.unwrap_or_else(|_| Err(Status::deadline_exceeded("too slow")));
            if let Err(status) = &result {
                tracing::warn!(peer = link.id, %status, "snapshot not sent");
            }
            link.sending_snapshot.store(false, Ordering::Relaxed);
            let report = Inbound::SnapshotSent { to: link.id, arrived: result.is_ok() };
            // The inbox is gone only when the node is.
            let _ = link.inbox.send(report).await;
        });
        true
    }
}

impl Link {
    /// Keeps a stream up until the queue's other end is dropped.
    async fn run(self: Arc<Self>, mut messages: mpsc::Receiver<Message>) {
        let mut backoff = BACKOFF_MIN;
        while !messages.is_closed() {
            let mut opened = false;
            let ended = self.stream(&mut messages, &mut opened).await;
            self.connected.store(false, Ordering::Relaxed);
            if opened {
                backoff = BACKOFF_MIN;
                tracing::info!(peer = self.id, address = self.address, "stream to peer ended");
            }
            match ended {
                Ok(()) => {}
                Err(status) => self.shared.refused_by(self.id, &self.address, &status),
            }
            // Of the stream that broke: not for the next one.
            while messages.try_recv().is_ok() {}
            let jitter = rand::rng().random_range(0.5..1.0);
            tokio::time::sleep(backoff.mul_f64(jitter)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn connect(&self) -> Result<RaftServiceClient<Channel>, Status> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|e| Status::invalid_argument(format!("address {}: {e}", self.address)))?
            .connect_timeout(CONNECT_TIME)
            .tcp_nodelay(true)
            .keep_alive_while_idle(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIME);
        let channel = timeout(CONNECT_TIME, endpoint.connect())
            .await
            .map_err(|_| Status::unavailable("connecting takes too long"))?
            .map_err(|e| Status::unavailable(format!("{e:?}")))?;
        Ok(RaftServiceClient::new(channel))
    }

    fn request<T>(&self, body: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(body);
        *request.metadata_mut() = self.shared.introduce(self.id)?;
        Ok(request)
    }

    /// Connects, and sends what comes until the stream breaks.
    async fn stream(
        &self,
        messages: &mut mpsc::Receiver<Message>,
        opened: &mut bool,
    ) -> Result<(), Status> {
        let mut client = self.connect().await?;
        let (frames, outgoing) = mpsc::channel(FRAMES_MAX);
        let request = self.request(ReceiverStream::new(outgoing))?;
        let mut received = timeout(OPEN_TIME, client.open_stream(request))
            .await
            .map_err(|_| Status::unavailable("opening the stream takes too long"))??
            .into_inner();
        *opened = true;
        self.shared.accepted_by(self.id);
        self.connected.store(true, Ordering::Relaxed);
        tracing::info!(peer = self.id, address = self.address, "stream to peer is up");
        pump(messages, &frames, &mut received).await
    }

    async fn send_snapshot(&self, mut message: Message) -> Result<(), Status> {
        let snapshot = message
            .snapshot
            .as_mut()
            .ok_or_else(|| Status::internal("the message has no snapshot"))?;
        let data = Bytes::from(std::mem::take(&mut snapshot.data));
        let index = snapshot.get_metadata().index;
        tracing::info!(peer = self.id, index, bytes = data.len(), "sending a snapshot");
        let chunks = snapshot_chunks(message.encode_to_vec().into(), data);
        let mut client = self.connect().await?;
        client.install_snapshot(self.request(tokio_stream::iter(chunks))?).await?;
        Ok(())
    }
}

/// Moves messages into the stream; ends when either side does.
async fn pump(
    messages: &mut mpsc::Receiver<Message>,
    frames: &mpsc::Sender<RaftFrame>,
    received: &mut Streaming<Received>,
) -> Result<(), Status> {
    let mut taken = Vec::with_capacity(FRAME_MESSAGES_MAX);
    loop {
        tokio::select! {
            count = messages.recv_many(&mut taken, FRAME_MESSAGES_MAX) => {
                if count == 0 {
                    return Ok(());
                }
                for frame in pack(taken.drain(..)) {
                    match timeout(FRAME_TIME, frames.send(frame)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Ok(()),
                        Err(_) => return Err(Status::unavailable("the peer takes nothing in")),
                    }
                }
            }
            answer = received.message() => if answer?.is_none() { return Ok(()) }
        }
    }
}

/// Packs messages into frames, in order.
fn pack(messages: impl Iterator<Item = Message>) -> Vec<RaftFrame> {
    let mut frames = vec![RaftFrame::default()];
    let mut bytes = 0;
    for message in messages {
        let message = message.encode_to_vec();
        bytes += message.len();
        if let Some(frame) = frames.last_mut() {
            frame.messages.push(message.into());
        }
        if bytes >= FRAME_BYTES {
            bytes = 0;
            frames.push(RaftFrame::default());
        }
    }
    frames.retain(|frame| !frame.messages.is_empty());
    frames
}

/// A snapshot in pieces: the first one says what it is.
fn snapshot_chunks(message: Bytes, data: Bytes) -> impl Iterator<Item = SnapshotChunk> {
    let total = data.len();
    let count = total.div_ceil(CHUNK_BYTES).max(1);
    (0..count).map(move |i| {
        let piece = data.slice(i * CHUNK_BYTES..total.min((i + 1) * CHUNK_BYTES));
        let first = i == 0;
        SnapshotChunk {
            message: if first { message.clone() } else { Bytes::new() },
            total_bytes: if first { total as u64 } else { 0 },
            crc: crc32fast::hash(&piece),
            data: piece,
        }
    })
}
