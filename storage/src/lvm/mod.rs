//! A pool in a thin pool of LVM's, driven by the LVM tools.
//!
//! ```text
//! drover_volume_<volume>        what VMMs open, as /dev/VG/drover_volume_…
//! drover_snapshot_<snapshot>    tagged drover.volume=<volume>
//! drover_image_<image>          read-only; tagged drover.bytes=<size>
//! drover_new_<random>           unfinished       ┐ removed by clean_up, unless this
//! drover_gone_<random>          being deleted    ┘ process works on it
//! ```
//!
//! All of them carry the tag `drover`; a logical volume without it is never touched. LVM's
//! metadata is the only record: each command changes it atomically, and what takes several
//! commands is made under another name and renamed at its end.
//!
//! Volumes are not activated when the node boots (`--setactivationskip y`): what runs here is for
//! the agent to decide.

mod command;
mod delete;
mod draft;
mod names;
mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use command::lvm;
use draft::{LvmDraft, LvmSnapshotDraft, Unfinished};
use names::{Kind, kind};
use report::Lv;

use crate::lock::{Claim, open_locked};
use crate::pool::{
    Contents, ImageDraft, ImageId, ImageInfo, Opened, Pool, PoolSpec, PoolUsage, SnapshotDraft,
    SnapshotId, SnapshotInfo, VolumeDraft, VolumeId, VolumeInfo, grows, holds_source, round_up,
    same_size,
};
use crate::{PoolError, Result};

/// For each new logical volume: ours, and activated only by who insists.
const NEW_ARGS: [&str; 6] =
    ["--quiet", "--yes", "--setactivationskip", "y", "--addtag", names::TAG];

/// What a thin pool does with writes for which it has no room, as LVM reports it: "error" or
/// "queue".
const ERROR_WHEN_FULL: &str = "error";

/// How LVM checks a thin pool's metadata before it is activated. A host that lost power leaves blocks
/// that nobody has, and one whose disk failed a mark that a check is due: both would keep the pool
/// from being used until somebody came, and both are put right here. Damage is not.
const CHECK: &str = r#"global/thin_check_options=["-q","--auto-repair"]"#;

/// A pool in a thin pool. See [`Pool`] for what it does.
#[derive(Debug)]
pub(crate) struct LvmPool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    spec: PoolSpec,
    vg: String,
    thin_pool: String,
    extent_bytes: u64,
    /// Names of what is unfinished because somebody works on it now.
    busy: Mutex<BTreeSet<String>>,
}

impl LvmPool {
    /// Opens a thin pool, and activates it so that its usage can be seen. When it is full, writes
    /// shall fail at once.
    pub(crate) fn open(vg: &str, thin_pool: &str) -> Result<Self> {
        let (vg, thin_pool) = (vg.to_owned(), thin_pool.to_owned());
        let spec = PoolSpec::Lvm { vg: vg.clone(), thin_pool: thin_pool.clone() };
        let busy = Mutex::default();
        let mut inner = Inner { spec, vg, thin_pool, extent_bytes: 0, busy };
        let lvs = inner.report().map_err(|error| match error {
            PoolError::Command { stderr, .. } => inner.unfit(stderr),
            other => other,
        })?;
        let pool = inner.fit_pool(&lvs)?;
        inner.extent_bytes = pool.extent_bytes;
        if !pool.is_active {
            inner.set_active(&inner.thin_pool, true)?;
        }
        if pool.when_full != ERROR_WHEN_FULL {
            // LVM's default holds writes back for a minute, and with them the VMM, its pauses and
            // whoever syncs; then they fail all the same.
            let name = inner.full(&inner.thin_pool);
            lvm(&["lvchange", "--quiet", "--errorwhenfull", "y", &name])?;
        }
        Ok(Self(Arc::new(inner)))
    }
}

impl Inner {
    fn unfit(&self, reason: String) -> PoolError {
        PoolError::Unfit { pool: self.spec.to_string(), reason }
    }

    fn not_found(&self, what: String) -> PoolError {
        PoolError::NotFound { what, pool: self.spec.to_string() }
    }

    /// `VG/name`, as LVM's tools want it.
    fn full(&self, name: &str) -> String {
        format!("{}/{name}", self.vg)
    }

    fn device(&self, name: &str) -> PathBuf {
        Path::new("/dev").join(&self.vg).join(name)
    }

    /// All logical volumes of the volume group.
    fn report(&self) -> Result<Vec<Lv>> {
        let args = [
            "lvs",
            "--reportformat",
            "json",
            "--units",
            "b",
            "--nosuffix",
            "-o",
            report::FIELDS,
            &self.vg,
        ];
        report::parse("lvm lvs", &lvm(&args)?)
    }

