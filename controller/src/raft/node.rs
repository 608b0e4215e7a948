//! The thread that owns the core, and the door to it.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{Message, MessageType, Snapshot};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::core::{Core, Fatal, Input, Limits, Options, Output, Waiter};
use super::identity::{Claim, Identity, IdentityError};
use super::peers::{Peers, Refused};
use super::service::{self, RaftServer};
use super::transport::Transport;
use crate::store::{
    CommitError, Engine, Leadership, MemberId, OpenError, ReadError, Request, Revision,
    RocksEngine, Shared, State, Status, Store,
};

/// Raft's clock: heartbeats each tick, elections after 10 to 19.
pub const TICK: Duration = Duration::from_millis(100);
/// Messages from peers that wait for a turn.
const INBOX_MAX: usize = 4096;
/// Requests of this process that wait for a turn.
const REQUESTS_MAX: usize = 4096;
/// Inputs of either kind taken into one turn: they share its fsync.
const TURN_INPUTS_MAX: usize = 512;
/// For the leadership to go to another member when this one stops.
const TRANSFER_TIME: Duration = Duration::from_secs(3);

/// For the thread to end after a failure.
const ABANDON_TIME: Duration = Duration::from_secs(2);

type CommitReply = oneshot::Sender<Result<Revision, CommitError>>;
type ReadReply = oneshot::Sender<Result<(), ReadError>>;

impl<T> Waiter for oneshot::Sender<T> {
    fn is_abandoned(&self) -> bool {
        self.is_closed()
    }
}

/// What comes in from outside this process, or from work done aside.
pub(crate) enum Inbound {
    Message(Message),
    SnapshotSent { to: MemberId, arrived: bool },
    SnapshotBuilt(Snapshot),
}

/// How to start a member.
#[derive(Clone, Debug)]
pub struct StartOptions {
    /// Who it is to be.
    pub claim: Claim,
    /// Where its data is.
    pub data_dir: PathBuf,
    /// How much is kept.
    pub limits: Limits,
}

/// Why a member did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its data directory does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its data directory is somebody else's.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its data cannot be what it is.
    #[error(transparent)]
    Fatal(#[from] Fatal),
    /// The thread was not started.
    #[error("the Raft thread: {0}")]
    Thread(std::io::Error),
}

/// Why a running member cannot go on. The process must end.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The disk, or what is on it.
    #[error(transparent)]
    Fatal(#[from] Fatal),
    /// The others do not want it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A broken invariant; the panic's own message is in the log.
    #[error("the Raft thread panicked")]
    Panicked,
}

/// A running member.
pub struct Running {
    /// Everyone's handle.
    pub store: Store,
    /// Its data directory's identity.
    pub identity: Identity,
    /// To be served at the member's address.
    pub server: RaftServer,
    refusals: mpsc::Receiver<Refused>,
    /// How the thread ended, until that is known.
    ended: Option<oneshot::Receiver<Result<(), Failure>>>,
    stop: watch::Sender<bool>,
    registrar: JoinHandle<()>,
}

/// Starts a member; it is up when this returns, and knows a leader soon after. Must be called
/// on a tokio runtime.
///
/// # Errors
/// See [`StartError`]; nothing runs then.
pub fn start(options: StartOptions) -> Result<Running, StartError> {
    let engine: Arc<dyn Engine> = Arc::new(RocksEngine::open(&options.data_dir)?);
    let storage_id = uuid::Uuid::new_v4().to_string();
    let identity = Identity::establish(engine.as_ref(), &options.claim, &storage_id)?;
    let members = options.claim.members.clone();
    let core = Core::open(
        engine.clone(),
        Options {
            identity: identity.clone(),
            members: members.clone(),
            nonce: rand::random(),
            seed: rand::random(),
            limits: options.limits,
        },
    )?;

    let (inbox, inbound) = mpsc::channel(INBOX_MAX);
    let (requests, requested) = mpsc::channel(REQUESTS_MAX);
    let (state, state_out) = watch::channel(core.state().clone());
    let (leadership, leadership_out) = watch::channel(Leadership::default());
    let (status, status_out) = watch::channel(core.status(|_| false));
    let (stop, stopping) = watch::channel(false);
    let (refuse, refusals) = mpsc::channel(1);

    let peers = Arc::new(Peers::new(identity.clone(), members, state_out.clone(), refuse));
    let store = Store::new(Shared {
        engine,
        state: state_out,
        leadership: leadership_out,
        status: status_out,
        requests,
    });
    let door = Door {
        transport: Transport::start(&peers, &inbox),
        inbox: inbox.clone(),
        runtime: Handle::current(),
        unreachable: Vec::new(),
        undelivered_snapshots: Vec::new(),
        state,
        leadership,
        status,
    };
    let node = Node { core, door, inbound, requested, stopping };
    let (end, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("raft".to_owned())
        .spawn(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| node.run()));
            let result = match result {
                Ok(result) => result.map_err(Failure::from),
                Err(_) => Err(Failure::Panicked),
            };
            // Nobody listens when the process ends anyway.
            let _ = end.send(result);
        })
        .map_err(StartError::Thread)?;
    let (registering, registered) = (peers.clone(), store.clone());
    let registrar = tokio::spawn(async move { registering.register(&registered).await });
    let server = service::server(peers, inbox);
    Ok(Running { store, identity, server, refusals, ended: Some(ended), stop, registrar })
}

