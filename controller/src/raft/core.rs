//! The member, without its threads and sockets: inputs in, one turn, outputs out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;
use prost_raft::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeV2, ConfState, Entry, EntryType, Message, MessageType, Snapshot,
};
use raft::{Config, ProgressState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::identity::{Identity, KEY_APPLIED};
use super::log::{Log, Position};
use super::logger::logger;
use super::reads::Reads;
use super::snapshot::{self, SnapshotJob};
use crate::store::{
    Batch, CommitError, Engine, EngineError, Family, Leadership, MalformedCommand, MemberId,
    MemberStatus, Outcome, ReadError, Revision, Role, Row, RowKey, State, Status, Txn, data_key,
    parse_data_key,
};

/// Ticks between a leader's heartbeats.
const HEARTBEAT_TICKS: usize = 1;
/// Ticks without a leader before an election, at least; at most twice as many.
const ELECTION_TICKS: usize = 10;
/// Of entries in one message to a peer. The default, 0, sends entries one by one.
const MESSAGE_BYTES_MAX: u64 = 512 << 10;
/// Messages to a peer that it has not answered.
const MESSAGES_INFLIGHT_MAX: usize = 64;
/// Of proposals that are not committed; more are refused as "busy".
const UNCOMMITTED_BYTES_MAX: u64 = 16 << 20;
/// Of entries applied in one turn.
const APPLY_BYTES_MAX: u64 = 4 << 20;
/// Ticks that a built snapshot is kept although nobody is being sent one.
const SNAPSHOT_KEEP_TICKS: u64 = 600;
/// Rows read at a time when the state is loaded.
const LOAD_ROWS: usize = 1024;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries that a compaction leaves for slow followers.
    pub log_entries_keep: u64,
    /// Entries at which the log is compacted.
    pub log_entries_max: u64,
    /// Bytes at which the log is compacted, to half of it.
    pub log_bytes_max: usize,
    /// Revisions whose changes are kept for watches.
    pub history_revisions: u64,
    /// Revisions removed at a time.
    pub history_stride: u64,
    /// Reads that may wait.
    pub reads_waiting_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            log_entries_keep: 5_000,
            log_entries_max: 10_000,
            log_bytes_max: 64 << 20,
            history_revisions: 100_000,
            history_stride: 1_000,
            reads_waiting_max: 65_536,
        }
    }
}

/// What a [`Core`] is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who it is.
    pub identity: Identity,
    /// Everyone's `host:port`.
    pub members: BTreeMap<MemberId, String>,
    /// Another one at each start: it keeps read questions apart.
    pub nonce: u64,
    /// Of the random election timeouts.
    pub seed: u64,
    /// How much is kept.
    pub limits: Limits,
}

/// Somebody who waits for an answer.
pub trait Waiter {
    /// It waits no more.
    fn is_abandoned(&self) -> bool;
}

/// What happens to a member. `C` waits for a commit, `R` for a read.
pub enum Input<C, R> {
    /// Time has passed: one tick.
    Tick,
    /// From a peer, in the order it was sent.
    Message(Message),
    /// Commit this [`Txn`], encoded.
    Propose {
        /// [`Txn::encode`].
        command: Vec<u8>,
        /// Who waits.
        waiter: C,
    },
    /// Say when a read here sees everything acknowledged until now.
    Read {
        /// Who waits.
        waiter: R,
    },
    /// A message to this peer was not sent, or is lost.
    Unreachable(MemberId),
    /// The end of a [`Output::Send`] of a snapshot; each one must be reported.
    SnapshotSent {
        /// To whom.
        to: MemberId,
        /// It arrived.
        arrived: bool,
    },
    /// The end of an [`Output::Build`].
    SnapshotBuilt(Snapshot),
    /// Give leadership away.
    TransferLeadership,
}

