//! Snapshots: what all of a domain's own disks held at one moment, a part for each.
//!
//! A row is CREATING until its node's agent has all parts, and only until then may the agent take
//! it. The operation that takes it holds the domain, so it does not move meanwhile. A taking that
//! fails leaves nothing: the row goes, and its parts, made or not, are garbage, for a while also
//! after a report without them: one may have been on its way.
//!
//! Parts are as independent of their volumes as copies would be: the volume may get other content
//! or go, the domain may move away. They lie on the node on which they were taken, and end with
//! their row or with the domain. What lies in pools that a move's destination shares goes along:
//! its row names that node then.
//!
//! Restoring puts new volumes, filled with the parts, in the place of the old ones
//! (`content`). The snapshot stays.

use std::collections::BTreeSet;

use drover_proto::v1::{
    DomainState, EventSeverity, OperationError, OperationKind, OperationState, PoolState,
    SnapshotState, VolumeState,
};

use super::begin::{Begun, busy, check_etag, free_domain, hold, operation, wrong_state};
use super::content::{Source, replace_content, resting};
use super::refusal::Refusal;
use super::step::{Context, Step, Work, error, timestamp};
use crate::model::{
    DomainId, DomainRecord, GarbageRecord, NodeId, OperationId, SnapshotId, SnapshotPart,
    SnapshotRecord, VolumeRecord, is_at_rest, snapshot_garbage, unready,
};
use crate::scheduler::listed;
use crate::store::{Txn, Versioned};

/// Taking one costs seconds: freezing the guest is bounded, and nothing is copied.
const TAKE_WAIT_MS: i64 = 2 * 60_000;
/// A part of one that was given up may come so late, and is removed then.
const LATE_MS_MAX: i64 = 5 * 60_000;
/// Restoring clones, and copies where a pool cannot: so long, and
const RESTORE_WAIT_MS: i64 = 10 * 60_000;
/// at this rate at least, bytes in a millisecond.
const RESTORE_RATE_MIN: u64 = (10 << 20) / 1000;
/// A domain has at most so many: each is in what its node is told, all the time.
pub const SNAPSHOTS_MAX: usize = 64;

/// Takes one of a domain that runs or is at rest.
///
/// # Errors
/// The name is taken; there is no such domain, it is held, it has no disks, or one that is not
/// there; its node is lost, or a pool there takes nothing new.
pub fn create_snapshot(
    cx: &Context<'_>,
    id: &SnapshotId,
    domain: &DomainId,
) -> Result<Begun, Refusal> {
    if cx.world.snapshots.contains_key(id.as_str()) {
        return Err(Refusal::AlreadyExists { name: id.name() });
    }
    let row = free_domain(cx, domain)?;
    let record = &row.value;
    let running = record.state() == DomainState::Running && record.migration.is_none();
    if !running && !is_at_rest(record) {
        let accepted = "a snapshot is taken of a domain that is RUNNING, STOPPED, FAILED or SAVED";
        return Err(wrong_state(domain, record, accepted));
    }
    let refuse =
        |reason, message| Err(Refusal::Precondition { subject: domain.name(), reason, message });
    let node = &record.node;
    if cx.is_lost(node) {
        return refuse("NODE_LOST", format!("{} is on nodes/{node}, which is lost", domain.name()));
    }
    let held = cx.world.snapshots_of(record).count();
    if held >= SNAPSHOTS_MAX {
        let message = format!(
            "{} has {held} snapshots, and at most {SNAPSHOTS_MAX} are kept: delete some",
            domain.name()
        );
        return refuse("TOO_MANY_SNAPSHOTS", message);
    }
    let volumes: Vec<&VolumeRecord> = own_disks(cx, record).map(|row| &row.value).collect();
    if volumes.is_empty() {
        return refuse("NO_DISKS", format!("{} has no disks", domain.name()));
    }
    for volume in &volumes {
        if volume.state() != VolumeState::Ready {
            return refuse("VOLUME_NOT_READY", unready(volume));
        }
        let pools = cx.observed.nodes.get(&NodeId::trusted(node)).map(|seen| &seen.pools);
        let pool = pools.and_then(|pools| pools.get(&volume.pool));
        // What is written from now on needs room of its own.
        if let Some(pool) = pool.filter(|pool| pool.state() != PoolState::Ready) {
            let why = match pool.state() {
                PoolState::Filling => "is past its threshold",
                _ => pool.state_reason.as_str(),
            };
            let message = format!("pool {} of nodes/{node} takes nothing new: {why}", pool.id);
            return refuse("POOL_CLOSED", message);
        }
    }

    let part = |volume: &VolumeRecord| SnapshotPart {
        uid: cx.ids.uuid(),
        volume: volume.id.clone(),
        volume_uid: volume.uid.clone(),
        pool: volume.pool.clone(),
        size_bytes: volume.size_bytes,
    };
    let snapshot = SnapshotRecord {
        id: id.as_str().to_owned(),
        uid: cx.ids.uuid(),
        domain: record.id.clone(),
        domain_uid: record.uid.clone(),
        node: node.clone(),
        state: SnapshotState::Creating.into(),
        parts: volumes.into_iter().map(part).collect(),
        create_time: Some(timestamp(cx.now.wall_ms)),
        ..SnapshotRecord::default()
    };
    let kind = OperationKind::CreateSnapshot;
    let mut operation = operation(cx, kind, domain.name(), TAKE_WAIT_MS);
    operation.status_message = format!("nodes/{node} takes {}", id.name());
    let txn = Txn::new().absent::<SnapshotRecord>(id.as_str()).put(&snapshot);
    Ok(hold(cx, txn, row, record.clone(), operation))
}

