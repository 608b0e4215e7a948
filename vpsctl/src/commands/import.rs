//! `vpsctl image import`: one call that carries the file to the controller and its progress back.
//!
//! An end of the messages that came too early would look like a file that is whole. So the
//! messages end behind the file's last byte and nowhere else: when the file cannot be read, or at
//! Ctrl-C, they stop coming and the whole call is dropped, which the controller takes as a
//! cancellation and keeps nothing.

use std::{sync::Arc, time::Duration};

use drover_proto::v1::{
    Image, ImageFormat, ImportImageRequest, ImportImageResponse, ImportImageSpec,
    image_service_client::ImageServiceClient, import_image_request::Message,
};
use futures::{Stream, StreamExt, stream};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{Context, files::ImageFile, request_id};
use crate::{
    args::{Format, ImportArgs},
    client::{MESSAGE_BYTES_MAX, root_cause},
    error::{Error, ImportEnd},
    out::{
        human::{short, time},
        json, pages,
    },
    transfer::Transfer,
    wait::interrupts,
};

/// A controller that says nothing for so long is given up. Writing the last of a large image out
/// takes a slow pool some minutes.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// Who has carried an import out already says so within this.
const DONE_TIME_MAX: Duration = Duration::from_secs(10);

pub(super) async fn run(context: &Context, args: ImportArgs) -> Result<(), Error> {
    let file = args.file.as_deref().map(ImageFile::open).transpose()?.map(Arc::new);
    let spec = spec(&args, file.as_deref());
    let started = Instant::now();
    let mut interrupt = interrupts()?;
    let title = format!("import image {}", short(&spec.name));
    let image = tokio::select! {
        biased;
        image = sent(context, &spec, file, title) => image?,
        _ = interrupt.recv() => return Err(ended(&spec, ImportEnd::Interrupted)),
        () = context.cluster.deadline_passed() => {
            return Err(ended(&spec, ImportEnd::Timeout(time(started.elapsed()))));
        }
    };
    context.answer(|| json::object(&image), || pages::imported(&image))
}

fn spec(args: &ImportArgs, file: Option<&ImageFile>) -> ImportImageSpec {
    let mut spec = ImportImageSpec {
        name: args.name.image.clone(),
        sha256: args.sha256.clone().unwrap_or_default(),
        url: args.url.clone().unwrap_or_default(),
        node: args.node.clone().unwrap_or_default(),
        pool: args.pool.clone().unwrap_or_default(),
        file_bytes: file.map_or(0, |file| file.bytes),
        request_id: request_id(),
        ..ImportImageSpec::default()
    };
    spec.set_format(match args.format {
        Format::Raw => ImageFormat::Raw,
        Format::Qcow2 => ImageFormat::Qcow2,
    });
    spec
}

fn ended(spec: &ImportImageSpec, how: ImportEnd) -> Error {
    Error::ImportEnded { image: short(&spec.name).to_owned(), how }
}

/// What is sent: something of a length that is known, which is read in chunks.
pub(super) trait Source: Send + Sync + 'static {
    /// Its length.
    fn bytes(&self) -> u64;
    /// The bytes at an offset below the length: some, at most `CHUNK_BYTES`. May wait for a disk.
    fn chunk(&self, offset: u64) -> Result<Vec<u8>, Error>;
}

impl Source for ImageFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn chunk(&self, offset: u64) -> Result<Vec<u8>, Error> {
        Self::chunk(self, offset)
    }
}

/// Sends what an import needs and shows what the controller says of it, up to the image.
pub(super) async fn sent<S: Source>(
    context: &Context,
    spec: &ImportImageSpec,
    source: Option<Arc<S>>,
    title: String,
) -> Result<Image, Error> {
    let (failed, mut failure) = mpsc::channel(1);
    tokio::select! {
        biased;
        image = carried(context, spec, source, failed, title) => image,
        Some(error) = failure.recv() => Err(error),
    }
}

