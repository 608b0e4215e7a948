//! Processes that outlive the program that started them, found again without mistake.
//!
//! A process is known by its number and the time it started (in clock ticks since boot), so that
//! a number used again by somebody else is never taken for ours, and never killed.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One process, now or in the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

impl Process {
    /// The process that has this number now.
    pub fn of(pid: u32) -> Result<Self> {
        let (_, start_ticks) = stat(pid).ok_or_else(|| {
            Error::other(format!("process {pid} is gone before it was looked at"))
        })?;
        Ok(Self { pid, start_ticks })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            // Ours or not: a child is reaped, for others this fails and changes nothing.
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
        }
        stat(self.pid).is_some_and(|(state, ticks)| {
            ticks == self.start_ticks && !matches!(state, 'Z' | 'X' | 'x')
        })
    }

    /// Sends a signal, if it still runs; whether it did.
    pub fn signal(&self, signal: Signal) -> bool {
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return false };
        self.is_alive() && rustix::process::kill_process(pid, signal).is_ok()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL);
        self.wait_gone(Duration::from_secs(20))
    }

    /// SIGTERM, then SIGKILL after `grace`.
    pub fn stop(&self, grace: Duration) -> Result<()> {
        self.signal(Signal::TERM);
        if self.wait_gone(grace).is_ok() { Ok(()) } else { self.kill() }
    }

    /// Waits until it is gone.
    pub fn wait_gone(&self, patience: Duration) -> Result<()> {
        wait_for(&format!("the end of process {}", self.pid), patience, || {
            Ok((!self.is_alive()).then_some(()))
        })
    }
}

/// State letter and start time.
fn stat(pid: u32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything; the fields begin after the last bracket.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

/// Starts a program that goes on when this one ends: its own session, nothing on its standard
/// input, its output in `log`.
pub fn start_detached(mut command: Command, log: &std::path::Path) -> Result<Process> {
    use std::os::unix::process::CommandExt as _;
    let name = command.get_program().to_string_lossy().into_owned();
    let open = || {
        std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(Error::io("cannot write", log))
    };
    command.stdin(Stdio::null()).stdout(open()?).stderr(open()?);
    // SAFETY: setsid is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::setsid().map(|_| ())?));
    }
    let child = command
        .spawn()
        .map_err(|e| Error::Program { program: name, reason: format!("cannot start: {e}") })?;
    Process::of(child.id())
}

/// Runs a program to its end; its standard output, or what went wrong with what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let fail = |reason: String| Error::Program { program: name.clone(), reason };
    // Its standard input is empty where the command says nothing else.
    let output = command.output().map_err(|e| fail(format!("cannot start: {e}")))?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(out);
    }
    let err = String::from_utf8_lossy(&output.stderr);
    Err(fail(format!("{}: {}{}", output.status, out, err.trim_end())))
}

/// Asks every 20 ms until there is an answer.
pub fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if start.elapsed() > patience {
            return Err(Error::Timeout { what: what.to_owned(), seconds: patience.as_secs() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
