//! One domain on this node: a task that looks, asks [`crate::decide`] what to do, does it, and
//! looks again. Domains share nothing but the bound on how many start at once, so that none
//! waits for another that hangs (I6).
//!
//! [`Domain::run`] is the loop; `vmm` finds, follows and starts the process; `act` carries out
//! one action, `save` the one that takes long; `files` are the files that the agent and a VMM
//! leave for each other. [`quiesce`] and [`guest`] serve others: who look at a guest's disks, and
//! who ask the agent inside it.

mod act;
pub(crate) mod client;
mod files;
pub mod guest;
mod plug;
pub mod quiesce;
mod save;
mod seeding;
mod vmm;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::agent::v1::{ObservedDomain, ObservedState, ObservedVolume};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::decide::{Action, Disks, Facts, LiveDisk, Progress, decide};
use crate::error::{Error, blocking};
use crate::observe::{differs, handed_over, observe, shorten};
use crate::records::{DomainFiles, DomainRecord, Handover, Places};
use crate::storage::StorageHandle;
use crate::wanted::Wanted;
use quiesce::Quiescer;
use save::Saving;
use vmm::Link;

/// How many VMMs may be starting at once.
pub const STARTS_AT_ONCE_MAX: usize = 4;
/// Without any news, a domain is looked at this often.
const TICK: Duration = Duration::from_secs(5);
/// A VMM that does not answer is called again this often.
const RECONNECT: Duration = Duration::from_millis(100);
/// First and longest wait before what failed is tried again.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(15);
/// So many actions in a row without a pause are a mistake of ours, not work.
const ACTIONS_IN_A_ROW_MAX: u32 = 32;

/// What all domains of a node share.
#[derive(Debug)]
pub struct Shared {
    /// The node's id, for messages.
    pub node: String,
    /// Where things lie.
    pub places: Places,
    /// The drover-vmm binary.
    pub vmm: PathBuf,
    /// The bridge for interfaces that name none.
    pub bridge: String,
    /// The node's pools, and what is in them.
    pub storage: StorageHandle,
    /// Makes guests stand still; and who else may, meanwhile.
    pub quiescer: Quiescer,
    /// `ADDR:0`, where a destination listens.
    pub migration_listen: String,
    /// This boot of the host.
    pub boot_id: String,
    /// Bounds the starts at once.
    pub starts: Semaphore,
    /// The beginning of the monotonic clock.
    pub clock: Instant,
    /// Counts up when something worth a report has changed.
    pub changed: watch::Sender<u64>,
}

/// What others see of a domain's task.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The first look is done.
    pub looked: bool,
    /// What to report, without usage by the process.
    pub observed: Option<ObservedDomain>,
    /// The VMM's process.
    pub pid: Option<u32>,
}

/// The task of one domain.
pub(crate) struct Domain {
    shared: Arc<Shared>,
    uid: String,
    files: DomainFiles,
    wanted_source: watch::Receiver<Wanted>,
    view: watch::Sender<View>,

    wanted: Wanted,
    /// The disks of `wanted`, as they were seen last.
    disks: Disks,
    /// The volume of its memory.
    memory: Disks,
    live_disks: Vec<LiveDisk>,
    saving: Option<Saving>,
    storage: StorageHandle,
    record: Option<DomainRecord>,
    /// Why the record cannot be used; then nothing is ever started. With the hand-over that is
    /// on disk beside it.
    record_damage: Option<(String, Option<Handover>)>,
    link: Link,
    progress: Progress,
    /// What failed last, and how often in a row.
    trouble: Option<(String, u32)>,
    refused: Option<String>,
    /// When the running VMM was first seen to answer, for the count of crashes.
    live_since: Option<Instant>,
    /// When its log is looked at next: however much news there is.
    log_due: Instant,
}

