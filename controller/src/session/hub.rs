//! What the leader holds in memory: reports, and the world as the workflows saw it last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use drover_proto::agent::v1::Report;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::{NodeId, Observed, World};
use crate::workflows::Now;

/// The world, and the term in which this member leads it.
#[derive(Clone, Debug)]
pub struct Lead {
    /// The Raft term.
    pub term: u64,
    /// The rows.
    pub world: Arc<World>,
}

/// Shared by sessions, workflows and the API of one member. Empty while it does not lead.
pub struct Hub {
    started: Instant,
    inner: Mutex<Inner>,
    /// Grows with each report.
    reports: watch::Sender<u64>,
    lead: watch::Sender<Option<Lead>>,
}

#[derive(Default)]
struct Inner {
    observed: Observed,
    sessions: BTreeMap<NodeId, Session>,
    last_session: u64,
}

struct Session {
    id: u64,
    boot_id: String,
    /// Dropped when a newer session takes its place.
    _alive: watch::Sender<()>,
}

/// A session's place in the hub; leaves it when dropped.
pub(super) struct Seat {
    hub: Arc<Hub>,
    node: NodeId,
    id: u64,
    /// Closed when a newer session has come.
    pub(super) replaced: watch::Receiver<()>,
}

impl Hub {
    /// Empty.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            inner: Mutex::default(),
            reports: watch::Sender::new(0),
            lead: watch::Sender::new(None),
        })
    }

    /// Now, on both clocks.
    #[must_use]
    pub fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now {
            wall_ms: i64::try_from(wall.as_millis()).unwrap_or(i64::MAX),
            mono_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// All reports, as they are now.
    #[must_use]
    pub fn observed(&self) -> Observed {
        self.lock().observed.clone()
    }

    /// Changes with each report.
    #[must_use]
    pub fn reports(&self) -> watch::Receiver<u64> {
        self.reports.subscribe()
    }

    /// The world as the workflows saw it last; None while this member does not lead.
    #[must_use]
    pub fn lead(&self) -> watch::Receiver<Option<Lead>> {
        self.lead.subscribe()
    }

    /// Shows the sessions a newer world.
    pub fn publish(&self, term: u64, world: &World) {
        self.lead.send_if_modified(|held| {
            let newer = held
                .as_ref()
                .is_none_or(|held| held.term != term || held.world.revision != world.revision);
            if newer {
                *held = Some(Lead { term, world: Arc::new(world.clone()) });
            }
            newer
        });
    }

    /// This member leads no more: sessions end, and what was heard is forgotten.
    pub fn rest(&self) {
        self.lead.send_replace(None);
        let mut inner = self.lock();
        inner.observed = Observed::default();
        inner.sessions.clear();
    }

    /// Seats a session; an older one of the same node ends.
    pub(super) fn sit(self: &Arc<Self>, node: &NodeId, boot_id: &str) -> Seat {
        let now_ms = self.now().mono_ms;
        let (alive, replaced) = watch::channel(());
        let mut inner = self.lock();
        inner.last_session += 1;
        let id = inner.last_session;
        let session = Session { id, boot_id: boot_id.to_owned(), _alive: alive };
        let older = inner.sessions.insert(node.clone(), session);
        let observation = Arc::make_mut(inner.observed.nodes.entry(node.clone()).or_default());
        observation.connected = true;
        observation.reported = false;
        observation.taken_in = 0;
        observation.heard_ms = now_ms;
        if older.is_none_or(|older| older.boot_id != boot_id) {
            observation.forget();
        }
        drop(inner);
        self.touch();
        Seat { hub: self.clone(), node: node.clone(), id, replaced }
    }

    fn touch(&self) {
        self.reports.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here is left half done by a panic: reports replace one another whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Takes a report in.
    pub(super) fn report(&self, report: Report, taken_in: u64) {
        let now_ms = self.hub.now().mono_ms;
        let mut inner = self.hub.lock();
        if !self.is_seated(&inner) {
            return;
        }
        if let Some(observation) = inner.observed.nodes.get_mut(&self.node) {
            Arc::make_mut(observation).take(report, taken_in, now_ms);
        }
        drop(inner);
        self.hub.touch();
    }

    /// The level that the last report knew is still the level at this revision.
    pub(super) fn still_knows(&self, taken_in: u64) {
        let mut inner = self.hub.lock();
        if !self.is_seated(&inner) {
            return;
        }
        let Some(observation) = inner.observed.nodes.get_mut(&self.node) else { return };
        if observation.taken_in >= taken_in {
            return;
        }
        Arc::make_mut(observation).taken_in = taken_in;
        drop(inner);
        self.hub.touch();
    }

    fn is_seated(&self, inner: &Inner) -> bool {
        inner.sessions.get(&self.node).is_some_and(|session| session.id == self.id)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inner = self.hub.lock();
        if !self.is_seated(&inner) {
            return;
        }
        // The boot is remembered with the session: it is only marked as gone.
        if let Some(observation) = inner.observed.nodes.get_mut(&self.node) {
            Arc::make_mut(observation).connected = false;
        }
        drop(inner);
        self.hub.touch();
    }
}
