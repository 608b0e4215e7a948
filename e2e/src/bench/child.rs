//! A program that does not outlive its owner.

use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::process::wait_for;
use crate::{Error, Result};

const END_PATIENCE: Duration = Duration::from_secs(30);

/// A child process; killed when dropped.
pub(super) struct Owned {
    child: Child,
    name: String,
    log: std::path::PathBuf,
}

impl Owned {
    /// Starts it: nothing on its standard input, what it says on standard error in `log`.
    pub(super) fn start(mut command: Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = std::fs::File::create(log).map_err(Error::io("cannot write", log))?;
        let child = command
            .stdin(Stdio::null())
            .stderr(file)
            .spawn()
            .map_err(|e| Error::other(format!("cannot run {name}: {e}")))?;
        Ok(Self { child, name, log: log.to_owned() })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output, once, when it was started with a pipe there.
    pub(super) fn stdout(&mut self) -> Result<ChildStdout> {
        let name = &self.name;
        self.child
            .stdout
            .take()
            .ok_or_else(|| Error::other(format!("{name} has no pipe as its output")))
    }

    /// An error with its last words when it has ended.
    pub(super) fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.failure(&format!("ended: {status}"))),
            Err(error) => Err(self.failure(&error.to_string())),
        }
    }

    /// Waits until it has ended by itself.
    pub(super) fn wait_end(&mut self) -> Result<()> {
        let what = format!("the end of {}", self.name);
        let child = &mut self.child;
        wait_for(&what, END_PATIENCE, || {
            child.try_wait().map_err(|e| Error::other(e.to_string())).map(|s| s.map(|_| ()))
        })
    }

    fn failure(&self, what: &str) -> Error {
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let last = &lines[lines.len().saturating_sub(10)..];
        Error::Program {
            program: self.name.clone(),
            reason: format!("{what}; {}", last.join("\n")),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