    /// The thin pool, when it may hold tenants' data.
    fn fit_pool<'a>(&self, lvs: &'a [Lv]) -> Result<&'a Lv> {
        let (vg, name) = (&self.vg, &self.thin_pool);
        let Some(pool) = lvs.iter().find(|lv| lv.name == *name) else {
            return Err(self.unfit(format!("volume group {vg} has no logical volume {name}")));
        };
        if pool.segtype != "thin-pool" {
            return Err(self.unfit(format!("{vg}/{name} is {}, not a thin-pool", pool.segtype)));
        }
        if !pool.zeroes {
            let reason = format!(
                "it does not zero new blocks, so that a volume would show what another tenant \
                 wrote; put right by: lvchange --zero y {vg}/{name}"
            );
            return Err(self.unfit(reason));
        }
        if pool.discards == "ignore" {
            let reason = format!(
                "it ignores discards, so that room never comes back; put right (while \
                 inactive) by: lvchange --discards passdown {vg}/{name}"
            );
            return Err(self.unfit(reason));
        }
        Ok(pool)
    }

    /// What is wrong with the thin pool, in LVM's word, and what puts it right.
    fn fault(&self, pool: &Lv) -> Option<String> {
        let (vg, full) = (&self.vg, self.full(&pool.name));
        let way = match pool.health.as_str() {
            "" if pool.is_active => return None,
            "" => return Some(format!("inactive; put right by: lvchange -ay {full}")),
            "out_of_data" => format!("put right by more room: lvextend -L +SIZE {full}"),
            // It could not write its metadata, and is activated only when that has been checked.
            "metadata_read_only" | "failed" => format!(
                "put right, when its disk is whole and its domains are stopped, by: vgchange -an \
                 {vg} && lvchange -ay --config '{CHECK}' {full}; if that finds damage: lvconvert \
                 --repair {full}"
            ),
            word => return Some(word.to_owned()),
        };
        Some(format!("{}; {way}", pool.health))
    }

    fn kind(&self, lv: &Lv) -> Kind {
        kind(lv, &self.thin_pool)
    }

    /// The logical volume of this name; an error when it is there and not ours.
    fn find(&self, lvs: &[Lv], name: &str) -> Result<Option<Lv>> {
        let Some(lv) = lvs.iter().find(|lv| lv.name == name) else {
            return Ok(None);
        };
        match self.kind(lv) {
            Kind::Foreign | Kind::Stranger => {
                Err(PoolError::Foreign { name: self.full(name), tag: names::TAG })
            }
            _ => Ok(Some(lv.clone())),
        }
    }

    fn find_volume(&self, lvs: &[Lv], id: VolumeId) -> Result<Option<VolumeInfo>> {
        Ok(self.find(lvs, &names::volume(id))?.map(|lv| self.volume_info(id, &lv)))
    }

    fn find_snapshot(
        &self,
        lvs: &[Lv],
        volume: VolumeId,
        id: SnapshotId,
    ) -> Result<Option<SnapshotInfo>> {
        let Some(lv) = self.find(lvs, &names::snapshot(id))? else {
            return Ok(None);
        };
        match self.kind(&lv) {
            Kind::Snapshot { volume: of, .. } if of == volume => {
                Ok(Some(snapshot_info(volume, id, &lv)))
            }
            _ => Err(PoolError::Conflict {
                what: format!("snapshot {id}"),
                have: format!("tags {}", lv.tags.join(",")),
                want: format!("volume {volume}"),
            }),
        }
    }

    fn volume_info(&self, id: VolumeId, lv: &Lv) -> VolumeInfo {
        VolumeInfo {
            id,
            bytes: lv.bytes,
            allocated_bytes: lv.allocated_bytes(),
            path: self.device(&lv.name),
            active: lv.is_active,
        }
    }

    fn wanted_volume(&self, id: VolumeId) -> Result<VolumeInfo> {
        let found = self.find_volume(&self.report()?, id)?;
        found.ok_or_else(|| self.not_found(format!("volume {id}")))
    }

    /// A logical volume that must be there, by its name.
    fn wanted(&self, name: &str) -> Result<Lv> {
        let found = self.find(&self.report()?, name)?;
        found.ok_or_else(|| self.not_found(self.full(name)))
    }

    /// A snapshot of this volume, and its logical volume.
    fn wanted_snapshot(
        &self,
        lvs: &[Lv],
        volume: VolumeId,
        id: SnapshotId,
    ) -> Result<(SnapshotInfo, Lv)> {
        let found = self.find_snapshot(lvs, volume, id)?.zip(self.find(lvs, &names::snapshot(id))?);
        found.ok_or_else(|| self.not_found(format!("snapshot {id} of volume {volume}")))
    }

    /// Makes an empty logical volume. Atomic.
    fn create_thin(&self, name: &str, bytes: u64, tags: &[String]) -> Result<()> {
        let (pool, size) = (self.full(&self.thin_pool), format!("{bytes}b"));
        let mut args = vec!["lvcreate", "--type", "thin", "--thinpool", &pool, "--name", name];
        args.extend(["--virtualsize", &size, "--activate", "n"]);
        self.create(args, tags)
    }

    /// Makes a snapshot of a logical volume. Atomic.
    fn create_thin_snapshot(&self, of: &str, name: &str, tags: &[String]) -> Result<()> {
        let origin = self.full(of);
        let mut args = vec!["lvcreate", "--snapshot", "--name", name, "--permission", "rw"];
        args.extend(["--activate", "n", &origin]);
        self.create(args, tags)
    }

    fn create<'a>(&self, mut args: Vec<&'a str>, tags: &'a [String]) -> Result<()> {
        args.extend(NEW_ARGS);
        tags.iter().for_each(|tag| args.extend(["--addtag", tag]));
        lvm(&args).map(drop)
    }

    /// A snapshot under a name for what is unfinished, grown to `bytes`.
    fn draft_of(self: &Arc<Self>, of: &Lv, bytes: u64) -> Result<Unfinished> {
        let draft = Unfinished::new(self, names::random_new());
        self.create_thin_snapshot(&of.name, &draft.name, &[])?;
        if bytes > of.bytes {
            self.extend(&draft.name, bytes)?;
        }
        Ok(draft)
    }

    fn extend(&self, name: &str, bytes: u64) -> Result<()> {
        lvm(&["lvextend", "--quiet", "--size", &format!("{bytes}b"), &self.full(name)]).map(drop)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        lvm(&["lvrename", "--quiet", &self.vg, from, to]).map(drop)
    }

    fn set_active(&self, name: &str, active: bool) -> Result<()> {
        let value = if active { "y" } else { "n" };
        let mut args = vec!["lvchange", "--quiet", "--yes", "--config", CHECK];
        args.extend(["--ignoreactivationskip", "--activate", value]);
        lvm(&[&args[..], &[&self.full(name)]].concat()).map(drop)
    }

    fn set_permission(&self, name: &str, value: &str) -> Result<()> {
        lvm(&["lvchange", "--quiet", "--permission", value, &self.full(name)]).map(drop)
    }

    /// Opens a logical volume, of which `bytes` count, for reading.
    fn open_shared(&self, lv: &Lv, bytes: u64, what: String) -> Result<Opened> {
        if !lv.is_active {
            // It stays active: another reader may come, and it costs a device node.
            self.set_active(&lv.name, true)?;
        }
        let path = self.device(&lv.name);
        let file = open_locked(&path, false, Claim::Shared, &what)?;
        let file = file.ok_or_else(|| self.not_found(what))?;
        Ok(Opened::new(file, path, bytes))
    }

    /// An empty logical volume under a name for what is unfinished, open for writing.
    fn empty_draft(self: &Arc<Self>, bytes: u64, tags: &[String]) -> Result<LvmDraft> {
        self.fit_pool(&self.report()?)?;
        let unfinished = Unfinished::new(self, names::random_new());
        self.create_thin(&unfinished.name, bytes, tags)?;
        self.set_active(&unfinished.name, true)?;
        let path = self.device(&unfinished.name);
        let what = format!("draft {}", path.display());
        let file = open_locked(&path, true, Claim::Exclusive, &what)?;
        let file = file.ok_or_else(|| self.not_found(what))?;
        Ok(LvmDraft { file, path, unfinished })
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the making of a volume under another name.
    fn publish_volume(&self, id: VolumeId, draft: Unfinished, bytes: u64) -> Result<VolumeInfo> {
        let renamed = draft.rename(&names::volume(id));
        match (renamed, self.find_volume(&self.report()?, id)?) {
            // Who comes second is answered like one who comes later.
            (_, Some(have)) => same_size(have, bytes),
            (Err(error), None) => Err(error),
            (Ok(()), None) => Err(self.not_found(format!("volume {id}"))),
        }
    }
}

