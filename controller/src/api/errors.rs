//! What callers are told: one place that turns everything into a gRPC status.
//!
//! | what | code |
//! | --- | --- |
//! | a field that is not accepted | INVALID_ARGUMENT, `BadRequest` with field and what is accepted |
//! | no such resource | NOT_FOUND, `ResourceInfo` |
//! | there is one already | ALREADY_EXISTS, `ResourceInfo` |
//! | another operation holds it; the etag is old | ABORTED |
//! | not in a state for it | FAILED_PRECONDITION, `PreconditionFailure` |
//! | no node fits | RESOURCE_EXHAUSTED, `PreconditionFailure` with each node's reason |
//! | no leader, leadership moved, overloaded | UNAVAILABLE, `RetryInfo`: try again |
//!
//! Each carries `ErrorInfo` with a stable reason, domain `drover`.

use std::collections::HashMap;
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::store::{CommitError, ReadError};
use crate::workflows::{Refusal, cut};

/// The `domain` of every `ErrorInfo`.
pub const ERROR_DOMAIN: &str = "drover";
/// Metadata of UNAVAILABLE: where the leader is.
pub const LEADER_METADATA: &str = "drover-leader";
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Why a call was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The caller's to change.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This member does not lead (any more).
    #[error("this controller does not lead")]
    NotLeading {
        /// Who does, if known.
        leader_address: Option<String>,
    },
    /// It may have been carried out, or not.
    #[error(
        "it is not known whether the change was made: ask again with the same request_id, or look"
    )]
    Unknown,
    /// Too much is under way.
    #[error("this controller is overloaded")]
    Busy,
    /// The rows kept changing while it was decided.
    #[error("the cluster changes too fast to decide this: try again")]
    Contended,
    /// The process ends.
    #[error("this controller is stopping")]
    Stopping,
    /// More than one transaction holds.
    #[error("the change is too large ({bytes} bytes)")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// A field of the request is not accepted.
#[must_use]
pub fn invalid(field: &str, value: &str, expected: &str) -> Refusal {
    Refusal::Invalid { field: field.into(), value: value.into(), expected: expected.into() }
}

/// UNAVAILABLE, with the leader's address where it is known.
#[must_use]
pub fn not_leading(leader_address: Option<&str>) -> Status {
    let leader_address = leader_address.map(str::to_owned);
    Fault::NotLeading { leader_address }.into()
}

impl From<CommitError> for Fault {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Guard { .. } => Self::Contended,
            CommitError::NotLeader { leader_address } => Self::NotLeading { leader_address },
            CommitError::Unknown => Self::Unknown,
            CommitError::TooLarge { bytes } => Self::TooLarge { bytes },
            CommitError::Busy => Self::Busy,
            CommitError::Closed => Self::Stopping,
        }
    }
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::NoLeader => Self::NotLeading { leader_address: None },
            ReadError::Busy => Self::Busy,
            ReadError::Closed => Self::Stopping,
        }
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let message = fault.to_string();
        let (reason, leader) = match fault {
            Fault::Refused(refusal) => return refusal.into(),
            Fault::TooLarge { .. } => {
                return with(Code::InvalidArgument, message, "TOO_LARGE", ErrorDetails::new());
            }
            Fault::NotLeading { leader_address } => ("NOT_LEADING", leader_address),
            Fault::Unknown => ("OUTCOME_UNKNOWN", None),
            Fault::Busy => ("OVERLOADED", None),
            Fault::Contended => ("CONTENDED", None),
            Fault::Stopping => ("STOPPING", None),
        };
        let mut details = ErrorDetails::new();
        details.set_retry_info(Some(RETRY_AFTER));
        let mut status = with(Code::Unavailable, message, reason, details);
        if let Some(value) = leader.and_then(|leader| MetadataValue::try_from(leader).ok()) {
            status.metadata_mut().insert(LEADER_METADATA, value);
        }
        status
    }
}

