//! Snapshots are taken together, and what is made of them.

use drover_proto::agent::v1::{ObservedSnapshot, VolumeSource, WantedSnapshot, WantedSnapshotPart};
use drover_proto::v1::SnapshotState;
use drover_storage::pool::SnapshotId;

use super::*;

const DOMAIN: &str = "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11";

/// Of volumes 1 and 2, as 0x11 and 0x12.
fn snapshot() -> WantedSnapshot {
    let part =
        |n: u8| WantedSnapshotPart { uid: uid(0x10 + n), volume_uid: uid(n), pool: "main".into() };
    WantedSnapshot { domain_uid: DOMAIN.into(), parts: vec![part(1), part(2)], create: true }
}

fn part_id(n: u8) -> SnapshotId {
    uid(0x10 + n).parse().unwrap()
}

fn volume_id(n: u8) -> VolumeId {
    uid(n).parse().unwrap()
}

fn part_garbage(n: u8) -> Garbage {
    Garbage { pool: "main".into(), snapshot_uid: uid(0x10 + n), ..Garbage::default() }
}

fn are(view: &View, state: SnapshotState) -> bool {
    view.snapshots.len() == 2 && view.snapshots.iter().all(|part| part.state() == state)
}

impl Node {
    async fn want_all(
        &self,
        volumes: Vec<WantedVolume>,
        snapshots: Vec<WantedSnapshot>,
        garbage: Vec<Garbage>,
    ) {
        let wanted = WantedStorage { volumes, snapshots, garbage, ..WantedStorage::default() };
        self.handle.desire(wanted).await.unwrap();
    }

    fn write(&self, n: u8, byte: u8) {
        std::fs::write(self.handle.activate("main", &uid(n)).unwrap(), vec![byte; 8 * MIB])
            .unwrap();
    }
}

/// Two volumes full of ones, and their snapshot.
async fn with_snapshot() -> Node {
    let node = node().await;
    // It waits for volumes that are still to be made.
    node.want_all(vec![blank(1), blank(2)], vec![snapshot()], vec![]).await;
    node.until("READY", |view| are(view, SnapshotState::Ready)).await;
    node.want_all(vec![blank(1), blank(2)], vec![], vec![part_garbage(1), part_garbage(2)]).await;
    node.until("gone", |view| view.snapshots.is_empty()).await;
    (1..=2).for_each(|n| node.write(n, 1));
    node.want_all(vec![blank(1), blank(2)], vec![snapshot()], vec![]).await;
    node.until("READY", |view| are(view, SnapshotState::Ready)).await;
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_taken_and_content_is_replaced_from_it() {
    let node = with_snapshot().await;
    let part = node.handle.view().snapshots[0].clone();
    let expected = ObservedSnapshot {
        uid: uid(0x11),
        volume_uid: uid(1),
        pool: "main".into(),
        state: SnapshotState::Ready.into(),
        // Nothing ran.
        quiesced: true,
        allocated_bytes: part.allocated_bytes,
        ..ObservedSnapshot::default()
    };
    assert_eq!(part, expected);
    assert!(part.allocated_bytes >= 8 * MIB as u64);
    assert_eq!(node.leftovers(), [""; 0]);

    // Another volume takes the place of the first one, which goes; the snapshot stays.
    node.write(1, 2);
    let source = VolumeSource { pool: "main".into(), volume_uid: uid(1), snapshot_uid: uid(0x11) };
    let size_bytes = 12 * MIB as u64;
    let restored = WantedVolume { snapshot: Some(source), size_bytes, ..blank(3) };
    let kept = WantedSnapshot { create: false, ..snapshot() };
    node.want_all(vec![restored.clone(), blank(2)], vec![kept.clone()], vec![garbage(1)]).await;
    node.until_ready(3).await;
    node.until("gone", |view| view.volumes.iter().all(|v| v.uid != uid(1))).await;
    let data = node.data(3);
    assert!(data[..8 * MIB] == vec![1; 8 * MIB] && data[8 * MIB..] == vec![0; 4 * MIB]);
    assert!(are(&node.handle.view(), SnapshotState::Ready));

    // One that is to be made of what is not there.
    let mut other = WantedVolume { uid: uid(4), ..restored.clone() };
    other.snapshot.as_mut().unwrap().snapshot_uid = uid(0x33);
    node.want_all(vec![other], vec![kept.clone()], vec![]).await;
    let failed =
        |view: &View| view.volumes.iter().any(|v| v.state_reason.ends_with("is not in pool main"));
    node.until("a reason", failed).await;

    // A part that is read stays until it is not.
    let open = node.pool().open_snapshot(volume_id(1), part_id(1)).unwrap();
    node.want_all(vec![], vec![], vec![part_garbage(1), part_garbage(2)]).await;
    let refused = |view: &View| {
        view.snapshots.len() == 1 && view.snapshots[0].state_reason.contains("is in use")
    };
    node.until("a refusal", refused).await;
    drop(open);
    node.until("gone", |view| view.snapshots.is_empty()).await;
    let there = node.pool().list().unwrap();
    assert_eq!((there.snapshots.len(), there.volumes.len()), (0, 2));
}

/// A part that is lost is told, and nothing takes its place; what a crash in the middle of a
/// taking has left is removed, and it is taken anew.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_is_failed_and_what_is_half_is_taken_anew() {
    let node = with_snapshot().await;
    node.pool().delete_snapshot(volume_id(2), part_id(2)).unwrap();
    let kept = WantedSnapshot { create: false, ..snapshot() };
    node.want_all(vec![blank(1), blank(2)], vec![kept], vec![]).await;
    let lost = |view: &View| {
        let states: Vec<_> = view.snapshots.iter().map(ObservedSnapshot::state).collect();
        states == [SnapshotState::Ready, SnapshotState::Failed]
    };
    node.until("one that is lost", lost).await;
    assert_eq!(node.handle.view().snapshots[1].state_reason, "is not there any more");

    (1..=2).for_each(|n| node.write(n, 3));
    node.want_all(vec![blank(1), blank(2)], vec![snapshot()], vec![]).await;
    node.until("READY", |view| are(view, SnapshotState::Ready)).await;
    for n in 1..=2 {
        let open = node.pool().open_snapshot(volume_id(n), part_id(n)).unwrap();
        let mut chunks = open.chunks(0).map(Result::unwrap);
        assert!(chunks.all(|chunk| chunk.bytes.iter().all(|byte| *byte == 3)), "part {n}");
    }
}

