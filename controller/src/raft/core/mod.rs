//! The member, without its threads and sockets: inputs in, one turn, outputs out.

mod apply;
mod interface;
mod load;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use prost_raft::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, Message, MessageType};
use raft::{Config, ProgressState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::log::{Log, Position};
use super::logger::logger;
use super::reads::Reads;
use super::snapshot::{self, SnapshotJob};
use crate::store::{
    Batch, CommitError, Engine, Leadership, MemberId, MemberStatus, ReadError, Role, State, Status,
};
use apply::Findings;
pub use interface::{Fatal, Input, Limits, Options, Output, Waiter};
use load::{load_applied, load_state};

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
        let mut findings = Findings::default();
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
