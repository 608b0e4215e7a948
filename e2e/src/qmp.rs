//! QEMU's control protocol: JSON lines on a unix socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::wait_for;
use crate::{Error, Result};

const ANSWER_PATIENCE: Duration = Duration::from_secs(120);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// An open connection.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects to a QEMU that listens, and agrees on the protocol.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(Error::io("cannot connect to", path))?;
        stream.set_read_timeout(Some(ANSWER_PATIENCE)).map_err(Error::io("cannot use", path))?;
        let writer = stream.try_clone().map_err(Error::io("cannot use", path))?;
        let mut qmp = Self { reader: BufReader::new(stream), writer };
        qmp.read()?;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Runs a command; what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
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
        }
    }

    /// Waits until a migration (to or from a file) is over.
    pub fn wait_migration(&mut self, patience: Duration) -> Result<()> {
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
