//! Whole controllers in this process: Raft on disk, workflows, and the API on real ports.

pub(crate) mod agent;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use drover_controller::api::{self, Service, ServiceOptions};
use drover_controller::raft::{self, Claim, Limits, Running, StartOptions};
use drover_controller::scheduler::Strategy;
use drover_controller::session::Hub;
use drover_controller::store::Store;
use drover_controller::workflows::{Settings, driver};
use drover_proto::v1::domain_service_client::DomainServiceClient;
use drover_proto::v1::node_service_client::NodeServiceClient;
use drover_proto::v1::operation_service_client::OperationServiceClient;
use drover_proto::v1::{
    Boot, CreateDomainRequest, Domain, DomainSpec, GetDomainRequest, Operation,
    WaitOperationRequest,
};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status};

pub(crate) const CLUSTER: &str = "test";
/// For anything that should happen at once, on a machine that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what} takes too long"),
    }
}

/// A member that runs.
struct Member {
    running: Running,
    tasks: Vec<JoinHandle<()>>,
}

/// Controllers, each with its own disk and port.
pub(crate) struct Controllers {
    addresses: BTreeMap<u64, SocketAddr>,
    dirs: BTreeMap<u64, tempfile::TempDir>,
    members: BTreeMap<u64, Member>,
}

impl Controllers {
    /// Starts `count` of them and waits for a leader.
    pub(crate) async fn start(count: u64) -> Self {
        let ports: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses = (1..).zip(ports.iter().map(|port| port.local_addr().unwrap())).collect();
        drop(ports);
        let dirs = (1..=count).map(|id| (id, tempfile::tempdir().unwrap())).collect();
        let mut controllers = Self { addresses, dirs, members: BTreeMap::new() };
        for id in 1..=count {
            controllers.start_member(id);
        }
        controllers.leader().await;
        controllers
    }

    fn start_member(&mut self, id: u64) {
        let members = self.addresses.iter().map(|(id, at)| (*id, at.to_string())).collect();
        let claim = Claim { cluster_id: CLUSTER.into(), member: id, members };
        let data_dir = self.dirs[&id].path().to_owned();
        let incoming = TcpIncoming::bind(self.addresses[&id]).unwrap();
        let options = StartOptions { claim, data_dir, limits: Limits::default() };
        let running = raft::start(options).unwrap();
        let settings = Settings { lease_ms: 3_000, report_interval_ms: 200 };
        let hub = Hub::new();
        let workflows = driver::run(running.store.clone(), hub.clone(), settings);
        let options = ServiceOptions {
            cluster_id: CLUSTER.into(),
            member: id,
            settings,
            strategy: Strategy::BestFit,
        };
        let service = Service::new(running.store.clone(), hub, options);
        let routes = api::routes(&service).add_service(running.server.clone());
        let server = Server::builder().add_routes(routes).serve_with_incoming(incoming);
        let serving = tokio::spawn(async move { drop(server.await) });
        let tasks = vec![tokio::spawn(workflows), serving];
        self.members.insert(id, Member { running, tasks });
    }

    /// Ends a member without a word.
    pub(crate) async fn kill(&mut self, id: u64) {
        let member = self.members.remove(&id).unwrap();
        for task in &member.tasks {
            task.abort();
        }
        member.running.abandon().await;
    }

    /// Who leads.
    pub(crate) async fn leader(&self) -> u64 {
        let mut waiting = tokio::task::JoinSet::new();
        for (id, member) in &self.members {
            let (id, mut leadership) = (*id, member.running.store.leadership());
            waiting.spawn(async move {
                leadership.wait_for(|now| now.is_leader).await.map(|_| id).ok()
            });
        }
        let first = within("an election", waiting.join_next()).await;
        first.unwrap().unwrap().expect("the store is open")
    }

    pub(crate) fn store(&self, id: u64) -> &Store {
        &self.members[&id].running.store
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.addresses.values().map(SocketAddr::to_string).collect()
    }

    /// A client of one member.
    pub(crate) fn client(&self, id: u64) -> Client {
        let address = format!("http://{}", self.addresses[&id]);
        Client { channel: Endpoint::from_shared(address).unwrap().connect_lazy() }
    }
}

/// Calls one member.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
}

impl Client {
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(crate) fn domains(&self) -> DomainServiceClient<Channel> {
        DomainServiceClient::new(self.channel())
    }

    pub(crate) fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel())
    }

    pub(crate) fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel())
    }

    /// Waits for an operation's end, across changes of leader.
    pub(crate) async fn wait(&self, name: &str) -> Operation {
        within("the operation", async {
            loop {
                let request = WaitOperationRequest { name: name.into(), timeout: None };
                match self.operations().wait_operation(request).await {
                    Ok(done) => return done.into_inner(),
                    Err(status) if is_moving(&status) => tokio::task::yield_now().await,
                    Err(status) => panic!("waiting for {name}: {status}"),
                }
            }
        })
        .await
    }

    pub(crate) async fn domain(&self, id: &str) -> Domain {
        let request = GetDomainRequest { name: format!("domains/{id}") };
        self.domains().get_domain(request).await.unwrap().into_inner()
    }

    /// Creates a small domain on a node, and waits until it runs.
    pub(crate) async fn run_domain(&self, id: &str, node: &str) -> Operation {
        let operation = self.domains().create_domain(create(id, node)).await.unwrap();
        self.wait(&operation.into_inner().name).await
    }
}

/// Leadership has moved or is about to.
pub(crate) fn is_moving(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
}

pub(crate) fn create(id: &str, node: &str) -> CreateDomainRequest {
    let node = if node.is_empty() { String::new() } else { format!("nodes/{node}") };
    let spec = DomainSpec {
        vcpus: 1,
        memory_bytes: 256 << 20,
        boot: Some(Boot { kernel: "/boot/vmlinuz".into(), ..Boot::default() }),
        ..DomainSpec::default()
    };
    let domain = Domain { name: format!("domains/{id}"), spec: Some(spec), ..Domain::default() };
    CreateDomainRequest { domain: Some(domain), node, ..CreateDomainRequest::default() }
}
