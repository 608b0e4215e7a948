//! The images' part of AgentService: ImportImage and ReadImage.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use drover_proto::agent::v1::{ReadImageRequest, ReadImageResponse};
use drover_proto::v1::{
    Image, ImageFormat, ImportImageRequest, ImportImageResponse, ImportImageSpec,
    import_image_request,
};
use drover_storage::PoolError;
use drover_storage::image::{CHUNK_BYTES, Format, Step};
use drover_storage::pool::{ImageId, ImageInfo, Opened, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::feed::{Feeder, Gone, feed};
use super::import::{Job, check_room};
use super::{Command, NodePool, Progress, StorageHandle, http};
use crate::error::{Error, blocking};

/// Imports at the same time.
const IMPORTS_MAX: usize = 2;
/// Readers of images at the same time, most of them other nodes; each has a few MiB on its way.
const READERS_MAX: usize = 16;
/// One more waits so long for its turn: less than a reader's own patience.
const TURN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the first message may take.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// A caller that sends or takes nothing for so long is not there.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How often an import says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// Answers that wait for a slow reader.
const ANSWERS_MAX: usize = 4;

/// What ImportImage answers.
pub type ImportAnswers = ReceiverStream<Result<ImportImageResponse, Status>>;
/// What ReadImage answers.
pub type ReadAnswers = ReceiverStream<Result<ReadImageResponse, Status>>;

/// Takes images in and gives them out.
#[derive(Debug, Clone)]
pub struct Images {
    storage: StorageHandle,
    node: String,
    spool: PathBuf,
    imports: Arc<Semaphore>,
    readers: Arc<Semaphore>,
}

enum Origin {
    Caller(Box<Streaming<ImportImageRequest>>),
    Url(http::Download),
}

impl Images {
    /// Of the pools of `node`; files that cannot go straight into a pool wait in `spool`.
    pub fn new(storage: StorageHandle, node: String, spool: PathBuf) -> Self {
        let imports = Arc::new(Semaphore::new(IMPORTS_MAX));
        let readers = Arc::new(Semaphore::new(READERS_MAX));
        Self { storage, node, spool, imports, readers }
    }

    /// As AgentService.ImportImage.
    pub(crate) async fn import(
        &self,
        mut input: Streaming<ImportImageRequest>,
    ) -> Result<ImportAnswers, Status> {
        let first = timeout(FIRST_MESSAGE_TIMEOUT, input.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no first message within 10 s"))??;
        let spec = match first.and_then(|first| first.message) {
            Some(import_image_request::Message::Spec(spec)) => spec,
            _ => return Err(Status::invalid_argument("spec: the first message carries it")),
        };
        let what = Job::import(format(&spec)?, sha256(&spec)?);
        let pool = self.pool(&spec.pool)?;
        let permit = Arc::clone(&self.imports).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "node {} takes {IMPORTS_MAX} images in already; wait for one of them",
                self.node
            ))
        })?;
        let stated = Some(spec.file_bytes).filter(|bytes| *bytes > 0);
        let (origin, bytes) = if spec.url.is_empty() {
            (Origin::Caller(Box::new(input)), stated)
        } else {
            let download = http::get(&spec.url).await.map_err(Status::failed_precondition)?;
            if let (Some(stated), Some(comes)) = (stated, download.bytes)
                && stated != comes
            {
                return Err(Status::invalid_argument(format!(
                    "file_bytes: {stated}: the server says {comes}"
                )));
            }
            let bytes = download.bytes.or(stated);
            (Origin::Url(download), bytes)
        };
        let asked = Arc::clone(&pool);
        blocking(move || check_room(&asked.id, &asked.pool()?.usage()?, bytes.unwrap_or(1)))
            .await
            .map_err(|err| status(&err))?;
        tracing::info!(pool = pool.id, url = spec.url, bytes, "takes an image in");
        let job = Job {
            pool: Arc::clone(pool.pool().map_err(|err| status(&err))?),
            what,
            bytes,
            spool: self.spool.clone(),
            cancel: Arc::default(),
        };
        let (answers, stream) = mpsc::channel(ANSWERS_MAX);
        let storage = self.storage.clone();
        tokio::spawn(async move {
            let _until_it_ends: OwnedSemaphorePermit = permit;
            let last = take_in(job, origin, &answers).await;
            let last = match last {
                Ok((info, done)) => {
                    tracing::info!(pool = pool.id, image = %info.id, "has taken the image in");
                    // So that the next report has it.
                    let command = Command::Imported { pool: pool.id.clone(), image: info.clone() };
                    let _ = storage.commands.send(command).await;
                    Ok(done_response(&info, done))
                }
                Err(status) => {
                    tracing::warn!(pool = pool.id, reason = status.message(), "no image");
                    Err(status)
                }
            };
            let _ = timeout(SILENCE_MAX, answers.send(last)).await;
        });
        Ok(ReceiverStream::new(stream))
    }

    /// The pool of this id, or the first one.
    fn pool(&self, id: &str) -> Result<Arc<NodePool>, Status> {
        let pool = match id {
            "" => self.storage.pools.first(),
            id => self.storage.pool(id),
        };
        pool.cloned().ok_or_else(|| {
            Status::failed_precondition(format!(
                "pool: {id:?}: is not on node {}; it has {}",
                self.node,
                self.storage.names()
            ))
        })
    }

    /// As AgentService.ReadImage.
    pub(crate) async fn read(&self, request: ReadImageRequest) -> Result<ReadAnswers, Status> {
        let id: ImageId = request.digest.parse().map_err(|err| status(&Error::from(err)))?;
        let turn = timeout(TURN_TIMEOUT, Arc::clone(&self.readers).acquire_owned()).await;
        let Ok(Ok(permit)) = turn else {
            return Err(Status::resource_exhausted(format!(
                "node {} gives images to {READERS_MAX} others already",
                self.node
            )));
        };
        let pools = Arc::clone(&self.storage.pools);
        let image = blocking(move || {
            for pool in pools.iter() {
                // One that is not open yet has nothing to give.
                let Ok(pool) = pool.pool() else { continue };
                match pool.open_image(id) {
                    Err(PoolError::NotFound { .. }) => {}
                    other => return Ok(Some(other?)),
                }
            }
            Ok(None)
        });
        let image = image.await.map_err(|err| status(&err))?;
        let image = image.ok_or_else(|| {
            Status::not_found(format!("digest: {id}: no such image on node {}", self.node))
        })?;
        let (answers, stream) = mpsc::channel(ANSWERS_MAX);
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || {
            let _until_it_ends: OwnedSemaphorePermit = permit;
            give_out(&image, PROGRESS_INTERVAL, |answer| {
                let last = answer.is_err();
                let sent = timeout(SILENCE_MAX, answers.send(answer));
                // A reader that has gone, or takes nothing, is none.
                matches!(runtime.block_on(sent), Ok(Ok(()))) && !last
            });
        });
        Ok(ReceiverStream::new(stream))
    }
}

