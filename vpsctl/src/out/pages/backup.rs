//! Backups in a directory.

use crate::{
    backup::Manifest,
    out::{
        human::{plural, short, size},
        table::Table,
    },
};

/// The backups, oldest first.
pub(crate) fn backups(manifests: &[Manifest]) -> String {
    let mut table = Table::new(&["NAME", "DOMAIN", "TAKEN", "FROZEN", "DISKS", "SIZE", "DATA"]);
    for manifest in manifests {
        table.row(vec![
            manifest.name.clone(),
            short(&manifest.domain).to_owned(),
            manifest.snapshot_time.clone(),
            if manifest.quiesced { "yes" } else { "no" }.to_owned(),
            manifest.disks.len().to_string(),
            size(manifest.size_bytes()),
            size(data_bytes(manifest.block_count())),
        ]);
    }
    table.render()
}

fn data_bytes(blocks: u64) -> u64 {
    blocks.saturating_mul(crate::backup::BLOCK_BYTES as u64)
}

/// One sentence on a backup that was made.
pub(crate) fn backed_up(manifest: &Manifest, received_bytes: u64, added_blocks: u64) -> String {
    let disks = plural(manifest.disks.len(), "disk");
    let frozen = if manifest.quiesced { "frozen" } else { "not frozen" };
    format!(
        "{} has {disks} of {}, {}, filesystems {frozen}: {} came over, {} were new\n",
        manifest.name,
        short(&manifest.domain),
        size(manifest.size_bytes()),
        size(received_bytes),
        size(data_bytes(added_blocks)),
    )
}

/// What was found of one backup.
pub(crate) struct Verified {
    pub(crate) name: String,
    pub(crate) block_count: u64,
    /// Digests, and what is wrong with each.
    pub(crate) damaged: Vec<(String, String)>,
}

impl Verified {
    /// For programs.
    pub(crate) fn view(&self) -> serde_json::Value {
        let damaged: Vec<_> = self
            .damaged
            .iter()
            .map(|(digest, reason)| serde_json::json!({ "digest": digest, "reason": reason }))
            .collect();
        serde_json::json!({
            "name": self.name,
            "ok": self.damaged.is_empty(),
            "block_count": self.block_count,
            "damaged": damaged,
        })
    }
}

/// The backups, and below them each block that is not as it should be.
pub(crate) fn verified(backups: &[Verified]) -> String {
    let mut table = Table::new(&["NAME", "STATE", "BLOCKS", "DAMAGED"]);
    let mut troubles = String::new();
    for backup in backups {
        let state = if backup.damaged.is_empty() { "whole" } else { "DAMAGED" };
        table.row(vec![
            backup.name.clone(),
            state.to_owned(),
            backup.block_count.to_string(),
            backup.damaged.len().to_string(),
        ]);
        for (digest, reason) in &backup.damaged {
            troubles.push_str(&format!("{}: block {digest} {reason}\n", backup.name));
        }
    }
    let table = table.render();
    if troubles.is_empty() { table } else { format!("{table}\n{troubles}") }
}
