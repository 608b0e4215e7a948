//! One member: a gRPC server on loopback that says what its script has.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use drover_proto::v1::{
    domain_service_server::{DomainService, DomainServiceServer},
    event_service_server::{EventService, EventServiceServer},
    image_service_server::ImageServiceServer,
    network_service_server::NetworkServiceServer,
    node_service_server::{NodeService, NodeServiceServer},
    operation_service_server::{OperationService, OperationServiceServer},
    pool_service_server::PoolServiceServer,
    snapshot_service_server::SnapshotServiceServer,
    volume_service_server::VolumeServiceServer,
    *,
};
use futures::{Stream, StreamExt, stream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    disks::Content,
    stored::{ImportScript, Imported},
};

/// What a member says.
#[derive(Clone, Default)]
pub(crate) struct Script {
    /// The answer to what starts, cancels or shows an operation; the first of `watch` if unset.
    pub(crate) accepted: Operation,
    /// A watch of an operation: these, then silence.
    pub(crate) watch: Vec<Operation>,
    /// A watch of events: those after the revision asked for, then silence.
    pub(crate) events: Vec<Event>,
    /// A console: these, then an answer to each line typed.
    pub(crate) console: Vec<ConsoleOutput>,
    /// The console ends after `console`.
    pub console_ends: bool,
    /// The one domain.
    pub(crate) domain: Domain,
    pub(crate) pools: Vec<Pool>,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) images: Vec<Image>,
    pub(crate) networks: Vec<Network>,
    /// What an import is answered.
    pub(crate) import: ImportScript,
    /// What the node behind it holds at the beginning.
    pub(crate) node: Content,
    /// What the guest's agent says.
    pub(crate) guest: Guest,
}

/// What a member was asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) domains: Vec<CreateDomainRequest>,
    pub(crate) networks: Vec<Network>,
    /// The names of what was to be deleted, and the filters of lists.
    pub(crate) names: Vec<String>,
    pub(crate) resizes: Vec<ResizeDomainRequest>,
    /// What else it was to do, a line each, in that order.
    pub(crate) did: Vec<String>,
}

/// A running member; dead when killed or dropped, with all its connections.
pub(crate) struct Member {
    address: String,
    runtime: Option<tokio::runtime::Runtime>,
    consoles: Receiver<()>,
    imports: Receiver<Imported>,
    pauses: Receiver<()>,
    scripted: Scripted,
}

