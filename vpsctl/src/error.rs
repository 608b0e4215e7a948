//! One error for all commands, and the exit code and the line that each becomes.

use drover_proto::v1::{Operation, OperationState};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::out::human::short;

/// The exit codes, as `vpsctl --help` documents them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// Anything that has no code of its own.
    Error = 1,
    /// The command line, or an argument that the controller refused.
    Usage = 2,
    /// What was named does not exist.
    NotFound = 3,
    /// It exists already, or its state forbids what was asked.
    Conflict = 4,
    /// No node has the room.
    NoRoom = 5,
    /// `--timeout` has passed; what was started goes on, but for imports and backups.
    Timeout = 6,
    /// A plan has blockers, or a drain ended with domains left.
    Left = 7,
    /// No controller answers, or none leads.
    Unavailable = 8,
    /// Ctrl-C; what was started goes on, but for imports and backups.
    Interrupted = 130,
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A controller refused.
    #[error("{}", status_lines(.0))]
    Refused(Box<Status>),
    /// No member answered, or none knew a leader.
    #[error("no controller could answer: {reason}")]
    Unavailable {
        /// What the last one that was asked said, and who that was.
        reason: String,
    },
    /// The member asked for the cluster's status knows no leader.
    #[error("member {0} knows no leader: nothing can be changed until a majority is back")]
    NoLeader(u64),
    /// An operation ended otherwise than wanted.
    #[error("{}", operation_line(.0))]
    Failed(Box<Operation>),
    /// A drain or a balance left domains where they were, or a plan would.
    #[error("{0}")]
    Left(String),
    /// `--timeout` passed during a wait.
    #[error("timeout: {operation} is not done after {after}; it goes on")]
    Timeout {
        /// The operation's name.
        operation: String,
        /// How long was waited.
        after: String,
    },
    /// `--timeout` passed while following something that has no end of its own.
    #[error("timeout: stopped after {0}")]
    TimeoutFollowing(String),
    /// Ctrl-C during a wait; the message has been printed.
    #[error("interrupted: {0} goes on")]
    Interrupted(String),
    /// A conflict that only the command can see.
    #[error("{0}")]
    Conflict(String),
    /// An argument that cannot be used, found before anything was sent.
    #[error("{0}")]
    Usage(String),
    /// An import ended before its end: nothing of it is kept.
    #[error("the import of {image} {how}")]
    ImportEnded {
        /// The image's id.
        image: String,
        /// Why.
        how: ImportEnd,
    },
    /// Work of this process, not of the cluster, ended before its end.
    #[error("{what} {how}")]
    Broken {
        /// What it was, with the article: "the backup of web1".
        what: String,
        /// Why.
        how: Broken,
    },
    /// What was named is not in a directory of this machine.
    #[error("{0}")]
    Missing(String),
    /// Anything of this machine: terminal, files.
    #[error("{0}")]
    Local(String),
    /// The reader of stdout has gone: nothing to say and nobody to say it to.
    #[error("stdout is closed")]
    PipeClosed,
}

/// What ends an import, other than its end and a refusal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportEnd {
    /// Ctrl-C.
    #[error("was interrupted: nothing of it is kept")]
    Interrupted,
    /// `--timeout`, or a controller that says nothing.
    #[error("is not done after {0}: it was ended and nothing of it is kept")]
    Timeout(String),
    /// The connection broke.
    #[error("broke off: {0}; nothing of it is kept")]
    Lost(String),
}

/// What ends the work of this process, other than its end and a refusal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// Ctrl-C, or a signal that ends processes.
    #[error("was interrupted")]
    Interrupted,
    /// `--timeout`, or a controller that says nothing.
    #[error("is not done after {0}: it was ended")]
    Timeout(String),
    /// The connection broke, again and again.
    #[error("broke off: {0}")]
    Lost(String),
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl Error {
    /// The process's exit code.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Refused(status) => status_exit(status),
            Self::Unavailable { .. } | Self::NoLeader(_) => Exit::Unavailable,
            Self::Failed(operation) => operation_exit(operation),
            Self::Left(_) => Exit::Left,
            Self::Timeout { .. } | Self::TimeoutFollowing(_) => Exit::Timeout,
            Self::Interrupted(_) => Exit::Interrupted,
            Self::Conflict(_) => Exit::Conflict,
            Self::Usage(_) => Exit::Usage,
            Self::ImportEnded { how: ImportEnd::Interrupted, .. } => Exit::Interrupted,
            Self::ImportEnded { how: ImportEnd::Timeout(_), .. } => Exit::Timeout,
            Self::ImportEnded { how: ImportEnd::Lost(_), .. } => Exit::Unavailable,
            Self::Broken { how: Broken::Interrupted, .. } => Exit::Interrupted,
            Self::Broken { how: Broken::Timeout(_), .. } => Exit::Timeout,
            Self::Broken { how: Broken::Lost(_), .. } => Exit::Unavailable,
            Self::Missing(_) => Exit::NotFound,
            Self::Local(_) => Exit::Error,
            Self::PipeClosed => Exit::Ok,
        }
    }

    /// What to do about it, where that is not plain.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Unavailable { .. } => {
                Some("name the cluster's members with --server A,B,C or DROVER_SERVER".to_owned())
            }
            Self::Timeout { operation, .. } | Self::Interrupted(operation) => {
                let id = short(operation);
                Some(format!(
                    "look again: vpsctl operation wait {id}\n      \
                     cancel:     vpsctl operation cancel {id}"
                ))
            }
            Self::ImportEnded { image, .. } => Some(format!(
                "vpsctl image show {image} says whether it was done at that very moment"
            )),
            Self::Refused(status) => refusal_hint(status),
            Self::Failed(operation) => {
                let error = operation.error.as_ref()?;
                (error.reason == "NO_ROOM").then(|| {
                    "vpsctl node list shows the room; --dry-run tries a placement".to_owned()
                })
            }
            _ => None,
        }
    }
}