fn snapshot_info(volume: VolumeId, id: SnapshotId, lv: &Lv) -> SnapshotInfo {
    SnapshotInfo { volume, id, bytes: lv.bytes, allocated_bytes: lv.allocated_bytes() }
}

impl Inner {
    fn image(&self, id: ImageId) -> Result<Option<ImageInfo>> {
        let found = self.find(&self.report()?, &names::image(id))?;
        Ok(found.and_then(|lv| self.image_info(&lv)))
    }

    fn image_info(&self, lv: &Lv) -> Option<ImageInfo> {
        match self.kind(lv) {
            Kind::Image { id, bytes } => {
                Some(ImageInfo { id, bytes, allocated_bytes: lv.allocated_bytes() })
            }
            _ => None,
        }
    }
}

impl Pool for LvmPool {
    fn spec(&self) -> &PoolSpec {
        &self.0.spec
    }

    fn grain_bytes(&self) -> u64 {
        self.0.extent_bytes
    }

    fn has_live_snapshots(&self) -> bool {
        true
    }

    fn create_volume(&self, id: VolumeId, bytes: u64) -> Result<VolumeInfo> {
        let bytes = round_up(bytes, self.0.extent_bytes)?;
        let lvs = self.0.report()?;
        if let Some(have) = self.0.find_volume(&lvs, id)? {
            return same_size(have, bytes);
        }
        self.0.fit_pool(&lvs)?;
        self.0.create_thin(&names::volume(id), bytes, &[])?;
        same_size(self.0.wanted_volume(id)?, bytes)
    }