impl Domain {
    pub(crate) fn new(
        shared: Arc<Shared>,
        uid: String,
        wanted_source: watch::Receiver<Wanted>,
        view: watch::Sender<View>,
    ) -> Self {
        let files = shared.places.domain(&uid);
        Self {
            storage: shared.storage.clone(),
            shared,
            uid,
            files,
            wanted_source,
            view,
            wanted: Wanted::Unknown,
            disks: Disks::Ready,
            memory: Disks::Ready,
            live_disks: Vec::new(),
            saving: None,
            record: None,
            record_damage: None,
            link: Link::gone(),
            progress: Progress::default(),
            log_due: Instant::now() + TICK,
            trouble: None,
            refused: None,
            live_since: None,
        }
    }

    /// Runs until nothing of the domain is left and nothing is wanted; answers its uid.
    pub(crate) async fn run(mut self) -> String {
        self.look_first().await;
        let mut in_a_row = 0;
        loop {
            self.wanted = self.wanted_source.borrow_and_update().clone();
            self.look_at_disks();
            self.note_exit();
            let action = self.next_action();
            self.refused = match &action {
                Action::Refuse(reason) => Some(reason.clone()),
                _ => None,
            };
            let mut wake = None;
            match action {
                Action::Nothing | Action::Refuse(_) => in_a_row = 0,
                Action::WaitUntil(at) => {
                    in_a_row = 0;
                    wake = Some(self.shared.clock + Duration::from_millis(at));
                }
                action if in_a_row >= ACTIONS_IN_A_ROW_MAX => {
                    in_a_row = 0;
                    tracing::error!(uid = self.uid, ?action, "the same things over and over");
                    wake = Some(Instant::now() + RETRY_MAX);
                }
                action => {
                    in_a_row += 1;
                    self.publish();
                    let removing = action == Action::Remove;
                    match self.act(action).await {
                        Ok(()) if removing => return self.uid,
                        Ok(()) => {
                            self.trouble = None;
                            continue;
                        }
                        Err(error) => wake = Some(self.note_trouble(&error)),
                    }
                }
            }
            self.publish();
            if !self.wait(wake).await {
                return self.uid;
            }
        }
    }

    fn look_at_disks(&mut self) {
        let disks = self.wanted.assigned().map_or(&[][..], |assigned| &assigned.disks);
        self.disks = self.storage.disks(disks);
        let memory = self.wanted.assigned().and_then(|assigned| assigned.memory.as_ref());
        self.memory = match memory {
            Some(memory) => save::memory_of(self.storage.disks(std::slice::from_ref(memory))),
            None => Disks::Ready,
        };
        let view = self.storage.view();
        let live = disks.iter().map(|disk| {
            let is_its =
                |volume: &&ObservedVolume| volume.uid == disk.volume && volume.pool == disk.pool;
            let volume = view.volumes.iter().find(is_its);
            LiveDisk {
                serial: disk.serial.clone(),
                slot: disk.slot,
                limits: disk.limits,
                size_bytes: volume.map_or(0, |volume| volume.size_bytes),
            }
        });
        self.live_disks = live.collect();
    }

    fn next_action(&self) -> Action {
        if let Some((damage, _)) = &self.record_damage {
            return match self.wanted {
                Wanted::Absent => decide(self.facts()),
                _ => Action::Refuse(damage.clone()),
            };
        }
        decide(self.facts())
    }

    /// Waits for news or for `wake`; false when the node has forgotten this task.
    async fn wait(&mut self, wake: Option<Instant>) -> bool {
        let tick = Instant::now() + if self.link.is_silent() { RECONNECT } else { TICK };
        let until = wake.map_or(tick, |wake| wake.min(tick));
        self.bound_log().await;
        let has_disks = !self.live_disks.is_empty() || self.memory != Disks::Ready;
        tokio::select! {
            changed = self.wanted_source.changed() => return changed.is_ok(),
            () = self.storage.changed(), if has_disks => {}
            event = self.link.event() => {
                let now_ms = self.now_ms();
                self.link.take(event, now_ms);
            }
            saved = save::outcome(&mut self.saving) => self.note_saved(saved).await,
            () = tokio::time::sleep_until(until) => {
                if self.link.is_silent() {
                    self.look_again().await;
                }
            }
        }
        self.learn().await;
        true
    }