/// The domain's disks, without what it is rescued with or saved to.
fn own_disks<'a>(
    cx: &Context<'a>,
    domain: &'a DomainRecord,
) -> impl Iterator<Item = &'a Versioned<VolumeRecord>> {
    let disks = cx.world.disks_of(domain);
    disks.filter_map(|(disk, volume)| disk.map(|_| volume))
}

/// Puts the disks of a domain that is at rest back to what the snapshot holds. A volume that the
/// domain has had since or has no more is left as it is; one that has grown keeps its size.
///
/// # Errors
/// There is none, it is not READY, the domain is held, runs, is saved, or lies on another node, or
/// no disk of it is in the snapshot.
pub fn restore_snapshot(cx: &Context<'_>, id: &SnapshotId) -> Result<Begun, Refusal> {
    let snapshot = known(cx, id)?;
    let record = &snapshot.value;
    let refuse =
        |reason, message| Err(Refusal::Precondition { subject: id.name(), reason, message });
    let domain_id = DomainId::trusted(&record.domain);
    let row = resting(cx, &domain_id)?;
    if record.state() != SnapshotState::Ready {
        return refuse("SNAPSHOT_NOT_READY", not_ready(record));
    }
    let node = &row.value.node;
    if *node != record.node {
        let message = format!(
            "{} lies on nodes/{}, and {} on nodes/{node}: migrate the stopped domain to \
             nodes/{} first",
            id.name(),
            record.node,
            domain_id.name(),
            record.node
        );
        return refuse("OTHER_NODE", message);
    }
    if cx.is_lost(node) {
        return refuse("NODE_LOST", format!("{} is on nodes/{node}, which is lost", id.name()));
    }

    let mut domain = row.value.clone();
    let mut txn = Txn::new().unchanged(snapshot);
    let (mut bytes, mut names) = (0_u64, Vec::new());
    for part in &record.parts {
        let held = own_disks(cx, &row.value).find(|volume| volume.value.id == part.volume);
        let Some(volume) = held else { continue };
        let source = Source::Snapshot(part);
        (txn, _) = replace_content(cx, txn, &mut domain, volume, source);
        bytes = bytes.saturating_add(volume.value.size_bytes);
        names.push(format!("volumes/{}", part.volume));
    }
    if names.is_empty() {
        let parts = record.parts.iter().map(|part| format!("volumes/{}", part.volume));
        let message = format!(
            "{} holds {}, none of which is a disk of {} any more",
            id.name(),
            listed(parts, record.parts.len(), ", "),
            domain_id.name()
        );
        return refuse("NO_SUCH_DISKS", message);
    }
    let copying_ms = i64::try_from(bytes / RESTORE_RATE_MIN).unwrap_or(i64::MAX);
    let wait_ms = RESTORE_WAIT_MS.saturating_add(copying_ms);
    let mut operation = operation(cx, OperationKind::RestoreSnapshot, domain_id.name(), wait_ms);
    let what = format!("{} from {}", names.join(", "), id.name());
    operation.status_message = format!("nodes/{node} fills {what}");
    let event = cx.event(EventSeverity::Info, domain_id.name(), "SNAPSHOT_RESTORED", what);
    Ok(hold(cx, txn.put(&event), row, domain, operation))
}

/// Forgets one; its parts are garbage. One that is being read stays until it is not: its agent
/// sees to that.
///
/// # Errors
/// There is none, it has changed, it is being taken, or a volume is being filled with it.
pub fn delete_snapshot(cx: &Context<'_>, id: &SnapshotId, etag: &str) -> Result<Txn, Refusal> {
    let row = known(cx, id)?;
    check_etag(&id.name(), etag, row.mod_revision)?;
    let mut txn = Txn::new().term_is(cx.term);
    if let Some(domain) = owner(cx, &row.value) {
        if row.value.state() == SnapshotState::Creating {
            return Err(busy(cx, id.name(), &domain.value.operation));
        }
        let filling = cx.world.volumes.values().find(|volume| {
            volume.value.state() == VolumeState::Creating
                && row.value.parts.iter().any(|part| part.uid == volume.value.snapshot_part)
        });
        if let Some(volume) = filling {
            return Err(Refusal::Precondition {
                subject: id.name(),
                reason: "SNAPSHOT_IN_USE",
                message: format!(
                    "{}: volumes/{} is being filled with it: wait for that",
                    id.name(),
                    volume.value.id
                ),
            });
        }
        // Who begins to restore it writes the domain's row.
        txn = txn.unchanged(domain);
    }
    Ok(discard(cx, txn, row))
}