impl Running {
    /// Resolves when the member cannot go on. Cancel-safe.
    pub async fn failed(&mut self) -> Failure {
        tokio::select! {
            Some(refused) = self.refusals.recv() => refused.into(),
            ended = ended(&mut self.ended) => match ended {
                Err(failure) => failure,
                // It only ends well when it is stopped, and that takes `self`.
                Ok(()) => Failure::Panicked,
            },
        }
    }

    /// Ends the thread as it is. The data directory is closed once every clone of the store
    /// is dropped, too.
    pub async fn abandon(mut self) {
        self.stop.send_replace(true);
        if timeout(ABANDON_TIME, self.finish()).await.is_err() {
            tracing::warn!("the Raft thread does not end");
        }
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        let result = ended(&mut self.ended).await;
        self.registrar.abort();
        // It ends by being aborted.
        let _ = (&mut self.registrar).await;
        result
    }

    /// Gives leadership away, if it has it and somebody can take it, and ends the thread. The
    /// service should be served until this returns.
    ///
    /// # Errors
    /// The thread had failed.
    pub async fn stop(mut self) -> Result<(), Failure> {
        let mut leadership = self.store.leadership();
        if leadership.borrow().is_leader {
            self.store.transfer_leadership().await;
            let gone = leadership.wait_for(|now| !now.is_leader && now.leader.is_some());
            if timeout(TRANSFER_TIME, gone).await.is_err() {
                tracing::warn!("no other member took the leadership");
            }
        }
        self.stop.send_replace(true);
        self.finish().await
    }
}

/// How the thread ended. It is told once; afterwards, it had ended well.
async fn ended(
    receiver: &mut Option<oneshot::Receiver<Result<(), Failure>>>,
) -> Result<(), Failure> {
    let Some(waiting) = receiver else { return Ok(()) };
    let result = waiting.await;
    *receiver = None;
    result.unwrap_or(Err(Failure::Panicked))
}

struct Node {
    core: Core<CommitReply, ReadReply>,
    door: Door,
    inbound: mpsc::Receiver<Inbound>,
    requested: mpsc::Receiver<Request>,
    stopping: watch::Receiver<bool>,
}

impl Node {
    fn run(mut self) -> Result<(), Fatal> {
        // A runtime of its own: the turn blocks on the disk.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|e| Fatal::Damaged(format!("the Raft thread's timer: {e}")))?;
        runtime.block_on(self.turns())
    }

    async fn turns(&mut self) -> Result<(), Fatal> {
        let mut ticks = interval(TICK);
        // After a long turn, one tick: a stall of this process must not look like silence of
        // the others.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut inbound = Vec::with_capacity(TURN_INPUTS_MAX);
        let mut requested = Vec::with_capacity(TURN_INPUTS_MAX);
        loop {
            let mut ticked = false;
            tokio::select! {
                biased;
                _ = self.stopping.wait_for(|stop| *stop) => return Ok(()),
                _ = ticks.tick() => ticked = true,
                _ = self.inbound.recv_many(&mut inbound, TURN_INPUTS_MAX) => {}
                _ = self.requested.recv_many(&mut requested, TURN_INPUTS_MAX) => {}
            }
            // What else is there shares the turn.
            fill(&mut self.inbound, &mut inbound);
            fill(&mut self.requested, &mut requested);
            let tick = ticked.then_some(Input::Tick);
            let inputs = tick
                .into_iter()
                .chain(inbound.drain(..).map(Input::from))
                .chain(requested.drain(..).map(Input::from));
            for input in inputs {
                self.core.step(input, &mut |output| self.door.put(output))?;
            }
            self.core.turn(&mut |output| self.door.put(output))?;
            self.report_losses()?;
            if ticked {
                self.publish_status();
            }
        }
    }