/// Sends the image's size and what is not zero, for as long as `send` says that it goes on. Where
/// only zeros are found, it says after each `progress_interval` how far it is.
pub(super) fn give_out(
    image: &Opened,
    progress_interval: Duration,
    send: impl Fn(Result<ReadImageResponse, Status>) -> bool,
) {
    let size_bytes = image.bytes();
    if !send(Ok(ReadImageResponse { size_bytes, ..ReadImageResponse::default() })) {
        return;
    }
    let (mut next, mut said) = (0, Instant::now());
    loop {
        let answer = match image.step(next) {
            Ok(Step::End) => return,
            Ok(Step::Zeros(end)) => {
                next = end;
                if said.elapsed() < progress_interval {
                    continue;
                }
                Ok(ReadImageResponse { offset: end, ..ReadImageResponse::default() })
            }
            Ok(Step::Data(chunk)) => {
                next = chunk.offset + CHUNK_BYTES;
                Ok(ReadImageResponse {
                    size_bytes: 0,
                    offset: chunk.offset,
                    data: chunk.bytes.into(),
                })
            }
            Err(err) => Err(status(&err.into())),
        };
        if !send(answer) {
            return;
        }
        said = Instant::now();
    }
}

/// Runs one import to its end; answers the image and how much was read.
async fn take_in(
    job: Job,
    origin: Origin,
    answers: &mpsc::Sender<Result<ImportImageResponse, Status>>,
) -> Result<(ImageInfo, u64), Status> {
    let progress = Arc::new(Progress::default());
    progress.set(0, job.bytes.unwrap_or_default());
    let cancel: Arc<AtomicBool> = Arc::clone(&job.cancel);
    let (feeder, reader) = feed(Arc::clone(&progress));
    let mut running = tokio::spawn(blocking(move || job.run(reader)));
    let mut feeding = Some(Box::pin(fill(origin, feeder)));
    let mut broke = None;
    let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
    let result = loop {
        let fed = async {
            match &mut feeding {
                Some(feeding) => feeding.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = &mut running => break result.unwrap_or(Err(Error::Ended("import"))),
            fed = fed => {
                feeding = None;
                if let Err(status) = fed {
                    cancel.store(true, Ordering::Relaxed);
                    broke = Some(status);
                }
            }
            _ = tick.tick() => {
                let (bytes_done, bytes_total) = (progress.done(), progress.total());
                let said = ImportImageResponse { bytes_done, bytes_total, image: None };
                // A caller who is behind with these needs no more of them.
                let _ = answers.try_send(Ok(said));
            }
            () = answers.closed(), if broke.is_none() => {
                // Without its end, what was fed is no file; the job cleans up behind itself.
                feeding = None;
                cancel.store(true, Ordering::Relaxed);
                broke = Some(Status::cancelled("the caller has gone"));
            }
        }
    };
    match (broke, result) {
        // Too late to matter.
        (_, Ok(info)) => Ok((info, progress.done())),
        (Some(status), Err(_)) => Err(status),
        (None, Err(error)) => Err(status(&error)),
    }
}

/// Feeds all that comes. A reader that has gone is no error here: it says itself why.
async fn fill(origin: Origin, feeder: Feeder) -> Result<(), Status> {
    match origin {
        Origin::Url(mut download) => loop {
            let Some(piece) = download.next().await.map_err(Status::unavailable)? else { break };
            if let Err(Gone) = feeder.data(piece).await {
                return Ok(());
            }
        },
        Origin::Caller(mut input) => loop {
            let silent = |_| Status::deadline_exceeded("data: nothing came for 60 s");
            let message = timeout(SILENCE_MAX, input.message()).await.map_err(silent)??;
            match message.map(|message| message.message) {
                Some(Some(import_image_request::Message::Data(data))) => {
                    if let Err(Gone) = feeder.data(data).await {
                        return Ok(());
                    }
                }
                Some(_) => {
                    let text = "data: the messages after the first carry it, and nothing else";
                    return Err(Status::invalid_argument(text));
                }
                None => break,
            }
        },
    }
    let _ = feeder.end().await;
    Ok(())
}

fn done_response(info: &ImageInfo, done: u64) -> ImportImageResponse {
    let image = Image { digest: info.id.to_string(), size_bytes: info.bytes, ..Image::default() };
    ImportImageResponse { bytes_done: done, bytes_total: done, image: Some(image) }
}

fn format(spec: &ImportImageSpec) -> Result<Format, Status> {
    match spec.format() {
        ImageFormat::Raw => Ok(Format::Raw),
        ImageFormat::Qcow2 => Ok(Format::Qcow2),
        ImageFormat::Unspecified => Err(Status::invalid_argument(
            "format: is not stated, and never guessed; accepted are raw and qcow2",
        )),
    }
}

fn sha256(spec: &ImportImageSpec) -> Result<Option<Sha256>, Status> {
    if spec.sha256.is_empty() {
        return Ok(None);
    }
    spec.sha256.parse().map(Some).map_err(|err: PoolError| status(&err.into()))
}

pub(super) fn status(error: &Error) -> Status {
    let text = error.to_string();
    match error {
        Error::NoRoom(_) | Error::InPool(PoolError::NoRoom { .. }) => {
            Status::resource_exhausted(text)
        }
        Error::Domain(_)
        | Error::InPool(
            PoolError::Invalid { .. } | PoolError::Truncated { .. } | PoolError::Digest { .. },
        ) => Status::invalid_argument(text),
        Error::InPool(PoolError::NotFound { .. }) => Status::not_found(text),
        Error::InPool(PoolError::Cancelled) => Status::cancelled(text),
        Error::InPool(PoolError::Timeout { .. }) => Status::deadline_exceeded(text),
        Error::InPool(PoolError::Unfit { .. } | PoolError::Busy { .. }) => {
            Status::failed_precondition(text)
        }
        _ => Status::internal(text),
    }
}