/// Errors travel in headers, of which a client takes 16 KiB in all; some texts more than once,
/// and larger than they are. So all of them are bounded here, whoever wrote them.
const MESSAGE_BYTES_MAX: usize = 1024;
const VIOLATIONS_MAX: usize = 16;
const VIOLATION_BYTES_MAX: usize = 200;

/// What is shown of a long or odd value.
pub(super) fn excerpt(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    let mut shown: String = text.chars().take(CHARS_MAX).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}

/// What callers gave is echoed in part.
fn excerpted(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::Invalid { field, value, expected } => {
            Refusal::Invalid { field, value: excerpt(&value), expected }
        }
        Refusal::Changed { name, given, etag } => {
            Refusal::Changed { name, given: excerpt(&given), etag }
        }
        other => other,
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let refusal = excerpted(refusal);
        let message = cut(&refusal.to_string(), MESSAGE_BYTES_MAX);
        let mut details = ErrorDetails::new();
        let (code, reason) = match &refusal {
            Refusal::Invalid { field, value, expected } => {
                let text = format!("{value:?} is not accepted: {expected}");
                details.add_bad_request_violation(field.clone(), cut(&text, MESSAGE_BYTES_MAX));
                (Code::InvalidArgument, "INVALID_FIELD")
            }
            Refusal::NotFound { name } => {
                details.set_resource_info(kind_of(name), name.clone(), "", message.clone());
                (Code::NotFound, "NOT_FOUND")
            }
            Refusal::AlreadyExists { name } => {
                details.set_resource_info(kind_of(name), name.clone(), "", message.clone());
                (Code::AlreadyExists, "ALREADY_EXISTS")
            }
            Refusal::Busy { name, .. } => {
                details.set_resource_info(kind_of(name), name.clone(), "", message.clone());
                (Code::Aborted, "OPERATION_RUNNING")
            }
            Refusal::Changed { name, .. } => {
                details.set_resource_info(kind_of(name), name.clone(), "", message.clone());
                (Code::Aborted, "ETAG_MISMATCH")
            }
            Refusal::Precondition { subject, reason, .. } => {
                details.add_precondition_failure_violation(
                    *reason,
                    subject.clone(),
                    message.clone(),
                );
                (Code::FailedPrecondition, *reason)
            }
            Refusal::NoRoomThere { node, reason, .. } => {
                let reason = cut(reason, VIOLATION_BYTES_MAX);
                details.add_precondition_failure_violation("NO_ROOM", node.clone(), reason);
                (Code::ResourceExhausted, "NO_ROOM")
            }
            Refusal::NoRoom { no_room, .. } => {
                let rejected = no_room.telling();
                for rejected in rejected.iter().take(VIOLATIONS_MAX) {
                    details.add_precondition_failure_violation(
                        "NO_ROOM",
                        rejected.node.name(),
                        cut(&rejected.reason, VIOLATION_BYTES_MAX),
                    );
                }
                if let Some(more @ 1..) = rejected.len().checked_sub(VIOLATIONS_MAX) {
                    let text = format!("and {more} more nodes, each with its reason");
                    details.add_precondition_failure_violation("NO_ROOM", "nodes", text);
                }
                (Code::ResourceExhausted, "NO_ROOM")
            }
        };
        let mut info = HashMap::new();
        if let Refusal::Busy { operation, .. } = &refusal {
            info.insert("operation".to_owned(), format!("operations/{operation}"));
        }
        details.set_error_info(reason, ERROR_DOMAIN, info);
        Status::with_error_details(code, message, details)
    }
}