/// A snapshot by its id.
///
/// # Errors
/// There is none.
pub fn known<'a>(
    cx: &Context<'a>,
    id: &SnapshotId,
) -> Result<&'a Versioned<SnapshotRecord>, Refusal> {
    let row = cx.world.snapshots.get(id.as_str());
    row.ok_or_else(|| Refusal::NotFound { name: id.name() })
}

/// Why what it holds cannot be had, for people.
#[must_use]
pub fn not_ready(snapshot: &SnapshotRecord) -> String {
    match snapshot.state() {
        SnapshotState::Creating => format!("snapshots/{} is being taken: wait for it", snapshot.id),
        _ => format!("snapshots/{} has failed: {}", snapshot.id, snapshot.state_reason),
    }
}

/// The row goes, and its parts from their node.
pub(super) fn discard(cx: &Context<'_>, txn: Txn, row: &Versioned<SnapshotRecord>) -> Txn {
    let SnapshotRecord { id, node, parts, .. } = &row.value;
    let txn = txn.unchanged(row).delete::<SnapshotRecord>(id.clone());
    if cx.node(node).is_none() {
        return txn;
    }
    // A part that its node was told to make may come after a report without it.
    let is_open = row.value.state() == SnapshotState::Creating;
    let keep_until = is_open.then(|| timestamp(cx.now.wall_ms + LATE_MS_MAX));
    parts.iter().fold(txn, |txn, part| {
        txn.put(&GarbageRecord {
            keep_until,
            ..snapshot_garbage(node, cx.world.shared_uid(node, &part.pool), part)
        })
    })
}

/// A move has ended: the snapshots that lie where the domain is now, too, are its node's.
pub(super) fn follow_domain(work: &mut Work<'_>, from: &str, to: &str) {
    for row in work.cx.world.goes_along(&work.row.value, from, to) {
        let snapshot = SnapshotRecord { node: to.to_owned(), ..row.value.clone() };
        work.write(|txn| txn.unchanged(row).put(&snapshot));
    }
}

/// Whose it is.
fn owner<'a>(cx: &Context<'a>, snapshot: &SnapshotRecord) -> Option<&'a Versioned<DomainRecord>> {
    let row = cx.world.domains.get(&DomainId::trusted(&snapshot.domain));
    row.filter(|row| row.value.uid == snapshot.domain_uid)
}

/// What the node says of all parts of a snapshot.
enum Said {
    /// Not enough.
    Little,
    /// All are there; whether the guest's filesystems were frozen.
    Ready { quiesced: bool },
    /// One is not, and why.
    Failed(String),
}

fn said(cx: &Context<'_>, row: &Versioned<SnapshotRecord>) -> Said {
    let snapshot = &row.value;
    let mut all = Said::Ready { quiesced: true };
    for part in &snapshot.parts {
        let seen = cx.observed.snapshot(&snapshot.node, &part.uid);
        match (seen.map(|seen| seen.state()), &all) {
            // What it said before it was told of this is no answer.
            (Some(SnapshotState::Failed), _)
                if cx.observed.knows(&snapshot.node, row.mod_revision) =>
            {
                let why = seen.map_or("", |seen| seen.state_reason.as_str());
                return Said::Failed(format!("volumes/{}: {why}", part.volume));
            }
            (Some(SnapshotState::Ready), Said::Ready { quiesced }) => {
                let frozen = seen.is_some_and(|seen| seen.quiesced);
                all = Said::Ready { quiesced: *quiesced && frozen };
            }
            _ => all = Said::Little,
        }
    }
    all
}

