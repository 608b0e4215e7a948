//! Who may speak to whom.
//!
//! Every stream between members names its ends (see `raft.proto`). The receiver checks them
//! before it reads anything; the sender, refused, decides whether that is its own fault:
//!
//! - Another data directory is recorded for its member id: it is a second controller with the
//!   same id. It ends.
//! - Another cluster, or other members: one of the two is wrong, and none can tell which. A
//!   member that so many refuse that it could never be part of a majority ends; one that is
//!   refused by a minority is the right one, says so in its log, and goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_proto::raft::v1 as pb;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use super::identity::{Identity, member_key};
use crate::store::{MemberId, State, Store, Txn, View};

const CLUSTER: &str = "drover-cluster";
const FROM: &str = "drover-from";
const TO: &str = "drover-to";
const STORAGE: &str = "drover-storage";
const TO_STORAGE: &str = "drover-to-storage";
const VOTERS: &str = "drover-voters";
const REFUSED: &str = "drover-refused";

/// For one registration; it is tried again.
const REGISTER_TIME: Duration = Duration::from_secs(5);

/// Why a peer refuses a stream, as it says in the status' metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// The sender is of another cluster, or knows other members.
    Cluster,
    /// The sender's member id is another data directory's.
    Storage,
    /// The receiver is not whom the sender means.
    Receiver,
}

impl Reason {
    const ALL: [Reason; 3] = [Reason::Cluster, Reason::Storage, Reason::Receiver];

    fn name(self) -> &'static str {
        match self {
            Reason::Cluster => "cluster",
            Reason::Storage => "storage",
            Reason::Receiver => "receiver",
        }
    }

    fn status(self, message: String) -> Status {
        let mut metadata = MetadataMap::new();
        metadata.insert(REFUSED, MetadataValue::from_static(self.name()));
        Status::with_metadata(Code::FailedPrecondition, message, metadata)
    }

    fn of(status: &Status) -> Option<Self> {
        let name = status.metadata().get(REFUSED)?.to_str().ok()?;
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

/// The peers refuse this member: it cannot be part of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("member {by} at {address} refuses this controller: {message}")]
pub struct Refused {
    /// Who refuses.
    pub by: MemberId,
    /// Where it is.
    pub address: String,
    /// Its words.
    pub message: String,
}

/// What this member knows of the others, shared by streams in both directions.
pub(crate) struct Peers {
    pub(crate) identity: Identity,
    pub(crate) members: BTreeMap<MemberId, String>,
    state: watch::Receiver<State>,
    known: Mutex<Known>,
    /// A peer was heard for the first time.
    contact: Notify,
    failures: mpsc::Sender<Refused>,
}

#[derive(Default)]
struct Known {
    /// The storage of each peer's first stream, until one is recorded.
    contacts: BTreeMap<MemberId, String>,
    /// Counts the incoming streams of each peer: only the newest one counts.
    streams: BTreeMap<MemberId, u64>,
    refused_by: BTreeSet<MemberId>,
}

/// An accepted stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) from: MemberId,
    stream: u64,
}

impl Peers {
    pub(crate) fn new(
        identity: Identity,
        members: BTreeMap<MemberId, String>,
        state: watch::Receiver<State>,
        failures: mpsc::Sender<Refused>,
    ) -> Self {
        Self { identity, members, state, known: Mutex::default(), contact: Notify::new(), failures }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What it holds is valid between any two statements.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The storage that is recorded for a member.
    fn recorded(&self, id: MemberId) -> Option<String> {
        let view = View::from(self.state.borrow().clone());
        view.get::<pb::MemberRecord>(&member_key(id)).map(|row| row.value.storage_id)
    }

    fn voters(&self) -> String {
        let ids: Vec<_> = self.identity.voters.iter().map(ToString::to_string).collect();
        ids.join(",")
    }

    /// The metadata of a stream to `to`.
    pub(crate) fn introduce(&self, to: MemberId) -> Result<MetadataMap, Status> {
        let mut metadata = MetadataMap::new();
        let mut put = |key: &'static str, value: String| {
            let value = MetadataValue::try_from(value)
                .map_err(|_| Status::internal(format!("{key} is no header value")))?;
            metadata.insert(key, value);
            Ok::<_, Status>(())
        };
        put(CLUSTER, self.identity.cluster_id.clone())?;
        put(FROM, self.identity.member.to_string())?;
        put(TO, to.to_string())?;
        put(STORAGE, self.identity.storage_id.clone())?;
        put(VOTERS, self.voters())?;
        if let Some(storage) = self.recorded(to) {
            put(TO_STORAGE, storage)?;
        }
        Ok(metadata)
    }

    /// Checks a stream's metadata; an accepted stream takes the place of the one before.
    pub(crate) fn accept(&self, metadata: &MetadataMap) -> Result<Accepted, Status> {
        let from = self.check(metadata)?;
        let storage = text(metadata, STORAGE)?;
        let recorded = self.recorded(from);
        let mut known = self.known();
        let expected = recorded.as_ref().or_else(|| known.contacts.get(&from));
        if expected.is_some_and(|expected| expected != storage) {
            return Err(Reason::Storage.status(format!(
                "--id {from}: member {from} of cluster \"{}\" has another data directory; start \
                 this controller with that one, or with an id of its own",
                self.identity.cluster_id
            )));
        }
        known.contacts.insert(from, storage.to_owned());
        let stream = known.streams.entry(from).or_default();
        *stream += 1;
        let accepted = Accepted { from, stream: *stream };
        drop(known);
        self.contact.notify_one();
        Ok(accepted)
    }

