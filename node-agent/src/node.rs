//! All domains of the node: who has a task, what each is told, and the whole picture of it.
//!
//! One task owns the map. It is told `Desired`, hands each domain its part and takes the others'
//! away, starts tasks for the new ones, and draws the picture for reports from what the domains'
//! tasks show. It never waits for a domain.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use drover_proto::agent::v1::{Assignment, Desired, ObservedDomain};
use drover_proto::v1::{DomainUsage, NodeUsage};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::domain::{Domain, Shared, View};
use crate::error::{Error, blocking};
use crate::identity::Home;
use crate::net;
use crate::storage::{View as StorageView, WantedStorage};
use crate::usage::Sampler;
use crate::wanted::{Wanted, is_uid};

/// How long the first look at all domains may take before the first report is made without
/// those that hang.
const FIRST_LOOK_TIMEOUT: Duration = Duration::from_secs(10);
const COMMANDS_MAX: usize = 16;

/// The node's domains, as the session sees them.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    commands: mpsc::Sender<Command>,
    changed: watch::Receiver<u64>,
}

/// All that is on the node.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    /// CPU and memory of the host.
    pub usage: NodeUsage,
    /// Every domain of which something is here.
    pub domains: Vec<ObservedDomain>,
    /// Pools, volumes and images.
    pub storage: Arc<StorageView>,
}

/// Why a `Desired` was not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stale {
    /// It comes from a controller that leads no more.
    #[error(
        "the controller's term {term} is behind {seen}, which this node has seen: it leads no \
         more, or the cluster's data was lost (then remove `term` from the state directory)"
    )]
    Term {
        /// The message's term.
        term: u64,
        /// The greatest that was seen.
        seen: u64,
    },
    /// The term could not be written down.
    #[error("the term cannot be written down: {0}")]
    Disk(String),
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
}

#[derive(Debug)]
enum Command {
    Desired { desired: Box<Desired>, reply: oneshot::Sender<Result<(), Stale>> },
    Picture { reply: oneshot::Sender<Picture> },
}

impl NodeHandle {
    /// Takes in what shall be on the node; it is worked towards from now on.
    ///
    /// # Errors
    /// When it comes from a controller that leads no more; then nothing is changed.
    pub async fn desire(&self, desired: Desired) -> Result<(), Stale> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Desired { desired: Box::new(desired), reply };
        self.commands.send(command).await.map_err(|_| Stale::Ending)?;
        answer.await.unwrap_or(Err(Stale::Ending))
    }

    /// What is on the node now.
    pub async fn picture(&self) -> Result<Picture, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Picture { reply }).await;
        sent.map_err(|_| Error::Ended("node task"))?;
        answer.await.map_err(|_| Error::Ended("node task"))
    }

    /// Counts up when something worth a report has changed.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }
}

struct Slot {
    wanted: watch::Sender<Wanted>,
    view: watch::Receiver<View>,
}

struct Node {
    shared: Arc<Shared>,
    home: Home,
    slots: BTreeMap<String, Slot>,
    tasks: JoinSet<String>,
    sampler: Sampler,
}

/// Makes the bridge, removes taps that belong to nothing, and begins with what is on the node.
/// When this returns, [`NodeHandle::picture`] is true.
pub async fn start(shared: Arc<Shared>, home: Home) -> Result<NodeHandle, Error> {
    let bridge = shared.bridge.clone();
    let places = shared.places.clone();
    blocking(move || {
        net::ensure_bridge(&bridge)?;
        for tap in net::remove_leftover_taps(&places.domains()?)? {
            tracing::info!(tap, "removed a tap that belongs to no domain");
        }
        Ok(())
    })
    .await?;
    start_without_network(shared, home).await
}

/// As [`start`], and leaves the host's network alone.
pub(crate) async fn start_without_network(
    shared: Arc<Shared>,
    home: Home,
) -> Result<NodeHandle, Error> {
    let places = shared.places.clone();
    let uids = blocking(move || {
        drover_storage::create_dir(&places.state.join("domains"))?;
        drover_storage::create_dir(&places.run.join("domains"))?;
        places.domains()
    })
    .await?;
    let changed = shared.changed.subscribe();
    let (sender, commands) = mpsc::channel(COMMANDS_MAX);
    let mut node = Node {
        shared,
        home,
        slots: BTreeMap::new(),
        tasks: JoinSet::new(),
        sampler: Sampler::default(),
    };
    node.shared.quiescer.release_leftovers(&uids);
    for uid in uids {
        node.add(uid, Wanted::Unknown);
    }
    node.first_look().await;
    tracing::info!(domains = node.slots.len(), "knows what is on the node");
    tokio::spawn(node.run(commands));
    Ok(NodeHandle { commands: sender, changed })
}