    /// Tells Raft what was not sent.
    fn report_losses(&mut self) -> Result<(), Fatal> {
        let unreachable = std::mem::take(&mut self.door.unreachable);
        let snapshots = std::mem::take(&mut self.door.undelivered_snapshots);
        let inputs = unreachable
            .into_iter()
            .map(Input::Unreachable)
            .chain(snapshots.into_iter().map(|to| Input::SnapshotSent { to, arrived: false }));
        for input in inputs {
            self.core.step(input, &mut |output| self.door.put(output))?;
        }
        Ok(())
    }

    fn publish_status(&self) {
        let status = self.core.status(|id| self.door.transport.connected(id));
        self.door.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }
}

fn fill<T>(from: &mut mpsc::Receiver<T>, into: &mut Vec<T>) {
    while into.len() < TURN_INPUTS_MAX
        && let Ok(item) = from.try_recv()
    {
        into.push(item);
    }
}

impl From<Inbound> for Input<CommitReply, ReadReply> {
    fn from(inbound: Inbound) -> Self {
        match inbound {
            Inbound::Message(message) => Input::Message(message),
            Inbound::SnapshotSent { to, arrived } => Input::SnapshotSent { to, arrived },
            Inbound::SnapshotBuilt(snapshot) => Input::SnapshotBuilt(snapshot),
        }
    }
}

impl From<Request> for Input<CommitReply, ReadReply> {
    fn from(request: Request) -> Self {
        match request {
            Request::Commit { command, reply } => Input::Propose { command, waiter: reply },
            Request::Barrier { reply } => Input::Read { waiter: reply },
            Request::TransferLeadership => Input::TransferLeadership,
        }
    }
}

/// Where the core's outputs go.
struct Door {
    transport: Transport,
    inbox: mpsc::Sender<Inbound>,
    runtime: Handle,
    unreachable: Vec<MemberId>,
    undelivered_snapshots: Vec<MemberId>,
    state: watch::Sender<State>,
    leadership: watch::Sender<Leadership>,
    status: watch::Sender<Status>,
}

impl Door {
    fn put(&mut self, output: Output<CommitReply, ReadReply>) {
        match output {
            Output::Send(message) => self.send(message),
            Output::Applied { .. } => {}
            Output::Publish(state) => {
                self.state.send_replace(state);
            }
            // Who waits no more is not told.
            Output::Committed { waiter, result } => drop(waiter.send(result)),
            Output::Read { waiter, result } => drop(waiter.send(result)),
            Output::Leadership(leadership) => {
                tracing::info!(
                    leader = leadership.leader,
                    term = leadership.term,
                    is_leader = leadership.is_leader,
                    "leadership"
                );
                self.leadership.send_replace(leadership);
            }
            Output::Build(job) => {
                let inbox = self.inbox.clone();
                self.runtime.spawn_blocking(move || {
                    // The inbox is gone only when the node is.
                    let _ = inbox.blocking_send(Inbound::SnapshotBuilt(job.run()));
                });
            }
        }
    }

    fn send(&mut self, message: Message) {
        let to = message.to;
        if message.msg_type() == MessageType::MsgSnapshot {
            if !self.transport.send_snapshot(message, &self.runtime) {
                self.undelivered_snapshots.push(to);
            }
        } else if !self.transport.send(message) {
            self.unreachable.push(to);
        }
    }
}

/// A member alone, for tests of what is built upon the store: it leads when this returns.
///
/// # Errors
/// It did not start.
///
/// # Panics
/// It does not lead within 30 s.
pub async fn start_alone(data_dir: PathBuf) -> Result<Running, StartError> {
    let members = BTreeMap::from([(1, "127.0.0.1:1".to_owned())]);
    let claim = Claim { cluster_id: "alone".to_owned(), member: 1, members };
    let running = start(StartOptions { claim, data_dir, limits: Limits::default() })?;
    let mut leadership = running.store.leadership();
    let leads = leadership.wait_for(|now| now.is_leader);
    let deadline = Instant::now() + Duration::from_secs(30);
    match tokio::time::timeout_at(deadline, leads).await {
        Ok(Ok(_)) => {}
        other => panic!("a single member does not lead: {:?}", other.is_ok()),
    }
    Ok(running)
}
