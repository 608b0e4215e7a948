//! Who this node is: a UUID made once, and the cluster that it belongs to. Also the greatest
//! Raft term that it has seen, so that a controller that leads no more cannot make it end
//! domains, not even right after the agent's restart.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::process::try_lock;
use crate::records::{load_json, save_json};

const IDENTITY_VERSION: u32 = 1;
const TERM_VERSION: u32 = 1;

/// The node, as its state directory knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its id, without `nodes/`.
    pub node: String,
    /// The cluster that it belongs to.
    pub cluster_id: String,
    /// A UUID, made when the directory was.
    pub uid: String,
}

/// A state directory that is this agent's alone for as long as this value lives.
#[derive(Debug)]
pub struct Home {
    /// Who this node is.
    pub identity: Identity,
    term_path: PathBuf,
    term: u64,
    _lock: File,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Term {
    term: u64,
}

impl Home {
    /// Takes the state directory, making it (and the node's UUID) if it is new. One of another
    /// node or cluster is refused, and so is one that another agent has.
    pub fn open(state_dir: &Path, node: &str, cluster_id: &str) -> Result<Self, Error> {
        drover_storage::create_dir(state_dir)?;
        let lock_path = state_dir.join("agent.lock");
        let lock = try_lock(&lock_path)
            .map_err(|err| Error::io("lock", &lock_path, err))?
            .ok_or_else(|| Error::InUse(state_dir.to_owned()))?;
        let path = state_dir.join("node");
        let identity = match load_json::<Identity>(&path, IDENTITY_VERSION)? {
            Some(found) => found,
            None => {
                let made = Identity {
                    node: node.to_owned(),
                    cluster_id: cluster_id.to_owned(),
                    uid: uuid::Uuid::new_v4().to_string(),
                };
                save_json(&path, IDENTITY_VERSION, &made)?;
                made
            }
        };
        if identity.node != node || identity.cluster_id != cluster_id {
            return Err(Error::OtherIdentity {
                path: state_dir.to_owned(),
                node: identity.node,
                cluster: identity.cluster_id,
                given_node: node.to_owned(),
                given_cluster: cluster_id.to_owned(),
            });
        }
        let term_path = state_dir.join("term");
        let term = load_json::<Term>(&term_path, TERM_VERSION)?.unwrap_or_default().term;
        Ok(Self { identity, term_path, term, _lock: lock })
    }

    /// The greatest term seen.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Notes a greater term, durably; a lower one changes nothing.
    pub fn raise_term(&mut self, term: u64) -> Result<(), Error> {
        if term > self.term {
            save_json(&self.term_path, TERM_VERSION, &Term { term })?;
            self.term = term;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_keeps_its_uid_and_its_term() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut home = Home::open(&state, "host1", "c1").unwrap();
        let uid = home.identity.uid.clone();
        assert!(crate::wanted::is_uid(&uid));
        home.raise_term(7).unwrap();
        home.raise_term(3).unwrap();
        let err = Home::open(&state, "host1", "c1").unwrap_err();
        assert!(matches!(err, Error::InUse(_)), "{err}");
        drop(home);
        let home = Home::open(&state, "host1", "c1").unwrap();
        assert_eq!((home.identity.uid.as_str(), home.term()), (uid.as_str(), 7));
    }

    #[test]
    fn another_nodes_directory_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(Home::open(dir.path(), "host1", "c1").unwrap());
        for (node, cluster) in [("host2", "c1"), ("host1", "c2")] {
            let err = Home::open(dir.path(), node, cluster).unwrap_err();
            let text = err.to_string();
            assert!(text.starts_with("--state-dir") && text.contains("node host1"), "{text}");
            assert!(text.contains(node) && text.contains(cluster), "{text}");
            assert_eq!(err.exit_code(), 3);
        }
        Home::open(dir.path(), "host1", "c1").unwrap();
    }

    #[test]
    fn a_damaged_identity_is_no_new_node() {
        let dir = tempfile::tempdir().unwrap();
        drop(Home::open(dir.path(), "host1", "c1").unwrap());
        std::fs::write(dir.path().join("node"), "drover-record 1 len").unwrap();
        let err = Home::open(dir.path(), "host1", "c1").unwrap_err().to_string();
        assert!(err.contains("damaged"), "{err}");
    }
}