/// What a member does.
pub enum Output<C, R> {
    /// Send to the peer named in it; in order, or not at all.
    Send(Message),
    /// An entry was applied. (For checks: equal entries must give equal hashes.)
    Applied {
        /// Its index.
        index: u64,
        /// Its term.
        term: u64,
        /// [`State::content_hash`] after it.
        content_hash: u64,
    },
    /// The newest state; written before this was said.
    Publish(State),
    /// The end of a [`Input::Propose`]. A waiter that is dropped instead does not know.
    Committed {
        /// Who waited.
        waiter: C,
        /// What came of it.
        result: Result<Revision, CommitError>,
    },
    /// The end of a [`Input::Read`].
    Read {
        /// Who waited.
        waiter: R,
        /// It may read the state published last.
        result: Result<(), ReadError>,
    },
    /// Leadership is another one now.
    Leadership(Leadership),
    /// Run this aside and hand back the snapshot.
    Build(SnapshotJob),
}

/// The member cannot go on. Its process must end.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The disk failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An entry that this version cannot read.
    #[error("log entry {index}: {source}; run the newer version of drover-controller")]
    Malformed {
        /// The entry.
        index: u64,
        /// What is wrong with it.
        source: MalformedCommand,
    },
    /// Raft's own state is broken.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    /// Records that contradict each other.
    #[error("the data directory is damaged: {0}")]
    Damaged(String),
}

/// One member of the group.
pub struct Core<C, R> {
    options: Options,
    raw: RawNode<Log>,
    engine: Arc<dyn Engine>,
    state: State,
    applied: Position,
    conf_state: ConfState,
    compacted_revision: u64,
    /// Committed entries that Raft has handed over and the state has not taken in.
    committed: VecDeque<Entry>,
    /// Who waits for the entry of an index, and the term in which it was proposed.
    proposals: BTreeMap<u64, (u64, C)>,
    reads: Reads<R>,
    /// Snapshots that were checked before Raft saw them in this turn, by index. A snapshot is
    /// of committed entries: of two with one index either will do.
    incoming: BTreeMap<u64, State>,
    building: bool,
    built_tick: u64,
    leadership: Leadership,
    rng: SmallRng,
    ticks: u64,
    heard: BTreeMap<MemberId, u64>,
}

/// What a turn's round has found out and may say only after its batch is written.
struct Findings<C> {
    applied: Vec<(Position, u64)>,
    ended: Vec<(C, Result<Revision, CommitError>)>,
}

impl<C: Waiter, R: Waiter> Core<C, R> {
    /// Loads a member from its disk.
    ///
    /// # Errors
    /// The disk fails or holds what cannot be.
    pub fn open(engine: Arc<dyn Engine>, options: Options) -> Result<Self, Fatal> {
        let applied = load_applied(engine.as_ref())?;
        let conf_state = ConfState::decode(applied.conf_state.as_ref())
            .map_err(|e| Fatal::Damaged(format!("the configuration: {e}")))?;
        let state = load_state(engine.as_ref(), applied.revision)?;
        if state.content_hash() != applied.content_hash {
            return Err(Fatal::Damaged(format!(
                "its rows are not those of index {}",
                applied.index
            )));
        }
        let log = Log::open(engine.as_ref(), conf_state.clone())?;
        let config = Config {
            id: options.identity.member,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied: applied.index,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: MESSAGES_INFLIGHT_MAX,
            // A leader that is cut off steps down, and one that comes back does not disturb.
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: APPLY_BYTES_MAX,
            ..Config::default()
        };
        let mut core = Self {
            raw: RawNode::new(&config, log, &logger())?,
            state,
            applied: Position { index: applied.index, term: applied.term },
            conf_state,
            compacted_revision: applied.compacted_revision,
            committed: VecDeque::new(),
            proposals: BTreeMap::new(),
            reads: Reads::new(
                options.identity.member,
                options.nonce,
                options.limits.reads_waiting_max,
            ),
            incoming: BTreeMap::new(),
            building: false,
            built_tick: 0,
            leadership: Leadership::default(),
            rng: SmallRng::seed_from_u64(options.seed),
            ticks: 0,
            heard: BTreeMap::new(),
            engine,
            options,
        };
        core.retime();
        Ok(core)
    }

