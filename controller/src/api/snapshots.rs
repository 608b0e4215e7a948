//! `drover.v1.SnapshotService`. What a snapshot holds comes from its node's agent, through the
//! leader, block by block; nothing of it is kept here.

use std::pin::Pin;
use std::time::Duration;

use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_proto::agent::v1::{ReadVolumeRequest, VolumeSource, read_volume_request};
use drover_proto::v1::read_snapshot_request::Message;
use drover_proto::v1::snapshot_service_server::SnapshotService;
use drover_proto::v1::{
    CreateSnapshotRequest, DeleteSnapshotRequest, DeleteSnapshotResponse, GetSnapshotRequest,
    KnownBlocks, ListSnapshotsRequest, ListSnapshotsResponse, Operation, ReadSnapshotRequest,
    ReadSnapshotResponse, ReadSnapshotSpec, RestoreSnapshotRequest, Snapshot, SnapshotDisk,
    SnapshotState,
};
use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::errors::invalid;
use super::service::{CALL_WAIT, Service};
use super::{agents, page, validate};
use crate::model::{NodeId, Observed, SnapshotPart, SnapshotRecord};
use crate::store::Versioned;
use crate::workflows::begin::etag;
use crate::workflows::{Context, Refusal, snapshot};

/// The caller says what it wants within this.
const FIRST_WAIT: Duration = Duration::from_secs(10);
/// A read in which nothing moves for so long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Messages that are on their way, in either direction; each has at most 1 MiB and a little.
const QUEUE: usize = 4;
const BLOCK_BYTES: u64 = 1 << 20;
const DIGEST_BYTES: usize = 32;
/// In one message.
const DIGESTS_MAX: usize = 32768;

type Blocks = Pin<Box<dyn Stream<Item = Result<ReadSnapshotResponse, Status>> + Send>>;

