//! Runs the real `vpsctl` and looks at what an operator or a program would see.

// Each test program uses its part of this.
#![allow(dead_code)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    time::{Duration, Instant},
};

/// Longer than anything that a test waits for takes on a busy machine.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);

/// `vpsctl` with nothing of the caller's environment that would change it.
pub(crate) fn vpsctl(server: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpsctl"));
    for name in ["DROVER_SERVER", "DROVER_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
        command.env_remove(name);
    }
    command.args(["--server", server]).args(args).stdin(Stdio::null());
    command
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Stdout as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Fails unless the command ended with this code and said this on stderr.
    #[track_caller]
    pub(crate) fn says(&self, code: i32, text: &str) -> &Self {
        assert!(self.code == code && self.stderr.contains(text), "{code}, \"{text}\": {self:#?}");
        self
    }
}

/// The same with something on its standard input.
pub(crate) fn run_with_input(server: &str, args: &[&str], input: &[u8]) -> Ended {
    let mut command = vpsctl(server, args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may refuse before it has read all.
    let _ = child.stdin.take().unwrap().write_all(input);
    let id = child.id();
    within(&format!("vpsctl {args:?}"), id, move || Ended::new(child.wait_with_output().unwrap()))
}

/// Runs a command to its end.
pub(crate) fn run(server: &str, args: &[&str]) -> Ended {
    let mut command = vpsctl(server, args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    within(&format!("vpsctl {args:?}"), id, move || Ended::new(child.wait_with_output().unwrap()))
}

/// Runs something that ends when a process does; kills the process when that takes too long.
fn within<T: Send + 'static>(what: &str, pid: u32, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = sync_channel(1);
    std::thread::spawn(move || sender.send(f()));
    receiver.recv_timeout(WAIT_MAX).unwrap_or_else(|e| {
        signal(pid, "KILL");
        panic!("{what} did not end: {e}")
    })
}

/// Sends a signal by its name.
pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status();
    assert!(status.unwrap().success(), "kill -{name} {pid}");
}

/// A command that is still running, whose stderr and stdout can be waited for.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Running {
    pub(crate) fn start(server: &str, args: &[&str]) -> Self {
        Self::spawn(vpsctl(server, args))
    }

    /// The same on a terminal, which `script` makes.
    pub(crate) fn on_a_terminal(server: &str, args: &[&str]) -> Self {
        let inner = vpsctl(server, args);
        let words = [inner.get_program()].into_iter().chain(inner.get_args());
        let line: Vec<_> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        let mut command = Command::new("script");
        let line = format!("stty cols 100; {}", line.join(" "));
        command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        command.env("TERM", "xterm");
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = sync_channel(1024);
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let outputs: [Box<dyn Read + Send>; 2] = [Box::new(stdout), Box::new(stderr)];
        for output in outputs {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines() {
                    if sender.send(line.unwrap()).is_err() {
                        return;
                    }
                }
            });
        }
        Self { child, lines, seen: Vec::new() }
    }

    pub(crate) fn type_in(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    pub(crate) fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for a line that contains the text.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + WAIT_MAX;
        while !self.seen.last().is_some_and(|line| line.contains(text)) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(e) => panic!("no \"{text}\" ({e}) in {:#?}", self.seen),
            }
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits for the end: the exit code and every line of both outputs.
    pub(crate) fn end(mut self) -> (i32, Vec<String>) {
        let pid = self.child.id();
        let mut child = self.child;
        let code = within("vpsctl", pid, move || child.wait().unwrap().code().unwrap_or(-1));
        self.seen.extend(self.lines.iter());
        (code, self.seen)
    }
}