    /// Takes one input in. What comes of it is said by the next [`Core::turn`], except what
    /// can be refused at once.
    ///
    /// # Errors
    /// The member cannot go on.
    pub fn step(
        &mut self,
        input: Input<C, R>,
        out: &mut dyn FnMut(Output<C, R>),
    ) -> Result<(), Fatal> {
        match input {
            Input::Tick => self.tick(),
            Input::Message(message) => self.message(message)?,
            Input::Propose { command, waiter } => {
                if let Err((waiter, error)) = self.propose(command, waiter) {
                    out(Output::Committed { waiter, result: Err(error) });
                }
            }
            Input::Read { waiter } => {
                if let Err(waiter) = self.reads.push(waiter) {
                    out(Output::Read { waiter, result: Err(ReadError::Busy) });
                }
            }
            Input::Unreachable(peer) => self.raw.report_unreachable(peer),
            Input::SnapshotSent { to, arrived } => {
                let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
                self.raw.report_snapshot(to, status);
            }
            Input::SnapshotBuilt(snapshot) => {
                self.building = false;
                self.built_tick = self.ticks;
                self.raw.store().offer_snapshot(snapshot);
            }
            Input::TransferLeadership => self.transfer_leadership(),
        }
        self.retime();
        Ok(())
    }

    /// Does all that is due: writes, applies, sends, answers. See the module's page for the
    /// order.
    ///
    /// # Errors
    /// The member cannot go on; nothing may be sent any more.
    pub fn turn(&mut self, out: &mut dyn FnMut(Output<C, R>)) -> Result<(), Fatal> {
        while self.ask() || self.raw.has_ready() || !self.committed.is_empty() {
            self.round(out)?;
        }
        self.incoming.clear();
        for waiter in self.reads.take_ready(self.applied.index) {
            out(Output::Read { waiter, result: Ok(()) });
        }
        self.lead(out)?;
        self.order_snapshot(out);
        Ok(())
    }

    /// The state applied last.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Index and term of the entry applied last.
    #[must_use]
    pub fn applied(&self) -> (u64, u64) {
        (self.applied.index, self.applied.term)
    }

    /// First and last index of the log that is kept.
    #[must_use]
    pub fn log_range(&self) -> (u64, u64) {
        let log = self.raw.store();
        (log.last() + 1 - log.len() as u64, log.last())
    }

    /// Who leads, as was said last.
    #[must_use]
    pub fn leadership(&self) -> &Leadership {
        &self.leadership
    }

    /// The group as this member knows it. `connected` says which peers' streams are up.
    #[must_use]
    pub fn status(&self, connected: impl Fn(MemberId) -> bool) -> Status {
        let me = self.options.identity.member;
        let raft = &self.raw.raft;
        let leads = raft.state == StateRole::Leader;
        let heard = |id: &MemberId| {
            self.heard.get(id).is_some_and(|at| self.ticks - at <= 2 * ELECTION_TICKS as u64)
        };
        let members = self.options.members.iter().map(|(id, address)| {
            let speaks_to_me = leads || raft.leader_id == *id;
            MemberStatus {
                id: *id,
                address: address.clone(),
                reachable: *id == me || if speaks_to_me { heard(id) } else { connected(*id) },
                index: match id {
                    id if *id == me => Some(self.applied.index),
                    id if leads => raft.prs().get(*id).map(|progress| progress.matched),
                    _ => None,
                },
                role: match id {
                    id if *id == raft.leader_id => Role::Leader,
                    id if *id == me && leads => Role::Leader,
                    id if *id == me && raft.state != StateRole::Follower => Role::Candidate,
                    id if *id == me || raft.leader_id != 0 => Role::Follower,
                    _ => Role::Unknown,
                },
            }
        });
        Status {
            member: me,
            leader: Some(raft.leader_id).filter(|id| *id != 0),
            term: raft.term,
            revision: self.state.revision(),
            applied_index: self.applied.index,
            members: members.collect(),
        }
    }

    // Inputs

