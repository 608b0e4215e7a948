//! The member's side of pools, volumes, images and networks.

use drover_proto::v1::{
    image_service_server::ImageService, import_image_request::Message,
    network_service_server::NetworkService, pool_service_server::PoolService,
    volume_service_server::VolumeService, *,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    common::WAIT_MAX,
    disks::image_digest,
    member::{Answer, Flow, Scripted},
};

/// How an import goes at the member.
#[derive(Clone, Default)]
pub(crate) struct ImportScript {
    /// Refused before anything is read.
    pub(crate) refused: Option<Status>,
    /// Once so many bytes have come: this refusal.
    pub(crate) refused_after: Option<(usize, Status)>,
    /// Once so many bytes have come, it reads no more until it is told to go on.
    pub(crate) pause_after: Option<usize>,
    /// The answer at the end; none when it has no name.
    pub(crate) image: Image,
    /// It is lost the first time.
    pub(crate) loses_its_answer: bool,
}

/// How the messages of an import ended, as the member saw it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum End {
    /// They broke off: nothing may be kept.
    #[default]
    Broken,
    /// As a file that is whole.
    Whole,
    /// It was the member that ended it.
    Refused,
}

/// An import as the member saw it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Imported {
    pub(crate) specs: Vec<ImportImageSpec>,
    /// The length of each message's data.
    pub(crate) chunks: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) end: End,
}

impl Scripted {
    async fn take_import(
        self,
        mut input: Streaming<ImportImageRequest>,
        answers: mpsc::Sender<Result<ImportImageResponse, Status>>,
    ) {
        let script = &self.script.import;
        let mut pause_after = script.pause_after;
        let mut seen = Imported::default();
        seen.end = loop {
            match input.message().await {
                Ok(Some(ImportImageRequest { message: Some(Message::Spec(spec)) })) => {
                    let done = self.node.lock().unwrap().imported.get(&spec.request_id).cloned();
                    if done.is_some() {
                        let said = ImportImageResponse { image: done, ..Default::default() };
                        let _ = answers.send(Ok(said)).await;
                        return;
                    }
                    seen.specs.push(spec);
                }
                Ok(Some(ImportImageRequest { message: Some(Message::Data(data)) })) => {
                    seen.chunks.push(data.len());
                    seen.bytes.extend_from_slice(&data);
                }
                Ok(Some(ImportImageRequest { message: None })) => panic!("an empty message"),
                Ok(None) => break End::Whole,
                Err(_) => break End::Broken,
            }
            if let Some((_, status)) =
                script.refused_after.as_ref().filter(|(bytes, _)| seen.bytes.len() >= *bytes)
            {
                let _ = answers.send(Err(status.clone())).await;
                break End::Refused;
            }
            let progress = ImportImageResponse {
                bytes_done: seen.bytes.len() as u64,
                bytes_total: seen.specs.first().map_or(0, |spec| spec.file_bytes),
                image: None,
            };
            // Who asked may have gone.
            let _ = answers.send(Ok(progress)).await;
            if pause_after.take_if(|bytes| seen.bytes.len() >= *bytes).is_some() {
                let _ = tokio::time::timeout(WAIT_MAX, self.go_on.notified()).await;
            }
        };
        let mut image = Some(script.image.clone()).filter(|image| !image.name.is_empty());
        if image.is_none() && seen.end == End::Whole {
            image = self.kept(&seen);
        }
        if script.loses_its_answer {
            let spec = seen.specs.first().cloned().unwrap_or_default();
            assert!(!spec.request_id.is_empty());
            self.node.lock().unwrap().imported.extend(image.map(|image| (spec.request_id, image)));
            let _ = answers.send(Err(Status::unavailable("the leader is gone"))).await;
        } else if seen.end == End::Whole && image.is_some() {
            let _ = answers.send(Ok(ImportImageResponse { image, ..Default::default() })).await;
        }
        let _ = self.imported.try_send(seen);
    }

    /// A node keeps what was imported, and says what that is.
    fn kept(&self, seen: &Imported) -> Option<Image> {
        let spec = seen.specs.first()?;
        let mut node = self.node.lock().unwrap();
        // Without a node that keeps content there is no image either.
        let _ = node.disks.first()?;
        node.images.insert(spec.name.clone(), seen.bytes.clone());
        Some(Image {
            name: spec.name.clone(),
            digest: image_digest(&seen.bytes),
            size_bytes: seen.bytes.len() as u64,
            nodes: vec![spec.node.clone()],
            ..Image::default()
        })
    }

    fn noted(&self, name: &str) {
        self.asked.lock().unwrap().names.push(name.to_owned());
    }
}

fn found<T: Clone>(items: &[T], is_it: impl Fn(&T) -> bool, name: &str) -> Answer<T> {
    let item = items.iter().find(|item| is_it(item)).cloned();
    item.map(Response::new).ok_or_else(|| Status::not_found(format!("there is no {name}")))
}

