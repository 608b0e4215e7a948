//! Why a call to a VMM did not do what was asked; what gRPC makes of that is decided here.

use tonic::{Code, Status};

use crate::config::FieldError;
use crate::guest_agent::AgentError;
use crate::migration::ControlError;
use crate::saved::SaveError;

/// An error of a call.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A field of the request is not accepted.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// Not in this state.
    #[error("{asked}: not possible while {state}")]
    State {
        /// What was asked for.
        asked: &'static str,
        /// Why not.
        state: String,
    },
    /// There is no such migration.
    #[error("migration_id: {asked}; accepted: {accepted}")]
    NoMigration {
        /// The one that was named.
        asked: String,
        /// What could have been.
        accepted: String,
    },
    /// A migration did not take a decision.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest was not saved, and goes on.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The guest's agent gave no result.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Too many calls at once, or the VMM is ending.
    #[error("the VMM is busy or ending")]
    Busy,
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
}

impl From<VmmError> for Status {
    fn from(error: VmmError) -> Self {
        let code = match &error {
            VmmError::Field(_) => Code::InvalidArgument,
            VmmError::State { .. } | VmmError::Control(_) => Code::FailedPrecondition,
            VmmError::NoMigration { .. } => Code::NotFound,
            VmmError::Agent(error) => match error {
                AgentError::Field(_) => Code::InvalidArgument,
                AgentError::Refused { .. } => Code::FailedPrecondition,
                AgentError::Busy { .. } | AgentError::Closed => Code::Unavailable,
                AgentError::NoAnswer { .. } => Code::DeadlineExceeded,
                AgentError::TooLarge { .. } => Code::ResourceExhausted,
                AgentError::Malformed { .. } => Code::DataLoss,
            },
            VmmError::Save(error) => match error {
                SaveError::Volume(_) => Code::InvalidArgument,
                SaveError::TooSmall { .. } => Code::ResourceExhausted,
                SaveError::Cancelled => Code::Aborted,
                _ => Code::Internal,
            },
            VmmError::Busy => Code::Unavailable,
            VmmError::Failed(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