fn with(code: Code, message: String, reason: &str, mut details: ErrorDetails) -> Status {
    details.set_error_info(reason, ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// OUT_OF_RANGE for a watch that begins after what there is.
#[must_use]
pub fn ahead(from: u64, revision: u64) -> Status {
    let message = format!(
        "from_revision: {from} is not accepted: the present revision is {revision}; 0 begins there"
    );
    let mut details = ErrorDetails::new();
    let info = HashMap::from([("revision".to_owned(), revision.to_string())]);
    details.set_error_info("REVISION_IN_FUTURE", ERROR_DOMAIN, info);
    Status::with_error_details(Code::OutOfRange, message, details)
}

/// OUT_OF_RANGE for a watch that begins before what is kept.
#[must_use]
pub fn compacted(from: u64, oldest: u64) -> Status {
    let message = format!(
        "from_revision: {from} is not kept any more: the oldest that can be asked for is {oldest}"
    );
    let mut details = ErrorDetails::new();
    let info = HashMap::from([("oldest_revision".to_owned(), oldest.to_string())]);
    details.set_error_info("REVISION_COMPACTED", ERROR_DOMAIN, info);
    Status::with_error_details(Code::OutOfRange, message, details)
}

fn kind_of(name: &str) -> &'static str {
    match name.split('/').next() {
        Some("nodes") => "drover.v1.Node",
        Some("domains") => "drover.v1.Domain",
        Some("volumes") => "drover.v1.Volume",
        Some("snapshots") => "drover.v1.Snapshot",
        Some("images") => "drover.v1.Image",
        Some("networks") => "drover.v1.Network",
        Some("operations") => "drover.v1.Operation",
        _ => "drover.v1.Cluster",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;
    use crate::scheduler::{NoRoom, OTHER_NODE, Rejection, Resources};

    /// What hyper takes of all headers together, with room for the other ones.
    const HEADERS_BYTES_MAX: usize = 15 << 10;

    fn header_bytes(status: &Status) -> usize {
        let headers = status.clone().into_http::<()>().into_parts().0.headers;
        headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
    }

    fn no_room(nodes: usize, reason: &str) -> Refusal {
        let rejected =
            |n| Rejection { node: NodeId::trusted(&format!("{n:063}")), reason: reason.to_owned() };
        let no_room = NoRoom { rejected: (0..nodes).map(rejected).collect() };
        Refusal::NoRoom { needs: Resources { vcpus: 1, memory_bytes: 1 << 20 }, no_room }
    }

    #[test]
    fn what_is_refused_fits_into_headers() {
        // A letter of three bytes is nine in a header.
        let long = "€".repeat(100_000);
        let precondition = Refusal::Precondition {
            subject: "nodes/a".into(),
            reason: "NODE_NOT_EMPTY",
            message: long.clone(),
        };
        let changed =
            Refusal::Changed { name: "nodes/a".into(), given: long.clone(), etag: "1".into() };
        let odd = "\u{1}".repeat(100_000);
        for refusal in [
            no_room(1000, "needs 64.0 GiB of memory, 2048 MiB of 2048 MiB free"),
            no_room(1000, &long),
            invalid("page_token", &long, "the next_page_token of the same list"),
            invalid("name", &odd, "nodes/{id}"),
            precondition,
            changed,
        ] {
            let status = Status::from(refusal);
            let bytes = header_bytes(&status);
            assert!(bytes < HEADERS_BYTES_MAX, "{bytes} bytes: {status}");
        }
    }

    #[test]
    fn it_is_said_that_something_was_left_out() {
        let status = Status::from(no_room(60, "cordoned"));
        assert!(status.message().ends_with("(cut)"), "{status}");
        assert!(status.message().len() <= MESSAGE_BYTES_MAX);
        let details = status.get_error_details();
        let violations = &details.precondition_failure().unwrap().violations;
        assert_eq!(violations.len(), VIOLATIONS_MAX + 1);
        assert!(violations[VIOLATIONS_MAX].description.contains("44 more"));

        let status = Status::from(no_room(16, "cordoned"));
        let details = status.get_error_details();
        assert_eq!(details.precondition_failure().unwrap().violations.len(), 16);
    }

    /// With many nodes, the one that was asked for must not be among those left out.
    #[test]
    fn the_node_that_was_asked_for_says_why() {
        let Refusal::NoRoom { needs, mut no_room } = no_room(60, OTHER_NODE) else { panic!() };
        no_room.rejected[59].reason = "cordoned".into();
        let status = Status::from(Refusal::NoRoom { needs, no_room });
        assert!(status.message().ends_with("59: cordoned"), "{status}");
        let details = status.get_error_details();
        assert_eq!(details.precondition_failure().unwrap().violations.len(), 1);
    }
}
