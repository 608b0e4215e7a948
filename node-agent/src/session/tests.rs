//! The session against scripted controllers on loopback.

use super::*;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use drover_proto::agent::v1::session_service_server::{SessionService, SessionServiceServer};
use drover_proto::agent::v1::{Assignment, Desired, ObservedState, Owner, assignment};
use drover_proto::v1::{DomainSpec, PowerState};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response};

use crate::domain::Shared;
use crate::identity::Home;
use crate::node;
use crate::records::Places;

const UID: &str = "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11";
const LONG: Duration = Duration::from_secs(30);

/// What a scripted controller does with each stream.
#[derive(Debug, Clone)]
enum Script {
    /// Does not lead; the leader is there.
    Follow(Option<SocketAddr>),
    /// Refuses the cluster.
    WrongCluster,
    /// Leads: Welcome, then the levels as they change; ends the stream when `None` is set.
    Lead { term: u64, desired: watch::Receiver<Option<Desired>> },
}

#[derive(Debug)]
struct Controller {
    script: Script,
    streams: Arc<AtomicU32>,
    said: mpsc::Sender<agent_message::Message>,
}

type Answers = ReceiverStream<Result<ControllerMessage, Status>>;

#[tonic::async_trait]
impl SessionService for Controller {
    type OpenSessionStream = Answers;

