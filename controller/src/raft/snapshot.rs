//! A snapshot's data: every row, sorted, with the digest that the receiver checks.

use std::sync::Arc;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;
use raft::eraftpb::{ConfState, Snapshot, SnapshotMetadata};

use super::log::Position;
use crate::store::{Row, State};

const FORMAT: u32 = 1;

/// Everything that a snapshot is made of. Making it takes a pointer; [`SnapshotJob::run`]
/// takes its time, on a thread of its own.
pub struct SnapshotJob {
    pub(crate) cluster_id: String,
    pub(crate) at: Position,
    pub(crate) conf_state: ConfState,
    pub(crate) state: State,
}

impl SnapshotJob {
    /// Builds the snapshot.
    #[must_use]
    pub fn run(self) -> Snapshot {
        let rows = self.state.rows().map(|(key, row)| pb::SnapshotRow {
            table: key.0.into(),
            key: key.1.to_string(),
            create_revision: row.create_revision,
            mod_revision: row.mod_revision,
            value: row.value.clone(),
        });
        let content = pb::SnapshotContent {
            format: FORMAT,
            cluster_id: self.cluster_id,
            revision: self.state.revision(),
            content_hash: self.state.content_hash(),
            rows: rows.collect(),
        };
        let metadata = SnapshotMetadata {
            conf_state: Some(self.conf_state),
            index: self.at.index,
            term: self.at.term,
        };
        Snapshot { data: content.encode_to_vec(), metadata: Some(metadata) }
    }
}

/// Why a snapshot was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No protobuf of this shape.
    #[error("the snapshot is damaged")]
    Encoding(#[from] prost::DecodeError),
    /// Written by another version.
    #[error("the snapshot has format {0}, this version reads {FORMAT}")]
    Format(u32),
    /// From elsewhere.
    #[error("the snapshot is of cluster {0:?}")]
    Cluster(String),
    /// Its rows are not those that were sent.
    #[error("the snapshot's rows do not match their digest")]
    Digest,
}

/// Reads and checks a snapshot's data.
pub(crate) fn read(cluster_id: &str, data: Vec<u8>) -> Result<State, SnapshotError> {
    let content = pb::SnapshotContent::decode(Bytes::from(data))?;
    if content.format != FORMAT {
        return Err(SnapshotError::Format(content.format));
    }
    if content.cluster_id != cluster_id {
        return Err(SnapshotError::Cluster(content.cluster_id));
    }
    let mut rows = Vec::with_capacity(content.rows.len());
    for row in content.rows {
        let table = u8::try_from(row.table).map_err(|_| SnapshotError::Digest)?;
        let key = (table, Arc::from(row.key.as_str()));
        rows.push((
            key,
            Row {
                create_revision: row.create_revision,
                mod_revision: row.mod_revision,
                value: row.value,
            },
        ));
    }
    let state = State::restore(content.revision, rows);
    if state.content_hash() != content.content_hash {
        return Err(SnapshotError::Digest);
    }
    Ok(state)
}