    /// The sender, when it is of this cluster and means this member.
    pub(crate) fn check(&self, metadata: &MetadataMap) -> Result<MemberId, Status> {
        let me = self.identity.member;
        let cluster = text(metadata, CLUSTER)?;
        if cluster != self.identity.cluster_id {
            return Err(Reason::Cluster.status(format!(
                "--cluster-id \"{cluster}\": this is cluster \"{}\"; give that id, or the \
                 addresses of the cluster's own members",
                self.identity.cluster_id
            )));
        }
        let (from, to) = (number(metadata, FROM)?, number(metadata, TO)?);
        if to != me {
            return Err(Reason::Receiver.status(format!(
                "--member {to}: member {me} answers at this address; give each member its own"
            )));
        }
        let voters = text(metadata, VOTERS)?;
        if voters != self.voters() || !self.members.contains_key(&from) || from == me {
            return Err(Reason::Cluster.status(format!(
                "--member: the cluster has members {}, this controller names {voters}; name \
                 the same ones",
                self.voters()
            )));
        }
        if let Some(storage) = metadata.get(TO_STORAGE)
            && storage.as_bytes() != self.identity.storage_id.as_bytes()
        {
            return Err(Reason::Receiver.status(format!(
                "this member {me} runs from another data directory than the cluster knows"
            )));
        }
        Ok(from)
    }

    /// Runs `deliver` unless a newer stream has taken this one's place.
    pub(crate) fn deliver<T>(&self, accepted: Accepted, deliver: impl FnOnce() -> T) -> Option<T> {
        // Held, so that nothing of an older stream comes behind something of a newer one.
        let known = self.known();
        let current = known.streams.get(&accepted.from) == Some(&accepted.stream);
        current.then(deliver)
    }

    /// A peer took a stream.
    pub(crate) fn accepted_by(&self, peer: MemberId) {
        self.known().refused_by.remove(&peer);
    }

    /// A peer did not take a stream: looks whether that is this member's own fault.
    pub(crate) fn refused_by(&self, peer: MemberId, address: &str, status: &Status) {
        let Some(reason) = Reason::of(status) else {
            tracing::debug!(peer, address, %status, "no stream");
            return;
        };
        let fatal = match reason {
            Reason::Storage => true,
            Reason::Receiver => false,
            Reason::Cluster => {
                let mut known = self.known();
                known.refused_by.insert(peer);
                let voters = self.identity.voters.len();
                voters - known.refused_by.len() < voters / 2 + 1
            }
        };
        if !fatal {
            tracing::error!(peer, address, reason = status.message(), "refused by a member");
        } else {
            // One is enough; a full queue holds one.
            let _ = self.failures.try_send(Refused {
                by: peer,
                address: address.to_owned(),
                message: status.message().to_owned(),
            });
        }
    }

    /// While this member leads, records the storage of itself and of each member heard.
    pub(crate) async fn register(&self, store: &Store) {
        let mut leadership = store.leadership();
        loop {
            let wait = if leadership.borrow_and_update().is_leader {
                self.register_all(store).await
            } else {
                None
            };
            let retry = async {
                match wait {
                    Some(time) => tokio::time::sleep(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = leadership.changed() => if changed.is_err() { return },
                () = self.contact.notified() => {}
                () = retry => {}
            }
        }
    }

    /// Returns when to try again, if something is left to do.
    async fn register_all(&self, store: &Store) -> Option<Duration> {
        let mut storages = self.known().contacts.clone();
        storages.insert(self.identity.member, self.identity.storage_id.clone());
        for (id, storage_id) in storages {
            match self.recorded(id) {
                Some(recorded) if recorded == storage_id => continue,
                Some(_) => self.cut(id),
                None => {
                    let record = pb::MemberRecord { id, storage_id };
                    let txn = Txn::new().absent::<pb::MemberRecord>(member_key(id)).put(&record);
                    if let Err(error) = store.commit(txn, Instant::now() + REGISTER_TIME).await {
                        tracing::debug!(member = id, %error, "member is not recorded yet");
                        return Some(REGISTER_TIME);
                    }
                    tracing::info!(member = id, storage = record.storage_id, "member recorded");
                }
            }
        }
        None
    }

    /// Ends the stream of a peer that is not who it said.
    fn cut(&self, id: MemberId) {
        let mut known = self.known();
        known.contacts.remove(&id);
        *known.streams.entry(id).or_default() += 1;
    }
}

fn text<'a>(metadata: &'a MetadataMap, key: &str) -> Result<&'a str, Status> {
    metadata
        .get(key)
        .and_then(|value| value.to_str().ok())
        .ok_or_else(|| Status::invalid_argument(format!("metadata {key}: missing")))
}

fn number(metadata: &MetadataMap, key: &str) -> Result<MemberId, Status> {
    let value = text(metadata, key)?;
    value
        .parse()
        .map_err(|_| Status::invalid_argument(format!("metadata {key}: {value:?} is no number")))
}
