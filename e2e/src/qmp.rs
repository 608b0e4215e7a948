//! QEMU's control protocol: JSON lines on a unix socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::wait_for;
use crate::{Error, Result};

const POLL_INTERVAL: Duration = Duration::from_millis(50);
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
/// Also between two events: a move on a busy machine takes long.
const ANSWER_PATIENCE: Duration = Duration::from_secs(300);

/// An open connection.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events that came while an answer was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects as soon as the socket is there, and agrees on the protocol; `still_runs` says
    /// whether it is worth waiting.
    pub(crate) fn connect(path: &Path, mut still_runs: impl FnMut() -> Result<()>) -> Result<Self> {
        let stream = wait_for("QEMU's control socket", CONNECT_PATIENCE, || {
            still_runs()?;
            Ok(UnixStream::connect(path).ok())
        })?;
        stream.set_read_timeout(Some(ANSWER_PATIENCE)).map_err(Error::io("cannot use", path))?;
        let writer = stream.try_clone().map_err(Error::io("cannot use", path))?;
        let mut qmp = Self { reader: BufReader::new(stream), writer, events: Vec::new() };
        qmp.read()?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs a command; what it returns.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        writeln!(self.writer, "{request}").map_err(|e| Error::other(format!("{command}: {e}")))?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(Error::other(format!("QEMU refused {command}: {error}")));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            self.events.push(answer);
        }
    }

    /// Waits for an event, those included that came since the last wait.
    pub(crate) fn wait_event<T>(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Value) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        for event in std::mem::take(&mut self.events) {
            if let Some(found) = wanted(&event)? {
                return Ok(found);
            }
        }
        while start.elapsed() < patience {
            let event = self.read()?;
            if let Some(found) = wanted(&event)? {
                return Ok(found);
            }
        }
        Err(Error::Timeout { what: "an event of QEMU".to_owned(), seconds: patience.as_secs() })
    }

    /// Waits until a migration (to or from a file) is over.
    pub(crate) fn wait_migration(&mut self, patience: Duration) -> Result<()> {
        wait_for("the end of QEMU's migration", patience, || {
            let state = self.execute("query-migrate", Value::Null)?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => {
                    Err(Error::other(format!("QEMU's migration failed: {state}")))
                }
                _ => {
                    std::thread::sleep(POLL_INTERVAL);
                    Ok(None)
                }
            }
        })
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read =
            self.reader.read_line(&mut line).map_err(|e| Error::other(format!("QMP: {e}")))?;
        if read == 0 {
            return Err(Error::other("QMP: QEMU has ended"));
        }
        serde_json::from_str(&line).map_err(|e| Error::other(format!("QMP: {line:?}: {e}")))
    }
}