#[tonic::async_trait]
impl SnapshotService for Service {
    type ReadSnapshotStream = Blocks;

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::snapshot("name", &request.name)?;
        let domain = validate::domain("domain", &request.domain)?;
        let operation = self
            .begin("CreateSnapshot", &request_id, &request, |cx| {
                snapshot::create_snapshot(cx, &id, &domain)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<Snapshot>, Status> {
        let id = validate::snapshot("name", &request.get_ref().name)?;
        let row = self.read().await?.get::<SnapshotRecord>(id.as_str());
        let row = row.ok_or_else(|| Refusal::NotFound { name: id.name() })?;
        Ok(Response::new(present(&row, &self.hub.observed())))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        let domain = match request.domain.as_str() {
            "" => None,
            name => Some(validate::domain("domain", name)?),
        };
        let filter = format!("snapshots of {}", request.domain);
        let after = page::after(&request.page_token, &filter)?;
        let of_domain = |row: &Versioned<SnapshotRecord>| {
            domain.as_ref().is_none_or(|domain| row.value.domain == domain.as_str())
        };
        let rows = self.read().await?.list::<SnapshotRecord>("", &after, usize::MAX);
        let rows: Vec<_> = rows.into_iter().filter(of_domain).take(size + 1).collect();
        let (rows, next_page_token) = page::cut(rows, size, &filter, |row| row.value.id.clone());
        let observed = self.hub.observed();
        let snapshots = rows.iter().map(|row| present(row, &observed)).collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots, next_page_token }))
    }

    async fn restore_snapshot(
        &self,
        request: Request<RestoreSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::snapshot("name", &request.name)?;
        let operation = self
            .begin("RestoreSnapshot", &request_id, &request, |cx| {
                snapshot::restore_snapshot(cx, &id)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        let id = validate::snapshot("name", &request.name)?;
        self.decide(Instant::now() + CALL_WAIT, |cx, _| {
            Ok((snapshot::delete_snapshot(cx, &id, &request.etag)?, ()))
        })
        .await?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn read_snapshot(
        &self,
        request: Request<Streaming<ReadSnapshotRequest>>,
    ) -> Result<Response<Blocks>, Status> {
        let mut input = request.into_inner();
        let first = timeout(FIRST_WAIT, input.message()).await.map_err(|_| {
            Status::deadline_exceeded("the first message did not come within 10 s")
        })??;
        let Some(Message::Spec(spec)) = first.and_then(|first| first.message) else {
            return Err(invalid("message", "", "spec, in the first message").into());
        };
        let source = self.look(|cx| source(cx, &spec)).await?;
        let channel = agents::connect(&source.address).await?;
        let (answers, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let end = tokio::select! {
                end = pass_on(channel, source, input, &answers) => end,
                () = answers.closed() => return,
            };
            if let Err(status) = end {
                // The caller may be gone.
                drop(answers.send(Err(status)).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Where what is asked for lies.
struct Source {
    node: NodeId,
    address: String,
    volume: VolumeSource,
    size_bytes: u64,
}

fn source(cx: &Context<'_>, spec: &ReadSnapshotSpec) -> Result<Source, Refusal> {
    let id = validate::snapshot("spec.name", &spec.name)?;
    let record = &snapshot::known(cx, &id)?.value;
    let refuse = |reason, message| Refusal::Precondition { subject: id.name(), reason, message };
    if record.state() != SnapshotState::Ready {
        return Err(refuse("SNAPSHOT_NOT_READY", snapshot::not_ready(record)));
    }
    let index = usize::try_from(spec.disk).unwrap_or(usize::MAX);
    let part: &SnapshotPart = record.parts.get(index).ok_or_else(|| {
        let last = record.parts.len().saturating_sub(1);
        invalid("spec.disk", &spec.disk.to_string(), &format!("0 to {last}, one of its disks"))
    })?;
    let node = NodeId::trusted(&record.node);
    let row = cx.world.nodes.get(&node).filter(|_| !cx.is_lost(node.as_str()));
    let row = row.ok_or_else(|| {
        refuse("NODE_LOST", format!("{} is on {}, which is lost", id.name(), node.name()))
    })?;
    Ok(Source {
        address: row.value.address.clone(),
        node,
        volume: VolumeSource {
            pool: part.pool.clone(),
            volume_uid: part.volume_uid.clone(),
            snapshot_uid: part.uid.clone(),
        },
        size_bytes: part.size_bytes,
    })
}

/// What the caller knows goes to the agent, and the blocks come back.
async fn pass_on(
    channel: Channel,
    source: Source,
    input: Streaming<ReadSnapshotRequest>,
    answers: &mpsc::Sender<Result<ReadSnapshotResponse, Status>>,
) -> Result<(), Status> {
    let (feed, inputs) = mpsc::channel(QUEUE);
    let (fed, is_fed) = oneshot::channel();
    let Source { node, volume, size_bytes, .. } = source;
    let first = read_volume_request::Message::Volume(volume);
    let known = async move {
        tell(input, first, size_bytes.div_ceil(BLOCK_BYTES), feed).await?;
        // The reader may have ended before.
        let _ = fed.send(());
        Ok::<_, Status>(())
    };
    let blocks = async {
        let mut client = AgentServiceClient::new(channel);
        // The agent answers when it has been told all: its silence is counted from then on.
        let silent = async {
            match is_fed.await {
                Ok(()) => sleep(SILENCE_MAX).await,
                Err(_) => std::future::pending().await,
            }
        };
        let mut outputs = tokio::select! {
            outputs = client.read_volume(ReceiverStream::new(inputs)) => outputs?.into_inner(),
            () = silent => return Err(silence(&node)),
        };
        loop {
            let block = timeout(SILENCE_MAX, outputs.message()).await;
            let Some(block) = block.map_err(|_| silence(&node))?? else { return Ok(()) };
            if answers.send(Ok(block)).await.is_err() {
                return Ok(());
            }
        }
    };
    tokio::select! {
        end = blocks => end,
        Err(status) = known => Err(status),
    }
}

fn silence(node: &NodeId) -> Status {
    let seconds = SILENCE_MAX.as_secs();
    Status::deadline_exceeded(format!("{}: nothing moved for {seconds} s", node.name()))
}

/// Ends when the caller has ended its stream, or when the agent takes no more: then it says why.
async fn tell(
    mut input: Streaming<ReadSnapshotRequest>,
    first: read_volume_request::Message,
    blocks: u64,
    feed: mpsc::Sender<ReadVolumeRequest>,
) -> Result<(), Status> {
    let mut next = 0;
    let mut message = first;
    loop {
        if feed.send(ReadVolumeRequest { message: Some(message) }).await.is_err() {
            return Ok(());
        }
        let said = timeout(SILENCE_MAX, input.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the stream of what is known did not end"))??;
        message = match said.map(|said| said.message) {
            None => return Ok(()),
            Some(Some(Message::Known(known))) => {
                next = checked(&known, next, blocks)?;
                read_volume_request::Message::Known(known)
            }
            Some(_) => return Err(invalid("message", "", "known, after the first one").into()),
        };
    }
}

/// The block behind those that are known: messages ascend, so they are not more than there are
/// blocks.
fn checked(known: &KnownBlocks, next: u64, blocks: u64) -> Result<u64, Refusal> {
    let bytes = known.digests.len();
    let count = bytes / DIGEST_BYTES;
    if !bytes.is_multiple_of(DIGEST_BYTES) || !(1..=DIGESTS_MAX).contains(&count) {
        let expected =
            format!("1 to {DIGESTS_MAX} digests of {DIGEST_BYTES} bytes, one behind the other");
        return Err(invalid("known.digests", &format!("{bytes} bytes"), &expected));
    }
    let end = known.first_block.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
    if known.first_block < next || end > blocks {
        let value = format!("{} and {count} blocks", known.first_block);
        let expected = format!("{next} or more, and no block behind the last of {blocks}");
        return Err(invalid("known.first_block", &value, &expected));
    }
    Ok(end)
}

fn present(row: &Versioned<SnapshotRecord>, observed: &Observed) -> Snapshot {
    let record = &row.value;
    let disk = |part: &SnapshotPart| SnapshotDisk {
        volume: format!("volumes/{}", part.volume),
        pool: part.pool.clone(),
        size_bytes: part.size_bytes,
        allocated_bytes: observed
            .snapshot(&record.node, &part.uid)
            .map_or(0, |seen| seen.allocated_bytes),
    };
    Snapshot {
        name: format!("snapshots/{}", record.id),
        uid: record.uid.clone(),
        domain: format!("domains/{}", record.domain),
        node: format!("nodes/{}", record.node),
        state: record.state,
        state_reason: record.state_reason.clone(),
        quiesced: record.quiesced,
        disks: record.parts.iter().map(disk).collect(),
        create_time: record.create_time,
        etag: etag(row.mod_revision),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_ascends_and_ends_with_the_disk() {
        let known =
            |first_block, bytes: usize| KnownBlocks { first_block, digests: vec![0; bytes].into() };
        assert_eq!(checked(&known(0, 64), 0, 4).unwrap(), 2);
        assert_eq!(checked(&known(3, 32), 2, 4).unwrap(), 4);
        for (bad, next, field) in [
            (known(0, 0), 0, "known.digests"),
            (known(0, 33), 0, "known.digests"),
            (known(0, (DIGESTS_MAX + 1) * DIGEST_BYTES), 0, "known.digests"),
            (known(1, 32), 2, "known.first_block"),
            (known(3, 64), 2, "known.first_block"),
            (known(u64::MAX, 32), 0, "known.first_block"),
        ] {
            let refused = checked(&bad, next, 4).unwrap_err().to_string();
            assert!(refused.starts_with(field), "{refused}");
        }
    }
}