    async fn bound_log(&mut self) {
        let now = Instant::now();
        if now < self.log_due {
            return;
        }
        self.log_due = now + TICK;
        let log = self.files.log.clone();
        if let Err(error) = blocking(move || files::bound_log(&log)).await {
            tracing::warn!(uid = self.uid, %error, "cannot bound the VMM's log");
        }
    }

    fn note_exit(&mut self) {
        let exited = self.link.has_exited();
        if exited && self.progress.exited_ms.is_none() {
            self.progress.exited_ms = Some(self.now_ms());
        }
    }

    /// Remembers a failure, says it once, and answers when to try again.
    fn note_trouble(&mut self, error: &Error) -> Instant {
        let text = error.to_string();
        let count = match &self.trouble {
            Some((before, count)) if *before == text => count + 1,
            _ => {
                tracing::warn!(
                    uid = self.uid,
                    domain = self.name(),
                    error = text,
                    "will try again"
                );
                1
            }
        };
        self.trouble = Some((text, count));
        Instant::now() + RETRY_MIN.saturating_mul(1 << count.min(6)).min(RETRY_MAX)
    }

    fn facts(&self) -> Facts<'_> {
        Facts {
            record: self.record.as_ref(),
            vmm: self.link.seen(),
            wanted: &self.wanted,
            progress: &self.progress,
            disks: &self.disks,
            memory: &self.memory,
            live_disks: &self.live_disks,
            plugged: self.link.status().map_or(&[], |status| &status.disks),
            now_ms: self.now_ms(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.shared.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn name(&self) -> &str {
        self.record.as_ref().map_or("", |record| &record.name)
    }

    /// Shows the others how things stand, and wakes the session if it is worth a report.
    fn publish(&mut self) {
        let trouble = self.trouble.as_ref().map(|(text, _)| text.as_str());
        let mut observed =
            observe(self.facts(), self.link.status(), trouble, self.refused.as_deref());
        if let Some((damage, handover)) = &self.record_damage {
            observed = Some(self.observe_damaged(damage, handover.as_ref()));
        }
        if let (Some(observed), Some(status)) = (&mut observed, self.link.status()) {
            observed.usage = Some(crate::usage::of_status(status));
        }
        let mut news = false;
        self.view.send_modify(|view| {
            news = match (&view.observed, &observed) {
                (Some(before), Some(now)) => differs(before, now),
                (None, None) => !view.looked,
                _ => true,
            };
            *view = View { looked: true, observed, pid: self.link.pid() };
        });
        if news {
            self.shared.changed.send_modify(|count| *count += 1);
        }
    }

    /// Without a record: what the files beside it say, and no more.
    fn observe_damaged(&self, damage: &str, handover: Option<&Handover>) -> ObservedDomain {
        let (state, migration) = match handover {
            Some(handover) => (ObservedState::HandedOver, Some(handed_over(handover))),
            None if self.link.is_gone() => (ObservedState::Failed, None),
            None => (ObservedState::Running, None),
        };
        ObservedDomain {
            uid: self.uid.clone(),
            name: self.wanted.assigned().map(|a| a.name.clone()).unwrap_or_default(),
            state: state.into(),
            state_reason: shorten(damage.to_owned()),
            migration,
            ..ObservedDomain::default()
        }
    }

    /// Writes the changed record durably, and only then believes it.
    async fn save(&mut self, record: DomainRecord) -> Result<(), Error> {
        let files = self.files.clone();
        let copy = record.clone();
        blocking(move || copy.save(&files)).await?;
        self.record = Some(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
