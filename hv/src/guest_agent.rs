//! A client of the guest's own agent (QEMU's guest agent protocol): JSON, a command a line, one
//! at a time.
//!
//! Who speaks with the agent does not know what was said before: an earlier call may have given up
//! in the middle of a line, or the domain have moved. So each call begins with the byte 0xff, at
//! which the agent forgets half a line, and `guest-sync-delimited` with a number of its own; the
//! agent's answer to that begins with 0xff too, and everything before it is old.
//!
//! An agent is a program of the guest: what it says has bounds in size and time, is never believed
//! to be JSON before it was read as such, and never gets into a log.

use std::time::Duration;

use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::config::FieldError;
use crate::virtio::console::{Closed, Listener, Port};

#[cfg(test)]
mod tests;

/// Longest command.
pub const COMMAND_BYTES_MAX: usize = 256 << 10;
/// Longest answer.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Most that is thrown away in one call before the agent has answered to the beginning of it.
const STALE_BYTES_MAX: usize = 4 << 20;
/// Shortest and longest time for an answer. To freeze a busy guest may take minutes.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(1);
/// See above.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// The agent's own words in an error, characters.
const REASON_CHARS_MAX: usize = 300;
/// Marks where a call begins, and the answer to that. No UTF-8 text has it.
const SENTINEL: u8 = 0xff;

/// Why there is no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// The command is not one.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// Another call has the agent.
    #[error("the guest's agent was busy with other calls for {waited:?}")]
    Busy {
        /// How long.
        waited: Duration,
    },
    /// It was silent.
    #[error("no agent in the guest answered within {waited:?}")]
    NoAnswer {
        /// How long it was waited for.
        waited: Duration,
    },
    /// Nobody in the guest has the port open.
    #[error("the guest's agent does not run: the guest has not opened its port")]
    Closed,
    /// It said too much.
    #[error("the guest's agent answered with more than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// It said something that is no answer.
    #[error("the guest's agent answered with something that is no answer: {reason}")]
    Malformed {
        /// What is wrong with it.
        reason: String,
    },
    /// It said no.
    #[error("the guest's agent refused: {class}: {description}")]
    Refused {
        /// Its class of error.
        class: String,
        /// Its words.
        description: String,
    },
}

impl From<Closed> for AgentError {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

/// The agent of one machine's guest.
#[derive(Debug)]
pub struct GuestAgent {
    port: Arc<Port>,
    /// One call at a time.
    turn: Mutex<()>,
}

impl GuestAgent {
    /// The agent that listens on this port, if one does.
    pub fn new(port: Arc<Port>) -> Self {
        Self { port, turn: Mutex::default() }
    }

    /// Calls the agent with a command, as in `{"execute":"guest-ping"}`, and answers its result as
    /// JSON. A command to which the agent never answers (`guest-shutdown`) ends with
    /// [`AgentError::NoAnswer`], though it may have been done.
    ///
    /// # Errors
    /// When there is no result within the time. The command may have been done all the same.
    pub async fn call(&self, command: &str, timeout: Duration) -> Result<String, AgentError> {
        check(command)?;
        let deadline = Instant::now() + timeout;
        let busy = AgentError::Busy { waited: timeout };
        let _turn = timeout_at(deadline, self.turn.lock()).await.map_err(|_| busy)?;
        let silent = AgentError::NoAnswer { waited: timeout };
        timeout_at(deadline, self.exchange(command)).await.map_err(|_| silent)?
    }

    async fn exchange(&self, command: &str) -> Result<String, AgentError> {
        let mut line = Line { listener: self.port.listen()?, unread: Vec::new() };
        line.synchronize().await?;
        line.listener.say(command.as_bytes());
        line.listener.say(b"\n");
        let answer = line.next().await?;
        result(&answer)
    }
}

/// What the agent says, line by line.
struct Line<'a> {
    listener: Listener<'a>,
    unread: Vec<u8>,
}

