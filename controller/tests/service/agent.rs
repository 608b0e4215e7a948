//! Agents that speak the session protocol and run nothing: peers for the controller.
//!
//! All of them share one [`Hosts`], so that a hand-over on one side is a resume on the other;
//! it holds every copy back until it is let go, and counts who runs what.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drover_proto::agent::v1::assignment::Role;
use drover_proto::agent::v1::session_service_client::SessionServiceClient;
use drover_proto::agent::v1::{
    AgentMessage, Assignment, Hello, MigrationProgress as P, MigrationRole, ObservedDomain,
    ObservedMigration, ObservedPool, ObservedSnapshot, ObservedState as S, ObservedVolume, Report,
    WantedSnapshotPart, WantedVolume, agent_message, controller_message,
};
use drover_proto::v1::{
    ExitReason, MigrationReport, NodeCapacity, PoolState, PowerState, SnapshotState, VolumeState,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::interval;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use super::CLUSTER;

const REPORT_EVERY: Duration = Duration::from_millis(50);

/// What is on all hosts.
#[derive(Default)]
pub(crate) struct Hosts {
    domains: BTreeMap<(String, String), ObservedDomain>,
    /// Migrations do not get beyond copying while this is set.
    pub(crate) hold: bool,
    /// A domain was seen on two nodes.
    pub(crate) twice: bool,
    /// Each has a pool of 10 GiB.
    pub(crate) has_pool: bool,
}

pub(crate) type Shared = Arc<Mutex<Hosts>>;

/// One agent; ends when dropped.
pub(crate) struct Agent {
    task: JoinHandle<()>,
    /// Sessions that were opened.
    pub(crate) sessions: watch::Receiver<u32>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn hello(node: &str) -> Hello {
    Hello {
        cluster_id: CLUSTER.into(),
        node: format!("nodes/{node}"),
        node_uid: uid_of(node),
        boot_id: "boot-1".into(),
        address: "127.0.0.1:7401".into(),
        capacity: Some(NodeCapacity { vcpus: 8, memory_bytes: 2 << 30 }),
        agent_version: "test".into(),
        kernel_version: "test".into(),
    }
}

fn uid_of(node: &str) -> String {
    let sum: u32 = node.bytes().map(u32::from).sum();
    format!("00000000-0000-4000-8000-{sum:012x}")
}

/// Opens one session and answers with how it ended.
pub(crate) async fn session(
    address: &str,
    hello: Hello,
    node: &str,
    hosts: &Shared,
    opened: &watch::Sender<u32>,
) -> Status {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = match endpoint.connect_timeout(Duration::from_secs(1)).connect().await {
        Ok(channel) => channel,
        Err(error) => return Status::unavailable(error.to_string()),
    };
    let (messages, outbound) = mpsc::channel(4);
    let first = AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
    messages.send(first).await.unwrap();
    let mut client = SessionServiceClient::new(channel);
    let mut inbound = match client.open_session(ReceiverStream::new(outbound)).await {
        Ok(inbound) => inbound.into_inner(),
        Err(status) => return status,
    };
    let (mut sequence, mut taken_in, mut level) = (0, 0, None);
    let mut tick = interval(REPORT_EVERY);
    loop {
        tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(message)) => match message.message {
                    Some(controller_message::Message::Desired(desired)) => {
                        taken_in = desired.sequence;
                        level = Some(desired);
                    }
                    _ => opened.send_modify(|count| *count += 1),
                },
                Ok(None) => return Status::unavailable("the session has ended"),
                Err(status) => return status,
            },
            _ = tick.tick() => {
                sequence += 1;
                let (domains, pools) = {
                    let mut hosts = hosts.lock().unwrap();
                    if let Some(level) = &level {
                        hosts.work(node, &level.domains);
                    }
                    (hosts.on(node), hosts.pools())
                };
                let level = level.clone().unwrap_or_default();
                let report = Report {
                    sequence,
                    desired_sequence: taken_in,
                    domains,
                    pools,
                    volumes: level.volumes.iter().map(made).collect(),
                    snapshots: level.snapshots.iter().flat_map(|s| &s.parts).map(taken).collect(),
                    ..Report::default()
                };
                let message = AgentMessage { message: Some(agent_message::Message::Report(report)) };
                if messages.send(message).await.is_err() {
                    return Status::unavailable("the session has ended");
                }
            }
        }
    }
}

/// Keeps a session with whoever leads.
pub(crate) fn start(node: &str, addresses: Vec<String>, hosts: &Shared) -> Agent {
    start_at(node, "127.0.0.1:7401".into(), addresses, hosts)
}

/// The same, of an agent whose service is at `own`.
pub(crate) fn start_at(node: &str, own: String, addresses: Vec<String>, hosts: &Shared) -> Agent {
    let (opened, sessions) = watch::channel(0);
    let (node, hosts) = (node.to_owned(), hosts.clone());
    let task = tokio::spawn(async move {
        loop {
            for address in &addresses {
                let hello = Hello { address: own.clone(), ..hello(&node) };
                let status = session(address, hello, &node, &hosts, &opened).await;
                assert_ne!(status.code(), Code::FailedPrecondition, "{status}");
            }
            tokio::time::sleep(REPORT_EVERY).await;
        }
    });
    Agent { task, sessions }
}