impl Member {
    pub(crate) fn start(script: Script) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (attached, consoles) = sync_channel(16);
        let (imported, imports) = sync_channel(16);
        let (paused, pauses) = sync_channel(16);
        let scripted = Scripted {
            node: Arc::new(Mutex::new(script.node.clone())),
            paused,
            script: Arc::new(script),
            attached,
            imported,
            asked: Arc::default(),
            go_on: Arc::default(),
        };
        let server = Server::builder()
            .add_service(OperationServiceServer::new(scripted.clone()))
            .add_service(NodeServiceServer::new(scripted.clone()))
            .add_service(EventServiceServer::new(scripted.clone()))
            .add_service(DomainServiceServer::new(scripted.clone()))
            .add_service(PoolServiceServer::new(scripted.clone()))
            .add_service(VolumeServiceServer::new(scripted.clone()))
            .add_service(ImageServiceServer::new(scripted.clone()))
            .add_service(SnapshotServiceServer::new(scripted.clone()))
            .add_service(NetworkServiceServer::new(scripted.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        runtime.spawn(server);
        Self { address, runtime: Some(runtime), consoles, imports, pauses, scripted }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Waits until somebody has attached to the console here.
    pub(crate) fn wait_for_a_console(&self) {
        self.consoles.recv_timeout(crate::common::WAIT_MAX).unwrap();
    }

    /// Waits until an import has ended here, whatever its end.
    pub(crate) fn wait_for_an_import(&self) -> Imported {
        self.imports.recv_timeout(crate::common::WAIT_MAX).unwrap()
    }

    /// Waits until the reading of a snapshot has come to its pause.
    pub(crate) fn wait_for_a_pause(&self) {
        self.pauses.recv_timeout(crate::common::WAIT_MAX).unwrap();
    }

    /// What the node behind it holds now.
    pub(crate) fn node(&self) -> std::sync::MutexGuard<'_, Content> {
        self.scripted.node.lock().unwrap()
    }

    /// Ends an import's pause, or a snapshot's.
    pub(crate) fn go_on(&self) {
        self.scripted.go_on.notify_one();
    }

    /// What it was asked so far.
    pub(crate) fn asked(&self) -> Asked {
        self.scripted.asked.lock().unwrap().clone()
    }

    /// As SIGKILL does: every connection ends at once.
    pub(crate) fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
pub(crate) struct Scripted {
    pub(crate) script: Arc<Script>,
    attached: SyncSender<()>,
    pub(crate) imported: SyncSender<Imported>,
    pub(crate) paused: SyncSender<()>,
    pub(crate) node: Arc<Mutex<Content>>,
    pub(crate) asked: Arc<Mutex<Asked>>,
    pub(crate) go_on: Arc<tokio::sync::Notify>,
}

pub(crate) type Answer<T> = Result<Response<T>, Status>;
pub(crate) type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// These, then silence.
fn then_silence<T: Send + 'static>(items: Vec<T>) -> Flow<T> {
    Box::pin(stream::iter(items.into_iter().map(Ok)).chain(stream::pending()))
}

impl Scripted {
    pub(crate) fn did(&self, what: String) {
        self.asked.lock().unwrap().did.push(what);
    }

    pub(crate) fn accepted(&self) -> Answer<Operation> {
        let script = &self.script;
        let first = match script.accepted.name.as_str() {
            "" => script.watch.first().cloned(),
            _ => Some(script.accepted.clone()),
        };
        first.map(Response::new).ok_or_else(|| Status::not_found("no operation in the script"))
    }
}

/// Methods that no test calls.
macro_rules! not_scripted {
    ($($method:ident: $request:ty => $answer:ty),* $(,)?) => {
        $(fn $method<'a, 'b>(
            &'a self,
            _: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Answer<$answer>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented("not in the script")) })
        })*
    };
}

#[tonic::async_trait]
impl OperationService for Scripted {
    type WatchOperationStream = Flow<Operation>;

    async fn watch_operation(&self, _: Request<GetOperationRequest>) -> Answer<Flow<Operation>> {
        Ok(Response::new(then_silence(self.script.watch.clone())))
    }
    async fn get_operation(&self, _: Request<GetOperationRequest>) -> Answer<Operation> {
        self.accepted()
    }
    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Answer<Operation> {
        self.did(format!("cancel {}", request.get_ref().name));
        self.accepted()
    }
    not_scripted! {
        list_operations: ListOperationsRequest => ListOperationsResponse,
        wait_operation: WaitOperationRequest => Operation,
    }
}

#[tonic::async_trait]
impl NodeService for Scripted {
    async fn drain_node(&self, _: Request<DrainNodeRequest>) -> Answer<Operation> {
        self.accepted()
    }
    not_scripted! {
        get_node: GetNodeRequest => Node,
        list_nodes: ListNodesRequest => ListNodesResponse,
        cordon_node: CordonNodeRequest => Node,
        uncordon_node: UncordonNodeRequest => Node,
        plan_drain: PlanDrainRequest => DrainPlan,
        delete_node: DeleteNodeRequest => DeleteNodeResponse,
    }
}

#[tonic::async_trait]
impl EventService for Scripted {
    type WatchEventsStream = Flow<Event>;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Flow<Event>> {
        let from = request.get_ref().from_revision;
        let events = self.script.events.iter().filter(|e| e.revision > from).cloned().collect();
        Ok(Response::new(then_silence(events)))
    }
    not_scripted! { list_events: ListEventsRequest => ListEventsResponse }
}

