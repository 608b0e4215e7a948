//! Whose data directory this is.
//!
//! A Raft member is its disk: one that votes from an empty disk under an old name can undo an
//! acknowledged write. So a data directory is made once, for one member of one cluster, and
//! gets a **storage id**, a UUID. The leader records the storage id of each member at first
//! contact (table META); from then on a member that calls itself by the same number from
//! another storage is refused.

use std::collections::BTreeMap;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;
use prost_raft::Message as _;
use raft::eraftpb::ConfState;

use super::log::Log;
use crate::store::{Batch, Engine, EngineError, Family, MemberId, Record, Table};

const FORMAT: u32 = 1;
const KEY_IDENTITY: &[u8] = b"identity";
pub(crate) const KEY_APPLIED: &[u8] = b"applied";

impl Record for pb::MemberRecord {
    const TABLE: Table = Table::Meta;
    fn key(&self) -> String {
        member_key(self.id)
    }
}

/// Key of a member's record in table META.
#[must_use]
pub fn member_key(id: MemberId) -> String {
    format!("members/{id}")
}

/// Who a member is to be, as its flags say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// `--cluster-id`.
    pub cluster_id: String,
    /// `--id`.
    pub member: MemberId,
    /// `--member`: every member's `host:port`.
    pub members: BTreeMap<MemberId, String>,
}

/// Who a member is, as its disk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster_id: String,
    /// The member.
    pub member: MemberId,
    /// The data directory's own name.
    pub storage_id: String,
    /// The voters that the cluster was started with, ascending.
    pub voters: Vec<MemberId>,
}

/// The data directory is somebody else's.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Made for another cluster.
    #[error(
        "--cluster-id \"{flag}\": the data directory belongs to cluster \"{disk}\"; give that id, \
         or another --data-dir"
    )]
    Cluster {
        /// What the flag says.
        flag: String,
        /// What the disk says.
        disk: String,
    },
    /// Made for another member.
    #[error(
        "--id {flag}: the data directory belongs to member {disk}; give that id, or another \
         --data-dir"
    )]
    Member {
        /// What the flag says.
        flag: MemberId,
        /// What the disk says.
        disk: MemberId,
    },
    /// Made with other members.
    #[error(
        "--member: the cluster was started with members {disk:?}, the flags name {flag:?}; name \
         the same ones (addresses may change)"
    )]
    Voters {
        /// What the flags say.
        flag: Vec<MemberId>,
        /// What the disk says.
        disk: Vec<MemberId>,
    },
    /// Written by a newer version.
    #[error(
        "--data-dir: its format is {0}, this version reads {FORMAT}; it was written by a newer \
         drover-controller, run that one"
    )]
    Format(u32),
    /// The disk failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Identity {
    /// Reads whose data directory it is and checks the claim; makes it the claim's when it is
    /// empty, with `storage_id`.
    ///
    /// # Errors
    /// See [`IdentityError`]; nothing is written then.
    pub fn establish(
        engine: &dyn Engine,
        claim: &Claim,
        storage_id: &str,
    ) -> Result<Self, IdentityError> {
        match engine.get(Family::State, KEY_IDENTITY)? {
            Some(bytes) => Self::check(bytes, claim),
            None => Self::create(engine, claim, storage_id),
        }
    }

    fn check(bytes: Vec<u8>, claim: &Claim) -> Result<Self, IdentityError> {
        let disk = pb::Identity::decode(Bytes::from(bytes))
            .map_err(|e| EngineError(format!("the identity is damaged: {e}")))?;
        if disk.format != FORMAT {
            return Err(IdentityError::Format(disk.format));
        }
        if disk.cluster_id != claim.cluster_id {
            let (flag, disk) = (claim.cluster_id.clone(), disk.cluster_id);
            return Err(IdentityError::Cluster { flag, disk });
        }
        if disk.member_id != claim.member {
            return Err(IdentityError::Member { flag: claim.member, disk: disk.member_id });
        }
        let flag: Vec<_> = claim.members.keys().copied().collect();
        if disk.voters != flag {
            return Err(IdentityError::Voters { flag, disk: disk.voters });
        }
        Ok(Self {
            cluster_id: disk.cluster_id,
            member: disk.member_id,
            storage_id: disk.storage_id,
            voters: disk.voters,
        })
    }

    fn create(engine: &dyn Engine, claim: &Claim, storage_id: &str) -> Result<Self, IdentityError> {
        let voters: Vec<_> = claim.members.keys().copied().collect();
        let mut batch = Batch::default();
        let first = Log::bootstrap(&mut batch);
        let conf_state = ConfState { voters: voters.clone(), ..ConfState::default() };
        let applied = pb::Applied {
            index: first.index,
            term: first.term,
            conf_state: conf_state.encode_to_vec().into(),
            ..pb::Applied::default()
        };
        batch.put(Family::State, KEY_APPLIED, prost::Message::encode_to_vec(&applied));
        let identity = pb::Identity {
            format: FORMAT,
            cluster_id: claim.cluster_id.clone(),
            member_id: claim.member,
            storage_id: storage_id.to_owned(),
            voters: voters.clone(),
        };
        batch.put(Family::State, KEY_IDENTITY, prost::Message::encode_to_vec(&identity));
        engine.write(batch, true)?;
        Ok(Self {
            cluster_id: claim.cluster_id.clone(),
            member: claim.member,
            storage_id: storage_id.to_owned(),
            voters,
        })
    }
}
