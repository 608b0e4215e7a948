//! Images as callers meet them: an import goes through a real controller to an agent that speaks
//! the protocol and keeps nothing but what it was sent.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use drover_proto::agent::v1::agent_service_server::{AgentService, AgentServiceServer};
use drover_proto::agent::v1::{
    CallGuestRequest, CallGuestResponse, ReadImageRequest, ReadImageResponse, ReadVolumeRequest,
};
use drover_proto::v1::image_service_client::ImageServiceClient;
use drover_proto::v1::import_image_request::Message;
use drover_proto::v1::network_service_client::NetworkServiceClient;
use drover_proto::v1::{
    ConsoleInput, ConsoleOutput, CreateNetworkRequest, DeleteImageRequest, DeleteNetworkRequest,
    GetImageRequest, Guest, Image, ImageFormat, ImportImageRequest, ImportImageResponse,
    ImportImageSpec, ListPoolsRequest, Network, ReadSnapshotResponse,
};
use futures::Stream;
use futures::stream::{self, StreamExt};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::service::{Controllers, agent, within};

/// How imports ended at the agent: the bytes, or that the stream broke.
type Ends = watch::Sender<Vec<Result<Vec<u8>, Code>>>;

/// What the agent was asked of guests.
type Guests = Arc<Mutex<Vec<CallGuestRequest>>>;