    fn tick(&mut self) {
        self.ticks += 1;
        self.raw.tick();
        self.reads.tick();
        let sending = self.raw.raft.prs().iter().any(|(_, p)| p.state == ProgressState::Snapshot);
        if !sending && self.ticks - self.built_tick > SNAPSHOT_KEEP_TICKS {
            self.raw.store().drop_snapshot();
        }
    }

    fn message(&mut self, message: Message) -> Result<(), Fatal> {
        let from = message.from;
        self.heard.insert(from, self.ticks);
        match message.msg_type() {
            // A follower would pass it on as its own. Whoever wants a write asks the leader.
            MessageType::MsgPropose => return Ok(()),
            MessageType::MsgSnapshot => {
                let Some(message) = self.check_snapshot(message) else { return Ok(()) };
                return self.step_raft(message);
            }
            _ => {}
        }
        let acknowledges = message.msg_type() == MessageType::MsgAppendResponse;
        self.step_raft(message)?;
        if acknowledges && let Some(progress) = self.raw.raft.mut_prs().get_mut(from) {
            // raft-rs 0.7.0 (#555): a stale rejection may take `next_idx` back behind what is
            // known to match. One ordered stream a peer makes it unlikely, this harmless.
            progress.next_idx = progress.next_idx.max(progress.matched + 1);
        }
        Ok(())
    }

