//! AgentService: what controllers and other agents ask of this node. Each call is another
//! module's; this one only says whose.

use drover_proto::agent::v1::agent_service_server::{AgentService, AgentServiceServer};
use drover_proto::agent::v1::{
    CallGuestRequest, CallGuestResponse, ReadImageRequest, ReadVolumeRequest,
};
use drover_proto::v1::{ConsoleInput, ImportImageRequest};
use tonic::{Request, Response, Status, Streaming};

use crate::console::{Console, ConsoleAnswers};
use crate::domain::guest::Guests;
use crate::storage::{Images, ImportAnswers, ReadAnswers, VolumeAnswers, Volumes};

/// The node's consoles, guests, volumes and images.
#[derive(Debug, Clone)]
pub struct Service {
    /// Of the domains that run here.
    pub console: Console,
    /// The agents inside them.
    pub guests: Guests,
    /// In the node's pools.
    pub images: Images,
    /// Volumes and snapshots in them.
    pub volumes: Volumes,
}

impl Service {
    /// For a server.
    pub fn server(self) -> AgentServiceServer<Self> {
        AgentServiceServer::new(self)
    }
}

#[tonic::async_trait]
impl AgentService for Service {
    type AttachConsoleStream = ConsoleAnswers;
    type ImportImageStream = ImportAnswers;
    type ReadImageStream = ReadAnswers;
    type ReadVolumeStream = VolumeAnswers;

    async fn attach_console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<ConsoleAnswers>, Status> {
        self.console.attach(request.into_inner()).await.map(Response::new)
    }

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<ImportAnswers>, Status> {
        self.images.import(request.into_inner()).await.map(Response::new)
    }

    async fn read_image(
        &self,
        request: Request<ReadImageRequest>,
    ) -> Result<Response<ReadAnswers>, Status> {
        self.images.read(request.into_inner()).await.map(Response::new)
    }

    async fn read_volume(
        &self,
        request: Request<Streaming<ReadVolumeRequest>>,
    ) -> Result<Response<VolumeAnswers>, Status> {
        self.volumes.read(request.into_inner()).await.map(Response::new)
    }

    async fn call_guest(
        &self,
        request: Request<CallGuestRequest>,
    ) -> Result<Response<CallGuestResponse>, Status> {
        self.guests.call(request.into_inner()).await.map(Response::new)
    }
}
