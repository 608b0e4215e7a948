//! The loop around [`plan`](super::plan): waits, plans, commits. On the leader only.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{debug, error, info, warn};

use super::step::{Context, RandomIds, Settings, Step};
use super::{housekeeping, plan};
use crate::model::World;
use crate::session::Hub;
use crate::store::{ChangeStream, CommitError, Leadership, Store, WatchError};

/// Deadlines and leases are looked at this often.
const TICK: Duration = Duration::from_millis(250);
/// A step is committed within this, or decided anew.
const COMMIT_WAIT: Duration = Duration::from_secs(5);
/// Transactions on their way at once.
const COMMITS_MAX: usize = 16;
/// What is kept for people is bounded this often.
const TIDY: Duration = Duration::from_secs(60);

/// Works whenever this member leads, until the store closes.
pub async fn run(store: Store, hub: Arc<Hub>, settings: Settings) {
    let mut leadership = store.leadership();
    loop {
        let term = {
            let held = leadership.borrow_and_update();
            held.is_leader.then_some(held.term)
        };
        if let Some(term) = term {
            info!(term, "leads: workflows start");
            let mut leader = Leader { store: &store, hub: &hub, settings: &settings, term };
            match leader.work(&mut leadership).await {
                Ok(()) => info!(term, "leads no more: workflows rest"),
                Err(WatchError::Closed) => return,
                Err(error) => error!(%error, "the change history cannot be read"),
            }
            hub.rest();
        }
        if !leads(&leadership) && leadership.changed().await.is_err() {
            return;
        }
    }
}

fn leads(leadership: &watch::Receiver<Leadership>) -> bool {
    leadership.borrow().is_leader
}

struct Leader<'a> {
    store: &'a Store,
    hub: &'a Arc<Hub>,
    settings: &'a Settings,
    term: u64,
}

impl Leader<'_> {
    /// Returns when this member does not lead this term any more.
    async fn work(
        &mut self,
        leadership: &mut watch::Receiver<Leadership>,
    ) -> Result<(), WatchError> {
        let leader_since_ms = self.hub.now().mono_ms;
        let (mut world, mut changes) = self.load()?;
        let mut reports = self.hub.reports();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tidied = Instant::now();
        while self.still_leads(leadership) {
            if let Err(error) = self.catch_up(&mut world, &mut changes).await {
                let WatchError::Compacted(_) = error else { return Err(error) };
                warn!(%error, "fell behind: reads everything again");
                (world, changes) = self.load()?;
            }
            self.hub.publish(self.term, &world);
            reports.borrow_and_update();
            let observed = self.hub.observed();
            let cx = Context {
                world: &world,
                observed: &observed,
                now: self.hub.now(),
                term: self.term,
                leader_since_ms,
                settings: self.settings,
                ids: &RandomIds,
            };
            let steps = plan(&cx);
            let written = !steps.is_empty() && self.commit(steps).await;
            // Also when there is always something to do; while there is more, a batch a pass.
            if tidied.elapsed() >= TIDY && !self.tidy().await {
                tidied = Instant::now();
            }
            if written {
                continue;
            }
            tokio::select! {
                set = changes.next() => world.apply(&set?),
                changed = reports.changed() => if changed.is_err() { return Ok(()) },
                changed = leadership.changed() => if changed.is_err() { return Ok(()) },
                _ = tick.tick() => {}
            }
        }
        Ok(())
    }

    fn still_leads(&self, leadership: &mut watch::Receiver<Leadership>) -> bool {
        let held = leadership.borrow_and_update();
        held.is_leader && held.term == self.term
    }

    fn load(&self) -> Result<(World, ChangeStream), WatchError> {
        let world = World::load(&self.store.view());
        let changes = self.store.watch(world.revision)?;
        Ok((world, changes))
    }

    /// Takes in everything that this member has applied.
    async fn catch_up(
        &self,
        world: &mut World,
        changes: &mut ChangeStream,
    ) -> Result<(), WatchError> {
        let applied = self.store.view().revision();
        while world.revision < applied {
            world.apply(&changes.next().await?);
        }
        Ok(())
    }

    /// Commits what does not depend on one another; true when anything was written.
    async fn commit(&self, steps: Vec<Step>) -> bool {
        let store = self.store;
        let results = stream::iter(steps).map(|step| async move {
            let result = store.commit(step.txn, Instant::now() + COMMIT_WAIT).await;
            match &result {
                Ok(revision) => debug!(subject = step.subject, revision, "step"),
                // Somebody else was faster: the next pass decides from what is so then.
                Err(CommitError::Guard { .. }) => {
                    debug!(subject = step.subject, "step is outdated")
                }
                Err(error) => warn!(subject = step.subject, %error, "step was not committed"),
            }
            result.is_ok()
        });
        let written: Vec<bool> = results.buffer_unordered(COMMITS_MAX).collect().await;
        written.contains(&true)
    }

    /// True when there is more to be removed at once.
    async fn tidy(&self) -> bool {
        let now = self.hub.now();
        let Some(tidy) = housekeeping::tidy(&self.store.view(), self.term, now) else {
            return false;
        };
        let commit = self.store.commit(tidy.txn, Instant::now() + COMMIT_WAIT);
        match timeout(COMMIT_WAIT, commit).await {
            Ok(Ok(_)) => tidy.more,
            Ok(Err(error)) => {
                debug!(%error, "tidying waits for the next time");
                false
            }
            Err(_) => false,
        }
    }
}
