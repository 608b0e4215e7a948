//! Names and tags by which our logical volumes are known among others in the volume group.

use uuid::Uuid;

use super::report::Lv;
use crate::pool::{ImageId, SnapshotId, VolumeId};

/// On everything of ours. What lacks it is not ours, whatever it is called.
pub(super) const TAG: &str = "drover";
/// `drover.volume=ID` on a snapshot: of which volume it is.
pub(super) const TAG_VOLUME: &str = "drover.volume";
/// `drover.bytes=N` on an image: its size, as a logical volume has whole extents.
pub(super) const TAG_BYTES: &str = "drover.bytes";

const VOLUME: &str = "drover_volume_";
const SNAPSHOT: &str = "drover_snapshot_";
const IMAGE: &str = "drover_image_";
/// Unfinished.
const NEW: &str = "drover_new_";
/// Being deleted.
const GONE: &str = "drover_gone_";

/// What a logical volume is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Volume(VolumeId),
    Snapshot {
        volume: VolumeId,
        id: SnapshotId,
    },
    Image {
        id: ImageId,
        bytes: u64,
    },
    /// To be removed.
    Leftover,
    /// Has our tag or a name like ours, and makes no sense.
    Stranger,
    /// Somebody else's.
    Foreign,
}

pub(super) fn volume(id: VolumeId) -> String {
    format!("{VOLUME}{id}")
}

pub(super) fn snapshot(id: SnapshotId) -> String {
    format!("{SNAPSHOT}{id}")
}

pub(super) fn image(id: ImageId) -> String {
    format!("{IMAGE}{id}")
}

pub(super) fn random_new() -> String {
    format!("{NEW}{}", Uuid::new_v4())
}

pub(super) fn random_gone() -> String {
    format!("{GONE}{}", Uuid::new_v4())
}

pub(super) fn tag(key: &str, value: impl std::fmt::Display) -> String {
    format!("{key}={value}")
}

/// What `lv` is, in the thin pool that is ours. Sub-volumes and other pools' are foreign.
pub(super) fn kind(lv: &Lv, thin_pool: &str) -> Kind {
    let is_tagged = lv.tags.iter().any(|tag| tag == TAG);
    if lv.pool != thin_pool || lv.segtype != "thin" {
        return Kind::Foreign;
    }
    match (is_tagged, by_name(lv)) {
        (true, Some(kind)) => kind,
        (true, None) => Kind::Stranger,
        (false, _) if lv.name.starts_with("drover_") => Kind::Stranger,
        (false, _) => Kind::Foreign,
    }
}

fn by_name(lv: &Lv) -> Option<Kind> {
    let name = lv.name.as_str();
    if let Some(id) = name.strip_prefix(VOLUME) {
        Some(Kind::Volume(id.parse().ok()?))
    } else if let Some(id) = name.strip_prefix(SNAPSHOT) {
        let volume = lv.tag(TAG_VOLUME)?.parse().ok()?;
        Some(Kind::Snapshot { volume, id: id.parse().ok()? })
    } else if let Some(id) = name.strip_prefix(IMAGE) {
        let bytes = lv.tag(TAG_BYTES)?.parse().ok().filter(|bytes| *bytes <= lv.bytes)?;
        Some(Kind::Image { id: id.parse().ok()?, bytes })
    } else if name.starts_with(NEW) || name.starts_with(GONE) {
        Some(Kind::Leftover)
    } else {
        None
    }
}