    fn clone_image(&self, id: VolumeId, image: ImageId, bytes: u64) -> Result<VolumeInfo> {
        let bytes = round_up(bytes, self.0.extent_bytes)?;
        let lvs = self.0.report()?;
        if let Some(have) = self.0.find_volume(&lvs, id)? {
            return same_size(have, bytes);
        }
        self.0.fit_pool(&lvs)?;
        let found = self.0.find(&lvs, &names::image(image))?;
        let source = found.and_then(|lv| Some((self.0.image_info(&lv)?, lv)));
        let (info, lv) = source.ok_or_else(|| self.0.not_found(format!("image {image}")))?;
        holds_source(bytes, info.bytes, &format!("image {image}"))?;
        let draft = self.0.draft_of(&lv, bytes)?;
        self.0.publish_volume(id, draft, bytes)
    }

    fn clone_snapshot(
        &self,
        id: VolumeId,
        volume: VolumeId,
        snapshot: SnapshotId,
        bytes: u64,
    ) -> Result<VolumeInfo> {
        let bytes = round_up(bytes, self.0.extent_bytes)?;
        let lvs = self.0.report()?;
        if let Some(have) = self.0.find_volume(&lvs, id)? {
            return same_size(have, bytes);
        }
        self.0.fit_pool(&lvs)?;
        let (info, lv) = self.0.wanted_snapshot(&lvs, volume, snapshot)?;
        holds_source(bytes, info.bytes, &format!("snapshot {snapshot}"))?;
        let draft = self.0.draft_of(&lv, bytes)?;
        self.0.publish_volume(id, draft, bytes)
    }

    fn draft_volume(&self, bytes: u64) -> Result<Box<dyn VolumeDraft>> {
        let bytes = round_up(bytes, self.0.extent_bytes)?;
        Ok(Box::new(self.0.empty_draft(bytes, &[])?))
    }

    fn volume(&self, id: VolumeId) -> Result<Option<VolumeInfo>> {
        self.0.find_volume(&self.0.report()?, id)
    }

    fn grow_volume(&self, id: VolumeId, bytes: u64) -> Result<VolumeInfo> {
        let bytes = round_up(bytes, self.0.extent_bytes)?;
        let have = self.volume(id)?.ok_or_else(|| self.0.not_found(format!("volume {id}")))?;
        if !grows(&have, bytes)? {
            return Ok(have);
        }
        self.0.extend(&names::volume(id), bytes)?;
        self.0.wanted_volume(id)
    }

    fn delete_volume(&self, id: VolumeId) -> Result<()> {
        self.0.delete_named(&self.0.report()?, &names::volume(id), &format!("volume {id}"))
    }

    fn activate(&self, id: VolumeId) -> Result<PathBuf> {
        let have = self.volume(id)?.ok_or_else(|| self.0.not_found(format!("volume {id}")))?;
        if !have.active {
            self.0.set_active(&names::volume(id), true)?;
        }
        std::fs::metadata(&have.path).map_err(PoolError::io("find", &have.path))?;
        Ok(have.path)
    }

    fn deactivate(&self, id: VolumeId) -> Result<()> {
        let lvs = self.0.report()?;
        let Some(lv) = self.0.find(&lvs, &names::volume(id))?.filter(|lv| lv.is_active) else {
            return Ok(());
        };
        let what = format!("volume {id}");
        drop(open_locked(&self.0.device(&lv.name), false, Claim::Exclusive, &what)?);
        self.0.set_active(&lv.name, false)
    }

