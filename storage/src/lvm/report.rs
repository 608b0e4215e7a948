//! LVM's report of a volume group, read from its JSON. Pure.

use serde::Deserialize;

use crate::{PoolError, Result};

/// What `lvs` is asked for.
pub(super) const FIELDS: &str = "lv_name,lv_size,lv_tags,segtype,pool_lv,data_percent,\
                                 metadata_percent,lv_active,zero,discards,lv_health_status,\
                                 lv_when_full,vg_extent_size";

/// Of a report's complaints, this many are shown.
const COMPLAINTS_MAX: usize = 8;

/// A logical volume.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Lv {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) tags: Vec<String>,
    /// "thin-pool", "thin", "linear" …
    pub(super) segtype: String,
    /// The thin pool it lives in, or nothing.
    pub(super) pool: String,
    /// Of a thin pool or an active thin volume: how much of it is allocated, 0 to 1.
    pub(super) data_fraction: Option<f64>,
    pub(super) metadata_fraction: Option<f64>,
    pub(super) is_active: bool,
    /// Of a thin pool: whether new blocks are zeroed.
    pub(super) zeroes: bool,
    /// Of a thin pool: "ignore", "nopassdown" or "passdown".
    pub(super) discards: String,
    /// Of a thin pool: "queue" or "error".
    pub(super) when_full: String,
    /// Empty while all is well.
    pub(super) health: String,
    pub(super) extent_bytes: u64,
}

impl Lv {
    /// A tag's value, of those written `key=value`.
    pub(super) fn tag(&self, key: &str) -> Option<&str> {
        self.tags.iter().find_map(|tag| tag.strip_prefix(key)?.strip_prefix('='))
    }

    /// How much room it takes, where that is known.
    pub(super) fn allocated_bytes(&self) -> Option<u64> {
        self.data_fraction.map(|fraction| (self.bytes as f64 * fraction) as u64)
    }
}

/// Reads the report that `command` gave.
pub(super) fn parse(command: &str, json: &[u8]) -> Result<Vec<Lv>> {
    let wrong = |detail: String| PoolError::Report { command: command.to_owned(), detail };
    let report: Report = serde_json::from_slice(json).map_err(|error| wrong(error.to_string()))?;
    let rows = report.report.into_iter().flat_map(|section| section.lv);
    rows.map(|row| row.read().map_err(wrong)).collect()
}

/// What a report says went wrong; nothing when it is no report.
pub(super) fn complaints(json: &[u8]) -> String {
    let log = serde_json::from_slice::<Report>(json).map(|report| report.log).unwrap_or_default();
    let errors = log.into_iter().filter(|line| line.log_type == "error");
    let errors: Vec<String> = errors.take(COMPLAINTS_MAX).map(|line| line.log_message).collect();
    errors.join("; ")
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Section>,
    #[serde(default)]
    log: Vec<LogLine>,
}

#[derive(Deserialize)]
struct LogLine {
    log_type: String,
    log_message: String,
}

#[derive(Deserialize)]
struct Section {
    lv: Vec<Row>,
}

/// Every value is a string in LVM's JSON.
#[derive(Deserialize)]
struct Row {
    lv_name: String,
    lv_size: String,
    lv_tags: String,
    segtype: String,
    pool_lv: String,
    data_percent: String,
    metadata_percent: String,
    lv_active: String,
    zero: String,
    discards: String,
    lv_health_status: String,
    lv_when_full: String,
    vg_extent_size: String,
}

impl Row {
    fn read(self) -> std::result::Result<Lv, String> {
        let tags = self.lv_tags.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned);
        Ok(Lv {
            bytes: bytes("lv_size", &self.lv_size)?,
            tags: tags.collect(),
            data_fraction: fraction("data_percent", &self.data_percent)?,
            metadata_fraction: fraction("metadata_percent", &self.metadata_percent)?,
            is_active: self.lv_active == "active",
            zeroes: self.zero == "zero",
            extent_bytes: bytes("vg_extent_size", &self.vg_extent_size)?,
            name: self.lv_name,
            segtype: self.segtype,
            pool: self.pool_lv,
            discards: self.discards,
            health: self.lv_health_status,
            when_full: self.lv_when_full,
        })
    }
}

fn bytes(field: &str, text: &str) -> std::result::Result<u64, String> {
    text.parse().map_err(|_| format!("{field}: {text:?} is no number of bytes"))
}

/// Empty where LVM does not know, as for what is not active.
fn fraction(field: &str, text: &str) -> std::result::Result<Option<f64>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let percent = text.parse::<f64>().ok().filter(|percent| (0.0..=100.0).contains(percent));
    percent.map(|percent| Some(percent / 100.0)).ok_or_else(|| format!("{field}: {text:?}"))
}
