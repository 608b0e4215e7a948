//! `drover.v1.ImageService`. An import goes through the leader to one node's agent, which
//! converts and keeps it; its row is written when the agent has all of it.

use std::pin::Pin;
use std::time::Duration;

use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_proto::v1::image_service_server::ImageService;
use drover_proto::v1::import_image_request::Message;
use drover_proto::v1::{
    DeleteImageRequest, DeleteImageResponse, GetImageRequest, Image, ImageFormat,
    ImportImageRequest, ImportImageResponse, ImportImageSpec, ListImagesRequest,
    ListImagesResponse, NodeState,
};
use futures::stream::{self, Stream, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::agents;
use super::errors::{Fault, excerpt, invalid};
use super::requests::Call;
use super::service::Service;
use super::{page, validate};
use crate::model::{ID_SYNTAX, ImageId, ImageRecord, NodeId};
use crate::scheduler::NodeView;
use crate::store::Versioned;
use crate::workflows::begin::etag;
use crate::workflows::{Context, Refusal, image};

/// The caller says what it wants within this.
const FIRST_WAIT: Duration = Duration::from_secs(10);
/// An import in which nothing moves for so long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Messages that are on their way, in either direction.
const QUEUE: usize = 4;
const URL_BYTES_MAX: usize = 2048;
const SHA256_CHARS: usize = 64;

type Progress = Pin<Box<dyn Stream<Item = Result<ImportImageResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ImageService for Service {
    type ImportImageStream = Progress;

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<Progress>, Status> {
        self.import(request.into_inner()).await.map(Response::new)
    }

    async fn get_image(
        &self,
        request: Request<GetImageRequest>,
    ) -> Result<Response<Image>, Status> {
        let id = validate::image("name", &request.get_ref().name)?;
        Ok(Response::new(self.image(&id).await?))
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        let after = page::after(&request.page_token, "images")?;
        let rows = self.read().await?.list::<ImageRecord>("", &after, size + 1);
        let (rows, next_page_token) = page::cut(rows, size, "images", |row| row.value.id.clone());
        let images = rows.iter().map(present).collect();
        Ok(Response::new(ListImagesResponse { images, next_page_token }))
    }

    async fn delete_image(
        &self,
        request: Request<DeleteImageRequest>,
    ) -> Result<Response<DeleteImageResponse>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let call = Call::new("DeleteImage", request_id, &request)?;
        let id = validate::image("name", &request.name)?;
        self.once(&call, |cx| image::delete(cx, &id, &request.etag)).await?;
        Ok(Response::new(DeleteImageResponse {}))
    }
}

