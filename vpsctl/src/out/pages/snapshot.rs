//! Snapshots.

use std::time::SystemTime;

use drover_proto::v1::{Snapshot, SnapshotDisk, SnapshotState};

use super::storage::takes;
use super::{Page, with_reason};
use crate::out::{
    human::{age, enum_name, short, short_or_dash, size},
    table::Table,
};

/// The snapshots, whose they are and where they lie.
pub(crate) fn snapshots(snapshots: &[Snapshot], now: SystemTime) -> String {
    let header =
        ["NAME", "STATE", "DOMAIN", "NODE", "DISKS", "SIZE", "TAKES", "FROZEN", "AGE", "REASON"];
    let mut table = Table::new(&header);
    for snapshot in snapshots {
        table.row(vec![
            short(&snapshot.name).to_owned(),
            enum_name(snapshot.state().as_str_name(), "SNAPSHOT_STATE_"),
            short_or_dash(&snapshot.domain),
            short_or_dash(&snapshot.node),
            snapshot.disks.len().to_string(),
            size(snapshot.disks.iter().map(|disk| disk.size_bytes).sum()),
            takes(snapshot.disks.iter().map(|disk| disk.allocated_bytes).sum()),
            frozen(snapshot).to_owned(),
            age(snapshot.create_time.as_ref(), now),
            snapshot.state_reason.clone(),
        ]);
    }
    table.render()
}

/// Known once it is taken.
fn frozen(snapshot: &Snapshot) -> &'static str {
    match (snapshot.state(), snapshot.quiesced) {
        (SnapshotState::Ready, true) => "yes",
        (SnapshotState::Ready, false) => "no",
        _ => "-",
    }
}

/// One snapshot.
pub(crate) fn snapshot(snapshot: &Snapshot, now: SystemTime) -> String {
    let mut page = Page::default();
    page.line("snapshot", short(&snapshot.name));
    let state = enum_name(snapshot.state().as_str_name(), "SNAPSHOT_STATE_");
    page.line("state", &with_reason(&state, &snapshot.state_reason));
    page.line("domain", &short_or_dash(&snapshot.domain));
    page.line("node", &short_or_dash(&snapshot.node));
    let filesystems = match frozen(snapshot) {
        "yes" => "frozen by the guest's agent while it was taken",
        "no" => "not frozen: what the guest had flushed is there",
        _ => "",
    };
    page.line("filesystems", filesystems);
    for disk in &snapshot.disks {
        page.line("disk", &disk_text(disk));
    }
    page.line("created", &format!("{} ago", age(snapshot.create_time.as_ref(), now)));
    page.line("uid", &snapshot.uid);
    page.text
}

fn disk_text(disk: &SnapshotDisk) -> String {
    let (volume, takes) = (short_or_dash(&disk.volume), takes(disk.allocated_bytes));
    format!("{volume}: {} in {}, takes {takes}", size(disk.size_bytes), disk.pool)
}