    async fn open_session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Answers>, Status> {
        self.streams.fetch_add(1, Ordering::SeqCst);
        let (term, mut desired) = match &self.script {
            Script::Follow(leader) => {
                let mut status = Status::unavailable("not the leader");
                if let Some(leader) = leader {
                    let value = leader.to_string().parse().unwrap();
                    status.metadata_mut().insert(LEADER_METADATA, value);
                }
                return Err(status);
            }
            Script::WrongCluster => {
                use tonic_types::StatusExt;
                let info = tonic_types::ErrorDetails::with_error_info(
                    WRONG_CLUSTER,
                    "drover",
                    std::collections::HashMap::new(),
                );
                let text = "cluster_id: \"c1\"; this is c2";
                return Err(Status::with_error_details(Code::FailedPrecondition, text, info));
            }
            Script::Lead { term, desired } => (*term, desired.clone()),
        };
        let mut inbox = request.into_inner();
        let said = self.said.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbox.message().await {
                if said.send(message.message.unwrap()).await.is_err() {
                    return;
                }
            }
        });
        let (answers, stream) = mpsc::channel(8);
        tokio::spawn(async move {
            let welcome = Welcome {
                leader_id: 1,
                term,
                report_interval: Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }),
                lease: None,
            };
            let say = |message| Ok(ControllerMessage { message: Some(message) });
            let _ = answers.send(say(controller_message::Message::Welcome(welcome))).await;
            loop {
                let now = desired.borrow_and_update().clone();
                let Some(now) = now else { return };
                let _ = answers.send(say(controller_message::Message::Desired(now))).await;
                if desired.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

struct Served {
    address: SocketAddr,
    streams: Arc<AtomicU32>,
    said: mpsc::Receiver<agent_message::Message>,
}

async fn serve_on(listener: TcpListener, script: Script) -> Served {
    let address = listener.local_addr().unwrap();
    let (sender, said) = mpsc::channel(1024);
    let streams = Arc::new(AtomicU32::new(0));
    let controller = Controller { script, streams: streams.clone(), said: sender };
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(SessionServiceServer::new(controller))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    Served { address, streams, said }
}

async fn served(script: Script) -> Served {
    serve_on(TcpListener::bind("127.0.0.1:0").await.unwrap(), script).await
}

/// A node without bridge and VMM: all that a session needs of one.
async fn a_node(dir: &tempfile::TempDir) -> NodeHandle {
    let places = Places { state: dir.path().join("state"), run: dir.path().join("run") };
    let home = Home::open(&places.state, "host1", "c1").unwrap();
    let changed = watch::Sender::new(0);
    let quiescer = crate::domain::quiesce::Quiescer::new(places.clone());
    let started =
        crate::storage::start(&[], "host1", &places.state, quiescer.clone(), changed.clone());
    let (storage, _) = started.await.unwrap();
    let shared = Shared {
        storage,
        node: "host1".into(),
        quiescer,
        places,
        vmm: "/nonexistent/drover-vmm".into(),
        bridge: "br0".into(),
        migration_listen: "127.0.0.1:0".into(),
        boot_id: crate::process::boot_id().unwrap(),
        starts: Semaphore::new(1),
        clock: Instant::now(),
        changed,
    };
    node::start_without_network(Arc::new(shared), home).await.unwrap()
}

fn hello() -> Hello {
    Hello { cluster_id: "c1".into(), node: "nodes/host1".into(), ..Hello::default() }
}

fn assignment(epoch: u64, power: PowerState) -> Assignment {
    let owner = Owner { power: power.into(), ..Owner::default() };
    Assignment {
        uid: UID.into(),
        name: "domains/web".into(),
        epoch,
        spec: Some(DomainSpec { vcpus: 1, memory_bytes: 64 << 20, ..DomainSpec::default() }),
        role: Some(assignment::Role::Owner(owner)),
        ..Assignment::default()
    }
}

fn desired(term: u64, sequence: u64, domains: Vec<Assignment>) -> Option<Desired> {
    Some(Desired { term, sequence, domains, ..Desired::default() })
}

/// The first report that fits.
async fn report_with(served: &mut Served, fits: impl Fn(&Report) -> bool) -> Report {
    let wait = async {
        loop {
            match served.said.recv().await.unwrap() {
                agent_message::Message::Report(report) if fits(&report) => return report,
                _ => {}
            }
        }
    };
    timeout(LONG, wait).await.expect("no such report")
}

/// A follower names the leader; there the agent says who it is, reports at once and again, takes
/// in what is desired, and shows what came of it. A domain that cannot start says why.
#[tokio::test]
async fn the_leader_is_found_through_a_follower() {
    let dir = tempfile::tempdir().unwrap();
    let (level, levels) = watch::channel(desired(3, 1, vec![]));
    let mut leader = served(Script::Lead { term: 3, desired: levels }).await;
    let follower = served(Script::Follow(Some(leader.address))).await;
    let nobody = served(Script::Follow(None)).await;
    let list = vec![nobody.address.to_string(), follower.address.to_string()];
    let session = tokio::spawn(run(list, hello(), a_node(&dir).await));

    let first = timeout(LONG, leader.said.recv()).await.unwrap().unwrap();
    assert!(matches!(first, agent_message::Message::Hello(h) if h.node == "nodes/host1"));
    let report = report_with(&mut leader, |_| true).await;
    assert_eq!(report.sequence, 1);
    let report = report_with(&mut leader, |report| report.desired_sequence == 1).await;
    assert!(report.domains.is_empty() && report.usage.is_some());

    level.send_replace(desired(3, 2, vec![assignment(5, PowerState::Running)]));
    let failed = |report: &Report| {
        report.domains.iter().any(|domain| domain.state() == ObservedState::Failed)
    };
    let report = report_with(&mut leader, failed).await;
    assert_eq!(report.desired_sequence, 2);
    let domain = &report.domains[0];
    assert_eq!((domain.uid.as_str(), domain.epoch), (UID, 5));
    assert!(domain.state_reason.starts_with("boot.kernel:"), "{}", domain.state_reason);

    // An older epoch is refused, whoever asks; the picture stays, with the reason.
    level.send_replace(desired(3, 3, vec![assignment(4, PowerState::Running)]));
    let report = report_with(&mut leader, |r| {
        r.domains.iter().any(|d| d.state_reason.contains("epoch 4 is refused"))
    })
    .await;
    assert_eq!(report.domains[0].epoch, 5);

    level.send_replace(desired(3, 4, vec![]));
    report_with(&mut leader, |r| r.desired_sequence == 4 && r.domains.is_empty()).await;
    assert!(follower.streams.load(Ordering::SeqCst) >= 1);
    session.abort();
}

/// When the session ends, another is opened; a controller whose term is behind is not obeyed.
#[tokio::test]
async fn a_new_leader_is_found_and_an_old_one_not_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    let (first_level, levels) =
        watch::channel(desired(7, 1, vec![assignment(1, PowerState::Stopped)]));
    let mut first = served(Script::Lead { term: 7, desired: levels }).await;
    let (_keep, levels) = watch::channel(desired(6, 1, vec![]));
    let mut stale = served(Script::Lead { term: 6, desired: levels }).await;
    let list = vec![first.address.to_string(), stale.address.to_string()];
    let session = tokio::spawn(run(list, hello(), a_node(&dir).await));
    let stopped = |report: &Report| {
        report.domains.iter().any(|domain| domain.state() == ObservedState::Stopped)
    };
    report_with(&mut first, stopped).await;

    // The first ends; the stale one says that nothing shall be here, and is left for the first
    // again, where the domain is still known.
    first_level.send_replace(None);
    let opened = || stale.streams.load(Ordering::SeqCst);
    timeout(LONG, async {
        while opened() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    first_level.send_replace(desired(7, 9, vec![assignment(1, PowerState::Stopped)]));
    let report = report_with(&mut first, |report| report.desired_sequence == 9).await;
    assert_eq!(report.domains.len(), 1, "the stale Desired removed nothing");
    while let Ok(message) = stale.said.try_recv() {
        let agent_message::Message::Report(report) = message else { continue };
        assert_eq!((report.desired_sequence, report.domains.len()), (0, 1));
    }
    session.abort();
}

#[tokio::test]
async fn a_wrong_cluster_ends_the_agent_with_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let wrong = served(Script::WrongCluster).await;
    let list = vec![wrong.address.to_string()];
    let error = timeout(LONG, run(list, hello(), a_node(&dir).await)).await.unwrap();
    assert_eq!(error.exit_code(), 4);
    let text = error.to_string();
    assert!(text.starts_with("--cluster-id c1") && text.contains("this is c2"), "{text}");
}

/// Nobody there: the agent goes on trying, and finds the controller when it comes.
#[tokio::test]
async fn a_controller_that_comes_later_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let session = tokio::spawn(run(vec![address.to_string()], hello(), a_node(&dir).await));
    let (_keep, levels) = watch::channel(desired(1, 1, vec![]));
    // The port was free a moment ago.
    let listener = TcpListener::bind(address).await.unwrap();
    let mut leader = serve_on(listener, Script::Lead { term: 1, desired: levels }).await;
    report_with(&mut leader, |report| report.desired_sequence == 1).await;
    session.abort();
}

#[test]
fn pauses_grow_and_are_bounded() {
    for rounds in 0..100 {
        let pause = pause(rounds);
        assert!(pause >= PAUSE_MIN / 2 && pause <= PAUSE_MAX, "{rounds}: {pause:?}");
    }
    assert!(pause(50) >= PAUSE_MAX / 2);
}