/// The operation that takes one holds the domain: how far it is.
pub(super) fn taking(work: &mut Work<'_>) {
    let cx = work.cx;
    let creating = |row: &&Versioned<SnapshotRecord>| row.value.state() == SnapshotState::Creating;
    let Some(row) = cx.world.snapshots_of(&work.row.value).find(creating) else {
        return work.end(OperationState::Failed, Some(super::begin::orphaned()));
    };
    let node = &row.value.node;
    let said = said(&cx, row);
    if let Said::Ready { quiesced } = said {
        let mut snapshot = row.value.clone();
        snapshot.set_state(SnapshotState::Ready);
        snapshot.quiesced = quiesced;
        work.write(|txn| txn.unchanged(row).put(&snapshot));
        let how = if quiesced { "its filesystems frozen" } else { "as after a power cut" };
        let message = format!("snapshots/{} on nodes/{node}, {how}", snapshot.id);
        work.event(EventSeverity::Info, "SNAPSHOT_TAKEN", message);
        return work.end(OperationState::Succeeded, None);
    }
    let why = match said {
        _ if work.is_cancelled() => error("CANCELLED", "cancelled on request"),
        Said::Failed(why) => error("SNAPSHOT_FAILED", format!("nodes/{node}: {why}")),
        _ if cx.is_lost(node) => error("NODE_LOST", format!("nodes/{node} is lost")),
        _ if work.is_overdue(0) => {
            error("DEADLINE_EXCEEDED", format!("nodes/{node} has not taken it in time"))
        }
        _ => return,
    };
    work.write(|txn| discard(&cx, txn, row));
    give_up(work, &row.value.id, why);
}

fn give_up(work: &mut Work<'_>, id: &str, why: OperationError) {
    if why.reason == "CANCELLED" {
        return work.end(OperationState::Cancelled, Some(why));
    }
    let message = format!("snapshots/{id}: {}", why.message);
    work.event(EventSeverity::Error, "SNAPSHOT_FAILED", message);
    work.end(OperationState::Failed, Some(why));
}

/// The operation that puts disks back holds the domain: done when they are all there.
pub(super) fn restoring(work: &mut Work<'_>) {
    let cx = work.cx;
    let node = &work.row.value.node;
    let open = own_disks(&cx, &work.row.value)
        .find(|volume| volume.value.state() == VolumeState::Creating)
        .map(|volume| &volume.value);
    let Some(volume) = open else { return work.end(OperationState::Succeeded, None) };
    let said = cx.observed.volume(node, &volume.uid);
    let failed = said.filter(|said| {
        said.state() == VolumeState::Failed && cx.observed.knows(node, work.row.mod_revision)
    });
    let (id, later) = (&volume.id, "it is filled when its agent can, and the domain starts then");
    let why = match failed {
        Some(said) => {
            let message = format!("nodes/{node}: volumes/{id}: {}; {later}", said.state_reason);
            error("RESTORE_FAILED", message)
        }
        None if work.is_overdue(0) => {
            let message = format!("nodes/{node} has not filled volumes/{id} in time; {later}");
            error("DEADLINE_EXCEEDED", message)
        }
        None => return,
    };
    work.end(OperationState::Failed, Some(why));
}

/// Snapshots follow what their nodes report. Those of domains that are `busy` in this pass are
/// looked at in the next one.
pub(super) fn steps(cx: &Context<'_>, busy: &BTreeSet<&DomainId>) -> Vec<Step> {
    let free =
        |row: &&Versioned<SnapshotRecord>| !busy.contains(&DomainId::trusted(&row.value.domain));
    cx.world.snapshots.values().filter(free).filter_map(|row| follow(cx, row)).collect()
}

fn follow(cx: &Context<'_>, row: &Versioned<SnapshotRecord>) -> Option<Step> {
    let subject = format!("snapshots/{}", row.value.id);
    let txn = Txn::new().term_is(cx.term);
    let mut snapshot = row.value.clone();
    let (severity, reason, message) = match (row.value.state(), said(cx, row)) {
        // Its operation sees to it; without one, nobody waits for it any more.
        (SnapshotState::Creating, _) if is_taken(cx, &row.value) => return None,
        (SnapshotState::Creating, _) => {
            return Some(Step { subject, txn: discard(cx, txn, row) });
        }
        (SnapshotState::Ready | SnapshotState::Failed, Said::Failed(why)) => {
            snapshot.set_state(SnapshotState::Failed);
            snapshot.state_reason.clone_from(&why);
            (EventSeverity::Error, "SNAPSHOT_FAILED", format!("{subject}: {why}"))
        }
        (SnapshotState::Failed, Said::Ready { .. }) => {
            snapshot.set_state(SnapshotState::Ready);
            snapshot.state_reason.clear();
            (EventSeverity::Info, "SNAPSHOT_FOUND", format!("{subject} is there again"))
        }
        _ => return None,
    };
    if snapshot == row.value {
        return None;
    }
    let event = cx.event(severity, format!("domains/{}", snapshot.domain), reason, message);
    Some(Step { subject, txn: txn.unchanged(row).put(&snapshot).put(&event) })
}

/// An operation takes it.
fn is_taken(cx: &Context<'_>, snapshot: &SnapshotRecord) -> bool {
    let operation = owner(cx, snapshot).map(|row| OperationId::trusted(&row.value.operation));
    let operation = operation.and_then(|id| cx.world.operation(&id));
    operation.is_some_and(|held| held.kind() == OperationKind::CreateSnapshot)
}