#[tonic::async_trait]
impl DomainService for Scripted {
    type AttachConsoleStream = Flow<ConsoleOutput>;

    async fn attach_console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Answer<Flow<ConsoleOutput>> {
        let mut input = request.into_inner();
        let hello = input.message().await?.unwrap_or_default();
        if hello.name != "domains/web1" {
            return Err(Status::not_found(format!("domains: no {}", hello.name)));
        }
        let _ = self.attached.try_send(());
        let said = stream::iter(self.script.console.clone().into_iter().map(Ok));
        if self.script.console_ends {
            return Ok(Response::new(Box::pin(said)));
        }
        let heard = input.filter_map(async |input| match input {
            Ok(input) => {
                let data = [b"guest heard: ".as_slice(), &input.data].concat().into();
                Some(Ok(ConsoleOutput { data, history: false }))
            }
            Err(status) => Some(Err(status)),
        });
        Ok(Response::new(Box::pin(said.chain(heard))))
    }
    async fn create_domain(&self, request: Request<CreateDomainRequest>) -> Answer<Operation> {
        self.asked.lock().unwrap().domains.push(request.into_inner());
        self.accepted()
    }
    async fn get_domain(&self, _: Request<GetDomainRequest>) -> Answer<Domain> {
        Ok(Response::new(self.script.domain.clone()))
    }
    async fn start_domain(&self, request: Request<StartDomainRequest>) -> Answer<Operation> {
        let request = request.into_inner();
        let how = if request.discard_saved { ", discarding what was saved" } else { "" };
        self.did(format!("start {}{how}", request.name));
        self.accepted()
    }
    async fn resize_domain(&self, request: Request<ResizeDomainRequest>) -> Answer<Operation> {
        self.asked.lock().unwrap().resizes.push(request.into_inner());
        self.accepted()
    }
    async fn reinstall_domain(
        &self,
        request: Request<ReinstallDomainRequest>,
    ) -> Answer<Operation> {
        let ReinstallDomainRequest { name, disk, image, keep_image, .. } = request.into_inner();
        let how = if keep_image { ", which it is not made of" } else { "" };
        self.did(format!("reinstall disk {disk} of {name} from \"{image}\"{how}"));
        let mut node = self.node.lock().unwrap();
        if let Some(content) = node.images.get(&image).cloned() {
            let disk = &mut node.disks[disk as usize];
            // The rest of a larger disk is blank.
            let length = disk.len();
            *disk = content;
            disk.resize(length, 0);
        }
        self.accepted()
    }
    async fn rescue_domain(&self, request: Request<RescueDomainRequest>) -> Answer<Operation> {
        let RescueDomainRequest { name, image, .. } = request.into_inner();
        self.did(format!("rescue {name} with {image}"));
        self.accepted()
    }
    async fn end_rescue(&self, request: Request<EndRescueRequest>) -> Answer<Operation> {
        self.did(format!("end rescue of {}", request.get_ref().name));
        self.accepted()
    }
    async fn save_domain(&self, request: Request<SaveDomainRequest>) -> Answer<Operation> {
        self.did(format!("save {}", request.get_ref().name));
        self.accepted()
    }
    async fn get_guest(&self, _: Request<GetGuestRequest>) -> Answer<Guest> {
        Ok(Response::new(self.script.guest.clone()))
    }
    async fn set_guest_password(
        &self,
        request: Request<SetGuestPasswordRequest>,
    ) -> Answer<SetGuestPasswordResponse> {
        let SetGuestPasswordRequest { name, user, password } = request.into_inner();
        self.did(format!("password of {user} in {name}: {password}"));
        Ok(Response::new(SetGuestPasswordResponse {}))
    }
    not_scripted! {
        list_domains: ListDomainsRequest => ListDomainsResponse,
        delete_domain: DeleteDomainRequest => Operation,
        stop_domain: StopDomainRequest => Operation,
        migrate_domain: MigrateDomainRequest => Operation,
    }
}
