//! Everything that can go wrong in the agent, in words for its log and for `state_reason`.

use std::io;
use std::path::{Path, PathBuf};

/// One error of the agent. The messages name the flag, file, interface or call.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag has a value that is not accepted.
    #[error("{flag}: {reason}")]
    Flag {
        /// As on the command line.
        flag: &'static str,
        /// The value, and what is accepted.
        reason: String,
    },
    /// The state directory was made by another node or cluster.
    #[error(
        "--state-dir {path}: belongs to node {node} of cluster {cluster}, and this agent was \
         started with --node {given_node} --cluster-id {given_cluster}; start it as it was, or \
         give it another directory"
    )]
    OtherIdentity {
        /// The state directory.
        path: PathBuf,
        /// The node that it belongs to.
        node: String,
        /// The cluster that it belongs to.
        cluster: String,
        /// `--node`.
        given_node: String,
        /// `--cluster-id`.
        given_cluster: String,
    },
    /// Another agent runs on the same state directory.
    #[error("--state-dir {0}: another drover-agent is running on it")]
    InUse(PathBuf),
    /// The controllers are of another cluster.
    #[error(
        "--cluster-id {cluster}: the controller at {address} refuses it: {reason}; give the id \
         of its cluster, or the addresses of the right controllers"
    )]
    WrongCluster {
        /// `--cluster-id`.
        cluster: String,
        /// The controller that refused.
        address: String,
        /// Its words.
        reason: String,
    },
    /// A record on disk.
    #[error(transparent)]
    Storage(#[from] drover_storage::Error),
    /// A pool, or what is in it.
    #[error(transparent)]
    InPool(#[from] drover_storage::PoolError),
    /// Those who could help are helping others now.
    #[error("{0}")]
    Busy(String),
    /// There is no room for what is to come.
    #[error("{0}")]
    NoRoom(String),
    /// A record that is whole, but says nothing that this agent understands.
    #[error("{path}: the record cannot be used: {reason}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file or directory.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A network interface or bridge.
    #[error("{name}: cannot {action}: {source}")]
    Net {
        /// What was being done.
        action: &'static str,
        /// The interface.
        name: String,
        /// The reason.
        source: io::Error,
    },
    /// What a domain asks for cannot be had on this node.
    #[error("{0}")]
    Domain(String),
    /// The VMM's API answered with an error.
    #[error("VMM: {call}: {}", .status.message())]
    Vmm {
        /// The call.
        call: &'static str,
        /// Its answer.
        status: Box<tonic::Status>,
    },
    /// The VMM's API did not answer in time.
    #[error("VMM: {call}: no answer within {seconds} s")]
    VmmTimeout {
        /// The call.
        call: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The process of a VMM could not be started or followed.
    #[error("VMM process: cannot {action}: {source}")]
    Process {
        /// What was being done.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// A part of the agent has ended that never should.
    #[error("the agent's {0} ended")]
    Ended(&'static str),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// The process's exit code for it: 2 usage, 3 the directory is another's, 4 the cluster is
    /// another, 1 anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Flag { .. } => 2,
            Self::OtherIdentity { .. } | Self::InUse(_) => 3,
            Self::WrongCluster { .. } => 4,
            _ => 1,
        }
    }
}

/// Runs what blocks (fsync, ioctl, fork) off the runtime's threads.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Error> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Ended("blocking task")),
    }
}
