//! An image comes from another pool of the node, or from another node's agent, and is visible
//! only when it has been verified.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drover_proto::agent::v1::ReadImageRequest;
use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_storage::PoolError;
use drover_storage::image::{ImageLimits, ImageWriter};
use drover_storage::pool::{ImageClaim, ImageId, ImageInfo, Opened};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::transport::Endpoint;

use super::{NodePool, Progress};
use crate::error::{Error, blocking};

/// So many sources are tried before the attempt counts as failed.
const SOURCES_MAX: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A source that says nothing for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Chunks on their way to the disk.
const CHUNKS_MAX: usize = 4;

/// Brings an image into `pool`. `bytes` is its size, 0 when nobody has said.
pub(super) async fn fetch(
    pool: &Arc<NodePool>,
    others: &[Arc<NodePool>],
    image: ImageId,
    bytes: u64,
    sources: &[String],
    progress: &Arc<Progress>,
) -> Result<ImageInfo, Error> {
    let claimed = Arc::clone(pool);
    let claim = blocking(move || claim(&claimed, image)).await?;
    let _until_it_is_here = match claim {
        Claim::Bring(claim) => claim,
        Claim::Here(info) => return Ok(info),
    };
    for other in others {
        let (pool, other, progress) = (Arc::clone(pool), Arc::clone(other), Arc::clone(progress));
        let copied = blocking(move || {
            match other.pool().map(|other| other.open_image(image)) {
                Ok(Ok(open)) => Ok(Some(copy(&pool, &open, image, &progress)?)),
                // It is not there, or that pool has its own trouble: the sources have it.
                _ => Ok(None),
            }
        });
        if let Some(info) = copied.await? {
            return Ok(info);
        }
    }
    if sources.is_empty() {
        return Err(Error::Domain(format!(
            "image {image}: is in no pool of this node, and no node that has it is known"
        )));
    }
    // Not all nodes ask the same one first.
    let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
    let first = (random % sources.len() as u64) as usize;
    let mut reasons = Vec::new();
    let mut all_busy = true;
    for source in sources.iter().cycle().skip(first).take(sources.len().min(SOURCES_MAX)) {
        match fetch_from(source, pool, image, bytes, progress).await {
            Ok(info) => return Ok(info),
            Err(error) => {
                tracing::warn!(%image, source, %error, "cannot fetch the image");
                all_busy &= matches!(error, Error::Busy(_));
                reasons.push(format!("{source}: {error}"));
            }
        }
    }
    let reasons = reasons.join("; ");
    if all_busy {
        return Err(Error::Busy(format!("the image is to be copied: {reasons}")));
    }
    Err(Error::Domain(format!("the image cannot be fetched: {reasons}")))
}

enum Claim {
    Bring(ImageClaim),
    Here(ImageInfo),
}

/// Of the nodes that share a pool one brings an image; the others wait for it.
fn claim(pool: &NodePool, image: ImageId) -> Result<Claim, Error> {
    let pool = pool.pool()?;
    let claim = match pool.claim_image(image) {
        Err(busy @ PoolError::Busy { .. }) => return Err(Error::Busy(busy.to_string())),
        other => other?,
    };
    Ok(match pool.image(image)? {
        Some(info) => Claim::Here(info),
        None => Claim::Bring(claim),
    })
}

fn copy(
    pool: &NodePool,
    from: &Opened,
    image: ImageId,
    progress: &Progress,
) -> Result<ImageInfo, Error> {
    let mut writer = ImageWriter::new(pool.pool()?, from.bytes(), ImageLimits::default())?;
    for chunk in from.chunks(0) {
        let chunk = chunk?;
        writer.write(chunk.offset, &chunk.bytes)?;
        progress.set(chunk.offset, from.bytes());
    }
    Ok(writer.finish(Some(image))?)
}

enum Piece {
    Data { offset: u64, bytes: Bytes },
    End,
}

async fn fetch_from(
    source: &str,
    pool: &Arc<NodePool>,
    image: ImageId,
    bytes: u64,
    progress: &Arc<Progress>,
) -> Result<ImageInfo, Error> {
    let wrong = |reason: String| Error::Domain(reason);
    let endpoint = Endpoint::from_shared(format!("http://{source}"))
        .map_err(|_| wrong("is no address such as 10.0.0.11:7401".into()))?
        .connect_timeout(CONNECT_TIMEOUT);
    let channel = endpoint.connect().await.map_err(|_| wrong("cannot be reached".into()))?;
    let mut client = AgentServiceClient::new(channel);
    let request = ReadImageRequest { digest: image.to_string() };
    let silent = |_| wrong(format!("said nothing for {} s", SILENCE_MAX.as_secs()));
    let said = |status: tonic::Status| match status.code() {
        tonic::Code::ResourceExhausted => Error::Busy(status.message().to_owned()),
        _ => wrong(status.message().to_owned()),
    };
    let answer = timeout(SILENCE_MAX, client.read_image(request)).await.map_err(silent)?;
    let mut stream = answer.map_err(said)?.into_inner();
    let next = timeout(SILENCE_MAX, stream.message()).await.map_err(silent)?.map_err(said)?;
    let mut message = next.ok_or_else(|| wrong("sent nothing".into()))?;
    let size = message.size_bytes;
    if bytes != 0 && size != bytes {
        return Err(wrong(format!("its image has {size} bytes, and {bytes} are right")));
    }
    progress.set(0, size);

    let (pieces, received) = mpsc::channel(CHUNKS_MAX);
    let (to, counter) = (Arc::clone(pool), Arc::clone(progress));
    let writing = tokio::spawn(blocking(move || write(&to, image, size, received, &counter)));
    // What the writer has against it, it says itself.
    let broke = loop {
        if !message.data.is_empty() {
            let piece = Piece::Data { offset: message.offset, bytes: message.data };
            if pieces.send(piece).await.is_err() {
                break None;
            }
        }
        match timeout(SILENCE_MAX, stream.message()).await {
            Ok(Ok(Some(next))) => message = next,
            Ok(Ok(None)) => {
                let _ = pieces.send(Piece::End).await;
                break None;
            }
            Ok(Err(status)) => break Some(said(status)),
            Err(elapsed) => break Some(silent(elapsed)),
        }
    };
    drop(pieces);
    let written = writing.await.unwrap_or(Err(Error::Ended("image writer")));
    match broke {
        Some(error) => Err(error),
        None => written,
    }
}

fn write(
    pool: &NodePool,
    image: ImageId,
    size: u64,
    mut pieces: mpsc::Receiver<Piece>,
    progress: &Progress,
) -> Result<ImageInfo, Error> {
    let mut writer = ImageWriter::new(pool.pool()?, size, ImageLimits::default())?;
    loop {
        match pieces.blocking_recv() {
            Some(Piece::Data { offset, bytes }) => {
                writer.write(offset, &bytes)?;
                progress.set(offset, size);
            }
            Some(Piece::End) => return Ok(writer.finish(Some(image))?),
            None => return Err(PoolError::Cancelled.into()),
        }
    }
}
