//! Why something is not begun. Every text names the thing, what it is, and what would be
//! accepted; the API turns each into one gRPC status.

use crate::scheduler::{NoRoom, Resources, size, vcpus};

/// Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A field of the request.
    #[error("{field}: {value:?} is not accepted: {expected}")]
    Invalid {
        /// Its path in the request: `domain.spec.vcpus`.
        field: String,
        /// What was given.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// No such resource.
    #[error("there is no {name}")]
    NotFound {
        /// Its name.
        name: String,
    },
    /// There is one already.
    #[error("{name} exists already")]
    AlreadyExists {
        /// Its name.
        name: String,
    },
    /// Another operation holds it.
    #[error(
        "operations/{operation} works on {name}: wait for it{}",
        if *cancellable { " or cancel it" } else { " (it cannot be cancelled)" }
    )]
    Busy {
        /// What is held.
        name: String,
        /// By which operation (a bare uuid).
        operation: String,
        /// A cancel would be accepted.
        cancellable: bool,
    },
    /// The resource is not in a state for this.
    #[error("{message}")]
    Precondition {
        /// The resource.
        subject: String,
        /// Stable, UPPER_SNAKE.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The resource has changed since the caller looked.
    #[error("{name} has changed: its etag is {etag}, not {given}")]
    Changed {
        /// The resource.
        name: String,
        /// What was given.
        given: String,
        /// What it is.
        etag: String,
    },
    /// The node that it is on has no room for more.
    #[error("{name} is on {node}, which has no room: it {reason}; migrate it elsewhere first")]
    NoRoomThere {
        /// What needs it.
        name: String,
        /// Its node.
        node: String,
        /// What is lacking.
        reason: String,
    },
    /// No node fits.
    #[error(
        "no node can take {}: {}", what(*needs), no_room.reasons()
    )]
    NoRoom {
        /// What was asked for.
        needs: Resources,
        /// Each node with its reason.
        no_room: NoRoom,
    },
}

/// What was asked for, beside disks.
fn what(needs: Resources) -> String {
    if needs == Resources::default() {
        return "it".into();
    }
    format!("{} and {} of memory", vcpus(needs.vcpus), size(needs.memory_bytes))
}

/// At most so many bytes of a text, and a mark where it was cut.
#[must_use]
pub(crate) fn cut(text: &str, bytes_max: usize) -> String {
    const MARK: &str = " … (cut)";
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(bytes_max.saturating_sub(MARK.len()));
    format!("{}{MARK}", &text[..end])
}
