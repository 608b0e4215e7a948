//! From the disk to what a core begins with.

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;

use super::super::identity::KEY_APPLIED;
use super::Fatal;
use crate::store::{Engine, Family, State, parse_data_key};

/// Rows read at a time.
const LOAD_ROWS: usize = 1024;

pub(super) fn load_applied(engine: &dyn Engine) -> Result<pb::Applied, Fatal> {
    let bytes = engine
        .get(Family::State, KEY_APPLIED)?
        .ok_or_else(|| Fatal::Damaged("what is applied is missing".to_owned()))?;
    pb::Applied::decode(Bytes::from(bytes))
        .map_err(|e| Fatal::Damaged(format!("what is applied: {e}")))
}

pub(super) fn load_state(engine: &dyn Engine, revision: u64) -> Result<State, Fatal> {
    let mut rows = Vec::new();
    let mut from = Vec::new();
    loop {
        let read = engine.scan(Family::Data, &from, LOAD_ROWS)?;
        let full = read.len() == LOAD_ROWS;
        for (bytes, value) in read {
            let key =
                parse_data_key(&bytes).ok_or_else(|| Fatal::Damaged("a row's key".to_owned()))?;
            let row = pb::Row::decode(Bytes::from(value))
                .map_err(|e| Fatal::Damaged(format!("row {}: {e}", key.1)))?;
            rows.push((key, row.into()));
            // The next key in byte order.
            from = bytes;
            from.push(0);
        }
        if !full {
            return Ok(State::restore(revision, rows));
        }
    }
}