async fn carried<S: Source>(
    context: &Context,
    spec: &ImportImageSpec,
    file: Option<Arc<S>>,
    failed: mpsc::Sender<Error>,
    title: String,
) -> Result<Image, Error> {
    // A member that cannot be reached has taken nothing: the next gets the file from its start.
    let mut answers = context
        .cluster
        .call(|rpc| {
            let messages = messages(spec.clone(), file.clone(), failed.clone());
            async move {
                let client = ImageServiceClient::new(rpc);
                client.max_decoding_message_size(MESSAGE_BYTES_MAX).import_image(messages).await
            }
        })
        .await?;
    let mut progress = Transfer::new(title, "read, being made an image");
    loop {
        match timeout(SILENCE_MAX, answers.message()).await {
            Ok(Ok(Some(ImportImageResponse { image: Some(image), .. }))) => return Ok(image),
            Ok(Ok(Some(said))) => {
                let total = if said.bytes_total > 0 { said.bytes_total } else { spec.file_bytes };
                progress.update(said.bytes_done, total);
            }
            Ok(Ok(None)) => {
                let image = short(&spec.name);
                let text = format!("the controller ended the import of {image} without an image");
                return Err(Error::Local(text));
            }
            // The file went with the stream: whoever answers next would want it whole.
            Ok(Err(status)) if context.cluster.turn_after(&status) => {
                let lost = || ended(spec, ImportEnd::Lost(root_cause(&status)));
                return done_already(context, spec).await.ok_or_else(lost);
            }
            Ok(Err(status)) => return Err(status.into()),
            Err(_) => {
                let silent = format!("{} without a word", time(SILENCE_MAX));
                return Err(ended(spec, ImportEnd::Timeout(silent)));
            }
        }
    }
}

/// The image, when all was done and its answer alone was lost: who has done it says so at once.
/// Anybody else would want the file, and is left alone.
async fn done_already(context: &Context, spec: &ImportImageSpec) -> Option<Image> {
    let asked = context.cluster.call(|rpc| {
        let spec = Message::Spec(spec.clone());
        let messages = stream::iter([ImportImageRequest { message: Some(spec) }]);
        async move { ImageServiceClient::new(rpc).import_image(messages).await }
    });
    let mut answers = asked.await.ok()?;
    let first = timeout(DONE_TIME_MAX, answers.message()).await;
    first.ok()?.ok()??.image
}

/// The spec, then the file. Ends only behind the file's last byte; an error goes to `failed`.
fn messages<S: Source>(
    spec: ImportImageSpec,
    file: Option<Arc<S>>,
    failed: mpsc::Sender<Error>,
) -> impl Stream<Item = ImportImageRequest> + Send + 'static {
    let message = |message| ImportImageRequest { message: Some(message) };
    let data = stream::unfold(0, move |offset: u64| {
        let (file, failed) = (file.clone(), failed.clone());
        async move {
            let file = file.filter(|file| offset < file.bytes())?;
            let read = tokio::task::spawn_blocking(move || file.chunk(offset)).await;
            match read.unwrap_or_else(|e| Err(Error::Local(format!("reading the file: {e}")))) {
                Ok(data) => {
                    let next = offset + data.len() as u64;
                    Some((message(Message::Data(data.into())), next))
                }
                Err(error) => {
                    // One error is enough; nobody waits for a second.
                    let _ = failed.try_send(error);
                    std::future::pending().await
                }
            }
        }
    });
    stream::iter([message(Message::Spec(spec))]).chain(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::files::CHUNK_BYTES;

    /// An end of the messages means that the file is whole: one that was cut has none.
    #[tokio::test]
    async fn a_file_that_was_cut_has_no_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, vec![1; 2 * CHUNK_BYTES]).unwrap();
        let file = Arc::new(ImageFile::open(&path).unwrap());
        let (failed, mut failure) = mpsc::channel(1);
        let spec = ImportImageSpec::default();
        let mut whole = Box::pin(messages(spec.clone(), Some(file.clone()), failed.clone()));
        let mut cut = Box::pin(messages(spec, Some(file), failed));
        for _ in 0..3 {
            assert!(whole.next().await.is_some(), "the spec and two chunks");
        }
        assert!(whole.next().await.is_none());
        assert!(cut.next().await.is_some(), "the spec");
        std::fs::write(&path, b"cut").unwrap();
        tokio::select! {
            biased;
            more = cut.next() => panic!("after the cut comes {more:?}"),
            error = failure.recv() => {
                assert!(error.unwrap().to_string().contains("became shorter"));
            }
        }
    }
}