impl Service {
    async fn import(&self, mut input: Streaming<ImportImageRequest>) -> Result<Progress, Status> {
        let first = timeout(FIRST_WAIT, input.message()).await.map_err(|_| {
            Status::deadline_exceeded("the first message did not come within 10 s")
        })??;
        let Some(Message::Spec(spec)) = first.and_then(|first| first.message) else {
            return Err(invalid("message", "", "spec, in the first message").into());
        };
        let (id, mut spec) = checked(spec)?;
        let request_id = std::mem::take(&mut spec.request_id);
        let call = Call::new("ImportImage", request_id, &spec)?;
        if call.is_done(&self.read().await?)? {
            let (image, bytes) = (self.image(&id).await?, spec.file_bytes);
            let image = Some(image);
            let said = ImportImageResponse { bytes_done: bytes, bytes_total: bytes, image };
            return Ok(Box::pin(stream::iter([Ok(said)])));
        }
        let (node, pool, address) = self.look(|cx| receiver(cx, &id, &spec)).await?;
        let spec = ImportImageSpec { pool, ..spec };

        let channel = agents::connect(&address).await?;
        // Who breaks off has sent fewer bytes than it said: the agent sees that.
        let first = ImportImageRequest { message: Some(Message::Spec(spec)) };
        let rest = input.take_while(|message| std::future::ready(message.is_ok()));
        let rest = rest.filter_map(|message| async { message.ok() });
        let (stop, stopped) = oneshot::channel::<()>();
        let inputs = stream::once(async { first }).chain(rest).take_until(stopped);
        let outputs = AgentServiceClient::new(channel).import_image(inputs).await?.into_inner();
        let (answers, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(self.clone().relay(call, id, node, outputs, answers, stop));
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    /// Passes progress on, and writes the row when the agent has the image. The agent is sent no
    /// more when this ends.
    async fn relay(
        self,
        call: Call,
        id: ImageId,
        node: NodeId,
        mut outputs: Streaming<ImportImageResponse>,
        answers: mpsc::Sender<Result<ImportImageResponse, Status>>,
        _stop: oneshot::Sender<()>,
    ) {
        loop {
            let said = tokio::select! {
                said = timeout(SILENCE_MAX, outputs.message()) => said,
                () = answers.closed() => return,
            };
            let answer = match said {
                Err(_) => Err(Status::deadline_exceeded(format!(
                    "{}: nothing moved for {} s",
                    node.name(),
                    SILENCE_MAX.as_secs()
                ))),
                Ok(Err(status)) => Err(status),
                Ok(Ok(None)) => Err(Status::aborted(format!("{} broke it off", node.name()))),
                Ok(Ok(Some(said))) => match &said.image {
                    None => Ok(said),
                    Some(image) => self
                        .register(&call, &id, &node, image)
                        .await
                        .map(|image| ImportImageResponse { image: Some(image), ..said })
                        .map_err(Status::from),
                },
            };
            let last = answer.as_ref().map_or(true, |said| said.image.is_some());
            // Without a caller the agent is let go of, which ends the import.
            if answers.send(answer).await.is_err() || last {
                return;
            }
        }
    }

    async fn register(
        &self,
        call: &Call,
        id: &ImageId,
        node: &NodeId,
        said: &Image,
    ) -> Result<Image, Fault> {
        self.once(call, |cx| image::register(cx, id, node, said)).await?;
        self.image(id).await
    }

    async fn image(&self, id: &ImageId) -> Result<Image, Fault> {
        let row = self.read().await?.get::<ImageRecord>(id.as_str());
        Ok(present(&row.ok_or_else(|| Refusal::NotFound { name: id.name() })?))
    }
}

fn checked(mut spec: ImportImageSpec) -> Result<(ImageId, ImportImageSpec), Refusal> {
    let id = validate::image("spec.name", &spec.name)?;
    if spec.format() == ImageFormat::Unspecified {
        let expected = "RAW or QCOW2: a format is never guessed";
        return Err(invalid("spec.format", &spec.format.to_string(), expected));
    }
    spec.sha256.make_ascii_lowercase();
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !spec.sha256.is_empty() && (spec.sha256.len() != SHA256_CHARS || !hex(&spec.sha256)) {
        let expected = "64 hexadecimal digits, or empty";
        return Err(invalid("spec.sha256", &excerpt(&spec.sha256), expected));
    }
    let web = spec.url.starts_with("http://") || spec.url.starts_with("https://");
    if !spec.url.is_empty() && (!web || spec.url.len() > URL_BYTES_MAX) {
        let expected = format!("http:// or https://, at most {URL_BYTES_MAX} bytes; or empty");
        return Err(invalid("spec.url", &excerpt(&spec.url), &expected));
    }
    if spec.url.is_empty() && spec.file_bytes == 0 {
        let expected = "the file's size: without a URL its bytes follow";
        return Err(invalid("spec.file_bytes", "0", expected));
    }
    validate::maybe_node("spec.node", &spec.node)?;
    if !spec.pool.is_empty() && NodeId::parse(&spec.pool).is_err() {
        let expected = format!("a pool's id ({ID_SYNTAX}), or empty for the node's first");
        return Err(invalid("spec.pool", &excerpt(&spec.pool), &expected));
    }
    Ok((id, spec))
}

/// Which node takes the import, into which pool, and where its agent is: the one that was asked for, or the one
/// with most room.
fn receiver(
    cx: &Context<'_>,
    id: &ImageId,
    spec: &ImportImageSpec,
) -> Result<(NodeId, String, String), Refusal> {
    image::absent(cx, id)?;
    let only = validate::maybe_node("spec.node", &spec.node)?;
    let view = cx.world.cluster_view(cx.observed);
    let room = |node: &NodeView| {
        let id = node.pool_id(&spec.pool)?;
        let pool = node.pools.get(&id)?;
        let free = pool.capacity_bytes.saturating_sub(pool.promised_bytes);
        (node.ready && pool.closed.is_none()).then_some((free, id))
    };
    let candidates = view.nodes.iter().filter(|(id, _)| only.as_ref().is_none_or(|o| o == *id));
    let best = candidates.filter_map(|(id, node)| Some((room(node)?, id))).max();
    if let Some(((_, pool), id)) = best
        && let Some(row) = cx.world.nodes.get(id)
    {
        return Ok((id.clone(), pool, row.value.address.clone()));
    }
    let Some(only) = only else {
        let message = "no node that is READY has a pool that takes an image: vpsctl pool list";
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "NO_POOL",
            message: message.into(),
        });
    };
    let row = cx.world.nodes.get(&only).ok_or_else(|| Refusal::NotFound { name: only.name() })?;
    let why = match row.value.state() {
        NodeState::Ready => "has no such pool that takes an image",
        _ => "is lost",
    };
    Err(Refusal::Precondition {
        subject: only.name(),
        reason: "NO_POOL",
        message: format!("{} {why}: vpsctl pool list", only.name()),
    })
}

fn present(row: &Versioned<ImageRecord>) -> Image {
    let record = &row.value;
    Image {
        name: format!("images/{}", record.id),
        digest: record.digest.clone(),
        size_bytes: record.size_bytes,
        nodes: record.nodes.iter().map(|node| format!("nodes/{node}")).collect(),
        create_time: record.create_time,
        etag: etag(row.mod_revision),
    }
}