#[derive(Clone)]
struct Receiver {
    ends: Arc<Ends>,
    guests: Guests,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Receiver {
    type AttachConsoleStream = Answers<ConsoleOutput>;
    type ImportImageStream = Answers<ImportImageResponse>;
    type ReadImageStream = Answers<ReadImageResponse>;
    type ReadVolumeStream = Answers<ReadSnapshotResponse>;

    async fn attach_console(
        &self,
        _: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        Err(Status::unimplemented("no domain here"))
    }

    async fn read_image(
        &self,
        _: Request<ReadImageRequest>,
    ) -> Result<Response<Self::ReadImageStream>, Status> {
        Err(Status::unimplemented("nothing is kept here"))
    }

    async fn read_volume(
        &self,
        request: Request<Streaming<ReadVolumeRequest>>,
    ) -> Result<Response<Self::ReadVolumeStream>, Status> {
        let blocks = crate::snapshots::blocks(request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream::iter(blocks.into_iter().map(Ok)))))
    }

    async fn call_guest(
        &self,
        request: Request<CallGuestRequest>,
    ) -> Result<Response<CallGuestResponse>, Status> {
        let guest = Guest { host_name: "web".into(), ..Guest::default() };
        self.guests.lock().unwrap().push(request.into_inner());
        Ok(Response::new(CallGuestResponse { guest: Some(guest) }))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<Self::ImportImageStream>, Status> {
        let mut input = request.into_inner();
        let (answers, receiver) = mpsc::channel(4);
        let ends = self.ends.clone();
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            let end = loop {
                match input.message().await {
                    Ok(Some(message)) => match message.message {
                        Some(Message::Data(data)) => bytes.extend_from_slice(&data),
                        _ => {
                            let said = ImportImageResponse { bytes_done: 1, ..Default::default() };
                            answers.send(Ok(said)).await.unwrap();
                        }
                    },
                    Ok(None) => break Ok(bytes),
                    Err(status) => break Err(status.code()),
                }
            };
            if let Ok(bytes) = &end {
                let image = Image {
                    digest: format!("{:064}", bytes.len()),
                    size_bytes: bytes.len() as u64,
                    ..Image::default()
                };
                let said = ImportImageResponse { image: Some(image), ..Default::default() };
                // Nobody may be there to hear it.
                drop(answers.send(Ok(said)).await);
            }
            ends.send_modify(|ends| ends.push(end));
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

pub(crate) struct World {
    pub(crate) controllers: Controllers,
    pub(crate) guests: Guests,
    ends: watch::Receiver<Vec<Result<Vec<u8>, Code>>>,
    _agent: agent::Agent,
}

/// A controller, and an agent of node `a` with a pool.
pub(crate) async fn world() -> World {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap().to_string();
    let (ends, seen) = watch::channel(Vec::new());
    let guests = Guests::default();
    let service =
        AgentServiceServer::new(Receiver { ends: Arc::new(ends), guests: guests.clone() });
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let controllers = Controllers::start(1).await;
    let hosts: agent::Shared = Arc::new(Mutex::default());
    hosts.lock().unwrap().has_pool = true;
    let mut agent = agent::start_at("a", address, controllers.addresses(), &hosts);
    let opened = agent.sessions.wait_for(|count| *count > 0);
    within("a session", opened).await.unwrap();
    let world = World { controllers, guests, ends: seen, _agent: agent };
    within("the pool", async {
        let channel = world.controllers.client(1).channel();
        let mut client = drover_proto::v1::pool_service_client::PoolServiceClient::new(channel);
        while client
            .list_pools(ListPoolsRequest::default())
            .await
            .unwrap()
            .get_ref()
            .pools
            .is_empty()
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world
}

impl World {
    fn client(&self) -> ImageServiceClient<tonic::transport::Channel> {
        ImageServiceClient::new(self.controllers.client(1).channel())
    }
}

fn spec(name: &str) -> ImportImageSpec {
    ImportImageSpec {
        name: name.into(),
        format: ImageFormat::Raw.into(),
        file_bytes: 6,
        ..ImportImageSpec::default()
    }
}

fn message(message: Message) -> ImportImageRequest {
    ImportImageRequest { message: Some(message) }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_imported_and_deleted() {
    let world = world().await;
    let mut client = world.client();
    let data = |bytes: &'static [u8]| message(Message::Data(bytes.into()));
    let messages = vec![message(Message::Spec(spec("images/deb"))), data(b"abc"), data(b"def")];
    let answers = client.import_image(stream::iter(messages)).await.unwrap().into_inner();
    let answers: Vec<_> = within("the import", answers.collect()).await;
    let image = answers.last().unwrap().as_ref().unwrap().image.clone().unwrap();
    assert_eq!((image.name.as_str(), image.size_bytes), ("images/deb", 6));
    assert_eq!(world.ends.borrow().first(), Some(&Ok(b"abcdef".to_vec())));

    // The name is taken, and nothing is sent to anybody.
    let again = stream::iter(vec![message(Message::Spec(spec("images/deb")))]);
    let refused = client.import_image(again).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    let name = "images/deb".to_owned();
    let delete = DeleteImageRequest { name: name.clone(), ..Default::default() };
    client.delete_image(delete).await.unwrap();
    let missing = client.get_image(GetImageRequest { name }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

/// A second try after a lost answer does nothing twice, and is not taken for something else.
#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_operation_is_carried_out_once() {
    const ID: &str = "11111111-2222-4333-8444-555555555555";
    let world = world().await;
    let import = async |spec: &ImportImageSpec, data: Option<&'static [u8]>| {
        let data = data.map(|data| message(Message::Data(data.into())));
        let messages: Vec<_> =
            [message(Message::Spec(spec.clone()))].into_iter().chain(data).collect();
        let answers = world.client().import_image(stream::iter(messages)).await?.into_inner();
        let answers: Vec<_> = within("the import", answers.collect()).await;
        answers.into_iter().next_back().unwrap()
    };
    let spec = ImportImageSpec { request_id: ID.into(), ..spec("images/deb") };
    let first = import(&spec, Some(b"abcdef")).await.unwrap().image.unwrap();
    // The file need not come again.
    let again = import(&spec, None).await.unwrap();
    let same = again.image.unwrap();
    assert_eq!((same.name, same.digest, again.bytes_done), (first.name, first.digest, 6));
    assert_eq!(world.ends.borrow().len(), 1, "the agent was asked once");
    let other = ImportImageSpec { name: "images/other".into(), ..spec };
    let refused = import(&other, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().starts_with("request_id: "), "{refused}");

    let id = |last: u8| format!("11111111-2222-4333-8444-55555555555{last}");
    let name = "images/deb".to_owned();
    let delete = DeleteImageRequest { name: name.clone(), request_id: id(1), ..Default::default() };
    for _ in 0..2 {
        world.client().delete_image(delete.clone()).await.unwrap();
    }
    let anew = DeleteImageRequest { request_id: id(2), ..delete };
    let missing = world.client().delete_image(anew).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);

    let channel = world.controllers.client(1).channel();
    let mut networks = NetworkServiceClient::new(channel);
    let name = "networks/lan".to_owned();
    let network =
        Network { name: name.clone(), subnet: "10.0.0.0/24".into(), ..Network::default() };
    let create = CreateNetworkRequest { network: Some(network), request_id: id(3) };
    let made = networks.create_network(create.clone()).await.unwrap().into_inner();
    assert_eq!(networks.create_network(create.clone()).await.unwrap().into_inner(), made);
    let anew = CreateNetworkRequest { request_id: id(4), ..create };
    let taken = networks.create_network(anew).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    let delete = DeleteNetworkRequest { name, request_id: id(6), ..Default::default() };
    for _ in 0..2 {
        networks.delete_network(delete.clone()).await.unwrap();
    }
    let bad = DeleteNetworkRequest { request_id: "x".into(), ..delete };
    let refused = networks.delete_network(bad).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
}

/// The agent must not wait for the rest for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_ends_the_import() {
    let world = world().await;
    let mut ends = world.ends.clone();
    let mut client = world.client();
    let (messages, rest) = mpsc::channel(4);
    messages.send(message(Message::Spec(spec("images/deb")))).await.unwrap();
    messages.send(message(Message::Data(b"abc".as_slice().into()))).await.unwrap();
    let mut call = client.import_image(ReceiverStream::new(rest)).await.unwrap().into_inner();
    // Progress has come: the agent is at it.
    within("progress", call.next()).await.unwrap().unwrap();
    drop((call, messages));
    let end = within("the agent's end", ends.wait_for(|ends| !ends.is_empty())).await.unwrap();
    assert!(end[0].as_ref().is_ok_and(|bytes| bytes.len() < 6), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_imports_are_refused_with_their_field() {
    let world = world().await;
    let cases: [(&str, ImportImageSpec); 6] = [
        ("spec.name", ImportImageSpec { name: "debian".into(), ..spec("") }),
        ("spec.format", ImportImageSpec { format: 0, ..spec("images/a") }),
        ("spec.sha256", ImportImageSpec { sha256: "abc".into(), ..spec("images/a") }),
        ("spec.url", ImportImageSpec { url: "file:///etc/shadow".into(), ..spec("images/a") }),
        ("spec.file_bytes", ImportImageSpec { file_bytes: 0, ..spec("images/a") }),
        ("spec.pool", ImportImageSpec { pool: "a/b".into(), ..spec("images/a") }),
    ];
    for (field, spec) in cases {
        let messages = stream::iter(vec![message(Message::Spec(spec))]);
        let refused = world.client().import_image(messages).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().starts_with(field), "{refused}");
    }
    let other = ImportImageSpec { pool: "none".into(), node: "nodes/a".into(), ..spec("images/a") };
    let messages = stream::iter(vec![message(Message::Spec(other))]);
    let refused = world.client().import_image(messages).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(world.ends.borrow().is_empty(), "the agent was not asked");
}