fn reason(status: &Status) -> Option<String> {
    Some(status.get_details_error_info()?.reason)
}

fn status_exit(status: &Status) -> Exit {
    if reason(status).as_deref() == Some("NO_ROOM") {
        return Exit::NoRoom;
    }
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Exit::Conflict,
        Code::ResourceExhausted => Exit::NoRoom,
        Code::DeadlineExceeded => Exit::Timeout,
        Code::Unavailable => Exit::Unavailable,
        _ => Exit::Error,
    }
}

fn operation_exit(operation: &Operation) -> Exit {
    match operation.error.as_ref().map(|e| e.reason.as_str()) {
        Some("NO_ROOM") => Exit::NoRoom,
        Some("NOT_FOUND") => Exit::NotFound,
        _ => Exit::Error,
    }
}

/// One line for each field that is wrong; the message where the details name none.
fn status_lines(status: &Status) -> String {
    let fields = status.get_details_bad_request().map(|b| b.field_violations).unwrap_or_default();
    let lines: Vec<_> = fields
        .iter()
        .filter(|f| !f.field.is_empty())
        .map(|f| {
            let prefix = format!("{}: ", f.field);
            let said = f.description.strip_prefix(&prefix).unwrap_or(&f.description);
            format!("{prefix}{said}")
        })
        .collect();
    match (lines.is_empty(), status.message()) {
        (false, _) => lines.join("\nerror: "),
        (true, "") => format!("the controller says {:?} and nothing more", status.code()),
        (true, message) => message.to_owned(),
    }
}

fn refusal_hint(status: &Status) -> Option<String> {
    let info = status.get_details_error_info();
    if let Some(running) = info.as_ref().and_then(|i| i.metadata.get("operation")) {
        let id = short(running);
        return Some(format!("vpsctl operation wait {id}, or cancel"));
    }
    let reason = info.map(|i| i.reason).unwrap_or_default();
    let hint = match (status.code(), reason.as_str()) {
        (_, "NO_ROOM") => "vpsctl node list shows the room",
        (Code::NotFound, _) => return missing_hint(status.message()),
        (Code::Aborted, _) => "vpsctl operation list --active shows what runs",
        (Code::OutOfRange, _) => "vpsctl events without --since shows what is kept",
        _ => return None,
    };
    Some(hint.to_owned())
}

/// How to see what there is of the kind that is missing.
fn missing_hint(message: &str) -> Option<String> {
    const NOUNS: [&str; 7] =
        ["snapshot", "domain", "image", "volume", "network", "node", "operation"];
    let noun = NOUNS.iter().find(|noun| message.contains(&format!("{noun}s/")))?;
    Some(format!("vpsctl {noun} list shows those that exist"))
}

fn operation_line(operation: &Operation) -> String {
    let what = crate::out::human::operation_title(operation);
    let ended = match operation.state() {
        OperationState::Cancelled => "cancelled",
        _ => "failed",
    };
    match &operation.error {
        Some(error) if error.message.is_empty() => format!("{what}: {ended}: {}", error.reason),
        Some(error) if error.reason.is_empty() => format!("{what}: {ended}: {}", error.message),
        Some(error) => format!("{what}: {ended}: {} ({})", error.message, error.reason),
        None => format!("{what}: {ended}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::{OperationError, OperationKind};
    use tonic_types::ErrorDetails;

    /// A refusal names its fields, each on one line, and says the field once.
    #[test]
    fn fields_come_first() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("domain.spec.vcpus", "0 is not in 1 to 8");
        details.add_bad_request_violation("name", "name: \"a/b\" has a slash");
        let status = Status::with_error_details(Code::InvalidArgument, "two fields", details);
        let error = Error::from(status);
        assert_eq!(
            error.to_string(),
            "domain.spec.vcpus: 0 is not in 1 to 8\nerror: name: \"a/b\" has a slash"
        );
        assert_eq!(error.exit(), Exit::Usage);
        assert_eq!(Error::from(Status::not_found("nodes/x: none")).to_string(), "nodes/x: none");
    }

    /// Each kind of refusal has its own exit code; NO_ROOM wins over the status's code.
    #[test]
    fn exit_codes() {
        let exit = |code| Error::from(Status::new(code, "x")).exit();
        assert_eq!(exit(Code::InvalidArgument), Exit::Usage);
        assert_eq!(exit(Code::NotFound), Exit::NotFound);
        assert_eq!(exit(Code::AlreadyExists), Exit::Conflict);
        assert_eq!(exit(Code::Aborted), Exit::Conflict);
        assert_eq!(exit(Code::ResourceExhausted), Exit::NoRoom);
        assert_eq!(exit(Code::Internal), Exit::Error);
        let details = ErrorDetails::with_error_info("NO_ROOM", "drover", []);
        let status = Status::with_error_details(Code::FailedPrecondition, "full", details);
        assert_eq!(Error::from(status).exit(), Exit::NoRoom);

        let mut operation = Operation {
            target: "domains/web1".to_owned(),
            error: Some(OperationError { reason: "NO_ROOM".to_owned(), message: "full".into() }),
            ..Operation::default()
        };
        operation.set_kind(OperationKind::CreateDomain);
        operation.set_state(OperationState::Failed);
        let error = Error::Failed(Box::new(operation));
        assert_eq!(error.exit(), Exit::NoRoom);
        assert_eq!(error.to_string(), "create domain web1: failed: full (NO_ROOM)");
    }
}