    fn open_volume(&self, id: VolumeId) -> Result<Opened> {
        let what = format!("volume {id}");
        let found = self.0.find(&self.0.report()?, &names::volume(id))?;
        let lv = found.ok_or_else(|| self.0.not_found(what.clone()))?;
        self.0.open_shared(&lv, lv.bytes, what)
    }

    fn draft_snapshot(
        &self,
        volume: VolumeId,
        id: SnapshotId,
        cancel: &AtomicBool,
    ) -> Result<Box<dyn SnapshotDraft>> {
        let lvs = self.0.report()?;
        let lv = self.0.find(&lvs, &names::volume(volume))?;
        let lv = lv.ok_or_else(|| self.0.not_found(format!("volume {volume}")))?;
        if lv.is_active {
            // A VMM writes through the page cache, below which the snapshot is taken.
            let path = self.0.device(&lv.name);
            let synced = File::open(&path).and_then(|file| file.sync_all());
            synced.map_err(PoolError::io("sync", &path))?;
        }
        if cancel.load(Ordering::Relaxed) {
            return Err(PoolError::Cancelled);
        }
        let unfinished = Unfinished::new(&self.0, names::random_new());
        let tags = [names::tag(names::TAG_VOLUME, volume)];
        self.0.create_thin_snapshot(&lv.name, &unfinished.name, &tags)?;
        Ok(Box::new(LvmSnapshotDraft { unfinished, volume, id }))
    }

    fn open_snapshot(&self, volume: VolumeId, id: SnapshotId) -> Result<Opened> {
        let (info, lv) = self.0.wanted_snapshot(&self.0.report()?, volume, id)?;
        self.0.open_shared(&lv, info.bytes, format!("snapshot {id} of volume {volume}"))
    }

    fn delete_snapshot(&self, volume: VolumeId, id: SnapshotId) -> Result<()> {
        let lvs = self.0.report()?;
        if self.0.find_snapshot(&lvs, volume, id)?.is_none() {
            return Ok(());
        }
        self.0.delete_named(&lvs, &names::snapshot(id), &format!("snapshot {id}"))
    }

    fn image(&self, id: ImageId) -> Result<Option<ImageInfo>> {
        self.0.image(id)
    }

    fn open_image(&self, id: ImageId) -> Result<Opened> {
        let what = format!("image {id}");
        let found = self.0.find(&self.0.report()?, &names::image(id))?;
        let found = found.and_then(|lv| Some((self.0.image_info(&lv)?, lv)));
        let (info, lv) = found.ok_or_else(|| self.0.not_found(what.clone()))?;
        self.0.open_shared(&lv, info.bytes, what)
    }

    fn delete_image(&self, id: ImageId) -> Result<()> {
        self.0.delete_named(&self.0.report()?, &names::image(id), &format!("image {id}"))
    }

    fn draft_image(&self, bytes: u64) -> Result<Box<dyn ImageDraft>> {
        let rounded = round_up(bytes, self.0.extent_bytes)?;
        let tags = [names::tag(names::TAG_BYTES, bytes)];
        Ok(Box::new(self.0.empty_draft(rounded, &tags)?))
    }

    fn usage(&self) -> Result<PoolUsage> {
        let lvs = self.0.report()?;
        let pool = self.0.fit_pool(&lvs)?;
        Ok(PoolUsage {
            bytes: pool.bytes,
            used_bytes: pool.allocated_bytes().unwrap_or(0),
            metadata_fraction: pool.metadata_fraction,
            fault: self.0.fault(pool),
        })
    }

    fn list(&self) -> Result<Contents> {
        let mut all = Contents::default();
        let mut lvs = self.0.report()?;
        lvs.sort_by(|a, b| a.name.cmp(&b.name));
        for lv in &lvs {
            match self.0.kind(lv) {
                Kind::Volume(id) => all.volumes.push(self.0.volume_info(id, lv)),
                Kind::Snapshot { volume, id } => {
                    all.snapshots.push(snapshot_info(volume, id, lv));
                }
                Kind::Image { .. } => all.images.extend(self.0.image_info(lv)),
                Kind::Leftover => all.leftovers.push(lv.name.clone()),
                Kind::Stranger => all.strangers.push(lv.name.clone()),
                Kind::Foreign => {}
            }
        }
        all.snapshots.sort();
        Ok(all)
    }

    fn clean_up(&self) -> Result<Vec<String>> {
        self.0.clean_up()
    }
}
