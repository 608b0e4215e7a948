//! raft-rs logs with slog; here it goes on to `tracing`, as target `raft`.
//!
//! What it calls information (each vote, each role) is ours to debug with: what an operator
//! must know is said by the node.

use std::fmt::{Arguments, Write as _};

use slog::{Drain, KV as _, Key, Level, Logger, Never, OwnedKVList, Record, Serializer, o};

pub(crate) fn logger() -> Logger {
    Logger::root(ToTracing, o!())
}

struct ToTracing;

impl Drain for ToTracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), Never> {
        match record.level() {
            Level::Critical | Level::Error => {
                tracing::error!(target: "raft", "{}", text(record));
            }
            Level::Warning => tracing::warn!(target: "raft", "{}", text(record)),
            Level::Info if tracing::enabled!(target: "raft", tracing::Level::DEBUG) => {
                tracing::debug!(target: "raft", "{}", text(record));
            }
            Level::Debug | Level::Trace if tracing::enabled!(target: "raft", tracing::Level::TRACE) =>
            {
                tracing::trace!(target: "raft", "{}", text(record));
            }
            Level::Info | Level::Debug | Level::Trace => {}
        }
        Ok(())
    }
}

fn text(record: &Record<'_>) -> String {
    let mut text = Text(record.msg().to_string());
    // Writing to a string does not fail.
    let _ = record.kv().serialize(record, &mut text);
    text.0
}

struct Text(String);

impl Serializer for Text {
    fn emit_arguments(&mut self, key: Key, value: &Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(slog::Error::from)
    }
}
