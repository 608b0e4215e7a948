//! A group of members in this process, each with its own disk and its own port.

pub(crate) mod process;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use drover_controller::raft::{self, Claim, Limits, Running, StartError, StartOptions, member_key};
use drover_controller::store::{Record, Store, Table, Txn};
use drover_proto::raft::v1::MemberRecord;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// For anything that should happen at once, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Small, so that a short test sees compaction.
const LIMITS: Limits = Limits {
    log_entries_keep: 10,
    log_entries_max: 20,
    log_bytes_max: 1 << 20,
    history_revisions: 1000,
    history_stride: 10,
    reads_waiting_max: 100,
};

/// What the tests write.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Row {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(uint64, tag = "2")]
    pub(crate) value: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) filler: Vec<u8>,
}

impl Record for Row {
    const TABLE: Table = Table::Events;
    fn key(&self) -> String {
        self.key.clone()
    }
}

pub(crate) fn put(key: &str, value: u64) -> Txn {
    Txn::new().put(&Row { key: key.into(), value, filler: Vec::new() })
}

pub(crate) fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Waits until a member has applied a revision.
pub(crate) async fn reaches(store: &Store, revision: u64) {
    let now = store.view().revision();
    if now < revision {
        // A snapshot takes the changes away: then ask again.
        while store.view().revision() < revision {
            match store.watch(store.view().revision()) {
                Ok(mut changes) => drop(changes.next().await),
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }
}

/// Waits until the storage of every member is recorded.
pub(crate) async fn all_recorded(store: &Store, members: u64) {
    let recorded = |id| store.view().get::<MemberRecord>(&member_key(id)).is_some();
    while !(1..=members).all(recorded) {
        let mut changes = store.watch(store.view().revision()).unwrap();
        if (1..=members).all(recorded) {
            return;
        }
        changes.next().await.unwrap();
    }
}

pub(crate) fn start_member(claim: Claim, data_dir: &Path) -> Result<Running, StartError> {
    raft::start(StartOptions { claim, data_dir: data_dir.to_owned(), limits: LIMITS })
}

pub(crate) struct Group {
    members: BTreeMap<u64, Member>,
}

struct Member {
    address: SocketAddr,
    text: String,
    dir: tempfile::TempDir,
    running: Option<(Running, JoinHandle<()>)>,
}

impl Group {
    pub(crate) fn new(count: u64) -> Self {
        if std::env::var_os("DROVER_LOG").is_some() {
            // Only the first group of a process starts it; it lasts as long as the process.
            std::mem::forget(drover_telemetry::init("test", None));
        }
        // All at once, so that no port is given twice.
        let ports: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let members = (1..).zip(&ports).map(|(id, port)| {
            let address = port.local_addr().unwrap();
            let dir = tempfile::tempdir().unwrap();
            (id, Member { address, text: address.to_string(), dir, running: None })
        });
        Self { members: members.collect() }
    }

    pub(crate) fn claim(&self, member: u64) -> Claim {
        let members = self.members.iter().map(|(id, m)| (*id, m.text.clone())).collect();
        Claim { cluster_id: "group".into(), member, members }
    }

    pub(crate) async fn start_all(&mut self) {
        for id in 1..=self.members.len() as u64 {
            self.start(id).await;
        }
    }

    pub(crate) async fn start(&mut self, id: u64) {
        self.start_as(id, self.claim(id));
    }

    pub(crate) fn start_as(&mut self, id: u64, claim: Claim) {
        let member = self.members.get_mut(&id).unwrap();
        let incoming = TcpIncoming::bind(member.address).unwrap();
        let running = start_member(claim, member.dir.path()).unwrap();
        let server = Server::builder().add_service(running.server.clone());
        let serving = tokio::spawn(async move {
            let _ = server.serve_with_incoming(incoming).await;
        });
        member.running = Some((running, serving));
    }

    /// Ends a member without a word.
    pub(crate) async fn kill(&mut self, id: u64) {
        let (running, serving) = self.members.get_mut(&id).unwrap().running.take().unwrap();
        serving.abort();
        running.abandon().await;
        assert!(serving.await.is_err());
    }

    /// Ends a member in an orderly way.
    pub(crate) async fn stop(&mut self, id: u64) {
        let (running, serving) = self.members.get_mut(&id).unwrap().running.take().unwrap();
        running.stop().await.unwrap();
        serving.abort();
    }

    pub(crate) async fn stop_all(&mut self) {
        for id in 1..=self.members.len() as u64 {
            if self.members[&id].running.is_some() {
                self.kill(id).await;
            }
        }
    }

    pub(crate) fn running(&mut self, id: u64) -> &mut Running {
        &mut self.members.get_mut(&id).unwrap().running.as_mut().unwrap().0
    }

    pub(crate) fn store(&self, id: u64) -> &Store {
        &self.members[&id].running.as_ref().unwrap().0.store
    }

    pub(crate) fn address(&self, id: u64) -> &str {
        &self.members[&id].text
    }

    /// Waits until one leads and all who run know it.
    pub(crate) async fn leader(&self) -> u64 {
        within(async {
            loop {
                let mut seen = Vec::new();
                for (running, _) in self.members.values().filter_map(|m| m.running.as_ref()) {
                    let mut leadership = running.store.leadership();
                    // One in error knows none.
                    let known = leadership.wait_for(|now| now.leader.is_some());
                    if let Ok(Ok(now)) = timeout(Duration::from_secs(5), known).await {
                        seen.push(now.clone());
                    }
                }
                let leads = seen.iter().find(|now| now.is_leader);
                if let Some(leads) = leads
                    && seen.iter().all(|now| now.term == leads.term)
                {
                    return leads.leader.unwrap();
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }
}