/// One item a page, so that every list has pages to turn.
fn page<T: Clone>(items: &[T], token: &str) -> (Vec<T>, String) {
    let at: usize = token.parse().unwrap_or(0);
    let next = if at + 1 < items.len() { (at + 1).to_string() } else { String::new() };
    (items.get(at).cloned().into_iter().collect(), next)
}

#[tonic::async_trait]
impl PoolService for Scripted {
    async fn list_pools(&self, request: Request<ListPoolsRequest>) -> Answer<ListPoolsResponse> {
        self.noted(&request.get_ref().node);
        Ok(Response::new(ListPoolsResponse { pools: self.script.pools.clone() }))
    }
}

#[tonic::async_trait]
impl VolumeService for Scripted {
    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Answer<Volume> {
        let name = &request.get_ref().name;
        found(&self.script.volumes, |volume| volume.name == *name, name)
    }
    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Answer<ListVolumesResponse> {
        self.noted(&request.get_ref().domain);
        let (volumes, next_page_token) = page(&self.script.volumes, &request.get_ref().page_token);
        Ok(Response::new(ListVolumesResponse { volumes, next_page_token }))
    }
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Answer<Operation> {
        let request = request.into_inner();
        let volume = request.volume.unwrap_or_default();
        self.did(format!(
            "create {} of {} bytes from \"{}\" in \"{}\" on \"{}\"",
            volume.name, volume.size_bytes, volume.image, volume.pool, request.node
        ));
        self.accepted()
    }
    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Answer<DeleteVolumeResponse> {
        let name = &request.get_ref().name;
        self.did(format!("delete {name}"));
        let volume = found(&self.script.volumes, |volume| volume.name == *name, name)?;
        match volume.get_ref().domain.as_str() {
            "" => Ok(Response::new(DeleteVolumeResponse {})),
            domain => Err(Status::failed_precondition(format!("{name} belongs to {domain}"))),
        }
    }
    async fn attach_volume(&self, request: Request<AttachVolumeRequest>) -> Answer<Volume> {
        let AttachVolumeRequest { name, domain, read_only, limits, .. } = request.into_inner();
        let iops = limits.map_or(0, |limits| limits.requests_per_second);
        self.did(format!("attach {name} to {domain}, read-only {read_only}, iops {iops}"));
        let volume = found(&self.script.volumes, |volume| volume.name == name, &name)?;
        Ok(volume.map(|volume| Volume { domain, ..volume }))
    }
    async fn detach_volume(&self, request: Request<DetachVolumeRequest>) -> Answer<Volume> {
        let name = &request.get_ref().name;
        self.did(format!("detach {name}"));
        let volume = found(&self.script.volumes, |volume| volume.name == *name, name)?;
        Ok(volume.map(|volume| Volume { domain: String::new(), ..volume }))
    }
}

#[tonic::async_trait]
impl ImageService for Scripted {
    type ImportImageStream = Flow<ImportImageResponse>;

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Answer<Flow<ImportImageResponse>> {
        if let Some(status) = &self.script.import.refused {
            return Err(status.clone());
        }
        let (sender, answers) = mpsc::channel(64);
        tokio::spawn(self.clone().take_import(request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
    async fn get_image(&self, request: Request<GetImageRequest>) -> Answer<Image> {
        let name = &request.get_ref().name;
        found(&self.script.images, |image| image.name == *name, name)
    }
    async fn list_images(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        let (images, next_page_token) = page(&self.script.images, &request.get_ref().page_token);
        Ok(Response::new(ListImagesResponse { images, next_page_token }))
    }
    async fn delete_image(
        &self,
        request: Request<DeleteImageRequest>,
    ) -> Answer<DeleteImageResponse> {
        let name = &request.get_ref().name;
        self.noted(name);
        if self.node.lock().unwrap().images.remove(name).is_some() {
            return Ok(Response::new(DeleteImageResponse {}));
        }
        found(&self.script.images, |image| image.name == *name, name)?;
        Ok(Response::new(DeleteImageResponse {}))
    }
}

#[tonic::async_trait]
impl NetworkService for Scripted {
    async fn create_network(&self, request: Request<CreateNetworkRequest>) -> Answer<Network> {
        let network = request.into_inner().network.unwrap_or_default();
        self.asked.lock().unwrap().networks.push(network.clone());
        Ok(Response::new(Network { addresses_total: 253, ..network }))
    }
    async fn get_network(&self, request: Request<GetNetworkRequest>) -> Answer<Network> {
        let name = &request.get_ref().name;
        found(&self.script.networks, |network| network.name == *name, name)
    }
    async fn list_networks(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Answer<ListNetworksResponse> {
        let (networks, next_page_token) =
            page(&self.script.networks, &request.get_ref().page_token);
        Ok(Response::new(ListNetworksResponse { networks, next_page_token }))
    }
    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Answer<DeleteNetworkResponse> {
        let name = &request.get_ref().name;
        self.noted(name);
        let network = found(&self.script.networks, |network| network.name == *name, name)?;
        if network.get_ref().addresses_used > 0 {
            return Err(Status::failed_precondition(format!("{name} is used by domains/web1")));
        }
        Ok(Response::new(DeleteNetworkResponse {}))
    }
}