/// What shall be there is there.
fn made(wanted: &WantedVolume) -> ObservedVolume {
    ObservedVolume {
        uid: wanted.uid.clone(),
        pool: wanted.pool.clone(),
        state: VolumeState::Ready.into(),
        size_bytes: wanted.size_bytes,
        ..ObservedVolume::default()
    }
}

fn taken(wanted: &WantedSnapshotPart) -> ObservedSnapshot {
    ObservedSnapshot {
        uid: wanted.uid.clone(),
        volume_uid: wanted.volume_uid.clone(),
        pool: wanted.pool.clone(),
        state: SnapshotState::Ready.into(),
        allocated_bytes: 1 << 20,
        quiesced: true,
        ..ObservedSnapshot::default()
    }
}

impl Hosts {
    fn pools(&self) -> Vec<ObservedPool> {
        let pool = ObservedPool {
            id: "ssd".into(),
            state: PoolState::Ready.into(),
            size_bytes: 10 << 30,
            overcommit: 1.0,
            ..ObservedPool::default()
        };
        if self.has_pool { vec![pool] } else { vec![] }
    }

    fn on(&self, node: &str) -> Vec<ObservedDomain> {
        let mine = self.domains.iter().filter(|((on, _), _)| on == node);
        mine.map(|(_, domain)| domain.clone()).collect()
    }

    /// Makes a host equal to its level.
    fn work(&mut self, node: &str, level: &[Assignment]) {
        let listed = |uid: &String| level.iter().any(|a| a.uid == *uid);
        self.domains.retain(|(on, uid), _| on != node || listed(uid));
        for assignment in level {
            self.work_on(node, assignment);
        }
        for assignment in level {
            let runs = self.domains.iter().filter(|((_, uid), domain)| {
                *uid == assignment.uid && domain.state() == S::Running
            });
            self.twice |= runs.count() > 1;
        }
    }

    fn work_on(&mut self, node: &str, a: &Assignment) {
        let key = (node.to_owned(), a.uid.clone());
        let held = self.domains.get(&key).cloned();
        let kernel = a.spec.as_ref().and_then(|spec| spec.boot.clone()).unwrap_or_default().kernel;
        let mut domain = held.unwrap_or_else(|| ObservedDomain {
            uid: a.uid.clone(),
            name: a.name.clone(),
            epoch: a.epoch,
            ..ObservedDomain::default()
        });
        match &a.role {
            Some(Role::Incoming(incoming)) if domain.migration.is_none() => {
                domain.set_state(S::Incoming);
                domain.migration = Some(ObservedMigration {
                    id: incoming.migration_id.clone(),
                    role: MigrationRole::Destination.into(),
                    progress: P::Listening.into(),
                    listen_address: "10.0.0.1:9000".into(),
                    ..ObservedMigration::default()
                });
            }
            Some(Role::Owner(owner)) => {
                let fresh = a.epoch > domain.epoch || domain.state() == S::Unspecified;
                domain.epoch = domain.epoch.max(a.epoch);
                if owner.power() == PowerState::Stopped {
                    domain.set_state(S::Stopped);
                } else if kernel.contains("missing") {
                    domain.set_state(S::Failed);
                    domain.set_exit_reason(ExitReason::Error);
                    domain.state_reason = format!("{kernel}: no such file");
                } else if fresh {
                    domain.set_state(S::Running);
                    domain.migration = None;
                }
                if let Some(outgoing) = &a.outgoing {
                    self.send_away(
                        &mut domain,
                        outgoing.migration_id.clone(),
                        outgoing.to_epoch,
                        outgoing.cancel,
                    );
                }
            }
            _ => {}
        }
        self.domains.insert(key, domain);
    }

    /// The source's side; the hand-over and the resume are one step here.
    fn send_away(&mut self, domain: &mut ObservedDomain, id: String, to_epoch: u64, cancel: bool) {
        let progress =
            domain.migration.as_ref().filter(|m| m.id == id).map(ObservedMigration::progress);
        if matches!(progress, Some(P::Failed | P::Succeeded)) {
            return;
        }
        let other = self.domains.values_mut().find(|other| {
            other.uid == domain.uid
                && other
                    .migration
                    .as_ref()
                    .is_some_and(|m| m.id == id && m.role() == MigrationRole::Destination)
        });
        let progress = match other {
            _ if cancel => P::Failed,
            Some(other) if !self.hold => {
                domain.set_state(S::HandedOver);
                other.set_state(S::Running);
                other.epoch = to_epoch;
                if let Some(m) = &mut other.migration {
                    m.set_progress(P::Succeeded);
                }
                P::Succeeded
            }
            _ => P::Copying,
        };
        domain.migration = Some(ObservedMigration {
            id,
            role: MigrationRole::Source.into(),
            progress: progress.into(),
            report: Some(MigrationReport {
                rounds: 3,
                memory_bytes: 256 << 20,
                remaining_bytes: 128 << 20,
                pause_us: 4_200,
                ..MigrationReport::default()
            }),
            ..ObservedMigration::default()
        });
    }
}
