//! AgentService.ReadVolume: what a volume or a snapshot holds, for other agents and for backups.
//! It is open under a lock meanwhile, so that no VMM opens it and nobody deletes it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_proto::agent::v1::{ReadVolumeRequest, VolumeSource, read_volume_request};
use drover_proto::v1::{KnownBlocks, ReadSnapshotResponse};
use drover_storage::PoolError;
use drover_storage::image::{CHUNK_BYTES, Chunk, Step, chunk_digest};
use drover_storage::pool::{Opened, Pool, SnapshotId, VolumeId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::StorageHandle;
use super::images::status;
use crate::error::{Error, blocking};

/// Readers at the same time: each reads as fast as the disks can, which guests use too.
const READERS_MAX: usize = 4;
/// How long the first message may take.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// And all that the caller knows.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(120);
/// A caller that takes nothing for so long is not there.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Where only zeros are found, the caller hears so often how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// Blocks that wait for a slow reader, of 1 MiB each.
const BLOCKS_MAX: usize = 4;
/// So many known blocks are kept for a reader, 32 MiB: of a disk that is larger than 1 TiB, what
/// lies behind comes with its data.
const KNOWN_MAX: u64 = 1 << 20;
/// In one message.
const KNOWN_IN_MESSAGE_MAX: usize = 32_768;
const DIGEST_BYTES: usize = 32;

/// What ReadVolume answers.
pub type VolumeAnswers = ReceiverStream<Result<ReadSnapshotResponse, Status>>;

/// Gives out what volumes and snapshots hold.
#[derive(Debug, Clone)]
pub struct Volumes {
    storage: StorageHandle,
    node: String,
    readers: Arc<Semaphore>,
}

impl Volumes {
    /// Of the pools of `node`.
    pub fn new(storage: StorageHandle, node: String) -> Self {
        Self { storage, node, readers: Arc::new(Semaphore::new(READERS_MAX)) }
    }

    /// As AgentService.ReadVolume.
    pub(crate) async fn read(
        &self,
        mut input: Streaming<ReadVolumeRequest>,
    ) -> Result<VolumeAnswers, Status> {
        let first = timeout(FIRST_MESSAGE_TIMEOUT, input.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no first message within 10 s"))??;
        let source = match first.and_then(|first| first.message) {
            Some(read_volume_request::Message::Volume(source)) => source,
            _ => return Err(Status::invalid_argument("volume: the first message carries it")),
        };
        let permit = Arc::clone(&self.readers).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "node {} gives {READERS_MAX} volumes out already; wait for one of them",
                self.node
            ))
        })?;
        let opened = self.open(source).await?;
        let (answers, stream) = mpsc::channel(BLOCKS_MAX);
        tokio::spawn(async move {
            let _until_it_ends: OwnedSemaphorePermit = permit;
            let known = tokio::select! {
                known = timeout(KNOWN_TIMEOUT, known(input, opened.bytes())) => known,
                () = answers.closed() => return,
            };
            let late = |_| Err(Status::deadline_exceeded("known: took longer than 120 s"));
            match known.unwrap_or_else(late) {
                Ok(known) => give_out(opened, known, answers, PROGRESS_INTERVAL).await,
                Err(status) => drop(timeout(SILENCE_MAX, answers.send(Err(status))).await),
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    /// Opens it in the pool that is named, or in the first one that has it.
    async fn open(&self, source: VolumeSource) -> Result<Opened, Status> {
        let invalid = |err: PoolError| status(&err.into());
        let volume: VolumeId = source.volume_uid.parse().map_err(invalid)?;
        let snapshot = match source.snapshot_uid.as_str() {
            "" => None,
            uid => Some(uid.parse::<SnapshotId>().map_err(invalid)?),
        };
        let pools: Vec<_> = match source.pool.as_str() {
            "" => self.storage.pools.iter().cloned().collect(),
            id => self.storage.pool(id).into_iter().cloned().collect(),
        };
        if pools.is_empty() {
            return Err(Status::not_found(format!(
                "pool: {:?}: is not on node {}; it has {}",
                source.pool,
                self.node,
                self.storage.names()
            )));
        }
        let what = match snapshot {
            None => format!("volume_uid: {volume}"),
            Some(snapshot) => format!("snapshot_uid: {snapshot} of volume {volume}"),
        };
        let node = self.node.clone();
        let found = blocking(move || {
            let mut closed = None;
            for pool in &pools {
                let opened = pool.pool().map(|pool| open(pool.as_ref(), volume, snapshot));
                match opened {
                    Err(error) => closed = Some(error),
                    Ok(Err(PoolError::NotFound { .. })) => {}
                    Ok(opened) => return Ok(Ok(opened?)),
                }
            }
            Ok(Err(match closed {
                Some(error) => Status::unavailable(error.to_string()),
                None => Status::not_found(format!("{what}: is not on node {node}")),
            }))
        });
        found.await.map_err(|err: Error| status(&err))?
    }
}

fn open(
    pool: &dyn Pool,
    volume: VolumeId,
    snapshot: Option<SnapshotId>,
) -> Result<Opened, PoolError> {
    match snapshot {
        None => pool.open_volume(volume),
        Some(snapshot) => pool.open_snapshot(volume, snapshot),
    }
}

/// The digests that the caller knows, block by block; zeros: none.
pub(super) type Known = Vec<[u8; DIGEST_BYTES]>;

/// Takes in what the caller knows of a disk of this size, until it has ended its stream.
async fn known(mut input: Streaming<ReadVolumeRequest>, bytes: u64) -> Result<Known, Status> {
    let mut known = Known::new();
    let blocks_max = bytes.div_ceil(CHUNK_BYTES).min(KNOWN_MAX);
    while let Some(message) = input.message().await? {
        let Some(read_volume_request::Message::Known(blocks)) = message.message else {
            let text = "known: the messages after the first carry it, and nothing else";
            return Err(Status::invalid_argument(text));
        };
        note(&mut known, &blocks, blocks_max)?;
    }
    Ok(known)
}

fn note(known: &mut Known, blocks: &KnownBlocks, blocks_max: u64) -> Result<(), Status> {
    let (digests, rest) = blocks.digests.as_chunks::<DIGEST_BYTES>();
    if !rest.is_empty() || digests.len() > KNOWN_IN_MESSAGE_MAX {
        return Err(Status::invalid_argument(format!(
            "known.digests: {} bytes: accepted are whole digests of {DIGEST_BYTES} bytes, at most \
             {KNOWN_IN_MESSAGE_MAX} of them",
            blocks.digests.len()
        )));
    }
    for (block, digest) in (blocks.first_block..blocks_max).zip(digests) {
        let block = block as usize;
        if known.len() <= block {
            known.resize(block + 1, [0; DIGEST_BYTES]);
        }
        known[block] = *digest;
    }
    Ok(())
}

/// Sends what is not zeros, and a sign of life after `progress_interval` without any, for as long
/// as somebody takes it.
pub(super) async fn give_out(
    opened: Opened,
    known: Known,
    answers: mpsc::Sender<Result<ReadSnapshotResponse, Status>>,
    progress_interval: Duration,
) {
    let runtime = tokio::runtime::Handle::current();
    let sending = blocking(move || {
        let send = |answer| {
            let sent = timeout(SILENCE_MAX, answers.send(answer));
            matches!(runtime.block_on(sent), Ok(Ok(())))
        };
        let size_bytes = opened.bytes();
        let mut goes_on =
            send(Ok(ReadSnapshotResponse { size_bytes, ..ReadSnapshotResponse::default() }));
        let mut next = 0;
        let mut said = Instant::now();
        while goes_on && !answers.is_closed() {
            match opened.step(next) {
                Ok(Step::End) => break,
                Ok(Step::Zeros(end)) => {
                    next = end;
                    if said.elapsed() >= progress_interval {
                        let offset = end.min(size_bytes);
                        goes_on = send(Ok(ReadSnapshotResponse { offset, ..Default::default() }));
                        said = Instant::now();
                    }
                }
                Ok(Step::Data(chunk)) => {
                    next = chunk.offset + CHUNK_BYTES;
                    goes_on = send(Ok(block(chunk, &known)));
                    said = Instant::now();
                }
                Err(error) => {
                    send(Err(status(&error.into())));
                    break;
                }
            }
        }
        Ok(())
    });
    if let Err(error) = sending.await {
        tracing::error!(%error, "reading a volume failed");
    }
}

fn block(chunk: Chunk, known: &Known) -> ReadSnapshotResponse {
    let digest = chunk_digest(&chunk.bytes);
    let at = (chunk.offset / CHUNK_BYTES) as usize;
    let is_known = known.get(at) == Some(&digest);
    let data = if is_known { Vec::new() } else { chunk.bytes };
    ReadSnapshotResponse {
        size_bytes: 0,
        offset: chunk.offset,
        digest: digest.to_vec().into(),
        data: data.into(),
    }
}