    fn step_raft(&mut self, message: Message) -> Result<(), Fatal> {
        match self.raw.step(message) {
            Err(error @ raft::Error::Store(_)) => Err(error.into()),
            Err(error) => {
                tracing::debug!(%error, "message not taken");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Reads the snapshot before Raft sees it: one that is damaged must not be promised.
    fn check_snapshot(&mut self, mut message: Message) -> Option<Message> {
        let snapshot = message.snapshot.as_mut()?;
        let index = snapshot.get_metadata().index;
        if index <= self.applied.index {
            // Raft will only confirm what is here already.
            snapshot.data = Vec::new();
            return Some(message);
        }
        let data = std::mem::take(&mut snapshot.data);
        match snapshot::read(&self.options.identity.cluster_id, data) {
            Ok(state) => {
                self.incoming.insert(index, state);
                Some(message)
            }
            Err(error) => {
                tracing::error!(from = message.from, index, %error, "snapshot refused");
                None
            }
        }
    }

    fn propose(&mut self, command: Vec<u8>, waiter: C) -> Result<(), (C, CommitError)> {
        if self.raw.raft.state != StateRole::Leader {
            return Err((waiter, self.not_leader()));
        }
        let before = self.raw.raft.raft_log.last_index();
        if self.raw.propose(Vec::new(), command).is_err() {
            // Leadership is being given away, or too much is uncommitted.
            return Err((waiter, CommitError::Busy));
        }
        let index = self.raw.raft.raft_log.last_index();
        assert_eq!(index, before + 1, "one proposal is one entry");
        self.proposals.insert(index, (self.raw.raft.term, waiter));
        Ok(())
    }

    fn not_leader(&self) -> CommitError {
        let leader = self.raw.raft.leader_id;
        let known = leader != self.options.identity.member;
        let leader_address = self.options.members.get(&leader).filter(|_| known).cloned();
        CommitError::NotLeader { leader_address }
    }

    fn transfer_leadership(&mut self) {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader || raft.lead_transferee.is_some() {
            return;
        }
        let me = self.options.identity.member;
        let furthest = raft
            .prs()
            .iter()
            .filter(|(id, p)| **id != me && p.recent_active && self.conf_state.voters.contains(id))
            .max_by_key(|(id, p)| (p.matched, **id))
            .map(|(id, _)| *id);
        if let Some(id) = furthest {
            self.raw.transfer_leader(id);
        }
    }

    /// Asks the leader for the reads that wait; false when there is nothing to ask now.
    fn ask(&mut self) -> bool {
        let raft = &self.raw.raft;
        // Raft drops a question without a word when there is no leader, or one that has
        // committed nothing in its term: then the readers wait here.
        let can_answer = match raft.state {
            StateRole::Leader => raft.commit_to_current_term(),
            _ => raft.leader_id != 0,
        };
        let question = if can_answer { self.reads.next_question() } else { None };
        let asked = question.is_some();
        if let Some(name) = question {
            self.raw.read_index(name);
        }
        asked
    }

    /// Raft draws its election timeouts from the thread's randomness; draw again, from ours.
    fn retime(&mut self) {
        if self.raw.raft.election_elapsed == 0 {
            let ticks = self.rng.random_range(ELECTION_TICKS..2 * ELECTION_TICKS);
            self.raw.raft.set_randomized_election_timeout(ticks);
        }
    }

    // A turn

    fn round(&mut self, out: &mut dyn FnMut(Output<C, R>)) -> Result<(), Fatal> {
        let mut batch = Batch::default();
        let mut findings = Findings { applied: Vec::new(), ended: Vec::new() };
        let mut sync = false;
        let compactable = self.applied.index;

        let mut ready = self.raw.has_ready().then(|| self.raw.ready());
        if let Some(ready) = &mut ready {
            for message in ready.take_messages() {
                out(Output::Send(message));
            }
            if ready.ss().is_some() {
                self.reads.ask_again();
            }
            for answer in ready.take_read_states() {
                self.reads.answer(&answer.request_ctx, answer.index);
            }
            sync = ready.must_sync();
        }
        // First what an earlier round left, then what this one brings.
        self.apply(&mut batch, &mut findings)?;
        if let Some(ready) = &mut ready {
            if !ready.snapshot().is_empty() {
                self.install(ready.snapshot(), &mut batch)?;
                findings.applied.push((self.applied, self.state.content_hash()));
            }
            if let Some(hard_state) = ready.hs() {
                self.raw.mut_store().set_hard_state(hard_state.clone(), &mut batch);
            }
            self.raw.mut_store().append(ready.entries(), &mut batch);
            self.committed.extend(ready.take_committed_entries());
            self.apply(&mut batch, &mut findings)?;
        }
        self.compact(compactable, &mut batch);
        if !batch.is_empty() {
            self.engine.write(batch, sync)?;
        }

        self.tell(findings, out);
        if let Some(mut ready) = ready {
            for message in ready.take_persisted_messages() {
                out(Output::Send(message));
            }
            let mut light = self.raw.advance_append(ready);
            for message in light.take_messages() {
                out(Output::Send(message));
            }
            self.committed.extend(light.take_committed_entries());
        }
        self.raw.advance_apply_to(self.applied.index);
        Ok(())
    }

    /// Says what the round found out, now that it is written.
    fn tell(&self, findings: Findings<C>, out: &mut dyn FnMut(Output<C, R>)) {
        if findings.applied.is_empty() {
            return;
        }
        for (at, content_hash) in findings.applied {
            out(Output::Applied { index: at.index, term: at.term, content_hash });
        }
        out(Output::Publish(self.state.clone()));
        for (waiter, result) in findings.ended {
            out(Output::Committed { waiter, result });
        }
    }

    /// Applies what is committed, in memory, and adds it to the batch.
    fn apply(&mut self, batch: &mut Batch, findings: &mut Findings<C>) -> Result<(), Fatal> {
        if self.committed.is_empty() {
            return Ok(());
        }
        while let Some(entry) = self.committed.pop_front() {
            let outcome = self.apply_entry(&entry, batch)?;
            self.applied = Position { index: entry.index, term: entry.term };
            findings.applied.push((self.applied, self.state.content_hash()));
            if let Some((term, waiter)) = self.proposals.remove(&entry.index) {
                // Another term's entry at the index: ours was overwritten, for good.
                let result = if term == entry.term {
                    commit_result(outcome)
                } else {
                    Err(self.not_leader())
                };
                findings.ended.push((waiter, result));
            }
        }
        self.forget_history(batch);
        self.put_applied(batch);
        // Raft's start refuses an applied index beyond the commit index: both in one batch.
        let hard_state = self.raw.raft.hard_state();
        debug_assert!(hard_state.commit >= self.applied.index);
        let mut known = self.raw.store().hard_state().clone();
        if known.commit < self.applied.index {
            known.commit = self.applied.index;
            self.raw.mut_store().set_hard_state(known, batch);
        }
        Ok(())
    }

    fn apply_entry(&mut self, entry: &Entry, batch: &mut Batch) -> Result<Outcome, Fatal> {
        // The type comes first: the entry that ends a joint change has no data, and must be
        // applied all the same.
        match entry.entry_type() {
            EntryType::EntryConfChange => {
                let change = ConfChange::decode(entry.data.as_slice()).map_err(codec)?;
                self.conf_state = self.raw.apply_conf_change(&change)?;
            }
            EntryType::EntryConfChangeV2 => {
                let change = ConfChangeV2::decode(entry.data.as_slice()).map_err(codec)?;
                self.conf_state = self.raw.apply_conf_change(&change)?;
            }
            EntryType::EntryNormal if entry.data.is_empty() => {}
            EntryType::EntryNormal => return self.apply_command(entry, batch),
        }
        Ok(Outcome::Committed { revision: self.state.revision() })
    }

    fn apply_command(&mut self, entry: &Entry, batch: &mut Batch) -> Result<Outcome, Fatal> {
        let txn = Txn::decode(Bytes::copy_from_slice(&entry.data))
            .map_err(|source| Fatal::Malformed { index: entry.index, source })?;
        let before = self.state.revision();
        let mut changes = Vec::new();
        let outcome = self.state.apply(entry.term, &txn, |key, row| {
            changes.push(change(key, row));
            match row {
                Some(row) => {
                    let row = pb::Row::from(row).encode_to_vec();
                    batch.put(Family::Data, data_key(key), row);
                }
                None => batch.delete(Family::Data, data_key(key)),
            }
        });
        if self.state.revision() != before {
            let set = pb::ChangeSet { changes }.encode_to_vec();
            batch.put(Family::Events, self.state.revision().to_be_bytes(), set);
        }
        Ok(outcome)
    }

    fn forget_history(&mut self, batch: &mut Batch) {
        let Limits { history_revisions, history_stride, .. } = self.options.limits;
        let keep_from = self.state.revision().saturating_sub(history_revisions);
        if keep_from >= self.compacted_revision + history_stride {
            let (from, to) = (0_u64.to_be_bytes(), (keep_from + 1).to_be_bytes());
            batch.delete_range(Family::Events, from, to);
            self.compacted_revision = keep_from;
        }
    }

    fn put_applied(&self, batch: &mut Batch) {
        let record = pb::Applied {
            index: self.applied.index,
            term: self.applied.term,
            revision: self.state.revision(),
            compacted_revision: self.compacted_revision,
            content_hash: self.state.content_hash(),
            conf_state: self.conf_state.encode_to_vec().into(),
        };
        batch.put(Family::State, KEY_APPLIED, record.encode_to_vec());
    }

    /// Takes a snapshot's state for the member's own.
    fn install(&mut self, snapshot: &Snapshot, batch: &mut Batch) -> Result<(), Fatal> {
        let metadata = snapshot.get_metadata();
        let Some(state) = self.incoming.remove(&metadata.index) else {
            return Err(Fatal::Damaged(format!("snapshot {} was not read", metadata.index)));
        };
        tracing::info!(index = metadata.index, revision = state.revision(), "snapshot installed");
        batch.clear(Family::Data);
        batch.clear(Family::Events);
        for (key, row) in state.rows() {
            batch.put(Family::Data, data_key(key), pb::Row::from(row).encode_to_vec());
        }
        self.compacted_revision = state.revision();
        self.state = state;
        self.applied = Position { index: metadata.index, term: metadata.term };
        self.conf_state = metadata.get_conf_state().clone();
        self.raw.mut_store().restart(self.applied, batch);
        self.put_applied(batch);
        // What became of proposals below it is not known any more: their waiters are dropped.
        self.proposals = self.proposals.split_off(&(metadata.index + 1));
        Ok(())
    }

    /// Keeps the log within its limits. `applied` is what Raft knows to be applied.
    fn compact(&mut self, applied: u64, batch: &mut Batch) {
        let limits = self.options.limits;
        let log = self.raw.mut_store();
        let mut upto = 0;
        if log.len() as u64 > limits.log_entries_max {
            upto = applied.saturating_sub(limits.log_entries_keep);
        }
        if log.bytes() > limits.log_bytes_max {
            upto = upto.max(log.index_above(limits.log_bytes_max / 2).min(applied));
        }
        if upto > log.last() - log.len() as u64 {
            log.compact(upto, batch);
        }
    }

    // Leadership and snapshots

    /// Notices and says who leads.
    fn lead(&mut self, out: &mut dyn FnMut(Output<C, R>)) -> Result<(), Fatal> {
        let raft = &self.raw.raft;
        let leader = Some(raft.leader_id).filter(|id| *id != 0);
        let now = Leadership {
            leader,
            leader_address: leader.and_then(|id| self.options.members.get(&id).cloned()),
            term: raft.term,
            // Entries of this term come after all from before: they are applied too.
            is_leader: raft.state == StateRole::Leader && self.applied.term == raft.term,
        };
        if now == self.leadership {
            return Ok(());
        }
        let begins = now.is_leader && !self.leadership.is_leader;
        self.leadership = now.clone();
        out(Output::Leadership(now));
        // A leader that fell before it left a joint configuration leaves that to the next.
        if begins
            && !self.conf_state.voters_outgoing.is_empty()
            && self.conf_state.auto_leave
            && !self.raw.raft.has_pending_conf()
        {
            if let Err(error) = self.raw.propose_conf_change(Vec::new(), ConfChangeV2::default()) {
                tracing::warn!(%error, "the joint configuration is not left yet");
            }
            while self.raw.has_ready() || !self.committed.is_empty() {
                self.round(out)?;
            }
        }
        Ok(())
    }

    fn order_snapshot(&mut self, out: &mut dyn FnMut(Output<C, R>)) {
        if self.building || self.raw.store().take_wanted_snapshot().is_none() {
            return;
        }
        self.building = true;
        out(Output::Build(SnapshotJob {
            cluster_id: self.options.identity.cluster_id.clone(),
            at: self.applied,
            conf_state: self.conf_state.clone(),
            state: self.state.clone(),
        }));
    }
}

fn commit_result(outcome: Outcome) -> Result<Revision, CommitError> {
    match outcome {
        Outcome::Committed { revision } => Ok(revision),
        Outcome::Rejected { guard, mod_revision } => {
            Err(CommitError::Guard { index: guard, mod_revision })
        }
    }
}

fn change(key: &RowKey, row: Option<&Row>) -> pb::Change {
    use pb::change::Action;
    let action = row.map_or(Action::Delete(true), |row| Action::Put(row.value.clone()));
    pb::Change { table: key.0.into(), key: key.1.to_string(), action: Some(action) }
}

fn codec(error: prost_raft::DecodeError) -> Fatal {
    Fatal::Damaged(format!("a configuration change: {error}"))
}

fn load_applied(engine: &dyn Engine) -> Result<pb::Applied, Fatal> {
    let bytes = engine
        .get(Family::State, KEY_APPLIED)?
        .ok_or_else(|| Fatal::Damaged("what is applied is missing".to_owned()))?;
    pb::Applied::decode(Bytes::from(bytes))
        .map_err(|e| Fatal::Damaged(format!("what is applied: {e}")))
}

fn load_state(engine: &dyn Engine, revision: u64) -> Result<State, Fatal> {
    let mut rows = Vec::new();
    let mut from = Vec::new();
    loop {
        let read = engine.scan(Family::Data, &from, LOAD_ROWS)?;
        let full = read.len() == LOAD_ROWS;
        for (bytes, value) in read {
            let key =
                parse_data_key(&bytes).ok_or_else(|| Fatal::Damaged("a row's key".to_owned()))?;
            let row = pb::Row::decode(Bytes::from(value))
                .map_err(|e| Fatal::Damaged(format!("row {}: {e}", key.1)))?;
            rows.push((key, row.into()));
            // The next key in byte order.
            from = bytes;
            from.push(0);
        }
        if !full {
            return Ok(State::restore(revision, rows));
        }
    }
}