/// A guest that cannot be held is not looked at: FAILED with the reason, once, and nothing is
/// left of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_cannot_be_taken_is_failed_once() {
    let node = node().await;
    node.want(vec![blank(1), blank(2)], vec![]).await;
    node.until_ready(1).await;
    node.until_ready(2).await;
    // A VMM that says nothing.
    let files = places(&node.dir).domain(DOMAIN);
    std::fs::create_dir_all(files.lock.parent().unwrap()).unwrap();
    let vmm = std::fs::File::create(&files.lock).unwrap();
    rustix::fs::flock(&vmm, rustix::fs::FlockOperation::LockExclusive).unwrap();
    node.want_all(vec![blank(1), blank(2)], vec![snapshot()], vec![]).await;
    let view = node.until("FAILED", |view| are(view, SnapshotState::Failed)).await;
    assert!(!view.snapshots[0].state_reason.is_empty());
    drop(vmm);
    // The same again asks for nothing new; asked for anew, it is taken.
    node.want_all(vec![blank(1), blank(2)], vec![snapshot()], vec![]).await;
    assert!(are(&node.handle.view(), SnapshotState::Failed));
    let there = node.pool().list().unwrap();
    assert_eq!((there.snapshots.len(), there.leftovers.len()), (0, 0));
    node.want_all(vec![blank(1), blank(2)], vec![], vec![]).await;
    node.want_all(vec![blank(1), blank(2)], vec![snapshot()], vec![]).await;
    node.until("READY", |view| are(view, SnapshotState::Ready)).await;
}

/// A volume that was never there has no snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_taken_of_a_volume_that_is_not_there() {
    let node = node().await;
    node.want_all(vec![blank(1)], vec![snapshot()], vec![]).await;
    let view = node.until("FAILED", |view| are(view, SnapshotState::Failed)).await;
    assert!(view.snapshots[0].state_reason.contains("is not there"));
    assert_eq!(node.pool().list().unwrap().snapshots, []);
}
