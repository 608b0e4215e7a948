//! The rules for snapshots. What has no state of its own on disk is known by what is there: with
//! all parts it was taken; with some of them a crash came between, and it is taken anew.

use drover_proto::agent::v1::{ObservedSnapshot, WantedSnapshot, WantedSnapshotPart};
use drover_proto::v1::SnapshotState;
use drover_storage::pool::{SnapshotId, SnapshotInfo};

use super::{Id, Part, Planner, PoolSeen, Take, Thing, WantedStorage, Work};

/// How a snapshot stands.
enum Stand {
    /// All parts alike.
    All(SnapshotState, String),
    /// What is there is fine, and the rest is lost.
    Lost,
}

impl Stand {
    fn creating(reason: impl Into<String>) -> Self {
        Self::All(SnapshotState::Creating, reason.into())
    }

    fn failed(reason: impl Into<String>) -> Self {
        Self::All(SnapshotState::Failed, reason.into())
    }
}

impl Planner<'_> {
    pub(super) fn snapshots(&mut self, wanted: &WantedStorage) {
        for group in &wanted.snapshots {
            let parts = group.parts.iter().map(parse).collect::<Result<Vec<_>, _>>();
            let stand = match &parts {
                Ok(parts) => self.stand(wanted, group, parts),
                Err(reason) => Stand::failed(reason.clone()),
            };
            for part in &group.parts {
                self.say(part, &stand);
            }
        }
    }

    fn say(&mut self, part: &WantedSnapshotPart, stand: &Stand) {
        let id = part.uid.parse::<SnapshotId>().ok();
        let thing = id.map(|id| Thing { pool: part.pool.clone(), id: Id::Snapshot(id) });
        let info = id.and_then(|id| self.snapshot(&part.pool, id));
        let (state, reason) = match stand {
            Stand::All(state, reason) => (*state, reason.as_str()),
            Stand::Lost if info.is_some() => (SnapshotState::Ready, ""),
            Stand::Lost => (SnapshotState::Failed, "is not there any more"),
        };
        let quiesced = id.is_some_and(|id| self.facts.quiesced.contains(&id));
        self.plan.snapshots.push(ObservedSnapshot {
            uid: part.uid.clone(),
            volume_uid: part.volume_uid.clone(),
            pool: part.pool.clone(),
            state: state.into(),
            state_reason: crate::observe::shorten(reason.to_owned()),
            allocated_bytes: info.and_then(|info| info.allocated_bytes).unwrap_or_default(),
            quiesced: quiesced && state == SnapshotState::Ready,
        });
        self.said.extend(thing);
    }

    fn stand(&mut self, wanted: &WantedStorage, group: &WantedSnapshot, parts: &[Part]) -> Stand {
        for part in parts {
            let Some(seen) = self.facts.pools.get(&part.pool) else {
                return Stand::failed(format!("pool {:?}: is not on this node", part.pool));
            };
            if let Some(fault) = &seen.fault {
                return Stand::failed(format!("pool {}: {fault}", part.pool));
            }
            if seen.inventory.is_none() {
                return Stand::creating("its pool has not been looked at yet");
            }
            let is_here = self.snapshot(&part.pool, part.snapshot).is_some();
            if let Some(why) = seen.unsure().filter(|_| !is_here) {
                return Stand::creating(why);
            }
        }
        for part in parts {
            match self.facts.busy.get(&part.thing()).map(|busy| &busy.work) {
                Some(Work::Delete) => return Stand::creating("is being removed first"),
                Some(_) => return Stand::creating("is being taken"),
                None => {}
            }
        }
        let here = |part: &&Part| self.snapshot(&part.pool, part.snapshot).is_some();
        let there: Vec<Thing> = parts.iter().filter(here).map(Part::thing).collect();
        if there.len() == parts.len() {
            return Stand::All(SnapshotState::Ready, String::new());
        }
        if let Some(reason) = parts.iter().find_map(|part| self.facts.untaken.get(&part.snapshot)) {
            return Stand::failed(reason.clone());
        }
        if !group.create {
            return Stand::Lost;
        }
        if !there.is_empty() {
            there.iter().for_each(|thing| self.begin(thing, Work::Delete));
            return Stand::creating("what a crash left of it is removed first");
        }
        for part in parts {
            let is_here = self.info(&part.pool, part.volume).is_some();
            let name = part.volume.to_string();
            let is_coming = wanted.about(&name).any(|volume| volume.create);
            if !is_here && !is_coming {
                return Stand::failed(format!("volume {name}: is not there"));
            }
            if !is_here || self.is_occupied(part) {
                return Stand::creating(format!("waits for volume {name}"));
            }
        }
        // Who was busy is asked again, all in good time.
        if let Some(failure) = parts.iter().find_map(|part| self.facts.failed.get(&part.thing()))
            && self.facts.now_ms < failure.retry_ms
        {
            self.wake(failure.retry_ms);
            return Stand::creating(failure.reason.clone());
        }
        self.plan.takes.push(Take { domain: group.domain_uid.clone(), parts: parts.to_vec() });
        Stand::creating("is being taken")
    }

    /// Whether something is done to the part's volume.
    fn is_occupied(&self, part: &Part) -> bool {
        let volume = part.volume_thing();
        let mut taken = self.plan.takes.iter().flat_map(|take| &take.parts);
        self.facts.busy.contains_key(&volume)
            || self.plan.begin.iter().any(|(thing, _)| *thing == volume)
            || taken.any(|other| other.volume_thing() == volume || other.thing() == part.thing())
    }

    /// A part that shall be gone.
    pub(super) fn garbage_snapshot(
        &mut self,
        wanted: &WantedStorage,
        thing: Thing,
        fault: Option<&str>,
    ) {
        let Id::Snapshot(id) = thing.id else { return };
        let uid = id.to_string();
        let is_source = wanted.volumes.iter().any(|volume| {
            let source = volume.snapshot.as_ref();
            volume.create && source.is_some_and(|source| source.snapshot_uid == uid)
        });
        if wanted.wants_part(&uid) || is_source {
            return;
        }
        let Some(seen) = self.facts.pools.get(&thing.pool) else { return };
        let unread = seen.inventory.is_none().then_some("is not read yet");
        let (state, reason) = if let Some(reason) = fault.or(unread) {
            // Nobody can say that it is gone.
            (SnapshotState::Failed, format!("pool {}: {reason}", thing.pool))
        } else if self.snapshot(&thing.pool, id).is_some() {
            return self.begin(&thing, Work::Delete);
        } else if self.facts.busy.contains_key(&thing) || seen.is_stale {
            (SnapshotState::Creating, "is given up".to_owned())
        } else {
            return;
        };
        self.plan.snapshots.push(ObservedSnapshot {
            uid,
            pool: thing.pool.clone(),
            state: state.into(),
            state_reason: crate::observe::shorten(reason),
            ..ObservedSnapshot::default()
        });
        self.said.insert(thing);
    }

    /// Parts that are here, and nobody said that they shall be.
    pub(super) fn other_snapshots(&mut self, pool: &str, seen: &PoolSeen) {
        for info in seen.inventory.iter().flat_map(|inventory| inventory.snapshots.values()) {
            let thing = Thing { pool: pool.to_owned(), id: Id::Snapshot(info.id) };
            if self.said.contains(&thing) || self.is_others(seen, &info.id.to_string()) {
                continue;
            }
            let busy = self.facts.busy.get(&thing).map(|busy| &busy.work);
            let reason = match (busy, self.facts.failed.get(&thing)) {
                (Some(Work::Delete), _) => "is being removed".to_owned(),
                (_, Some(failure)) => format!("cannot be removed: {}", failure.reason),
                _ => String::new(),
            };
            self.plan.snapshots.push(ObservedSnapshot {
                uid: info.id.to_string(),
                volume_uid: info.volume.to_string(),
                pool: pool.to_owned(),
                state: SnapshotState::Ready.into(),
                state_reason: crate::observe::shorten(reason),
                allocated_bytes: info.allocated_bytes.unwrap_or_default(),
                quiesced: self.facts.quiesced.contains(&info.id),
            });
        }
    }

    fn snapshot(&self, pool: &str, id: SnapshotId) -> Option<&SnapshotInfo> {
        self.facts.pools.get(pool)?.inventory.as_ref()?.snapshots.get(&id)
    }
}

fn parse(part: &WantedSnapshotPart) -> Result<Part, String> {
    let snapshot = part.uid.parse().map_err(|err: drover_storage::PoolError| err.to_string())?;
    let volume =
        part.volume_uid.parse().map_err(|err: drover_storage::PoolError| err.to_string())?;
    Ok(Part { pool: part.pool.clone(), volume, snapshot })
}