impl Node {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Desired { desired, reply }) => {
                        // Nobody waiting for the answer is no reason not to do it.
                        let _ = reply.send(self.desire(*desired).await);
                    }
                    Some(Command::Picture { reply }) => {
                        let _ = reply.send(self.picture());
                    }
                    None => return,
                },
                Some(ended) = self.tasks.join_next() => self.forget(ended),
            }
        }
    }

    fn add(&mut self, uid: String, wanted: Wanted) {
        let (wanted, wanted_source) = watch::channel(wanted);
        let (view_sink, view) = watch::channel(View::default());
        let task = Domain::new(self.shared.clone(), uid.clone(), wanted_source, view_sink);
        self.tasks.spawn(task.run());
        self.slots.insert(uid, Slot { wanted, view });
    }

    /// Waits until each task has looked at its domain once.
    async fn first_look(&mut self) {
        let deadline = Instant::now() + FIRST_LOOK_TIMEOUT;
        for (uid, slot) in &mut self.slots {
            let looked = slot.view.wait_for(|view| view.looked);
            if tokio::time::timeout_at(deadline, looked).await.is_err() {
                tracing::warn!(uid, "has not been looked at within 10 s");
            }
        }
    }

    async fn desire(&mut self, desired: Desired) -> Result<(), Stale> {
        let seen = self.home.term();
        if desired.term < seen {
            return Err(Stale::Term { term: desired.term, seen });
        }
        self.home.raise_term(desired.term).map_err(|err| Stale::Disk(err.to_string()))?;
        let disks =
            desired.domains.iter().flat_map(|domain| domain.disks.iter().chain(&domain.memory));
        let used: BTreeSet<String> = disks.map(|disk| disk.volume_uid.clone()).collect();
        let Desired { domains, volumes, garbage, .. } = desired;
        // Before the domains: they look for their disks among what is wanted.
        let wanted = WantedStorage { volumes, garbage, used };
        self.shared.storage.desire(wanted).await.map_err(|_| Stale::Ending)?;
        let mut assignments: BTreeMap<String, Assignment> = BTreeMap::new();
        for assignment in domains {
            if is_uid(&assignment.uid) {
                assignments.insert(assignment.uid.clone(), assignment);
            } else {
                tracing::error!(uid = assignment.uid, "an assignment's uid is no UUID; ignored");
            }
        }
        for (uid, slot) in &self.slots {
            let wanted = match assignments.remove(uid) {
                Some(assignment) => Wanted::from_assignment(assignment),
                None => Wanted::Absent,
            };
            tell(slot, wanted);
        }
        for (uid, assignment) in assignments {
            self.add(uid, Wanted::from_assignment(assignment));
        }
        Ok(())
    }

    /// A task has removed all of its domain, or has failed.
    fn forget(&mut self, ended: Result<String, tokio::task::JoinError>) {
        match ended {
            Ok(uid) => {
                let Some(slot) = self.slots.remove(&uid) else { return };
                let wanted = slot.wanted.borrow().clone();
                if wanted != Wanted::Absent {
                    // It was wanted again in the meantime.
                    self.add(uid, wanted);
                }
            }
            Err(err) => {
                tracing::error!(%err, "a domain's task failed; it is started again");
                let dead: Vec<String> = self
                    .slots
                    .iter()
                    .filter(|(_, slot)| slot.view.has_changed().is_err())
                    .map(|(uid, _)| uid.clone())
                    .collect();
                for uid in dead {
                    let wanted = self.slots.remove(&uid).map(|slot| slot.wanted.borrow().clone());
                    self.add(uid, wanted.unwrap_or_default());
                }
            }
        }
        self.shared.changed.send_modify(|count| *count += 1);
    }

    fn picture(&mut self) -> Picture {
        let now = Instant::now();
        let mut domains = Vec::with_capacity(self.slots.len());
        let mut pids = Vec::new();
        for (uid, slot) in &self.slots {
            let view = slot.view.borrow().clone();
            let mut observed = match (view.observed, slot.wanted.borrow().assigned()) {
                (Some(observed), _) => observed,
                // Its task has not come to look yet, but it is known of.
                (None, Some(assigned)) => ObservedDomain {
                    uid: uid.clone(),
                    name: assigned.name.clone(),
                    ..ObservedDomain::default()
                },
                // Nor is it wanted; that it is gone is not known before it was looked for.
                (None, None) if !view.looked => {
                    ObservedDomain { uid: uid.clone(), ..ObservedDomain::default() }
                }
                (None, None) => continue,
            };
            if let Some(pid) = view.pid {
                pids.push(pid);
                let usage = observed.usage.get_or_insert_with(DomainUsage::default);
                self.sampler.process(now, pid, usage);
            }
            domains.push(observed);
        }
        self.sampler.keep_only(&pids);
        Picture { usage: self.sampler.node(now), domains, storage: self.shared.storage.view() }
    }
}

fn tell(slot: &Slot, wanted: Wanted) {
    slot.wanted.send_if_modified(|before| {
        let news = *before != wanted;
        *before = wanted;
        news
    });
}
