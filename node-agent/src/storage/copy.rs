//! A volume comes from another node's agent, where nobody has it open meanwhile. Each block is
//! checked, and the volume is seen only when all of it is here.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_proto::agent::v1::{ReadVolumeRequest, VolumeSource, read_volume_request};
use drover_proto::v1::ReadSnapshotResponse;
use drover_storage::PoolError;
use drover_storage::image::{CHUNK_BYTES, chunk_digest};
use drover_storage::pool::{VolumeId, VolumeInfo};
use drover_storage::volume::VolumeWriter;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::transport::Endpoint;

use super::{NodePool, Progress};
use crate::error::{Error, blocking};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// From the call to its first message: the source makes the volume ready to be read.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two messages: a source that finds only zeros says every few seconds how far it is.
const SILENCE_MAX: Duration = Duration::from_secs(120);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Blocks on their way to the disk.
const BLOCKS_MAX: usize = 4;

enum Piece {
    Block(ReadSnapshotResponse),
    End,
}

/// Brings `volume`, of `bytes` or what it has at its source if that is more, into `pool`. When it
/// is given up, this returns when nothing more can come of it.
pub(super) async fn copy(
    pool: &Arc<NodePool>,
    volume: VolumeId,
    bytes: u64,
    source: &str,
    progress: &Arc<Progress>,
) -> Result<VolumeInfo, Error> {
    let mut writing = None;
    let begin = |size: u64| {
        progress.set(0, size);
        let (pieces, received) = mpsc::channel(BLOCKS_MAX);
        let (to, counter) = (Arc::clone(pool), Arc::clone(progress));
        let bytes = bytes.max(size);
        let write = move || write(&to, volume, bytes, size, received, &counter);
        writing = Some(tokio::spawn(blocking(write)));
        pieces
    };
    let received = tokio::select! {
        received = receive(source, volume, begin) => received,
        () = progress.given_up.notified() => Err(PoolError::Cancelled.into()),
    };
    let written = match writing {
        Some(writing) => writing.await.unwrap_or(Err(Error::Ended("volume writer"))),
        None => Err(Error::Ended("volume writer")),
    };
    match (received, written) {
        // Whatever else there was.
        (_, Ok(info)) => Ok(info),
        (Err(error), _) => Err(error),
        (Ok(()), Err(Error::Domain(reason))) => Err(Error::Domain(format!("{source}: {reason}"))),
        (Ok(()), Err(error)) => Err(error),
    }
}

/// Hands on what comes, to whoever `begin` finds for so many bytes, until all of it is there. A
/// receiver that has gone is no error here: it says itself why.
async fn receive(
    source: &str,
    volume: VolumeId,
    begin: impl FnOnce(u64) -> mpsc::Sender<Piece>,
) -> Result<(), Error> {
    let wrong = |reason: &str| Error::Domain(format!("{source}: {reason}"));
    let endpoint = Endpoint::from_shared(format!("http://{source}"))
        .map_err(|_| wrong("is no address such as 10.0.0.11:7401"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    let channel = endpoint.connect().await.map_err(|_| wrong("cannot be reached"))?;
    let mut client = AgentServiceClient::new(channel);
    // In whichever pool it lies there.
    let from = VolumeSource { volume_uid: volume.to_string(), ..VolumeSource::default() };
    let message = Some(read_volume_request::Message::Volume(from));
    let request = tokio_stream::iter([ReadVolumeRequest { message }]);
    let silent = |_| wrong("says nothing");
    let said = |status: tonic::Status| match status.code() {
        tonic::Code::ResourceExhausted => Error::Busy(format!("{source}: {}", status.message())),
        _ => wrong(status.message()),
    };
    let answer = timeout(ANSWER_TIMEOUT, client.read_volume(request)).await.map_err(silent)?;
    let mut stream = answer.map_err(said)?.into_inner();
    let first = timeout(ANSWER_TIMEOUT, stream.message()).await.map_err(silent)?.map_err(said)?;
    let pieces = begin(first.ok_or_else(|| wrong("sent nothing"))?.size_bytes);
    let next = async |stream: &mut tonic::Streaming<_>| {
        timeout(SILENCE_MAX, stream.message()).await.map_err(silent)?.map_err(said)
    };
    while let Some(block) = next(&mut stream).await? {
        if pieces.send(Piece::Block(block)).await.is_err() {
            return Ok(());
        }
    }
    // An end that nobody has confirmed is none: what has not come would be zeros.
    match stream.trailers().await {
        Ok(Some(_)) => {
            let _ = pieces.send(Piece::End).await;
            Ok(())
        }
        _ => Err(wrong("the stream broke off")),
    }
}

fn write(
    pool: &NodePool,
    volume: VolumeId,
    bytes: u64,
    size: u64,
    mut pieces: mpsc::Receiver<Piece>,
    progress: &Progress,
) -> Result<VolumeInfo, Error> {
    let mut writer = VolumeWriter::new(pool.pool()?, bytes)?;
    loop {
        match pieces.blocking_recv() {
            Some(Piece::Block(block)) => {
                check(&block, size)?;
                progress.set(block.offset, size);
                if block.digest.is_empty() {
                    continue;
                }
                writer.write(block.offset, &block.data)?;
            }
            Some(Piece::End) => return Ok(writer.finish(volume)?),
            None => return Err(PoolError::Cancelled.into()),
        }
    }
}

/// Whether a block is whole, in its place, and what its digest says; or says how far the source is.
fn check(block: &ReadSnapshotResponse, size: u64) -> Result<(), Error> {
    let ReadSnapshotResponse { offset, digest, data, .. } = block;
    let wrong = |what: &str| Err(Error::Domain(format!("the block at {offset}: {what}")));
    if digest.is_empty() {
        return if data.is_empty() && *offset <= size { Ok(()) } else { wrong("has no digest") };
    }
    if !offset.is_multiple_of(CHUNK_BYTES) || *offset >= size {
        return wrong("is none of this disk's");
    }
    if data.len() as u64 != CHUNK_BYTES.min(size - offset) {
        return wrong(&format!("has {} bytes", data.len()));
    }
    if digest[..] != chunk_digest(data) {
        return wrong("is not what its digest says");
    }
    Ok(())
}