impl Line<'_> {
    /// When this returns, the next line is the answer to the next command.
    async fn synchronize(&mut self) -> Result<(), AgentError> {
        // Unlike a counter it is not used again by a VMM to which the domain moves.
        let id = Uuid::new_v4().as_u128() as u32;
        self.listener.say(&[SENTINEL]);
        let command =
            format!("{{\"execute\":\"guest-sync-delimited\",\"arguments\":{{\"id\":{id}}}}}\n");
        self.listener.say(command.as_bytes());
        let mut stale_bytes = 0;
        loop {
            let sentinel = self.unread.iter().position(|byte| *byte == SENTINEL);
            let Some(sentinel) = sentinel else {
                stale_bytes += self.unread.len();
                if stale_bytes > STALE_BYTES_MAX {
                    return Err(AgentError::TooLarge { limit: STALE_BYTES_MAX });
                }
                self.unread = self.listener.hear().await?;
                continue;
            };
            stale_bytes += sentinel + 1;
            self.unread.drain(..=sentinel);
            let answer = self.next().await?;
            stale_bytes += answer.len();
            // Another number is the answer to a call that has given up.
            if result(&answer).is_ok_and(|echo| echo == id.to_string()) {
                return Ok(());
            }
        }
    }

    /// The next line that is not empty, without its end.
    async fn next(&mut self) -> Result<Vec<u8>, AgentError> {
        let mut looked_at = 0;
        loop {
            let end = self.unread[looked_at..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let rest = self.unread.split_off(looked_at + end + 1);
                let mut line = std::mem::replace(&mut self.unread, rest);
                line.pop();
                looked_at = 0;
                if !line.trim_ascii().is_empty() {
                    return Ok(line);
                }
                continue;
            }
            looked_at = self.unread.len();
            if looked_at > ANSWER_BYTES_MAX {
                return Err(AgentError::TooLarge { limit: ANSWER_BYTES_MAX });
            }
            let more = self.listener.hear().await?;
            self.unread.extend(more);
        }
    }
}

/// A command is one JSON object that says what to execute.
fn check(command: &str) -> Result<(), FieldError> {
    #[derive(Deserialize)]
    struct Command<'a> {
        #[serde(borrow, rename = "execute")]
        _execute: std::borrow::Cow<'a, str>,
    }
    if command.len() > COMMAND_BYTES_MAX {
        let value = format!("{} bytes", command.len());
        return Err(FieldError::new(
            "command",
            value,
            format!("at most {COMMAND_BYTES_MAX} bytes"),
        ));
    }
    match serde_json::from_str::<Command<'_>>(command) {
        // A list of values would be taken for a command as well.
        Ok(_) if command.trim_start().starts_with('{') => Ok(()),
        Ok(_) => Err(FieldError::new("command", command, "a JSON object")),
        Err(error) => {
            let accepted = "a JSON object with \"execute\", as in {\"execute\":\"guest-ping\"}";
            Err(FieldError::new("command", error, accepted))
        }
    }
}

/// What a line of the agent says.
fn result(line: &[u8]) -> Result<String, AgentError> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow, rename = "return")]
        result: Option<&'a RawValue>,
        #[serde(borrow)]
        error: Option<Fault<'a>>,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Fault<'a> {
        #[serde(borrow)]
        class: std::borrow::Cow<'a, str>,
        #[serde(borrow)]
        desc: std::borrow::Cow<'a, str>,
    }
    let malformed = |reason: &str| AgentError::Malformed { reason: printable(reason) };
    let answer: Answer<'_> =
        serde_json::from_slice(line).map_err(|error| malformed(&error.to_string()))?;
    match answer {
        Answer { error: Some(fault), .. } => Err(AgentError::Refused {
            class: printable(&fault.class),
            description: printable(&fault.desc),
        }),
        Answer { result: Some(result), .. } => Ok(result.get().to_owned()),
        Answer { .. } => Err(malformed("it has neither \"return\" nor \"error\"")),
    }
}

/// The guest's words, cut, and without what a terminal would obey.
fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(REASON_CHARS_MAX).map(plain).collect()
}
